"""The figures of a study: a forest plot of all arms, and a curve over the sizes of the training set."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from cellflux_bridge.base.files import replacing

if TYPE_CHECKING:
    from cellflux_bridge.study.summary import Row

_COLOURS = {"base": "#444444", "augmentation": "#1b6ca8", "images": "#b8442f", "images and augmentation": "#7a4a9e"}
_FORMATS = ("png", "pdf")


def write_figures(rows: "Sequence[Row]", folder: Path, *, base: str) -> list[Path]:
    """Write forest and curve as PNG and PDF; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = [row for row in rows if row.backbone]
    written = _saved(_forest(trained, base=base), folder / "forest") if any(row.difference for row in trained) else []
    return written + (_saved(_curve(trained), folder / "curve") if len({row.size for row in trained}) > 1 else [])


def _plain(name: str) -> str:
    """A name that matplotlib takes for no formula and leaves in a legend."""
    return name.replace("$", r"\$") if not name.startswith("_") else f" {name}".replace("$", r"\$")


def _saved(figure: Figure, stem: Path) -> list[Path]:
    written = [stem.with_suffix(f".{kind}") for kind in _FORMATS]
    for path, kind in zip(written, _FORMATS, strict=True):
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, bbox_inches="tight")
    return written


def _forest(rows: "Sequence[Row]", *, base: str) -> Figure:
    """Differences to the base arm with their intervals, a panel a size and backbone."""
    panels = list(dict.fromkeys((row.size, row.backbone) for row in rows if row.difference))
    arms = list(dict.fromkeys(row.arm for row in rows if row.difference))
    figure = Figure(figsize=(2.2 + 3.2 * len(panels), 0.9 + 0.3 * len(arms)))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (size, backbone) in zip(axes, panels, strict=True):
        for row in rows:
            if (row.size, row.backbone) == (size, backbone) and row.difference:
                value, low, high = (100 * number for number in row.difference)
                y, colour = len(arms) - arms.index(row.arm), _COLOURS[row.family]
                axis.plot([low, high], [y, y], color=colour, linewidth=1.5)
                axis.plot([value], [y], "o", color=colour, markersize=5)
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.set_title(_plain(f"{size} groups of every class, {backbone}"), fontsize=9)
        axis.set_xlabel(_plain(f"balanced accuracy less {base}, points"), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(arms), 0, -1), list(map(_plain, arms)))
    figure.tight_layout()
    return figure


def _curve(rows: "Sequence[Row]") -> Figure:
    """Balanced accuracy over the sizes, a line an arm, a panel a backbone."""
    sizes, names = list(dict.fromkeys(row.size for row in rows)), list(dict.fromkeys(row.backbone for row in rows))
    figure = Figure(figsize=(1.5 + 4 * len(names), 3.6))
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        arms = list(dict.fromkeys(row.arm for row in rows if row.backbone == name))
        for number, arm in enumerate(arms):
            own = {row.size: row for row in rows if (row.backbone, row.arm) == (name, arm)}
            known = [size for size in sizes if size in own]
            values = [100 * own[size].figures["balanced accuracy"][0] for size in known]
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            axis.plot(range(len(known)), values, style, marker="o", markersize=3, linewidth=1.2, label=_plain(arm))
        axis.set_xticks(range(len(sizes)), list(map(str, sizes)))
        axis.set_xlabel("training groups of every class", fontsize=8)
        axis.set_ylabel("balanced accuracy, %", fontsize=8)
        axis.set_title(_plain(name), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure
