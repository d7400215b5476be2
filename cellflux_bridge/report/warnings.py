"""What a reader must know before believing a report, in plain words."""

from collections.abc import Iterator
from pathlib import Path

from cellflux_bridge.config import Config
from cellflux_bridge.config.registry import trusts_everything
from cellflux_bridge.flow.task import IGNORED, ignores_condition
from cellflux_bridge.metrics.warnings import UNKNOWN
from cellflux_bridge.metrics.words import floor_of, interval, number
from cellflux_bridge.report.gallery import Gallery
from cellflux_bridge.report.runs import CELLULARITY, Chapter, Method, file_inside
from cellflux_bridge.report.runs import NUCLEI as OF_NUCLEI
from cellflux_bridge.report.tables import find, levels_of, words_of
from cellflux_bridge.training.run import last_values

# A level counts as missed where the judges' mean p lies this far off, and its interval does not reach nearer.
_MISSED, _FAR_FRAME = 0.15, 0.05
# A structure judge that follows a colour judge less closely than this speaks of recolouring.
_RECOLOURED = 0.15


def warnings_of(chapter: Chapter, gallery: Gallery | None) -> list[str]:
    """Every warning of a chapter: the gravest first, last what is not known."""
    parts = (_outdated, _networks, _unconditional, _of_evaluate, _recolouring, _missed, _nuclei, _uncounted, _floors)
    found = [text for part in parts for text in part(chapter)]
    if gallery is None:
        found.append("The sequence folders that metrics.json names are not here. So only figures are shown, no images.")
    return sorted(dict.fromkeys(found), key=lambda text: UNKNOWN in text)


def _outdated(chapter: Chapter) -> Iterator[str]:
    for method in chapter.methods:
        if method.trajectory is None:
            yield f"{method.name}: its sequences ({method.record.trajectory}) are not here. Only its figures are shown."
        elif method.header.config_hash != method.record.config_hash:
            yield (
                f"{method.name}: the sequences in {method.trajectory} were made again after they were judged. Its "
                "figures belong to the earlier ones. Run cellflux-bridge evaluate again."
            )
        if not isinstance(method.config, Config | None):
            yield f"{method.name}: its configuration is not shown. {method.config}"


def ignored_condition(run: Path) -> str:
    """What a run's validation says, where it says that the network ignores its condition; else nothing."""
    try:
        figures = last_values(run, "val/condition_gain") if file_inside(run, "metrics.jsonl") else {}
        if not ignores_condition(figures):
            return ""
        figures = {name.removeprefix("val/"): value for name, value in figures.items()}
        return IGNORED.removeprefix("WARNING: ").format(**figures) + "."
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return ""  # a log that no training wrote


def _unconditional(chapter: Chapter) -> Iterator[str]:
    for method in (method for method in chapter.methods if method.trajectory):
        if text := ignored_condition(method.trajectory.parent.parent):
            yield f"{method.name}: {text}"


def _recolouring(chapter: Chapter) -> Iterator[str]:
    if not any(n.use == "judge" and n.view != "rgb" for run in chapter.runs for n in run.metrics.networks):
        yield (
            "All judges see colour, so a mere recolouring can satisfy them. Train a judge of structure: "
            "cellflux-bridge train-classifier RUN classifier.view=grey. Then evaluate with it, too."
        )
    for method in chapter.methods:
        judges = [n for n in method.run.metrics.networks if n.use == "judge"]
        flips = [(n.view, method.value("flip_rate", 1.0, n.name)) for n in judges]
        known = [(view, figure.value) for view, figure in flips if figure and figure.value is not None]
        colour = max((value for view, value in known if view == "rgb"), default=None)
        structure = min((value for view, value in known if view != "rgb"), default=None)
        if colour is not None and structure is not None and colour - structure > _RECOLOURED:
            yield (
                f"{method.name} may partly be a mere recolouring: the colour judge calls {colour:.0%} of its images "
                f"{chapter.target}, the structure judge calls only {structure:.0%} so."
            )


def _missed(chapter: Chapter) -> Iterator[str]:
    for method in chapter.methods:
        pairs = zip(method.record.levels, method.record.frame_levels, strict=True)
        far = [f"{level:g} (shown by {frame:.2f})" for level, frame in pairs if abs(level - frame) > _FAR_FRAME]
        if far:
            yield f"{method.name}: no frame was made at level {', '.join(far)}. The nearest frame is shown instead."
        off = {judge: ", ".join(_missed_levels(chapter, method, judge)) for judge in method.run.judges}
        if any(off.values()):
            means = (f"{judge} gives {levels}" for judge, levels in off.items() if levels)
            yield f"{method.name} misses levels. The mean p should be near the level, but {'; '.join(means)}."


def _missed_levels(chapter: Chapter, method: Method, judge: str) -> Iterator[str]:
    # A judge that gives real patches 0.1 and 0.8 cannot give the levels 0 and 1.
    ends = [method.run.real(which, "probability", judge) for which in ("source", "target")]
    low, high = (end.value for end in ends) if all(end and end.value is not None for end in ends) else (0.0, 1.0)
    for level in (level for level in levels_of(chapter) if level > 0):
        figure = find(method, "probability", method.run.network(judge), level)
        if figure is None or figure.value is None:
            continue
        least, most = (figure.value if end is None else end for end in (figure.low, figure.high))
        nearest = min(max(level, least), most)
        goal = min(max(level, low), high)
        if abs(figure.value - goal) > _MISSED and abs(nearest - goal) > _MISSED / 2:
            yield f"{figure.value:.2f} at level {level:g}"


def _floors(chapter: Chapter) -> Iterator[str]:
    missing: dict[str, dict[str, None]] = {}
    for run in chapter.runs:
        for figure in (figure for figure in run.metrics.values if not figure.method.startswith("real ")):
            floor = floor_of(figure.quantity)
            at = figure.level if floor and floor[0] == "own" else None
            beside = floor and run.real(*floor, figure.extractor, at)
            if floor and (beside is None or beside.value is None):
                label = words_of(figure.quantity).label.removesuffix(", worst")
                missing.setdefault(chapter.called(run.network(figure.extractor)), {})[label] = None
    for by, labels in missing.items():
        yield (
            f"{UNKNOWN} the floor (real patches against real patches) of {', '.join(labels)} by {by}. So nobody can "
            "say which values real patches would reach."
        )
    if not chapter.baselines:
        yield "No baselines (copy the source, nearest real target) stand beside the methods. Evaluate again."


def _of_evaluate(chapter: Chapter) -> Iterator[str]:
    """Warnings of evaluate: poor judges, near-copies, stain, few images, undefined figures."""
    for run in chapter.runs:
        yield from (chapter.of_run(run) + text for text in run.metrics.warnings)


def _uncounted(chapter: Chapter) -> Iterator[str]:
    for run in chapter.runs:
        if run.cellularity is None:
            yield (
                f"{run.name}: nuclei were not counted. So nothing here says whether cellularity follows the level. "
                f"To count them (into {CELLULARITY}): cellflux-bridge cellularity {run.folder}"
            )
        elif run.cellularity.parameters.file and not trusts_everything():
            yield (
                f"{run.name}: nuclei are not outlined, because a network counted them "
                f"({run.cellularity.parameters.file}). If you trust this run, pass --trust."
            )
    for method in (method for method in chapter.methods if method.trajectory and method.run.cellularity):
        if method.cellularity is None:
            together = (m.trajectory for m in chapter.methods if m.run is method.run and m.trajectory)
            yield (
                f"{method.name}: its nuclei were not counted. To count those of all methods: cellflux-bridge "
                f"cellularity {' '.join(map(str, together))}"
            )
        elif method.cellularity.config_hash != method.header.config_hash:
            yield (
                f"{method.name}: the sequences in {method.trajectory} were made again after their nuclei were counted. "
                "Run cellflux-bridge cellularity again."
            )


def _nuclei(chapter: Chapter) -> Iterator[str]:
    for run in chapter.runs:
        for quantity in (f"{OF_NUCLEI}area_fraction", f"{OF_NUCLEI}count"):
            goal = run.real("target", quantity)
            if goal is None or goal.low is None or goal.high is None:
                continue
            ends = ((method.name, method.value(quantity, 1.0)) for method in chapter.methods if method.run is run)
            apart = [
                f"{name} {number(end.value)} ({interval(end.low, end.high)})"
                for name, end in ends
                if end and None not in (end.low, end.high) and (end.high < goal.low or end.low > goal.high)
            ]
            if apart:
                yield (
                    f"{words_of(quantity).label.capitalize()} at level 1 differs from real {chapter.target}: "
                    f"{', '.join(apart)}; real: {number(goal.value)} ({interval(goal.low, goal.high)})."
                )


def _networks(chapter: Chapter) -> Iterator[str]:
    if len({tuple(run.network(name) for name in run.networks) for run in chapter.runs}) > 1:
        yield (
            "The runs were judged by different networks. Do not compare figures of different networks; they stand in "
            "separate rows. To compare the runs, evaluate all their trajectories together."
        )
