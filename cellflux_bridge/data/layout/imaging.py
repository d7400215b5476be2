"""Cells under treatments: an index CSV of a high-content screen, as IMPA and CellFlux publish theirs, a row a cell."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.config.schema import nearest
from cellflux_bridge.data.layout.base import SPLITS, Layout, PatchRecord, in_order, split_of
from cellflux_bridge.data.table import FilesBelow, column_name, is_absent, number, table_rows

# The settings of a screen, those of no preset first. Paths, columns and states are those of the readers of
# theislab/IMPA (Zenodo 8307629) and yuhui-zh15/CellFlux (training/dataloader.py, data_utils.py).
_DEFAULTS = {
    "index": "index.csv", "key": "SAMPLE_KEY", "key_pattern": "", "file": "{SAMPLE_KEY}.npy", "split": "SPLIT",
    "perturbation": "CPD_NAME", "state": "STATE", "control": "control", "treated": "", "control_label": "control",
    "batch": "BATCH", "dose": "", "group": "",
}  # fmt: skip
_PRESETS = {
    "bbbc021": {
        "index": "metadata/bbbc021_df_all.csv",
        "key_pattern": "(?P<week>[^_]+)_(?P<plate>[^_]+)_(?P<cell>.+)",
        "file": "{week}/{plate}/{cell}.npy",
        "control": "0",
        "treated": "1",
        "control_label": "DMSO",
        "dose": "DOSE",
    },
    "rxrx1": {
        "index": "metadata/rxrx1_df.csv",
        "key_pattern": "[^-]*-(?P<plate>[^-_]+_[^-_]+)_(?P<well>[^-_]+)_(?P<cell>[^-]+)",
        "file": "{plate}/{well}/{cell}.npy",
        "state": "ANNOT",
        "control": "negative_control",
        "treated": "treated",
    },
    "cpg0000": {
        "index": "metadata/metadata_large.csv",
        "key_pattern": "(?P<plate>[^_]+)_(?P<view>[^_]+_[^_]+)_(?P<cell>.+)",
        "file": "{plate}/{view}/{view}_{cell}.npy",
        "perturbation": "BROAD_SAMPLE",
        "treated": "trt",
        "batch": "PLATE",
    },
}
_CHANNEL = "channel"
_SHOWN_FAULTS = 10


class Imaging(Layout):
    """Lists the cells that an `index` CSV below the root names.

    `key` is the column that names a cell, once each; `file` is the path of its image below the root, with names of
    columns and of the groups of `key_pattern`, a regular expression for the whole key, in braces. Where {channel} is
    one of them, a cell has one file per channel, those in `channel_names`, in this order.

    A row whose `state` is `control` gets the class `control_label`; one whose `state` is `treated` ("": any other) the
    class in `perturbation`; rows of further states are left out and counted. `batch` and `dose` are columns, too ("":
    none), and so are `group` (the well or plate that must stay in one split) and `split`, whose words are read as a
    manifest's are.

    Each of these is taken from `preset` where it is not given. Names of columns differ neither by case nor by blanks.
    `ignore` names classes to leave out, before their files are looked for. With `missing: leave_out` rows without files
    are counted and left out. `follow_links` allows files that lie outside of the root, behind symbolic links.
    """

    def __init__(
        self,
        root: Path,
        *,
        preset: Literal["bbbc021", "rxrx1", "cpg0000"] | None = None,
        index: str | None = None,
        key: str | None = None,
        key_pattern: str | None = None,
        file: str | None = None,
        channel_names: list[str] = [],  # noqa: B006 -- read only
        split: str | None = None,
        perturbation: str | None = None,
        state: str | None = None,
        control: str | int | None = None,
        treated: str | int | None = None,
        control_label: str | None = None,
        batch: str | None = None,
        dose: str | None = None,
        group: str | None = None,
        ignore: list[str] = [],  # noqa: B006 -- read only
        missing: Literal["error", "leave_out"] = "error",
        follow_links: bool = False,
    ):
        given = {
            "index": index, "key": key, "key_pattern": key_pattern, "file": file, "split": split, "batch": batch,
            "perturbation": perturbation, "state": state, "control": control, "treated": treated,
            "control_label": control_label, "dose": dose, "group": group,
        }  # fmt: skip
        given = {name: str(value) for name, value in given.items() if value is not None}
        settings = _DEFAULTS | _PRESETS.get(preset, {}) | given
        self.root, self._ignore, self._missing, self._settings = root, ignore, missing, settings
        self._files = FilesBelow(root, follow_links=follow_links)
        self._columns = {
            name: column_name(settings[name])
            for name in ("key", "split", "perturbation", "state", "batch", "dose", "group")
        }
        if nothing := [name for name in ("key", "perturbation", "state") if not self._columns[name]]:
            raise UserError(f"data.layout.{nothing[0]}: names no column")
        try:
            self._pattern = re.compile(settings["key_pattern"] or ".*", re.DOTALL)
        except re.error as error:
            raise UserError(f"data.layout.key_pattern: no regular expression ({error})") from error
        # Text and names in braces by turns.
        parts = re.split(r"\{([^{}]*)\}", settings["file"])
        groups = self._pattern.groupindex
        self._parts = [part if i % 2 == 0 or part in groups else column_name(part) for i, part in enumerate(parts)]
        self._channel_names, self._channels = channel_names, "{" + ",".join(channel_names) + "}"
        self._require_channels(channel_names)

    def records(self) -> list[PatchRecord]:
        """Every cell that is not left out, sorted by id.

        Raises UserError that counts and names, by their lines, all rows that cannot be read.
        """
        _, name, exists = self._files.find(self._settings["index"], where="data.layout.index")
        if not exists:
            raise UserError(f"{name}: no such file; set data.layout.index to the CSV, relative to {self.root}")
        wanted = dict.fromkeys([*filter(None, self._columns.values()), *self._named_columns()])
        faults, lines, absent, found, self._left_out = [], {}, [], [], Counter()
        rows = 0
        for line, row in table_rows(Path(name), wanted, check=self._check_columns):
            rows += 1
            try:
                self._refuse_repeat(lines, row.get(self._columns["key"], ""), line)
                record, exists = self._record(row, where=f"line {line}")
            except UserError as error:
                faults.append(str(error))
                continue
            if record and exists:
                found.append(record)
            elif record:
                absent.append(f"{record.id} (line {line})")
        if faults:
            more = [f"and {len(faults) - _SHOWN_FAULTS} more"] if len(faults) > _SHOWN_FAULTS else []
            shown = "\n  ".join([*faults[:_SHOWN_FAULTS], *more])
            raise UserError(f"{name}: {len(faults)} of {rows} rows cannot be read:\n  {shown}")
        if absent and self._missing == "error":
            raise UserError(
                f"{name}: {len(absent)} of {rows} rows name files that do not exist: {abbreviate(absent, limit=3)}; "
                "is data.root the folder of the images? data.layout.missing=leave_out goes on without these rows"
            )
        if absent:
            self._left_out["without files"] = len(absent)
        records = in_order(found, ignore=())
        self._reading = self._described(rows, records)
        return records

    def reading(self) -> list[str]:
        return self._reading

    def _named_columns(self) -> list[str]:
        """The columns that the path of a file is made of."""
        return [part for part in self._parts[1::2] if part not in self._pattern.groupindex and part != _CHANNEL]

    def _require_channels(self, names: Sequence[str]) -> None:
        if (_CHANNEL in self._parts[1::2]) != bool(names):
            raise UserError("data.layout: channel_names and {channel} in file belong together: give both or none")
        if bad := [name for name in names if not name or re.search(r"[{},/\\]", name) or names.count(name) > 1]:
            raise UserError(f"data.layout.channel_names: {bad[0]!r}: expected different names without {{ }} , / \\")
        if len(names) == 1:
            raise UserError("data.layout.channel_names: one channel needs no {channel}; write its name into file")

    def _check_columns(self, columns: list[str]) -> None:
        named = {f"data.layout.{key}": column for key, column in self._columns.items() if column}
        named |= {f"data.layout.file, {{{column}}}": column for column in self._named_columns()}
        for key, column in named.items():
            if (num := columns.count(column)) != 1:
                fault = f"{num} columns are called" if num else "no column"
                found = abbreviate(list(filter(None, columns)), limit=20) or "nothing"
                where = self.root / self._settings["index"]
                raise UserError(f"{where}: {fault} {column!r} ({key}){nearest(column, columns)}; found: {found}")

    @staticmethod
    def _refuse_repeat(lines: dict[str, int], key: str, line: int) -> None:
        if key and (first := lines.setdefault(key, line)) != line:
            raise UserError(f"line {line}: {key} stands already on line {first}")

    def _record(self, row: dict[str, str], *, where: str) -> tuple[PatchRecord | None, bool]:
        """The cell of a row, None where it is left out, and whether its files exist."""
        cells = {name: row.get(column, "") for name, column in self._columns.items()}
        settings, key = self._settings, cells["key"]
        if is_absent(key):
            raise UserError(f"{where}: {settings['key']} is empty ({key!r})")
        if not (match := self._pattern.fullmatch(key)):
            raise UserError(f"{where}: {settings['key']} {key!r} does not match key_pattern {settings['key_pattern']}")
        is_control = _same(cells["state"], settings["control"])
        if not is_control and settings["treated"] and not _same(cells["state"], settings["treated"]):
            self._left_out[f"of {settings['state']} {cells['state']!r}"] += 1
            return None, False
        label = settings["control_label"] if is_control else cells["perturbation"]
        if not is_control and (is_absent(label) or label == settings["control_label"]):
            fault = "is empty" if is_absent(label) else "is control_label"
            raise UserError(f"{where}: {settings['perturbation']} of a treated row {fault} ({label!r})")
        if label in self._ignore:
            self._left_out["of ignored classes"] += 1
            return None, False
        word = "" if is_absent(cells["split"]) else cells["split"]
        split = split_of(word)
        if word and not split:
            raise UserError(f"{where}: unknown split {word!r}; expected one of {', '.join(SPLITS)}")
        batch, group = (None if is_absent(cells[name]) else cells[name] for name in ("batch", "group"))
        dose = number(cells["dose"], where=f"{where}, {settings['dose']}", low=0, high=1e12) or None
        values = row | match.groupdict() | {_CHANNEL: self._channels}
        path = "".join(values.get(part) or "" if i % 2 else part for i, part in enumerate(self._parts))
        relative, file, exists = self._files.find(path, where=where)
        if names := self._channel_names:
            exists = all([self._files.find(path.replace(self._channels, name), where=where)[2] for name in names])
        return PatchRecord(relative, Path(file), label, split, group, batch=batch, dose=dose), exists

    def _described(self, rows: int, records: Sequence[PatchRecord]) -> list[str]:
        """What `reading` says."""
        settings = self._settings
        controls = Counter(r.batch for r in records if r.label == settings["control_label"])
        batches = Counter(r.batch for r in records)
        nameless = batches.pop(None, 0)
        lines = [f"read from {settings['index']}: {rows} rows, {len(records)} used"]
        if self._left_out:
            lines[0] += "; left out: " + ", ".join(f"{num} {why}" for why, num in self._left_out.items())
        lines.append(
            f"{controls.total()} controls ({settings['state']} {settings['control']}, class "
            f"{settings['control_label']!r}), {len({r.label for r in records} - {settings['control_label']})} "
            f"perturbations, {len(batches)} batches, {len({r.dose for r in records} - {None})} doses"
        )
        if nameless and self._columns["batch"]:
            lines.append(f"WARNING: {nameless} rows name no {settings['batch']}")
        for what, names in (
            ("hold a single cell", sorted(name for name, num in batches.items() if num == 1)),
            ("hold no control", sorted(batches.keys() - controls)),
        ):
            if names:
                lines.append(f"WARNING: {len(names)} batches {what}: {abbreviate(names)}")
        return lines


def _same(cell: str, value: str) -> bool:
    """Whether a cell holds a value, whatever the case; 0, 0.0 and 00 are one number."""
    if cell.casefold() == value.casefold():
        return True
    try:
        return float(cell) == float(value)
    except ValueError:
        return False
