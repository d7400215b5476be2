"""The report: runs' figures, sequences and warnings as one HTML file that needs no network and no server."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cellflux_bridge import __version__
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import csv_rows, replace_text
from cellflux_bridge.cellularity.nuclei import segment as segment_nuclei
from cellflux_bridge.config import Config
from cellflux_bridge.config.registry import trusts_everything
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.metrics.verdict import WORDS, Verdict, verdict
from cellflux_bridge.metrics.words import NUCLEI, interval, number
from cellflux_bridge.report import charts, tables
from cellflux_bridge.report import gallery as sequences
from cellflux_bridge.report.figures import write_figures
from cellflux_bridge.report.gallery import Gallery, Segment
from cellflux_bridge.report.media import Film, Stills, films, stills
from cellflux_bridge.report.perturbations import load_perturbations, perturbations_of
from cellflux_bridge.report.runs import Chapter, Method, file_inside, is_evaluated, load_chapters
from cellflux_bridge.report.studies import is_study, load_studies
from cellflux_bridge.report.warnings import warnings_of

# Bytes of the page; of them the pictures', which leaves the rest to words, curves and numbers; of the pictures' again
# what real patches with near copies, videos and, beside sequences, cells may take. Sequences get what these leave.
_MOST, _MOST_SEEN = 15_000_000, 13_000_000
_MOST_OF_STILLS, _MOST_OF_FILMS, _MOST_OF_CELLS = 3_000_000, 3_500_000, 4_000_000
# Frames are shown at so many pixels of the screen.
_SHOWN = 256
# Sections whose curves are open when the page opens.
_OPEN = ("real", "arrival", "levels", "likeness")
_USES = {
    "judge": "judges",
    "features": "features for distances; it neither guides nor judges",
    "scores": "estimates severity",
}


def write_report(
    runs: Sequence[Path], output: Path, *, num_sequences: int = 50, segment: Segment | None = None
) -> tuple[Path, list[Path]]:
    """Write the page `output` (.html) about runs and studies, and `figures/` beside it; returns page and figures.

    Of each transition at most `num_sequences` sources are shown, fewer where the page would grow beyond 15 MB.
    `segment` finds nuclei, RGB uint8 (H, W, 3) -> labels (H, W) int32, by default as the run's cellularity.json counted
    them; where it raises UserError a frame is shown without outlines. Raises UserError for a run with neither
    metrics.json nor perturbations.json, damaged files, an output that is no .html, and so many runs that no choice of
    sequences makes the page small enough.
    """
    if output.suffix != ".html":
        raise UserError(f"--output {output}: expected a name that ends in .html")
    if num_sequences < 1:
        raise UserError(f"--sequences {num_sequences}: expected at least 1")
    studies = load_studies([run for run in runs if is_study(run)])
    with_cells = [run for run in runs if perturbations_of(run)]
    chapters = load_chapters([run for run in runs if is_evaluated(run) or not (is_study(run) or run in with_cells)])
    output.parent.mkdir(parents=True, exist_ok=True)
    views, figures = [], []
    beside = [stills(chapter, budget=_MOST_OF_STILLS // len(chapters)) for chapter in chapters]
    videos = films(chapters, budget=_MOST_OF_FILMS)
    left = _MOST_SEEN - sum(of.stored for of in beside) - sum(film.stored for of in videos for film in of)
    left -= sum(len(study.made or "") for study in studies)
    treated = load_perturbations(with_cells, budget=min(left, _MOST_OF_CELLS) if chapters else left)
    left -= sum(of.stored for of in treated)
    for place, chapter in enumerate(chapters):
        budget = left // (len(chapters) - place)
        segment_of = _as_counted if segment is None else lambda method: segment
        gallery = sequences.gather(chapter, num=num_sequences, budget=budget, segment_of=segment_of)
        left -= 0 if gallery is None else gallery.stored
        suffix = f"_{place + 1}" if len(chapters) > 1 else ""
        figures += write_figures(chapter, gallery, beside[place].real, output.parent / "figures", suffix=suffix)
        views.append(_view(place, chapter, gallery, beside[place], videos[place]))
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    templates = Environment(loader=PackageLoader("cellflux_bridge.report", "template"), **options)
    templates.globals |= {"charts": charts, "tables": tables, "number": number, "interval": interval}
    templates.globals["verdict_words"] = WORDS
    titles = [chapter.title for chapter in chapters] + [f"Perturbations: {of.record.name}" for of in treated]
    text = templates.get_template("page.html").render(
        title=" · ".join(dict.fromkeys([*titles, *(study.record.name for study in studies)])),
        runs=[run for chapter in chapters for run in chapter.runs],
        studies=studies,
        treated=treated,
        chapters=views,
        **{name: Markup(templates.loader.get_source(templates, f"page.{name}")[0]) for name in ("css", "js")},
        uses=_USES,
        version=__version__,
        today=date.today().isoformat(),
    )
    text = text.encode(errors="replace").decode()  # a received name may hold half of a surrogate pair
    if (size := len(text.encode())) > _MOST:
        raise UserError(f"{output}: would take {size / 1e6:.1f} MB, {_MOST / 1e6:g} at most; report fewer runs at once")
    replace_text(output, text)
    return output, figures


def _as_counted(method: Method) -> Segment:
    """How a run's nuclei were counted. A network that cellularity.json names is loaded only from a trusted run."""
    counted = method.run.cellularity
    if counted is None:
        return segment_nuclei
    if counted.parameters.file and not trusts_everything():
        return lambda rgb: None
    parameters = replace(counted.parameters, device="cpu")
    return partial(segment_nuclei, mpp=counted.mpp, parameters=parameters, scale=counted.scale)


def _view(place: int, chapter: Chapter, gallery: Gallery | None, beside: Stills, videos: list[Film]) -> dict[str, Any]:
    """What the template shows of a chapter."""
    plots, spectrum = tables.curves(chapter), tables.spectrum(chapter)
    nuclei = [chart for section, chart in plots if section == "nuclei"]
    return {
        "id": f"c{place}",
        "place": place,
        "chapter": chapter,
        "verdicts": [(method, _verdict(chapter, method), _longer(method)) for method in chapter.methods],
        "warnings": warnings_of(chapter, gallery) + beside.warnings,
        "viewer": None if gallery is None else _viewer(chapter, gallery, beside, plots),
        "has_scored": any(series.style == charts.REAL for chart in nuclei for series in chart.series),
        "nuclei_charts": nuclei,
        "charts": [spectrum][: spectrum is not None] + [chart for section, chart in plots if section in _OPEN],
        "more_charts": [chart for section, chart in plots if section not in (*_OPEN, "nuclei")],
        "facts": [(method, _facts(method)) for method in chapter.methods],
        "networks": {
            (chapter.called(run.network(n.name)), n.use): n for run in chapter.runs for n in run.metrics.networks
        },
        "copies": beside.copies,
        "pixelated": chapter.size <= sequences.PIXELATED,
        "videos": videos,
    }


def _verdict(chapter: Chapter, method: Method) -> Verdict:
    def find(name: str, quantity: str, level: float | None, by: str) -> float | None:
        figure = method.run.lookup.get((name, quantity, level, by))
        return None if figure is None else figure.value

    run = method.run
    return verdict(find, method.key, run.judges, target=chapter.target, extractor=run.extractor)


def _longer(method: Method) -> str | None:
    """The command that trains a flow for twice as long."""
    if not isinstance(method.config, Config) or method.config.translate.method == "ddim":
        return None
    return f"cellflux-bridge train {method.run.folder} train.steps={2 * method.config.train.steps}"


def _viewer(chapter: Chapter, gallery: Gallery, beside: Stills, plots) -> dict[str, Any]:
    """The charts beside a sequence, and what the page's script needs to move through it."""
    known: dict[str, list[float]] = {}
    for shown in gallery.all:
        for key, values in shown.curves.items():
            known.setdefault(key, []).extend(v for v in values if v is not None)
    by_key = {key: charts.Chart(key, NUCLEI[key], ()) for key in ("area_fraction", "count") if known.get(key)}
    by_key |= {chart.key: chart for _, chart in plots if chart.key in ("area_fraction", "count")}
    by_key |= {chart.key: chart for _, chart in plots if chart.key.startswith("p:")}
    moving = [
        chart._replace(
            title=chart.title.replace("mean p(target)", f"p({chapter.target})"),
            series=tuple(s for s in chart.series if s.style.startswith("m")),
            extra=tuple(known.get(key, ())),
        )
        for key, chart in by_key.items()
    ]
    shown = [method for method in chapter.methods if method.slot in gallery.levels]
    data = {
        "source": chapter.source,
        "target": chapter.target,
        "size": chapter.size,
        "pixelated": chapter.size <= sequences.PIXELATED,
        "methods": [
            {"slot": m.slot, "name": m.name, "style": charts.style_of(m.slot), "levels": gallery.levels[m.slot]}
            for m in shown
        ],
        "sources": [
            {"label": label, "shown": {slot: one.for_page() for slot, one in row.items()}}
            for label, row in zip(gallery.labels, gallery.shown.values(), strict=True)
        ],
        "real": {k: {"sprite": sprite, "num": len(beside.real[k])} for k, sprite in beside.rows.items()},
        "marks": charts.MARKS,
        "curves": {chart.key: chart.title for chart in moving},
    }
    return {
        # "</script>" in a file's name must not end the script.
        "data": Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        "charts": moving,
        "methods": shown,
        "num_levels": len(data["methods"][0]["levels"]),
        "gallery": gallery,
        "scale": max(1, _SHOWN // chapter.size),
        "rule": beside.rule,
    }


def _facts(method: Method) -> list[tuple[str, str]]:
    """What was run, in a few lines; the whole configuration stands below it."""
    record, config = method.record, method.config
    facts = [("Method", record.method), ("Sequences", f"{record.n:,}")]
    facts.append(("Levels", ", ".join(f"{level:g}" for level in record.frame_levels)))
    for label, quantity in (("Network forwards", "nfe"), ("Classifier gradients", "gradients")):
        if (figure := method.value(quantity)) and figure.value is not None:
            facts.append((f"{label} a sequence", number(figure.value)))
    if method.cost is not None:
        device, each, cpu = method.cost
        facts.append(("Time a sequence", f"{each:.3g} s on {device}" + (f" ({cpu:.3g} s of CPU time)" if cpu else "")))
    if isinstance(config, Config):
        facts += [
            ("Data", f"{config.data.root} ({config.data.layout['name']}), {config.data.image_size} px"),
            ("Split of the sources", config.translate.split + _splits(method)),
            ("Stain", config.data.stain.mode),
            ("Seed", str(config.seed)),
        ]
        if record.method != "ddim":
            names = (section["name"] for section in (config.path, config.coupling, config.velocity))
            facts.append(("Path, coupling, network", ", ".join(names)))
    return [*facts, ("Configuration", record.config_hash), ("Folder", record.trajectory)]


def _splits(method: Method) -> str:
    """How many patches each split of the run holds, from the splits.csv that its training left."""
    table = file_inside(method.trajectory.parent.parent, "splits.csv")
    if table is None:
        return ""
    counts = Counter(row["split"] for row in csv_rows(table) if row.get("split") in SPLITS)
    return " (patches: " + ", ".join(f"{split} {count:,}" for split, count in counts.items()) + ")" if counts else ""
