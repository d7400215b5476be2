"""A table of patches: `manifest.csv` under the root."""

from pathlib import Path

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.config.schema import nearest
from cellflux_bridge.data.layout.base import SPLITS, Layout, PatchRecord, in_order, split_of
from cellflux_bridge.data.table import FilesBelow, is_absent, number, one_slip, table_rows

COLUMNS = ("path", "label", "split", "group", "score", "mpp", "batch", "dose")


class Manifest(Layout):
    """Lists the patches that `manifest.csv` under the root names, a row a patch.

    Columns are path (relative to the root) and label, optionally split (train, val, test), group, score in [0, 1], mpp
    (microns per pixel of the file), batch (plate, experiment) and dose (above 0); other columns are ignored. The file
    is CSV in UTF-8, divided by commas, semicolons, tabs or bars; numbers have a decimal point. An empty cell, NA, None
    and the like mean "not given": a patch without group stands alone. `ignore` names classes to leave out;
    `follow_links` allows files that lie outside of the root, behind symbolic links.
    """

    def __init__(self, root: Path, *, ignore: list[str] = [], follow_links: bool = False):  # noqa: B006 -- read only
        self.root, self.ignore = root, ignore
        self._file = root / "manifest.csv"
        self._files = FilesBelow(root, follow_links=follow_links)

    def records(self) -> list[PatchRecord]:
        """Every patch of every class that is not ignored, sorted by id."""
        absent, lines, found = [], {}, []
        for line, row in table_rows(self._file, COLUMNS, check=self._check_columns):
            record, exists = self._record(row, where=f"{self._file}, line {line}")
            if (first := lines.setdefault(record.id, line)) != line:
                raise UserError(f"{self._file}, line {line}: {record.id} stands already on line {first}")
            if not exists:
                absent.append(record.id)
            found.append(record)
        if absent:
            raise UserError(f"{self._file}: names files that do not exist ({len(absent)}): {abbreviate(absent)}")
        records = in_order(found, ignore=self.ignore)
        alone = sum(record.group is None for record in records)
        if self._has_groups and alone:
            self._reading.append(f"{alone} patches name no group (an empty cell, NA or the like): each stands alone")
        return records

    def reading(self) -> list[str]:
        return self._reading

    def _check_columns(self, columns: list[str]) -> None:
        others = [name for name in columns if name not in (*COLUMNS, "patch")]  # a patch is no slip for a batch
        slips = [(name, known) for name in others for known in COLUMNS if one_slip(name, known)]
        found = abbreviate(columns, limit=10) or "nothing"
        faults = [f"column {name!r}: did you mean {known!r}? Rename it, whatever it holds" for name, known in slips]
        faults += [f"no column {name}; found: {found}" for name in COLUMNS[:2] if name not in columns]
        faults += [f"{n} columns are called {name!r}; keep one" for name in COLUMNS if (n := columns.count(name)) > 1]
        if faults:
            raise UserError(f"{self._file}: {faults[0]}")
        ignored = [name for name in columns if name and name not in COLUMNS]
        self._reading = ["read from manifest.csv" + (f"; columns ignored: {abbreviate(ignored)}" if ignored else "")]
        self._has_groups = "group" in columns

    def _record(self, row: dict[str, str], *, where: str) -> tuple[PatchRecord, bool]:
        """The patch of a row, and whether its file exists."""
        path, label = row.get("path"), row.get("label")
        if not path or not label:
            raise UserError(f"{where}: path and label must not be empty")
        if is_absent(label) and label not in self.ignore and label.casefold() != "unknown":
            raise UserError(
                f"{where}: label {label!r} means that no label is given; name the class otherwise, remove the row, or "
                f"list {label!r} in data.layout.ignore"
            )
        relative, file, exists = self._files.find(path, where=where)
        words = (row.get(name, "") for name in ("split", "group", "batch"))
        word, group, batch = (None if is_absent(cell) else cell for cell in words)
        split = word and split_of(word)
        if word and not split:
            raise UserError(
                f"{where}: unknown split {word!r}; expected one of {', '.join(SPLITS)}{nearest(word, SPLITS)}"
            )
        score = number(row.get("score", ""), where=f"{where}, score", low=0, high=1)
        mpp = number(row.get("mpp", ""), where=f"{where}, mpp", low=0.001, high=1000)
        dose = number(row.get("dose", ""), where=f"{where}, dose", low=0, high=1e12) or None  # 0: no treatment
        return PatchRecord(relative, Path(file), label, split, group, score, mpp, batch, dose), exists
