"""The report: runs' figures, sequences and warnings as one HTML file that needs no network and no server."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cellflux_bridge import __version__
from cellflux_bridge.cellularity.nuclei import segment as segment_nuclei
from cellflux_bridge.errors import UserError
from cellflux_bridge.files import replace_text
from cellflux_bridge.report import charts, sequences, tables
from cellflux_bridge.report.cautions import cautions
from cellflux_bridge.report.figures import write_figures
from cellflux_bridge.report.real import near_copies, real_patches
from cellflux_bridge.report.runs import Chapter, Method, load_chapters
from cellflux_bridge.report.sequences import Gallery, Segment
from cellflux_bridge.report.words import NUCLEI, interval, number

# Of the page's 15 MB, as characters in the file.
_MOST_OF_SEQUENCES, _MOST_OF_VIDEOS = 9_500_000, 3_500_000
# Smaller frames are shown as squares, at so many pixels of the screen.
_PIXELATED, _SHOWN = 96, 256
_OPEN = ("arrival", "levels", "likeness")


def write_report(
    runs: Sequence[Path], output: Path, *, num_sequences: int = 50, segment: Segment = segment_nuclei
) -> tuple[Path, list[Path]]:
    """Write the page `output` (.html) about run folders, and `figures/` beside it; returns the page and the figures.

    Of each transition at most `num_sequences` sources are shown, fewer where the page would grow beyond 15 MB.
    `segment` finds nuclei, RGB uint8 (H, W, 3) -> labels (H, W) int32; where it raises UserError a frame is shown
    without outlines. Raises UserError for a run without metrics.json, damaged files, and an output that is no .html.
    """
    if output.suffix != ".html":
        raise UserError(f"--output {output}: expected a name that ends in .html")
    if num_sequences < 1:
        raise UserError(f"--sequences {num_sequences}: expected at least 1")
    chapters = load_chapters(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    views, figures, videos = [], [], _Videos(_MOST_OF_VIDEOS)
    for place, chapter in enumerate(chapters):
        budget = _MOST_OF_SEQUENCES // len(chapters)
        gallery = sequences.gather(chapter, num=num_sequences, budget=budget, segment=segment)
        real, rule = {}, ""
        if gallery is not None:
            real, rule = real_patches(chapter, gallery.levels[min(gallery.levels)], size=gallery.size)
        suffix = f"_{place + 1}" if len(chapters) > 1 else ""
        figures += write_figures(chapter, gallery, real, output.parent / "figures", suffix=suffix)
        views.append(_view(place, chapter, gallery, real, rule, videos))
    environment = Environment(
        loader=PackageLoader("cellflux_bridge.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(
        title=" · ".join(dict.fromkeys(chapter.title for chapter in chapters)),
        runs=[run for chapter in chapters for run in chapter.runs],
        chapters=views,
        style=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
        number=number,
        swatch=charts.swatch,
        style_of=charts.style_of,
        version=__version__,
        today=date.today().isoformat(),
    )
    replace_text(output, text)
    return output, figures


def _resource(name: str) -> str:
    return (resources.files("cellflux_bridge.report") / "template" / name).read_text(encoding="utf-8")


class _Videos:
    """Videos as data URIs, as long as they fit."""

    def __init__(self, budget: int):
        self._left = budget

    def embed(self, method: Method) -> str | None:
        if method.video is None or method.video.stat().st_size * 4 / 3 > self._left:
            return None
        uri = sequences.data_uri("video/mp4", method.video.read_bytes())
        self._left -= len(uri)
        return uri


def _view(
    place: int, chapter: Chapter, gallery: Gallery | None, real: dict, rule: str, videos: _Videos
) -> dict[str, Any]:
    """What the template shows of a chapter."""
    plots = tables.curves(chapter)
    nuclei = tables.nuclei_charts(chapter)
    warnings = cautions(chapter, gallery)
    if gallery is not None and not real:
        warnings.append(f"Real patches are not shown beside the made ones: {rule}.")
    return {
        "id": f"c{place}",
        "chapter": chapter,
        "cautions": warnings,
        "viewer": None if gallery is None else _viewer(place, chapter, gallery, real, rule, plots, nuclei),
        "main": tables.main_table(chapter),
        "nuclei_rows": tables.nuclei_table(chapter),
        "nuclei_charts": [_drawn(place, "curve", chart) for chart in nuclei],
        "charts": [_drawn(place, "curve", chart) for section, chart in plots if section in _OPEN],
        "more_charts": [_drawn(place, "curve", chart) for section, chart in plots if section not in _OPEN],
        "levels": list(tables.level_tables(chapter)),
        "differences": [
            (d, tables.Cell(number(d["difference"]), interval(d["low"], d["high"])))
            for run in chapter.runs
            for d in run.metrics["differences"]
        ],
        "made": [(method, _facts(method)) for method in chapter.methods],
        "networks": list(
            {(n["name"], n["checkpoint"]): n for run in chapter.runs for n in run.metrics["networks"]}.values()
        ),
        "copies": [
            (
                copy,
                sequences.encode_row([copy.frame, copy.training], _SHOWN, "PNG"),
                max(copy.frame.shape) <= _PIXELATED,
            )
            for copy in near_copies(chapter)
        ],
        "videos": [(method.name, uri) for method in chapter.methods if (uri := videos.embed(method))],
    }


def _drawn(place: int, use: str, chart: charts.Chart, *, interactive: bool = False) -> Markup:
    # Ids must differ over the page; the part after the last slash is the curve's own key.
    return charts.draw(chart._replace(key=f"{place}/{use}/{chart.key}"), interactive=interactive)


def _viewer(place, chapter: Chapter, gallery: Gallery, real, rule, plots, nuclei) -> dict[str, Any]:
    """The charts beside a sequence, and what the page's script needs to move through it."""
    known: dict[str, list[float]] = {}
    for row in gallery.shown.values():
        for shown in row.values():
            for key, values in shown.curves.items():
                known.setdefault(key, []).extend(v for v in values if v is not None)
    by_key = {chart.key: chart for chart in nuclei if chart.key in ("area_fraction", "count")}
    for key in ("area_fraction", "count"):
        if known.get(key) and key not in by_key:
            by_key[key] = charts.Chart(key, NUCLEI[key], ())
    by_key |= {chart.key: chart for _, chart in plots if chart.key.startswith("p:")}
    beside = [
        chart._replace(
            title=chart.title.replace("mean p(target)", f"p({chapter.target})"),
            series=tuple(s for s in chart.series if s.style.startswith("m")),
            extra=tuple(known.get(key, ())),
        )
        for key, chart in by_key.items()
    ]
    shown = [method for method in chapter.methods if method.slot in gallery.frames]
    height, width = gallery.size
    data = {
        "source": chapter.source,
        "target": chapter.target,
        "width": width,
        "height": height,
        "pixelated": max(gallery.size) <= _PIXELATED,
        "methods": [
            {"slot": m.slot, "name": m.name, "style": charts.style_of(m.slot), "levels": gallery.levels[m.slot]}
            for m in shown
        ],
        "sources": [
            {
                "label": gallery.sources[key],
                "shown": {
                    slot: {"sprite": s.sprite, "outlines": s.outlines, "curves": s.curves} for slot, s in row.items()
                },
            }
            for key, row in gallery.shown.items()
        ],
        "real": {
            k: {"sprite": sequences.encode_row(patches, _SHOWN, "PNG"), "num": len(patches)}
            for k, patches in real.items()
        },
        "marks": charts.MARKS,
        "curves": {chart.key: chart.title for chart in beside},
    }
    return {
        # "</script>" in a file's name must not end the script.
        "data": Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        "charts": [_drawn(place, "own", chart, interactive=True) for chart in beside],
        "methods": shown,
        "num_levels": len(data["methods"][0]["levels"]),
        "num_sources": len(gallery.sources),
        "labels": list(gallery.sources.values()),
        "total": gallery.total,
        "size": gallery.size,
        "scale": max(1, math.floor(_SHOWN / max(gallery.size))),
        "shrunk": gallery.shrunk,
        "has_outlines": gallery.has_outlines,
        "rule": rule if real else "",
    }


def _facts(method: Method) -> list[tuple[str, str]]:
    """What was run, in a few lines; the whole configuration stands below it."""
    facts = [("Method", method.record["method"]), ("Sequences", f"{method.record['n']:,}")]
    facts.append(("Levels", ", ".join(f"{level:g}" for level in method.record["frame_levels"])))
    for label, quantity in (("Network forwards", "nfe"), ("Classifier gradients", "gradients")):
        if (value := method.value(quantity)) and value["value"] is not None:
            facts.append((f"{label} a sequence", number(value["value"])))
    if method.cost is not None and method.cost["sequences"]:
        each = method.cost["seconds"] / method.cost["sequences"]
        cpu = method.cost["cpu_seconds"] / method.cost["sequences"]
        facts.append(("Time a sequence", f"{each:.3g} s ({cpu:.3g} s of CPU)"))
    if (config := method.config) is not None:
        facts += [
            ("Data", f"{config.data.root} ({config.data.layout['name']}), {config.data.image_size} px"),
            ("Split of the sources", config.translate.split + _splits(method)),
            ("Stain", config.data.stain.mode),
            ("Seed", str(config.seed)),
        ]
        if method.record["method"] != "ddim_bridge":
            names = (section["name"] for section in (config.path, config.coupling, config.velocity))
            facts.append(("Path, coupling, network", ", ".join(names)))
    facts += [("Configuration", method.record["config_hash"]), ("Folder", method.record["trajectory"])]
    return facts


def _splits(method: Method) -> str:
    """How many patches each split of the run holds, from the splits.csv that its training left."""
    file = method.trajectory.parent.parent / "splits.csv"
    if not file.exists():
        return ""
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines or "split" not in (head := lines[0].split(",")):
        return ""
    # Ids may hold commas, splits do not: count from the right.
    back = head.index("split") - len(head)
    counts = Counter(line.split(",")[back] for line in lines[1:] if line)
    return " (patches: " + ", ".join(f"{split} {count:,}" for split, count in counts.items()) + ")"
