"""What is known of a patch before it is decoded, and what every layout has."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class PatchRecord:
    """One image file. `id` is its path relative to the root, with forward slashes; `group` is the patient, slide or
    original tile that must stay in one split; `score` is a progression score in [0, 1]; `mpp` microns per pixel."""

    id: str
    file: Path
    label: str
    split: str | None = None
    group: str | None = None
    score: float | None = None
    mpp: float | None = None


class Layout(ABC):
    """Finds the patches under a folder. It is constructed with the folder's path, `data.root`, and its own settings."""

    @abstractmethod
    def records(self) -> list[PatchRecord]:
        """Every patch, sorted by id. Raises UserError that names a file or folder which it does not understand."""
