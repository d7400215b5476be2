"""Measurements of an image by its label map: how many nuclei, of which size and shape, and how dark."""

from dataclasses import dataclass, fields, replace

import numpy as np

from cellflux_bridge.images.stain import RUIFROK_HE, optical_density

# Below this median area of an image's nuclei, in px, neighbours merge and counts are refused.
MIN_PIXELS = 16.0


@dataclass(frozen=True)
class Measurement:
    """One image's nuclei; NaN where a quantity does not exist (no nuclei, no microns per pixel, nuclei too small).

    count         nuclei, those that the border cuts with them
    area_fraction nuclear share of the pixels, in [0, 1]: cellularity
    mean_area     px a nucleus; mean_area_um2 the same in square microns
    eccentricity  mean over nuclei of that of the ellipse with the same second moments: 0 a disc, towards 1 a line
    darkness      mean haematoxylin concentration of nuclear pixels (natural optical density, Ruifrok's vectors)
    density_mm2   nuclei per square millimetre
    """

    count: float
    area_fraction: float
    mean_area: float
    mean_area_um2: float
    eccentricity: float
    darkness: float
    density_mm2: float


QUANTITIES = tuple(field.name for field in fields(Measurement))
# Those that need single nuclei.
OF_SINGLE_NUCLEI = ("count", "mean_area", "mean_area_um2", "eccentricity", "density_mm2")


def measure_all(rgb: np.ndarray, labels: np.ndarray, *, mpp: float | None = None) -> tuple[Measurement, float]:
    """The measurement of RGB uint8 (H, W, 3) by its label map (H, W), however small the nuclei, and their median
    area in px (NaN without any)."""
    areas = np.bincount(labels.ravel(), minlength=2).astype(np.float64)
    areas[0] = 0
    present = np.flatnonzero(areas)
    square = np.nan if mpp is None else mpp**2
    density = len(present) / (labels.size * square / 1e6)
    if len(present) == 0:
        return Measurement(0.0, 0.0, np.nan, np.nan, np.nan, np.nan, density), np.nan
    areas, darkness = areas[present], haematoxylin_amount(rgb[labels > 0])
    measured = Measurement(
        count=float(len(present)),
        area_fraction=float((labels > 0).mean()),
        mean_area=float(areas.mean()),
        mean_area_um2=float(areas.mean() * square),
        eccentricity=float(eccentricities(labels)[present].mean()),
        darkness=float(darkness.mean()),
        density_mm2=float(density),
    )
    return measured, float(np.median(areas))


def haematoxylin_amount(pixels: np.ndarray) -> np.ndarray:
    """Haematoxylin concentration (N,) of RGB uint8 pixels (N, 3), by Ruifrok's vectors."""
    # Without a matrix product, whose threads would wait on those of other processes.
    weights = np.linalg.pinv(RUIFROK_HE)[:, 0]
    return sum(w * channel for w, channel in zip(weights, optical_density(pixels).T, strict=True))


def eccentricities(labels: np.ndarray) -> np.ndarray:
    """Eccentricity of every label from the second moments of its pixels, each a unit square; (max + 1,), 0 unused."""
    row, column = np.nonzero(labels)
    of = labels[row, column]
    num = np.maximum(np.bincount(of), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(of, values) / num

    dy, dx = row - mean(row)[of], column - mean(column)[of]
    yy, xx, xy = mean(dy**2) + 1 / 12, mean(dx**2) + 1 / 12, mean(dy * dx)
    half, spread = (yy + xx) / 2, np.hypot((yy - xx) / 2, xy)
    return np.sqrt(1 - (half - spread) / (half + spread))


def trusted(measured: Measurement, median_area: float) -> Measurement:
    """The measurement, with NaN for all that needs single nuclei where their median area lies below `MIN_PIXELS`."""
    return replace(measured, **dict.fromkeys(OF_SINGLE_NUCLEI, np.nan)) if median_area < MIN_PIXELS else measured


def measure(rgb: np.ndarray, labels: np.ndarray, *, mpp: float | None = None) -> Measurement:
    """The trusted measurement of RGB uint8 (H, W, 3) by its label map (H, W); `mpp` microns per pixel."""
    return trusted(*measure_all(rgb, labels, mpp=mpp))
