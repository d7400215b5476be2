"""The tables and figures of a study: every arm beside the base arm, and the one test that was named beforehand."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.errors import abbreviate
from cellflux_bridge.base.files import csv_text, replace_text, without_nan
from cellflux_bridge.classifier.scores import colour_probabilities
from cellflux_bridge.data.compression import compare, encoding
from cellflux_bridge.data.index import list_records
from cellflux_bridge.data.patches import Patches, load_patches
from cellflux_bridge.images import write_png
from cellflux_bridge.images.panels import named_rows
from cellflux_bridge.study.figures import write_figures
from cellflux_bridge.study.plan import DONE, Cell, cells, made_folder, makings, sized
from cellflux_bridge.study.results import (
    BIASED,
    FIGURES,
    Draws,
    Sums,
    balanced_accuracy,
    bundled,
    draw,
    finished,
    holm,
    interval,
    p_value,
    probabilities,
    resampled,
    sums,
)
from cellflux_bridge.study.settings import FORMAT, StudyConfig
from cellflux_bridge.trajectory import load_trajectory

COLOUR = "colour alone"
_COLUMNS = 11
_MOST_FILES = 500  # of which compression is compared


class Row(NamedTuple):
    """An arm at a size with a backbone: of each figure value, low and high; the paired difference of balanced accuracy
    to the base arm likewise, its p value and that after Holm's correction (None: the base, or colour alone)."""

    size: int | str
    backbone: str
    arm: str
    family: str
    seeds: int
    val_balanced_accuracy: float
    figures: dict[str, tuple[float, float, float]]
    difference: tuple[float, float, float] | None = None
    p: float | None = None
    p_holm: float | None = None


class Primary(NamedTuple):
    """The one test: which arms were chosen on the validation split, and the difference of their balanced accuracy."""

    arm: str
    against: str
    difference: tuple[float, float, float]
    p: float


def write_summary(config: StudyConfig) -> list[Path]:
    """Write study.md, .csv, .tex and .json and figures/ from the finished cells; returns the files."""
    rows, primary = summarise(config)
    output, lines = config.output, [f"# {config.name}", "", *_primary_words(config, primary)]
    table = _table(rows)
    notes = [
        *_strength(config),
        *_lacking(config),
        *(config.output / "checks.txt").read_text(encoding="utf-8").splitlines(),
    ]
    notes += _compression(config)
    lines += ["| " + " | ".join(line) + " |" for line in (table[0], ["---"] * len(table[0]), *table[1:])]
    lines += ["", *(f"- {note}" for note in (*_NOTES, *notes)), ""]
    (output / "figures").mkdir(exist_ok=True)
    written = [output / f"study.{kind}" for kind in ("md", "csv", "tex", "json")]
    replace_text(written[0], "\n".join(lines))
    replace_text(written[1], csv_text(_long(rows)))
    replace_text(written[2], _latex(table))
    found = {
        "format": FORMAT,
        "name": config.name,
        "base": config.base,
        "primary": primary and primary._asdict(),
        "primary_words": _primary_words(config, primary)[0].replace("**", ""),
        "rows": [row._asdict() for row in rows],
        "notes": [*_NOTES, *notes],
    }
    replace_text(written[3], json.dumps(without_nan(found), indent=1) + "\n")
    write_png(output / "figures" / "made.png", _made_sheet(config))
    return [*written, output / "figures" / "made.png", *write_figures(rows, output / "figures", base=config.base)]


def _made_sheet(config: StudyConfig) -> np.ndarray:
    """Rows of real patches of every class and of what each generator made: of stairs the first sequence of every
    direction, otherwise first images of level 1."""
    patches, rows = load_patches(config.data, seed=config.seed), {}
    for label in patches.classes:
        chosen = patches.sample("train", label, num=_COLUMNS, seed=config.seed)
        rows[f"real, {label}"] = list(patches.centre(chosen).numpy().transpose(0, 2, 3, 1))
    for made in (made_folder(config, making) for making in makings(config)):
        run = made.parent
        for file in sorted(made.glob("*/trajectory.json")) if (run / DONE).exists() else ():
            found = load_trajectory(file.parent, num=_COLUMNS)
            is_stair = len(found.header.levels) > 2
            frames = found.frames[:, 0] if is_stair else found.frames[-1]
            name = f"size {run.parent.name}, {run.name}: {found.header.source} to {found.header.target}"
            rows[name] = list(frames[:_COLUMNS].transpose(0, 2, 3, 1))
    return named_rows(rows, scale=max(1, 64 // patches.preprocessing.image_size))


_NOTES = (
    "Means over seeds on the test split. A 95 % interval draws test groups and seeds with replacement (2,000 times). "
    "It holds for these training groups and, of a generator, for this one training of it.",
    "Difference: balanced accuracy less that of the base arm, paired over groups and seeds; p by the same resamples; "
    "Holm: corrected for all arms beside the base at this size and with this backbone.",
    "Sensitivity is the recall of the last class and specificity that of the others (means over classes of more).",
    "Nothing was chosen on the test split. Validation patches chose the primary arms, calibrate the classifiers, and "
    "are what a calibrated generator measures its levels on.",
)
_FEW_SEEDS, _FEW_GROUPS = 5, 15


def _strength(config: StudyConfig) -> list[str]:
    """How many test groups and seeds the intervals rest on, with a warning where they are too few to be believed."""
    patches = load_patches(config.data, seed=config.seed)
    nums = [len(np.unique(patches.groups[patches.indices("test", label)])) for label in patches.classes]
    counts = ", ".join(f"{num} of {label}" for num, label in zip(nums, patches.classes, strict=True))
    lines = [f"test groups: {counts}; seeds: {config.seeds}"]
    if config.seeds < _FEW_SEEDS or min(nums) < _FEW_GROUPS:
        lines.append(
            f"WARNING: with fewer than {_FEW_SEEDS} seeds, or {_FEW_GROUPS} test groups of a class, intervals are too "
            "narrow and p too small: in simulations without any difference 3 seeds gave p < .05 in up to 15 % of cases"
        )
    return lines


def _lacking(config: StudyConfig) -> list[str]:
    """What is not in the table, because not all of its seeds are there."""
    counts = Counter(cell[:3] for cell in finished(config))
    keys = {cell[:3]: None for cell in cells(config)}
    lacking = [f"{size}/{backbone}/{arm} ({counts[size, backbone, arm]})" for size, backbone, arm in keys]
    lacking = [text for text, key in zip(lacking, keys, strict=True) if counts[key] < config.seeds]
    return [f"NOT SHOWN, because fewer than {config.seeds} seeds are there: {abbreviate(lacking)}"] if lacking else []


def summarise(config: StudyConfig) -> tuple[list[Row], Primary | None]:
    """The rows of every arm of which all seeds are there, and the primary test where its arms are."""
    patches = load_patches(config.data, seed=config.seed)
    done: dict[tuple, list[Cell]] = {}
    for cell in finished(config):
        done.setdefault(cell[:3], []).append(cell)
    whole = {key: of for key, of in done.items() if len(of) == config.seeds}
    rows, sums_of, draws = [], {}, draw(_groups(patches, "test", config)[1], config.seeds, seed=config.seed)
    for (size, backbone, arm), of in whole.items():
        found = sums_of[size, backbone, arm] = _sums(config, patches, of, "test")
        of_validation = _sums(config, patches, of, "val")
        validation = balanced_accuracy(of_validation, draw(of_validation.excess.shape[1], config.seeds, seed=0))
        figures = _figures(found, draws)
        rows.append(Row(size, backbone, arm, config.arms[arm].family, len(of), float(validation[0].mean()), figures))
    rows = [
        row
        for size in config.sizes
        for name in config.backbones
        for row in _compared(config, rows, sums_of, draws, size, name)
    ]
    return rows + [_colour(config, size) for size in config.sizes], _primary(config, rows, sums_of, draws)


def _groups(patches: Patches, split: str, config: StudyConfig) -> tuple[np.ndarray, int]:
    return bundled(patches.groups[patches.indices(split)], seed=config.seed)


def _sums(config: StudyConfig, patches: Patches, of: list[Cell], split: str) -> Sums:
    chosen, (numbers, num) = patches.indices(split), _groups(patches, split, config)
    size = {"num": len(chosen), "num_classes": len(patches.classes)}
    values = np.stack([probabilities(config, cell, split, **size) for cell in sorted(of)])
    return sums(values, patches.labels[chosen], numbers, num)


def _figures(of: Sums, draws: Draws) -> dict[str, tuple[float, float, float]]:
    """Every figure with its 95 % interval, NaN where it has none."""
    found = {name: interval(resampled(figure, of, draws)) for name, figure in FIGURES.items()}
    return found | {name: (found[name][0], np.nan, np.nan) for name in BIASED}


def _compared(config: StudyConfig, rows, sums_of, draws: Draws, size, backbone: str) -> list[Row]:
    """The rows of one size and backbone, each beside the base arm."""
    own = [row for row in rows if (row.size, row.backbone) == (size, backbone)]
    base = config.base
    if (size, backbone, base) not in sums_of:
        return own
    against = resampled(balanced_accuracy, sums_of[size, backbone, base], draws)
    others = [row for row in own if row.arm != base]
    differences = [resampled(balanced_accuracy, sums_of[size, backbone, row.arm], draws) - against for row in others]
    values, num = [p_value(difference) for difference in differences], len(config.arms) - 1
    found = {
        row.arm: row._replace(difference=interval(difference), p=p, p_holm=corrected)
        for row, difference, p, corrected in zip(others, differences, values, holm(values, num=num), strict=True)
    }
    return [found.get(row.arm, row) for row in own]


def _primary(config: StudyConfig, rows: list[Row], sums_of, draws: Draws) -> Primary | None:
    named = config.primary
    if named is None:
        return None
    of_validation = {
        row.arm: row.val_balanced_accuracy for row in rows if (row.size, row.backbone) == (named.size, named.backbone)
    }
    if not {*named.arms, *named.against} <= of_validation.keys():
        return None
    arm, against = (max(names, key=of_validation.__getitem__) for names in (named.arms, named.against))
    one, other = (
        resampled(balanced_accuracy, sums_of[named.size, named.backbone, name], draws) for name in (arm, against)
    )
    return Primary(arm, against, interval(one - other), p_value(one - other))


def _colour(config: StudyConfig, size) -> Row:
    """A logistic regression on means and spreads of the colours, fitted on a size's training patches."""
    patches = load_patches(sized(config, size).data, seed=config.seed)
    found, draws = {}, {}
    for split in ("val", "test"):
        chosen, (numbers, num) = patches.indices(split), _groups(patches, split, config)
        values = colour_probabilities(patches, chosen)[None]
        found[split] = sums(values, patches.labels[chosen], numbers, num)
        draws[split] = draw(num, 1, seed=config.seed)
    figures = _figures(found["test"], draws["test"])
    validation = balanced_accuracy(found["val"], draws["val"])[0].mean()
    return Row(size, "", COLOUR, "baseline", 1, float(validation), figures)


def _compression(config: StudyConfig) -> list[str]:
    records, _ = list_records(config.data, seed=config.seed)
    records = records[:: max(1, len(records) // _MOST_FILES)]
    return compare([encoding(record.file) for record in records], [record.label for record in records])


def _primary_words(config: StudyConfig, primary: Primary | None) -> list[str]:
    named = config.primary
    if named is None:
        return ["No primary test was named before the study.", ""]
    where = f"size {named.size}, {named.backbone}"
    if primary is None:
        return [f"Primary test ({where}): its cells are not all there.", ""]
    value, low, high = (100 * number for number in primary.difference)
    return [
        f"**Primary test** ({where}; both arms chosen by validation): {primary.arm} less {primary.against}: "
        f"{value:+.1f} points of balanced accuracy [{low:+.1f}, {high:+.1f}], p = {primary.p:.3g}.",
        "",
    ]


def _table(rows: list[Row]) -> list[list[str]]:
    """The cells of the table as text, its heading first."""
    heading = ["size", "backbone", "arm", "val. balanced accuracy", *FIGURES, "difference (points)", "p", "p (Holm)"]
    table = [heading]
    for row in rows:
        cells = [str(row.size), row.backbone or "-", row.arm, f"{row.val_balanced_accuracy:.3f}"]
        spans = (
            (value, "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]") for value, low, high in row.figures.values()
        )
        cells += [f"{value:.3f}{span}" for value, span in spans]
        if row.difference is None:
            cells += ["-"] * 3
        else:
            value, low, high = (100 * number for number in row.difference)
            cells += [f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", f"{row.p:.3g}", f"{row.p_holm:.3g}"]
        table.append(cells)
    return table


def _long(rows: list[Row]) -> list[list]:
    table = [["size", "backbone", "arm", "family", "seeds", "figure", "value", "low", "high", "p", "p_holm"]]
    for row in rows:
        about = [row.size, row.backbone, row.arm, row.family, row.seeds]
        table.append([*about, "val balanced accuracy", f"{row.val_balanced_accuracy:.6g}", None, None, None, None])
        for name, values in row.figures.items():
            table.append([*about, name, *(f"{value:.6g}" for value in values), None, None])
        if row.difference is not None:
            table.append(
                [*about, "difference", *(f"{v:.6g}" for v in row.difference), f"{row.p:.6g}", f"{row.p_holm:.6g}"]
            )
    return table


_SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\^{}", "\\": r"\textbackslash{}"}
)


def _latex(table: list[list[str]]) -> str:
    """The table for a paper, with booktabs."""
    lines = [" & ".join(cell.translate(_SPECIAL) for cell in line) + r" \\" for line in table]
    columns = "lll" + "r" * (len(table[0]) - 3)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end, ""])
