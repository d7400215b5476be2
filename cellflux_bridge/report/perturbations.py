"""The chapter of cells under perturbations: what it found in plain words, tables, and pictures to choose from."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cellflux_bridge.images import read_rgb
from cellflux_bridge.metrics.perturbation import TEST
from cellflux_bridge.metrics.perturbation_files import CONTROLS, HUNDREDFOLD, REAL, Table, picture_of, tables
from cellflux_bridge.metrics.words import interval, number
from cellflux_bridge.report.gallery import encode_row
from cellflux_bridge.report.reading import PerturbationRow, Perturbations, read
from cellflux_bridge.report.runs import file_inside
from cellflux_bridge.report.tables import Cell
from cellflux_bridge.report.warnings import ignored_condition

_FILE, _WIDEST = "perturbations.json", 1600
# The batch is kept where it is told at most so much less often than that of real cells; a condition is hardly used
# where both changes of a cell are more alike than this.
_KEPT, _ALIKE = 0.05, 0.99
Interval = tuple[float, float | None, float | None]


class Said(NamedTuple):
    """What was found of a method: a paragraph a kind of perturbations."""

    method: str
    words: list[str]


class Treated(NamedTuple):
    """What the template shows; `pictures` are data URIs by perturbation, whose rows are called `shown`."""

    record: Perturbations
    file: Path
    said: list[Said]
    warnings: list[str]
    tables: list[tuple[Table, str, list[list[Cell | None]]]]
    pictures: dict[str, str]
    shown: list[str]

    @property
    def stored(self) -> int:
        return sum(map(len, self.pictures.values()))


def perturbations_of(run: Path) -> Path | None:
    """The perturbations.json of a run, or of the folder that holds one."""
    return file_inside(run, f"perturbations/{_FILE}") or file_inside(run, _FILE)


def load_perturbations(runs: Sequence[Path], *, budget: int) -> list[Treated]:
    """The chapters of runs with a perturbations.json, UserError for a damaged one; their pictures take `budget`
    characters of page at most."""
    return [_view(run, perturbations_of(run), budget // len(runs)) for run in runs]


def _view(run: Path, file: Path, budget: int) -> Treated:
    record = read(file, Perturbations)
    methods = [name for name in dict.fromkeys(row.method for row in record.rows) if name not in (TEST, REAL, CONTROLS)]
    said = [Said(name, list(_paragraphs(record.rows, name))) for name in methods]
    pictures = _pictures(file.parent, record.drawn, budget)
    ignored = ignored_condition(run)
    warnings = [f"{run.resolve().name}: {ignored}"] if ignored else []
    if missing := len(record.drawn) - len(pictures):
        warnings.append(f"{missing} pictures of cells are not shown: the page has no room for them, or they are gone.")
    known = [of for of in tables(record.rows) if any(row.estimate[0] is not None for row in of.cells.values())]
    found = [(of, _numbers(of), [[_cell(of, m, f) for f in of.figures] for m in of.methods]) for of in known]
    return Treated(record, file, said, warnings, found, pictures, ["real treated cells", CONTROLS, *methods])


def _cell(table: Table, method: str, figure: str) -> Cell | None:
    row = table.cells.get((method, figure))
    if row is None or row.estimate[0] is None:
        return None
    value, low, high = (v if v is None or figure not in HUNDREDFOLD else 100 * v for v in row.estimate)
    return Cell(number(value), interval(low, high), basis=f"n = {row.num}")


def _numbers(table: Table) -> str:
    """What the figures of a table rest on: "n = 96; 8 for FIDc, KIDc"."""
    by_number: dict[str, list[str]] = {}
    for figure in table.figures:
        numbers = [row.num for (_, of), row in table.cells.items() if of == figure]
        ends = dict.fromkeys((min(numbers), max(numbers)))
        by_number.setdefault(" to ".join(map(str, ends)), []).append(figure)
    first, *others = sorted(by_number, key=lambda text: -len(by_number[text]))
    return "; ".join([f"n = {first}", *(f"{text} for {', '.join(by_number[text])}" for text in others)])


def _pictures(folder: Path, drawn: Sequence[str], budget: int) -> dict[str, str]:
    """Pictures by perturbation: without loss where all fit so, else as WebP as long as they fit."""
    files = {name: file_inside(folder, str(picture_of(folder, name).relative_to(folder))) for name in drawn}
    files = {name: file for name, file in files.items() if file}
    for form in ("PNG", "WEBP"):
        found, left = {}, budget
        for name, file in files.items():
            found[name] = encode_row([read_rgb(file)], _WIDEST, form)
            left -= len(found[name])
            if left < 0:
                del found[name]
                break
        if len(found) == len(files):
            break
    return found


def _paragraphs(rows: Sequence[PerturbationRow], method: str) -> Iterator[str]:
    """What was found of a method's cells; of each figure by the first kind of features."""
    found: dict[tuple[str, str, str], Interval] = {}
    first: dict[tuple[str, str], str] = {}
    for row in rows:
        if first.setdefault((row.perturbations, row.figure), row.by) == row.by and row.estimate[0] is not None:
            found.setdefault((row.perturbations, row.figure, row.method), row.estimate)
    for group in ("seen", "unseen"):
        own = {figure: _Beside(found, group, figure, method) for which, figure, _ in found if which == group}
        own = {figure: beside for figure, beside in own.items() if beside.made is not None}
        if parts := [*_told(own), *_batch(own), *_near(own)]:
            yield f"{group.capitalize()} perturbations. {' '.join(parts)}"
    grey, cosine = (found.get(("all", f"condition swapped, {of}", method)) for of in ("grey levels", "cosine"))
    if grey and cosine:
        is_used = (cosine[0] if cosine[1] is None else cosine[1]) < _ALIKE
        yield (
            f"Asked for another perturbation, made cells differ by {grey[0]:.1f} grey levels, and the cosine of "
            f"both changes is {number(cosine[0])} (1: alike): the condition is {'' if is_used else 'hardly '}used."
        )


class _Beside:
    """A figure of made cells, of real cells (test cells where they have it, else training cells) and of untreated
    controls; None where there is none."""

    def __init__(self, found: dict[tuple[str, str, str], Interval], group: str, figure: str, method: str):
        self.real_name = TEST if (group, figure, TEST) in found else REAL
        names = (method, self.real_name, CONTROLS)
        self.made, self.real, self.controls = (found.get((group, figure, name)) for name in names)

    def text(self, write: Callable[[float], str]) -> str:
        known = {self.real_name: self.real, "untreated controls": self.controls}
        others = ", ".join(f"{name} {write(of[0])}" for name, of in known.items() if of)
        return write(self.made[0]) + (f" ({others})" if others else "")

    @property
    def way(self) -> float:
        """0 where made cells are as untreated controls, 1 where they are as real cells."""
        return (self.made[0] - self.controls[0]) / (self.real[0] - self.controls[0])


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _told(own: dict[str, _Beside]) -> Iterator[str]:
    for kind in ("perturbation", "mode of action"):
        if (beside := own.get(f"{kind} told")) is None:
            continue
        text = f"The {kind} of made cells is told in {beside.text(_percent)}"
        if beside.controls is None:
            yield f"{text}."
            continue
        (value, low, _), (floor, _, high) = beside.made, beside.controls
        if value <= floor:
            words = "it is not shown"
        elif None in (low, high) or low <= high:
            words = "this may be chance"
        else:
            words = "it is shown" + (" in part" if beside.real and beside.real[0] > value and beside.way < 0.5 else "")
        yield f"{text}: {words}."


def _batch(own: dict[str, _Beside]) -> Iterator[str]:
    beside = own.get("batch told")
    if beside is None or beside.real is None:
        return
    is_kept = beside.made[0] >= beside.real[0] - _KEPT
    yield f"Their batch is told in {beside.text(_percent)}: it is {'' if is_kept else 'not '}kept."


def _near(own: dict[str, _Beside]) -> Iterator[str]:
    beside = own.get("KIDc")
    if beside is None:
        return
    text = f"KIDc x100 is {beside.text(lambda value: number(round(100 * value, 2) + 0.0))}"
    if beside.controls is None:
        yield f"{text}."
        return
    (value, _, high), (floor, low, _) = beside.made, beside.controls
    if value >= floor:
        yield f"{text}: made cells are no nearer to real treated cells than untreated controls are."
        return
    chance = "" if None not in (low, high) and high < low else "; this may be chance"
    way = (
        f", {_percent(min(1.0, beside.way))} of the way to real training cells"
        if beside.real and beside.real[0] < floor
        else ""
    )
    yield f"{text}: made cells are nearer to real treated cells than untreated controls are{way}{chance}."
