"""How well the nuclei are found: against label maps, and against cellularity that people annotated."""

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr
from skimage.metrics import contingency_table

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.parallel import in_processes
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.base.statistics import NUM_RESAMPLES, Estimate, bootstrap, estimate
from cellflux_bridge.cellularity.counting import count_images, list_images, segment_file
from cellflux_bridge.cellularity.label_maps import SUFFIXES, find_label_map, read_label_map, resample
from cellflux_bridge.cellularity.nuclei import Parameters
from cellflux_bridge.images import read_size


class Compared(NamedTuple):
    """One image's found label map against the true one; two nuclei match at an intersection over union above 0.5.
    `was_mask` where the true one had no numbers and its connected parts were taken for nuclei."""

    num_true: int
    num_found: int
    num_matched: int
    overlap: float  # of the matched ones, the sum of their intersections over unions
    area_true: float
    area_found: float
    was_mask: bool = False


class Scores(NamedTuple):
    """Over n images: F1 of all nuclei together and the mean of the images' own; panoptic quality of all (Kirillov
    et al. 2019: F1 times the mean intersection over union of matched ones); relative errors of the images' counts;
    Pearson's correlation and mean absolute error of the area fractions. Where nothing is and nothing is found, F1 is 1;
    images without nuclei have no error of their count."""

    n: int
    num_nuclei: int
    f1: float
    f1_of_images: float
    panoptic_quality: float
    count_error_median: float
    count_error_mean: float
    area_correlation: float
    area_error_mean: float


def compare(truth: np.ndarray, found: np.ndarray) -> Compared:
    """Match the nuclei of two label maps (H, W) of int, 0 background. Above a half, a nucleus has one match at most."""
    table = contingency_table(truth, found).tocoo()
    area_true, area_found = np.bincount(truth.ravel()), np.bincount(found.ravel())
    union = area_true[table.row] + area_found[table.col] - table.data
    over = table.data / union
    matched = (table.row > 0) & (table.col > 0) & (over > 0.5)
    num_true, num_found = (int(np.count_nonzero(areas[1:])) for areas in (area_true, area_found))
    nuclear = (float((labels > 0).mean()) for labels in (truth, found))
    return Compared(num_true, num_found, int(matched.sum()), float(over[matched].sum()), *nuclear)


def _f1(matched: np.ndarray, nuclei: np.ndarray) -> np.ndarray:
    """Of matched nuclei, and true and found ones together."""
    return np.where(nuclei > 0, 2 * matched / np.maximum(nuclei, 1), 1.0)


def score(compared: Sequence[Compared]) -> Scores:
    """The scores of some images; NaN are the count errors where none shows nuclei, and correlations of under three."""
    true, found, matched, overlap, area_true, area_found, _ = np.array(compared, np.float64).T
    shows = true > 0
    errors = np.abs(found - true)[shows] / true[shows] if shows.any() else np.array([np.nan])
    constant = len(compared) < 3 or min(np.ptp(area_true), np.ptp(area_found)) == 0
    return Scores(
        n=len(compared),
        num_nuclei=int(true.sum()),
        f1=float(_f1(matched.sum(), true.sum() + found.sum())),
        f1_of_images=float(np.mean(_f1(matched, true + found))),
        panoptic_quality=float(_f1(overlap.sum(), true.sum() + found.sum())),
        count_error_median=float(np.median(errors)),
        count_error_mean=float(np.mean(errors)),
        area_correlation=np.nan if constant else float(pearsonr(area_true, area_found).statistic),
        area_error_mean=float(np.abs(area_found - area_true).mean()),
    )


def _compare_file(
    pair: tuple[Path, Path], *, mpp: float | None, parameters: Parameters, diameter: float | None
) -> Compared:
    truth, was_mask = read_label_map(pair[1], read_size(pair[0]))
    areas = np.bincount(truth.ravel())[1:]
    is_scaled = diameter is not None and areas.any()
    scale = diameter / (2 * np.sqrt(np.median(areas[areas > 0]) / np.pi)) if is_scaled else 1.0
    rgb, found = segment_file(pair[0], mpp=mpp and mpp / scale, parameters=parameters, scale=scale)
    truth = truth if scale == 1 else resample(truth, rgb.shape[:2])
    return compare(truth, found.labels[0])._replace(was_mask=was_mask)


def paired_files(folder: Path) -> tuple[list[str], list[tuple[Path, Path]], list[str]]:
    """The images of `folder`/images: names, (image, label map of its name in `folder`/labels), and groups.

    A group stands in `folder`/index.csv: column `group`, or one that ends in `_group`, by the column `id`; "" without.
    UserError for images without a label map.
    """
    images = list_images(folder / "images")
    names = [image.relative_to(folder / "images").with_suffix("").as_posix() for image in images]
    maps = [find_label_map(folder / "labels", name) for name in names]
    missing = [name for name, path in zip(names, maps, strict=True) if path is None]
    if missing:
        raise UserError(
            f"{folder / 'labels' / missing[0]}.png: no such label map ({len(missing)} of {len(images)} images have "
            f"none); expected the image's name with {', '.join(SUFFIXES)}"
        )
    groups = _groups(folder / "index.csv")
    return names, list(zip(images, maps, strict=True)), [groups.get(name, "") for name in names]


def score_label_maps(
    folder: Path,
    *,
    mpp: float | None = None,
    parameters: Parameters,
    diameter: float | None = None,
    workers: int = 0,
) -> tuple[list[str], list[str], list[Compared]]:
    """Compare every image of a folder with its label map (see `paired_files`, `label_maps`).

    With `diameter` each is first brought to the size at which its nuclei have that median diameter in px. Returns the
    names, each one's group, and what was found. UserError for what is no label map.
    """
    names, pairs, groups = paired_files(folder)
    work = partial(_compare_file, mpp=mpp, parameters=parameters, diameter=diameter)
    found = in_processes(work, pairs, workers=workers)
    return names, groups, list(progress(found, total=len(pairs), desc="label maps", unit="image"))


def _groups(index: Path) -> dict[str, str]:
    if not index.exists():
        return {}
    rows = _read_table(index)
    names = [name for name in (rows[0] if rows else {}) if name is not None]
    column = next((name for name in names if name == "group" or name.endswith("_group")), None)
    if column is not None and "id" not in names:
        raise UserError(f"{index}: expected the columns id (an image's name) and {column}; found {', '.join(names)}")
    return {} if column is None else {row["id"]: row[column] or "" for row in rows}


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; UserError where it is none."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


class Agreement(NamedTuple):
    """Of estimated with annotated cellularity over n images, with 95 % intervals over images."""

    n: int
    pearson: Estimate
    spearman: Estimate
    mean_absolute_error: Estimate


def read_annotated(table: Path) -> Iterator[tuple[Path, float]]:
    """The rows of a CSV with the columns path (relative to it) and cellularity in [0, 1]."""
    rows = _read_table(table)
    if not rows or not {"path", "cellularity"} <= set(rows[0]):
        raise UserError(f"{table}: expected the columns path and cellularity, and at least one row")
    for number, row in enumerate(rows, start=2):
        try:
            value = float(row["cellularity"])
        except (TypeError, ValueError):
            value = np.nan
        if not 0 <= value <= 1:
            raise UserError(f"{table}, line {number}: cellularity {row['cellularity'] or ''!r}: expected 0 to 1")
        if not row["path"]:
            raise UserError(f"{table}, line {number}: no path; expected an image file")
        yield table.parent / row["path"], value


def agree(
    table: Path, *, mpp: float | None = None, parameters: Parameters, seed: int = 0, workers: int = 0
) -> Agreement:
    """Nuclear area fraction against annotated cellularity, as BreastPathQ is validated.

    Correlations are the figure to read: annotators estimate the share of tumour, which no count of all nuclei can
    equal, so the mean absolute error also holds that difference of definition. UserError for fewer than three images.
    """
    rows = list(read_annotated(table))
    if len(rows) < 3:
        raise UserError(f"{table}: {len(rows)} images; a correlation needs at least 3")
    counted = count_images([path for path, _ in rows], mpp=mpp, parameters=parameters, workers=workers)
    found = np.array([row["area_fraction"] for row in progress(counted, total=len(rows), desc="nuclei", unit="image")])
    truth = np.array([value for _, value in rows])
    resamples = bootstrap(np.arange(len(rows)), num=NUM_RESAMPLES, generator=numpy_generator(seed, "annotated"))
    varied = resamples._replace(draws=[d for d in resamples.draws if min(np.ptp(truth[d]), np.ptp(found[d])) > 0])
    if not varied.draws:
        raise UserError(
            f"{table}: all cellularities, or all that was found, are equal; a correlation needs them to vary"
        )
    return Agreement(
        len(rows),
        estimate(lambda i: pearsonr(truth[i], found[i]).statistic, varied),
        estimate(lambda i: spearmanr(truth[i], found[i]).statistic, varied),
        estimate(lambda i: np.abs(truth[i] - found[i]).mean(), resamples),
    )
