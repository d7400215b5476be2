"""What a reader must know before believing a report, in plain words."""

from collections.abc import Iterator

from cellflux_bridge.metrics.words import NUCLEI, floor_of, interval, number, words
from cellflux_bridge.report.gallery import Gallery
from cellflux_bridge.report.runs import CELLULARITY, Chapter, Method
from cellflux_bridge.report.tables import find, levels_of

# A level counts as unmet where the judges' mean p lies this far off, and its interval does not reach nearer.
_UNMET, _FAR_FRAME = 0.15, 0.05
# A structure judge that follows a colour judge less closely than this speaks of recolouring.
_RECOLOURED = 0.15
_GOOD_JUDGE = 0.8


def cautions(chapter: Chapter, gallery: Gallery | None) -> list[str]:
    """Every warning of a chapter, the gravest first."""
    parts = (_stale, _recolouring, _unmet, _floors, _told, _judges, _uncounted, _nuclei, _networks)
    found = [text for part in parts for text in part(chapter)]
    if gallery is None:
        found.append("No sequence folder named in metrics.json is here, so no images are shown, only figures.")
    return list(dict.fromkeys(found))


def _stale(chapter: Chapter) -> Iterator[str]:
    for method in chapter.methods:
        if method.trajectory is None:
            where = method.record["trajectory"]
            yield f"{method.name}: its sequences ({where}) are not here; only its figures are shown."
        elif method.header.config_hash != method.record["config_hash"]:
            yield (
                f"{method.name}: the sequences in {method.trajectory} were made anew after they were judged. Its "
                "figures belong to the earlier ones; run cellflux-bridge evaluate again."
            )


def _recolouring(chapter: Chapter) -> Iterator[str]:
    if not any(n["use"] == "judge" and n["view"] != "rgb" for run in chapter.runs for n in run.metrics["networks"]):
        yield (
            "Only colour judges were asked. A mere recolouring can satisfy them; train one of structure with "
            "cellflux-bridge train-classifier RUN classifier.view=grey and evaluate with it, too."
        )
    for method in chapter.methods:
        judges = [n for n in method.run.metrics["networks"] if n["use"] == "judge"]
        flips = {n["name"]: (n["view"], method.value("flip_rate", 1.0, n["name"])) for n in judges}
        flips = {name: (view, v["value"]) for name, (view, v) in flips.items() if v and v["value"] is not None}
        colour = max((v for view, v in flips.values() if view == "rgb"), default=None)
        structure = min((v for view, v in flips.values() if view != "rgb"), default=None)
        if colour is not None and structure is not None and colour - structure > _RECOLOURED:
            yield (
                f"{method.name} looks like a recolouring in part: the colour judge calls {colour:.0%} of its images "
                f"{chapter.target}, the structure judge only {structure:.0%}."
            )


def _unmet(chapter: Chapter) -> Iterator[str]:
    for method in chapter.methods:
        pairs = zip(method.record["levels"], method.record["frame_levels"], strict=True)
        far = [f"{level:g} (shown by {frame:.2f})" for level, frame in pairs if abs(level - frame) > _FAR_FRAME]
        if far:
            yield f"{method.name}: no frame was made at level {', '.join(far)}; the nearest one stands for it."
        off = {judge: missed for judge in method.run.judges if (missed := ", ".join(_missed(chapter, method, judge)))}
        if off:
            told = "; ".join(f"{judge} gives a mean p of {missed}" for judge, missed in off.items())
            yield f"{method.name} misses levels: {told}."


def _missed(chapter: Chapter, method: Method, judge: str) -> Iterator[str]:
    by = method.run.network(judge)
    # A judge that gives real patches 0.1 and 0.8 cannot give the levels 0 and 1.
    ends = [(method.run.real(which, "probability", judge) or {}).get("value") for which in ("source", "target")]
    low, high = (0.0, 1.0) if None in ends else ends
    for level in levels_of(chapter):
        value = find(method, "probability", by, level)
        if value is None or value["value"] is None or level == 0:
            continue
        least, most = (value["value"] if value[end] is None else value[end] for end in ("low", "high"))
        nearest = min(max(level, least), most)
        wanted = min(max(level, low), high)
        if abs(value["value"] - wanted) > _UNMET and abs(nearest - wanted) > _UNMET / 2:
            yield f"{value['value']:.2f} at {level:g}"


def _floors(chapter: Chapter) -> Iterator[str]:
    missing = {}
    for run in chapter.runs:
        for value in run.metrics["values"]:
            floor = floor_of(value["quantity"])
            of_method = not value["method"].startswith("real ")
            at = value["level"] if floor and floor[0] == "own" else None
            if floor and of_method and (run.real(*floor, value["extractor"], at) or {}).get("value") is None:
                called = chapter.called(run.network(value["extractor"]))
                missing[words(value["quantity"]).label.removesuffix(", worst"), called] = None
    for label, by in missing:
        yield f"{label} ({by}) has no real-versus-real floor: how near real patches come to each other is not known."
    if not chapter.baselines:
        yield "No baselines (copy the source, nearest real target) stand beside the methods; evaluate again."


def _told(chapter: Chapter) -> Iterator[str]:
    """What evaluate warned of: few images, near copies, stain, undefined figures."""
    for run in chapter.runs:
        yield from (chapter.of_run(run) + text for text in run.metrics.get("warnings", ()))


def _judges(chapter: Chapter) -> Iterator[str]:
    for run in chapter.runs:
        for judge in run.judges:
            for which, label in (("target", chapter.target), ("source", chapter.source)):
                value = run.real(which, "flip_rate", judge)
                if value is None or value["value"] is None:
                    continue
                share = value["value"] if which == "target" else 1 - value["value"]
                if share < _GOOD_JUDGE:
                    yield (
                        f"{chapter.called(run.network(judge))} recognises only {share:.0%} of the real {label} patches "
                        f"(n = {value['n']}): its word on made ones is worth no more."
                    )


def _uncounted(chapter: Chapter) -> Iterator[str]:
    for run in chapter.runs:
        if run.cellularity is None:
            yield (
                f"{run.name}: nuclei were not counted, so nothing here says whether cellularity follows the level. "
                f"Make {CELLULARITY} with: cellflux-bridge cellularity {run.folder}"
            )
    for method in (method for method in chapter.methods if method.trajectory and method.run.cellularity):
        if method.cellularity is None:
            together = (m.trajectory for m in chapter.methods if m.run is method.run and m.trajectory)
            yield (
                f"{method.name}: its nuclei were not counted. Count those of all methods with: cellflux-bridge "
                f"cellularity {' '.join(map(str, together))}"
            )
        elif method.cellularity["config_hash"] != method.header.config_hash:
            yield (
                f"{method.name}: the sequences in {method.trajectory} were made anew after their nuclei were counted; "
                "run cellflux-bridge cellularity again."
            )


def _nuclei(chapter: Chapter) -> Iterator[str]:
    for run in (run for run in chapter.runs if run.cellularity is not None):
        for quantity in ("area_fraction", "count"):
            goals = (r for r in run.cellularity["real"] if (r["class"], r["quantity"]) == (chapter.target, quantity))
            goal = next(goals, None)
            ends = {m.name: _end(m, quantity) for m in chapter.methods if m.run is run and m.cellularity is not None}
            if goal is None or goal["low"] is None:
                continue
            apart = [
                f"{name} {number(end['mean'])} ({interval(end['low'], end['high'])})"
                for name, end in ends.items()
                if end is not None and (end["high"] < goal["low"] or end["low"] > goal["high"])
            ]
            if apart:
                yield (
                    f"{NUCLEI[quantity].capitalize()} at level 1 is not that of real {chapter.target}, "
                    f"{number(goal['mean'])} ({interval(goal['low'], goal['high'])}): {', '.join(apart)}."
                )


def _end(method: Method, quantity: str) -> dict | None:
    """The last point of a curve of cellularity.json, where it has an interval."""
    curve = [c for c in method.cellularity["curves"] if c["quantity"] == quantity and c["low"] is not None]
    return max(curve, key=lambda c: c["level"], default=None)


def _networks(chapter: Chapter) -> Iterator[str]:
    first = {tuple(run.network(name) for name in run.networks) for run in chapter.runs}
    if len(first) > 1:
        yield (
            "The runs were judged by different networks. Figures of different networks do not compare and stand in "
            "rows of their own; evaluate all trajectories together to compare them."
        )
