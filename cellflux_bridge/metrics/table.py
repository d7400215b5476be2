"""An evaluation as a Markdown table: quantities down, methods, baselines and real patches across."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from cellflux_bridge.data.patches import SCORE_WINDOW
from cellflux_bridge.metrics.evaluate import Evaluation
from cellflux_bridge.metrics.manifold import FIGURES as MANIFOLD
from cellflux_bridge.metrics.reference_set import REAL_OWN, REAL_POOLED, REAL_SCORED, REAL_SOURCE, REAL_TARGET
from cellflux_bridge.metrics.tissue import FIGURES
from cellflux_bridge.metrics.values import Value

_Row = tuple[str, Callable[[str], str]]


class _Lookup:
    """Values by method, quantity, level and extractor, as the text of a cell; "" where there is none."""

    def __init__(self, evaluation: Evaluation):
        self._rows = {(v.method, v.quantity, v.level, v.extractor): v for v in evaluation.values}
        self._devices = {of.name: of.cost.device for of in evaluation.methods if of.cost is not None}
        self.levels = [(k + 1) / evaluation.num_levels for k in range(evaluation.num_levels)]

    def get(self, method: str, quantity: str, level: float | None = None, by: str = "") -> Value | None:
        return self._rows.get((method, quantity, level, by))

    def text(self, method: str, quantity: str, level: float | None = None, by: str = "") -> str:
        return _text(self.get(method, quantity, level, by))

    def at_end(self, method: str, quantity: str, by: str = "") -> str:
        """At level 1; of real patches, which have no level, the value itself."""
        return self.text(method, quantity, None if method in (REAL_SOURCE, REAL_TARGET) else 1.0, by)

    def seconds(self, method: str) -> str:
        """With the device that took them."""
        return f"{self.text(method, 'seconds')} ({self._devices[method]})" if method in self._devices else ""

    def both(self, method: str, quantities: Sequence[str], by: str) -> str:
        return "; ".join(filter(None, (self.text(method, quantity, None, by) for quantity in quantities)))

    def over_levels(self, method: str, quantity: str, by: str, *, inner: bool = False) -> list[Value]:
        found = [self.get(method, quantity, level, by) for level in self.levels[: -1 if inner else None]]
        return [value for value in found if value is not None]

    def mean(self, method: str, quantity: str, by: str) -> str:
        """The mean over levels; the real patches may differ from level to level in number."""
        found = self.over_levels(method, quantity, by)
        if not found:
            return ""
        least, most = min(v.n_real for v in found), max(v.n_real for v in found)
        against = f"{least}" if least == most else f"{least} to {most}"
        return f"{_number(float(np.mean([v.value for v in found])))} (against {against})"

    def largest(self, method: str, quantity: str, by: str, *, inner: bool = False) -> str:
        found = self.over_levels(method, quantity, by, inner=inner)
        if not found:
            return ""
        worst = max(found, key=lambda value: value.value)
        return f"{_text(worst)} at {worst.level:g}"


def _number(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.3g}"


def _halves(floor: Value) -> str:
    return f"{floor.n} against {floor.n_real}"


def _text(value: Value | None) -> str:
    if value is None:
        return ""
    interval = "" if np.isnan(value.low) else f" [{_number(value.low)}, {_number(value.high)}]"
    return _number(value.value) + interval


def _rows(evaluation: Evaluation, look: _Lookup) -> Iterator[_Row]:
    of = {use: [n.name for n in evaluation.networks if n.use == use] for use in ("judge", "features", "scores")}
    for by in of["judge"]:
        yield f"flip rate at 1, {by}", partial(look.at_end, quantity="flip_rate", by=by)
    for quantity, label in (
        ("calibration_mean", "calibration (a), of means"),
        ("calibration_image", "calibration (b), of images"),
        ("monotone_share", "monotone sequences"),
        ("rank_correlation", "rank correlation with the level"),
    ):
        for by in of["judge"]:
            yield f"{label}, {by}", partial(look.text, quantity=quantity, by=by)
    for by in of["scores"]:
        yield f"severity error, {by}", partial(look.text, quantity="severity_error", by=by)
    for by in (*of["judge"], *of["features"]):
        worst = "KID to real, pooled, over the floor, worst"
        for where, inner in (("inner level", True), ("level", False)):
            cell = partial(look.largest, quantity="kid_pooled_over_floor", by=by, inner=inner)
            yield f"{worst} {where}, {by}", cell
    for by in (*of["judge"], *of["features"]):
        preserved = "distance to own source / to a random one, largest below level 1"
        yield f"{preserved}, {by}", partial(look.largest, quantity="preservation", by=by, inner=True)
    (extractor,) = of["features"]
    like = "score" if of["scores"] else "class"
    for kind in ("KID", "Frechet distance"):
        key = kind.split()[0].lower()
        own = f"{kind} to real of the own {like}, mean over levels, {extractor}"
        yield own, partial(look.mean, quantity=f"{key}_own", by=extractor)
        yield (
            f"{kind} of level 1 to real {evaluation.target}, {extractor}",
            partial(look.text, quantity=f"{key}_target", level=1.0, by=extractor),
        )
        if kind != "KID":
            pooled = partial(look.text, quantity=f"{key}_pooled", by=extractor)
            yield f"{kind} of all frames to real, pooled, {extractor}", pooled
        yield (
            f"{kind} to real of the own {like}, guided / unguided: mean over levels; ratio of means",
            partial(look.both, quantities=[f"guidance_{key}_ratio", f"guidance_{key}_ratio_of_means"], by=extractor),
        )
    for figure in MANIFOLD:
        own = f"{figure} against real of the own {like}, mean over levels, {extractor}"
        yield own, partial(look.mean, quantity=f"{figure}_own", by=extractor)
        pooled = partial(look.text, quantity=f"{figure}_pooled", by=extractor)
        yield f"{figure} of all frames against real, pooled, {extractor}", pooled
        at_target = partial(look.at_end, quantity=f"{figure}_target", by=extractor)
        yield f"{figure} of level 1 against real {evaluation.target}, {extractor}", at_target
    yield "way in features / straight", partial(look.text, quantity="path_over_straight", by=extractor)
    yield "largest step / mean step", partial(look.text, quantity="largest_over_mean_step", by=extractor)
    for by in (*of["judge"], *of["features"]):
        share = partial(look.at_end, quantity="stain_share", by=by)
        yield f"share of the change at 1 that a stain transfer explains, {by}", share
    yield "MS-SSIM of haematoxylin to own source at 1", partial(look.at_end, quantity="ms_ssim")
    layers = partial(look.at_end, quantity="layer_distance", by=extractor)
    yield f"distance to own source at 1, over layers, {extractor}", layers
    for quantity, label in (
        ("nearest_training_ratio", "nearest training patch at 1, distance over that of held-out real patches"),
        ("nearest_training_closer", "chance to lie nearer to training than a held-out real patch, at 1"),
    ):
        yield f"{label}, {extractor}", partial(look.at_end, quantity=quantity, by=extractor)
    copies = partial(look.text, quantity="near_copy_share", by=extractor)
    yield f"share of frames nearer to training than all held-out real patches, {extractor}", copies
    for by in (*of["judge"], *of["features"]):
        cycle = partial(look.text, quantity="cycle_preservation", by=by)
        yield f"there and back: distance to own source / to a random one, {by}", cycle
    yield "there and back: MS-SSIM of haematoxylin", partial(look.text, quantity="cycle_ms_ssim")
    yield "seconds a sequence", look.seconds
    for quantity, label in (
        ("nfe", "network forwards a sequence"),
        ("gradients", "classifier gradients a sequence"),
        ("cpu_seconds", "CPU seconds a sequence"),
    ):
        yield label, partial(look.text, quantity=quantity)
    for figure in FIGURES:
        yield f"{figure.replace('_', ' ')} at 1", partial(look.at_end, quantity=figure)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def markdown(evaluation: Evaluation) -> str:
    """The table of methods, what its numbers rest on, and the paired differences."""
    look = _Lookup(evaluation)
    sequences = (*evaluation.methods, *evaluation.baselines)
    columns = {s.name: f"{s.name} (n = {len(s.source_ids)})" for s in sequences}
    for name, label in ((REAL_SOURCE, evaluation.source), (REAL_TARGET, evaluation.target)):
        columns[name] = f"real {label} (n = {look.get(name, FIGURES[0]).n})"
    rows = [[label, *(cell(name) for name in columns)] for label, cell in _rows(evaluation, look)]
    rows = [row for row in rows if any(row[1:])]
    lines = [f"# {evaluation.source} to {evaluation.target}, {evaluation.num_levels} levels", ""]
    lines += [*_table(["", *columns.values()], rows), "", *_notes(evaluation, look), ""]
    if evaluation.differences:
        head = ["paired difference", "by", "n (groups)", "difference", "p"]
        lines += [*_table(head, list(_differences(evaluation))), ""]
    return "\n".join(lines)


def by_level(evaluation: Evaluation) -> str:
    """One line a quantity, network and method: its value at every level."""
    levels = [0.0, *((k + 1) / evaluation.num_levels for k in range(evaluation.num_levels))]
    lines: dict[tuple[str, str, str], dict[float, float]] = {}
    for value in evaluation.values:
        if value.level is not None:
            line = lines.setdefault((value.quantity, value.extractor, value.method), {})
            line[value.level] = value.value
    rows = [
        [*key, *(_number(line[level]) if level in line else "" for level in levels)]
        for key, line in sorted(lines.items())
        if len(line) > 1
    ]
    head = ["by level", "by", "method", *(f"{level:g}" for level in levels)]
    return "\n".join([*_table(head, rows), ""])


def _notes(evaluation: Evaluation, look: _Lookup) -> Iterator[str]:
    yield "Square brackets: 95 % intervals, over groups of sources. Distances of different extractors do not compare."
    uses = {"judge": "judge", "features": "extractor that neither guided nor judges", "scores": "severity estimator"}
    for network in evaluation.networks:
        told = f"- {network.name}: {uses[network.use]}, {network.view}, {network.checkpoint}"
        floor = look.get(REAL_POOLED, "kid_floor", None, network.name)
        if floor is not None:
            spread = look.get(REAL_POOLED, "kid_floor_spread", None, network.name)
            told += (
                f"; real-vs-real KID of halves by group, {_halves(floor)} patches: mean {_number(floor.value)}, "
                f"standard deviation {_number(spread.value)}"
            )
        error = look.get(REAL_SCORED, "severity_error", None, network.name)
        if error is not None:
            told += f"; its own error on {error.n} real patches: {_text(error)}; real patches of a level: score within "
            told += f"{SCORE_WINDOW:g}"
        yield told
    by = next(network.name for network in evaluation.networks if network.use == "features")
    kinds = {"KID": "kid", "Frechet distance": "frechet", **{figure: figure for figure in MANIFOLD}}
    for name, label in ((REAL_TARGET, f"real {evaluation.target} patches"), (REAL_POOLED, "real patches, pooled")):
        found = {kind: look.get(name, f"{key}_floor", None, by) for kind, key in kinds.items()}
        told = ", ".join(f"{kind} {_text(value)}" for kind, value in found.items())
        yield f"- floors of halves of {label} ({_halves(found['KID'])}), {by}: {told}"
    told = ", ".join(f"{kind} {look.mean(REAL_OWN, f'{key}_floor', by)}" for kind, key in kinds.items())
    yield f"- floors of halves of the real patches of each level's own, mean over levels, {by}: {told}"
    for guided, unguided in evaluation.unguided.items():
        yield f"- {guided} is compared to {unguided}"
    for warning in evaluation.warnings:
        yield f"- **warning**: {warning}"


def _differences(evaluation: Evaluation) -> Iterator[list[str]]:
    for first, second, quantity, extractor, n, paired in evaluation.differences:
        interval = f"[{_number(paired.low)}, {_number(paired.high)}]"
        yield [
            f"{quantity.replace('_', ' ')}: {first} less {second}",
            extractor,
            f"{n} ({paired.num_groups})",
            f"{_number(paired.difference)} {interval}",
            f"{paired.p:.2g}",
        ]
