"""Counting over many images: in parallel, under a bar, with memory that does not grow with their number."""

import csv
import glob
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import csv_rows, csv_text
from cellflux_bridge.base.parallel import in_processes
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.walk import image_files
from cellflux_bridge.cellularity import network
from cellflux_bridge.cellularity.measurement import QUANTITIES, measure_all, trusted
from cellflux_bridge.cellularity.nuclei import (
    Found,
    NotBrightField,
    Parameters,
    is_bright_field,
    require_bright_field,
    segment_stack,
)
from cellflux_bridge.cellularity.outlines import write_nuclei
from cellflux_bridge.cellularity.parameters import Scale
from cellflux_bridge.images import SUFFIXES, UnreadableImage, read_rgb, resize

_SLAB = 64
_COLUMNS = ("path", "width", "height", "median_area", *QUANTITIES, "scale", "scale_agreement", "reason")


def list_images(folder: Path) -> list[Path]:
    """The image files under a folder, by name, without hidden and system files; UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one that holds images ({', '.join(SUFFIXES)})")
    files = image_files(folder)
    if not files:
        raise UserError(f"{folder}: holds no images; expected files that end in {', '.join(SUFFIXES)}")
    return files


def count_images(
    files: Iterable[Path], *, mpp: float | None, parameters: Parameters, workers: int = 0
) -> Iterator[dict[str, float]]:
    """width, height, median_area, every quantity and the network's scale of each image file, in order; NaN as `measure`
    leaves them."""
    yield from in_processes(partial(_count_file, mpp=mpp, parameters=parameters), files, workers=workers)


def segment_file(
    file: Path, *, mpp: float | None, parameters: Parameters, scale: float = 1.0
) -> tuple[np.ndarray, Found]:
    """An image file at `scale` times its size, RGB uint8 (H, W, 3), and its nuclei, (1, H, W) int32; UserError names
    the file."""
    rgb = read_rgb(file)
    rgb = resize(rgb, *(max(1, round(side * scale)) for side in rgb.shape[:2]))
    try:
        require_bright_field(rgb)
        return rgb, segment_stack(rgb[None], mpp=mpp, parameters=parameters)
    except UserError as error:
        raise type(error)(f"{file}: {error}") from error


def _count_file(
    file: Path, *, mpp: float | None, parameters: Parameters, nuclei: Path | None = None
) -> dict[str, float]:
    rgb, found = segment_file(file, mpp=mpp, parameters=parameters)
    if nuclei is not None:
        write_nuclei(nuclei, rgb, found.labels[0])
    measured, median_area = measure_all(rgb, found.labels[0], mpp=mpp)
    size = {"width": rgb.shape[1], "height": rgb.shape[0], "median_area": median_area}
    factor, _, agreement = found.scale or (np.nan,) * 3
    return size | asdict(trusted(measured, median_area)) | {"scale": factor, "scale_agreement": agreement}


def _count_or_reason(
    file: Path, *, folder: Path, nuclei: Path | None, mpp: float | None, parameters: Parameters
) -> list[float | str | None]:
    """The cells of an image file after its path: what was counted, or nothing and the reason."""
    try:
        place = None if nuclei is None else nuclei / file.relative_to(folder)
        counted = _count_file(file, mpp=mpp, parameters=parameters, nuclei=place)
    except (UnreadableImage, NotBrightField) as error:
        reason = " ".join(str(error).removeprefix(f"{file}: ").split())
        return [*[None] * (len(_COLUMNS) - 2), reason]
    return [*map(_short, counted.values()), None]


def _short(value: float) -> float | None:
    """Six significant digits, None for NaN."""
    short = float(f"{value:.6g}")
    return None if np.isnan(short) else int(short) if short.is_integer() else short


class Tally(NamedTuple):
    """The numbers of a folder's images whose nuclei are too small to be counted, and that could not be measured."""

    too_small: int
    unmeasured: int


def write_counts(
    folder: Path,
    output: Path,
    *,
    mpp: float | None,
    parameters: Parameters,
    nuclei: Path | None = None,
    workers: int = 0,
) -> Tally:
    """Count every image under a folder into a CSV, one row an image.

    A cell is empty where a quantity does not exist. The row of an image that cannot be read or is grey, dark or
    inverted holds only the reason. With `nuclei` the single nuclei of every image are written into that folder, under
    the image's name (see `outlines`).

    Rows are kept beside `output` as they are made, and a run that was stopped continues there if files and settings are
    the same. Raises UserError after the table is written where no image could be measured.
    """
    files = list_images(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = _kept_place(output, files, mpp=mpp, parameters=parameters, nuclei=nuclei)
    done = _num_kept_rows(kept)
    with open(kept, "a", buffering=1, newline="", encoding="utf-8") as stream:  # a line is written when it is whole
        if not stream.tell():
            stream.write(csv_text([_COLUMNS]))
        work = partial(_count_or_reason, folder=folder, nuclei=nuclei, mpp=mpp, parameters=parameters)
        counted = in_processes(work, files[done:], workers=workers)
        bar = progress(counted, total=len(files), initial=done, desc="nuclei", unit="image")
        for file, cells in zip(files[done:], bar, strict=True):
            stream.write(csv_text([[file.relative_to(folder).as_posix(), *cells]]))
    os.replace(kept, output)
    for outdated in output.parent.glob(f"{glob.escape(output.name)}.*.tmp"):  # of other files or settings
        outdated.unlink()
    rows = [row for row in csv_rows(output) if not row["count"]]
    refused = [row for row in rows if row["reason"]]
    if len(refused) == len(files):
        path, reason = refused[0]["path"], refused[0]["reason"]
        raise UserError(f"{folder}: none of {len(files)} images can be measured (see {output}); {path}: {reason}")
    return Tally(too_small=len(rows) - len(refused), unmeasured=len(refused))


def _kept_place(
    output: Path, files: list[Path], *, mpp: float | None, parameters: Parameters, nuclei: Path | None
) -> Path:
    """Where rows stand until all are there; the name is a key of all that they depend on."""
    asked = [*files, *([Path(parameters.instanseg)] if parameters.instanseg else [])]
    asked += [network.weights_file(parameters.model)] if parameters.method == "network" else []
    stamps = [(str(file), status.st_size, status.st_mtime_ns) for file in asked for status in (file.stat(),)]
    key = hashlib.sha256(repr((mpp, parameters, str(nuclei), stamps)).encode()).hexdigest()[:16]
    return output.with_name(f"{output.name}.{key}.tmp")


def _num_kept_rows(table: Path) -> int:
    """The rows of a CSV below its heading, without one that a stop has cut, which is removed."""
    if not table.exists():
        return 0
    content = table.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    os.truncate(table, len(whole))
    return max(0, sum(1 for _ in csv.reader(io.StringIO(whole.decode(), newline=""))) - 1)


def count_arrays(
    stacks: Iterable[np.ndarray],
    *,
    mpp: float | None,
    parameters: Parameters,
    scale: Scale | None = None,
    workers: int = 0,
) -> Iterator[np.ndarray]:
    """For each stack of RGB uint8 images (K, H, W, 3) a table (K, 1 + Q) float64: the median nuclear area in px and
    every quantity, however small the nuclei. The row of a grey, dark or inverted image is NaN."""
    work = partial(_count_stack, mpp=mpp, parameters=parameters, scale=scale)
    yield from in_processes(work, stacks, workers=workers, slab=_SLAB)


def _count_stack(stack: np.ndarray, *, mpp: float | None, parameters: Parameters, scale: Scale | None) -> np.ndarray:
    rows = np.full((len(stack), 1 + len(QUANTITIES)), np.nan)
    bright = np.flatnonzero([is_bright_field(rgb) for rgb in stack])
    if len(bright) == 0:
        return rows
    found = segment_stack(stack[bright], mpp=mpp, parameters=parameters, scale=scale)
    for number, labels in zip(bright, found.labels, strict=True):
        measured, median_area = measure_all(stack[number], labels, mpp=mpp)
        rows[number] = [median_area, *asdict(measured).values()]
    return rows
