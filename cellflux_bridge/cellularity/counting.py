"""Counting over many images: in parallel, under a bar, with memory that does not grow with their number."""

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from cellflux_bridge.cellularity.measurement import MIN_PIXELS, QUANTITIES, measure_all, without_single_nuclei
from cellflux_bridge.cellularity.nuclei import Parameters, segment
from cellflux_bridge.errors import UserError
from cellflux_bridge.images import SUFFIXES, read_rgb
from cellflux_bridge.progress import in_processes, progress

_SLAB = 64


def list_images(folder: Path) -> list[Path]:
    """The image files under a folder, by name; UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one that holds images ({', '.join(SUFFIXES)})")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder}: holds no images; expected files that end in {', '.join(SUFFIXES)}")
    return files


def count_images(
    files: Iterable[Path], *, mpp: float | None, parameters: Parameters, workers: int = 0
) -> Iterator[dict[str, float]]:
    """width, height, median_area and every quantity of each image file, in order; NaN as `measure` leaves them."""
    yield from in_processes(partial(_count_file, mpp=mpp, parameters=parameters), files, workers=workers)


def segment_file(file: Path, *, mpp: float | None, parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """An image file as RGB uint8 (H, W, 3) and its nuclei, (H, W) int32; UserError names the file."""
    rgb = read_rgb(file)
    try:
        return rgb, segment(rgb, mpp=mpp, parameters=parameters)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _count_file(file: Path, *, mpp: float | None, parameters: Parameters) -> dict[str, float]:
    rgb, labels = segment_file(file, mpp=mpp, parameters=parameters)
    measured, median_area = measure_all(rgb, labels, mpp=mpp)
    size = {"width": rgb.shape[1], "height": rgb.shape[0], "median_area": median_area}
    return size | asdict(without_single_nuclei(measured) if median_area < MIN_PIXELS else measured)


def write_counts(folder: Path, output: Path, *, mpp: float | None, parameters: Parameters, workers: int = 0) -> int:
    """Count every image under a folder into a CSV, a row an image, empty where a quantity does not exist.

    Returns how many images had nuclei too small to be counted.
    """
    files = list_images(folder)
    temporary = output.with_name(output.name + ".tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    too_small = 0
    with open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "width", "height", "median_area", *QUANTITIES])
        counted = count_images(files, mpp=mpp, parameters=parameters, workers=workers)
        for file, row in zip(files, progress(counted, total=len(files), desc="nuclei", unit="image"), strict=True):
            too_small += row["median_area"] < MIN_PIXELS
            values = ["" if isinstance(v, float) and np.isnan(v) else f"{v:.6g}" for v in row.values()]
            writer.writerow([file.relative_to(folder).as_posix(), *values])
    os.replace(temporary, output)
    return too_small


def count_arrays(
    stacks: Iterable[np.ndarray], *, mpp: float | None, parameters: Parameters, workers: int = 0
) -> Iterator[np.ndarray]:
    """Of each stack of RGB uint8 images (K, H, W, 3): (K, 1 + Q) float64, the median nuclear area in px and every
    quantity, however small the nuclei; a row of NaN for an image in which nuclei cannot be sought (grey, inverted)."""
    work = partial(_count_stack, mpp=mpp, parameters=parameters)
    yield from in_processes(work, stacks, workers=workers, slab=_SLAB)


def _count_stack(stack: np.ndarray, *, mpp: float | None, parameters: Parameters) -> np.ndarray:
    rows = np.full((len(stack), 1 + len(QUANTITIES)), np.nan)
    for row, rgb in zip(rows, stack, strict=True):
        try:
            labels = segment(rgb, mpp=mpp, parameters=parameters)
        except UserError:
            continue
        measured, median_area = measure_all(rgb, labels, mpp=mpp)
        row[:] = [median_area, *asdict(measured).values()]
    return rows
