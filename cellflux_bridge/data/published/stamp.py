"""Tiles that STAMP has cut: a folder or a cache archive for each slide."""

import json
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import regular, replacing, safe_name
from cellflux_bridge.data.published.base import Download, Patch, Published

_ARCHIVE = re.compile(r"^(.+)\.[0-9a-f]{64}\.zip$")
_TILE = re.compile(r"^tile_\(([\d.]+), ([\d.]+)\)\.(jpe?g|png)$")
_MAX_BYTES = 2**26


def _unpack(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(archive.read(name))


def _archive(file: Path, slide: str, label: str, patient: str) -> Iterator[Patch]:
    try:
        archive = zipfile.ZipFile(regular(file))
        params = json.loads(archive.read("tiler_params.json"))
        mpp = float(params["tile_size_um"]) / float(params["tile_size_px"])
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: damaged, or no cache of STAMP ({error}); make it again") from error
    for info in archive.infolist():
        if (tile := _TILE.match(info.filename)) and info.file_size <= _MAX_BYTES:
            path = f"patches/{safe_name(slide)}/{tile[1]}_{tile[2]}.{tile[3]}"
            yield Patch(path, label, group=patient, mpp=mpp, write=partial(_unpack, archive, info.filename))


def _read(download: Download) -> Iterator[Patch]:
    for where, row in download.table():
        slide, label, patient = row["FILENAME"].removesuffix(".h5"), row["label"], row["PATIENT"]
        archives = [path for path in download.root.glob("*.zip") if (m := _ARCHIVE.match(path.name)) and m[1] == slide]
        if len(archives) == 1:
            yield from _archive(download.file(archives[0].name), slide, label, patient)
        elif slide in download.folders() and not archives:
            yield from (Patch(path, label, group=patient) for path in download.images(slide))
        else:
            found = "several archives" if archives else "neither a folder of tiles nor an archive"
            download.fail(f"{where}: slide {slide!r} has {found}")


DATASET = Published(
    title="STAMP: your own slides' tiles, a folder or a cache archive for each slide; labels from --table",
    source="your own slides; https://github.com/KatherLab/STAMP",
    licence="your own",
    citation="El Nahhas et al. 2024, Nature Protocols",
    tree="  SRC/<slide>.<64 hexadecimal digits>.zip ... (STAMP's cache_dir)\n  or SRC/<slide>/*.jpg ...",
    read=_read,
    groups="patient",
    table=("PATIENT", "FILENAME", "label"),
    note="that is STAMP's slide table with the class as a column label. Feature files (.h5) hold no pixels",
)
