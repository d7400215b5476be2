"""Real patches, near copies and videos as data URIs, within what the page can hold of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cellflux_bridge.report.gallery import data_uri, encode_rows, shown_frames
from cellflux_bridge.report.real import NearCopy, near_copies, real_patches
from cellflux_bridge.report.runs import Chapter

_PICTURED = 8


class Stills(NamedTuple):
    """What a chapter shows beside its sequences.

    `real` patches by the number of a level of the first method and, in `rows`, the same as data URIs; `rule` says how
    they were taken; near `copies` with the URI of frame and training patch; `warnings` what is left out, and why.
    """

    real: dict[int, list[np.ndarray]]
    rows: dict[int, str]
    rule: str
    copies: list[tuple[NearCopy, str]]
    warnings: list[str]

    @property
    def stored(self) -> int:
        return sum(map(len, self.rows.values())) + sum(len(uri) for _, uri in self.copies)


def stills(chapter: Chapter, *, budget: int) -> Stills:
    """Real patches by level and near copies in `budget` characters of page, of which the copies take half at most."""
    copies, warnings = near_copies(chapter, num=_PICTURED), []
    pairs = encode_rows([[copy.frame, copy.training] for copy in copies], budget // 2)
    missing = sum(min(len(run.near_copies), _PICTURED) for run in chapter.runs) - len(pairs)
    if missing:
        warnings.append(
            f"{missing} of the worst near copies that evaluate listed are not pictured: their sequences were made anew "
            "or are gone, their training patches are not in the cache, or they do not fit into the page."
        )
    pictured = list(zip(copies, pairs, strict=False))
    header = next((method.header for method in chapter.methods if method.header is not None), None)
    if header is None:
        return Stills({}, {}, "", pictured, warnings)
    levels = [header.levels[k] for k in shown_frames(len(header.levels))]
    real, rule = real_patches(chapter, levels)
    rows = dict(zip(real, encode_rows(list(real.values()), budget - sum(map(len, pairs))), strict=False))
    if not rows:
        why = "they do not fit into the page" if real else rule
        warnings.append(f"Real patches are not shown beside the made ones: {why}.")
    return Stills(real, rows, rule if rows else "", pictured, warnings)


def films(chapters: Sequence[Chapter], *, budget: int) -> list[list[tuple[str, str]]]:
    """For each chapter its videos, (method, data URI), as long as they fit."""
    found = []
    for chapter in chapters:
        found.append([])
        for method in (method for method in chapter.methods if method.video is not None):
            if method.video.stat().st_size * 4 / 3 + 100 <= budget:  # base64 takes four characters for three bytes
                uri = data_uri("video/mp4", method.video.read_bytes())
                found[-1].append((method.name, uri))
                budget -= len(uri)
    return found
