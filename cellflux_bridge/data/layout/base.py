"""What is known of a patch before it is decoded, and what every layout has."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.walk import refuse_repeats
from cellflux_bridge.images import files_of

SPLITS = ("train", "val", "test")
_KIND = r"(set|data|dataset|split|images?|imgs?|patches|tiles)?s?\d*"
_SPLIT_WORDS = {
    "train": re.compile(r"(train(ing)?|trn)" + _KIND),
    "val": re.compile(r"(val(id(at(ion|e))?)?|dev(elopment)?|eval(uation)?)" + _KIND),
    "test": re.compile(r"(test(ing)?|tst|holdout|heldout)" + _KIND),
}


@dataclass(frozen=True, slots=True)
class PatchRecord:
    """One image. `id` is its path relative to the root, with forward slashes; `file` that of its file, or the name of
    one file per channel (see `images.files_of`); `group` is the patient, slide or original tile that must stay in one
    split; `score` is a progression score in [0, 1]; `mpp` microns per pixel; of cells under a treatment, `batch` is the
    plate or experiment and `dose` the concentration, above 0, in any one unit.
    """

    id: str
    file: Path
    label: str
    split: str | None = None
    group: str | None = None
    score: float | None = None
    mpp: float | None = None
    batch: str | None = None
    dose: float | None = None


class Layout(ABC):
    """Finds the patches under a folder. It is constructed with the folder's path, `data.root`, and its own settings."""

    @abstractmethod
    def records(self) -> list[PatchRecord]:
        """Every patch, sorted by id. Raises UserError that names a file or folder which it does not understand."""

    def reading(self) -> list[str]:
        """Lines for `data check` on how `records`, which was called before, read the folder and what it left out."""
        return []


@lru_cache
def split_of(word: str) -> str | None:
    """The split that a word names ("Training", "TEST", "val_set"), None where it names none."""
    compact = re.sub(r"[\W_]+", "", word.casefold())
    return next((split for split, pattern in _SPLIT_WORDS.items() if pattern.fullmatch(compact)), None)


def in_order(records: Iterable[PatchRecord], *, ignore: Collection[str]) -> list[PatchRecord]:
    """The records of every class that is not ignored, sorted by id.

    Raises UserError for two records of one file on disk, and for two labels that differ by letter case alone.
    """
    kept = sorted((record for record in records if record.label not in ignore), key=attrgetter("id"))
    labels: dict[str, str] = {}
    for label in sorted({record.label for record in kept}):
        if (first := labels.setdefault(label.casefold(), label)) != label:
            raise UserError(f"labels {first!r} and {label!r} differ by letter case only: write them alike")
    refuse_repeats(file for record in kept for file in files_of(record.file))
    return kept
