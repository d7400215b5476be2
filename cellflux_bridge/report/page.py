"""The report: runs' figures, sequences and warnings as one HTML file that needs no network and no server."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from datetime import date
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cellflux_bridge import __version__
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import replace_text
from cellflux_bridge.cellularity.nuclei import segment as segment_nuclei
from cellflux_bridge.metrics.words import NUCLEI, interval, number
from cellflux_bridge.report import charts, tables
from cellflux_bridge.report import gallery as sequences
from cellflux_bridge.report.figures import write_figures
from cellflux_bridge.report.gallery import Gallery, Segment
from cellflux_bridge.report.media import Stills, films, stills
from cellflux_bridge.report.runs import Chapter, Method, load_chapters
from cellflux_bridge.report.warnings import cautions

# Bytes of the page; of them what is seen, which leaves the rest to words, curves and numbers; of that again what real
# patches with near copies, and what videos may take. Sequences get what these leave.
_MOST, _MOST_SEEN, _MOST_OF_STILLS, _MOST_OF_FILMS = 15_000_000, 13_000_000, 3_000_000, 3_500_000
# Frames are shown at so many pixels of the screen.
_SHOWN = 256
_OPEN = ("arrival", "levels", "likeness")


def write_report(
    runs: Sequence[Path], output: Path, *, num_sequences: int = 50, segment: Segment | None = None
) -> tuple[Path, list[Path]]:
    """Write the page `output` (.html) about run folders, and `figures/` beside it; returns the page and the figures.

    Of each transition at most `num_sequences` sources are shown, fewer where the page would grow beyond 15 MB.
    `segment` finds nuclei, RGB uint8 (H, W, 3) -> labels (H, W) int32, by default as the run's cellularity.json counted
    them; where it raises UserError a frame is shown without outlines. Raises UserError for a run without metrics.json,
    damaged files, an output that is no .html, and so many runs that no choice of sequences makes the page small enough.
    """
    if output.suffix != ".html":
        raise UserError(f"--output {output}: expected a name that ends in .html")
    if num_sequences < 1:
        raise UserError(f"--sequences {num_sequences}: expected at least 1")
    chapters = load_chapters(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    views, figures = [], []
    beside = [stills(chapter, budget=_MOST_OF_STILLS // len(chapters)) for chapter in chapters]
    videos = films(chapters, budget=_MOST_OF_FILMS)
    left = _MOST_SEEN - sum(of.stored for of in beside) - sum(len(uri) for of in videos for _, uri in of)
    for place, chapter in enumerate(chapters):
        budget = left // (len(chapters) - place)
        segment_of = _as_counted if segment is None else lambda method: segment
        gallery = sequences.gather(chapter, num=num_sequences, budget=budget, segment_of=segment_of)
        left -= 0 if gallery is None else gallery.stored
        suffix = f"_{place + 1}" if len(chapters) > 1 else ""
        figures += write_figures(chapter, gallery, beside[place].real, output.parent / "figures", suffix=suffix)
        views.append(_view(place, chapter, gallery, beside[place], videos[place]))
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
    if (size := len(text.encode())) > _MOST:
        raise UserError(f"{output}: would take {size / 1e6:.1f} MB, {_MOST / 1e6:g} at most; report fewer runs at once")
    replace_text(output, text)
    return output, figures


def _as_counted(method: Method) -> Segment:
    parameters, mpp = method.run.nuclei
    return partial(segment_nuclei, mpp=mpp, parameters=parameters)


def _resource(name: str) -> str:
    return (resources.files("cellflux_bridge.report") / "template" / name).read_text(encoding="utf-8")


def _view(
    place: int, chapter: Chapter, gallery: Gallery | None, beside: Stills, videos: list[tuple[str, str]]
) -> dict[str, Any]:
    """What the template shows of a chapter."""
    plots = tables.curves(chapter)
    nuclei = tables.nuclei_charts(chapter)
    return {
        "id": f"c{place}",
        "chapter": chapter,
        "cautions": cautions(chapter, gallery) + beside.warnings,
        "viewer": None if gallery is None else _viewer(place, chapter, gallery, beside, plots, nuclei),
        "has_scored": any(series.style == charts.REAL for chart in nuclei for series in chart.series),
        "baselines": tables.baseline_styles(chapter),
        "main": tables.main_table(chapter),
        "nuclei_rows": tables.nuclei_table(chapter),
        "nuclei_charts": [_drawn(place, "curve", chart) for chart in nuclei],
        "charts": [_drawn(place, "curve", chart) for section, chart in plots if section in _OPEN],
        "more_charts": [_drawn(place, "curve", chart) for section, chart in plots if section not in _OPEN],
        "levels": list(tables.level_tables(chapter)),
        "differences": [
            (chapter.of_run(run), d, tables.Cell(number(d["difference"]), interval(d["low"], d["high"])))
            for run in chapter.runs
            for d in run.metrics["differences"]
        ],
        "made": [(method, _facts(method)) for method in chapter.methods],
        "networks": {
            (chapter.called(run.network(n["name"])), n["use"]): n
            for run in chapter.runs
            for n in run.metrics["networks"]
        },
        "copies": beside.copies,
        "pixelated": chapter.size <= sequences.PIXELATED,
        "videos": videos,
    }


def _drawn(place: int, use: str, chart: charts.Chart, *, interactive: bool = False) -> Markup:
    # Ids must differ over the page; the part after the last slash is the curve's own key.
    return charts.draw(chart._replace(key=f"{place}/{use}/{chart.key}"), interactive=interactive)


def _viewer(place, chapter: Chapter, gallery: Gallery, beside: Stills, plots, nuclei) -> dict[str, Any]:
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
    moving = [
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
        "pixelated": chapter.size <= sequences.PIXELATED,
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
        "real": {k: {"sprite": sprite, "num": len(beside.real[k])} for k, sprite in beside.rows.items()},
        "marks": charts.MARKS,
        "curves": {chart.key: chart.title for chart in moving},
    }
    return {
        # "</script>" in a file's name must not end the script.
        "data": Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        "charts": [_drawn(place, "own", chart, interactive=True) for chart in moving],
        "methods": shown,
        "num_levels": len(data["methods"][0]["levels"]),
        "num_sources": len(gallery.sources),
        "labels": list(gallery.sources.values()),
        "total": gallery.total,
        "size": gallery.size,
        "scale": max(1, math.floor(_SHOWN / max(gallery.size))),
        "shrunk": gallery.shrunk,
        "has_outlines": gallery.has_outlines,
        "rule": beside.rule,
    }


def _facts(method: Method) -> list[tuple[str, str]]:
    """What was run, in a few lines; the whole configuration stands below it."""
    facts = [("Method", method.record["method"]), ("Sequences", f"{method.record['n']:,}")]
    facts.append(("Levels", ", ".join(f"{level:g}" for level in method.record["frame_levels"])))
    for label, quantity in (("Network forwards", "nfe"), ("Classifier gradients", "gradients")):
        if (value := method.value(quantity)) and value["value"] is not None:
            facts.append((f"{label} a sequence", number(value["value"])))
    if method.cost is not None:
        device, each, cpu = method.cost
        of_cpu = "" if cpu is None else f" ({cpu:.3g} s of CPU time)"
        facts.append(("Time a sequence", f"{each:.3g} s on {device}{of_cpu}"))
    if (config := method.config) is not None:
        facts += [
            ("Data", f"{config.data.root} ({config.data.layout['name']}), {config.data.image_size} px"),
            ("Split of the sources", config.translate.split + _splits(method)),
            ("Stain", config.data.stain.mode),
            ("Seed", str(config.seed)),
        ]
        if method.record["method"] != "ddim":
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
