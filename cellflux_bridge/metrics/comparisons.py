"""Methods against methods on the sources that both carried: paired differences, and guidance against none."""

from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.statistics import Estimate, Paired, paired_difference
from cellflux_bridge.metrics import progression
from cellflux_bridge.metrics.quantities import own_distances, source_distances, subject
from cellflux_bridge.metrics.reference_set import ReferenceSet
from cellflux_bridge.metrics.sequences import Sequences
from cellflux_bridge.metrics.values import Values


class Difference(NamedTuple):
    """`first` less `second` in the mean of a quantity, on the `n` sources that both carried."""

    first: str
    second: str
    quantity: str
    extractor: str
    n: int
    paired: Paired


def _common(first: Sequences, second: Sequences) -> tuple[Sequences, Sequences]:
    """The sequences of the sources that both have, in the same order."""
    places = {source_id: n for n, source_id in enumerate(second.source_ids)}
    pairs = [(n, places[source_id]) for n, source_id in enumerate(first.source_ids) if source_id in places]
    rows = np.array(pairs, dtype=int).reshape(-1, 2)
    return first.rows(rows[:, 0]), second.rows(rows[:, 1])


def differences(first: Sequences, second: Sequences, panel: ReferenceSet) -> list[Difference]:
    """Paired differences of all that each source has a figure of its own for; none where no source is common."""
    first, second = _common(first, second)
    if not first.source_ids:
        return []
    groups = panel.groups(first.source_ids)
    own, others = _figures_of_sources(first, panel), _figures_of_sources(second, panel)
    resamples, rows = panel.resamples(groups), []
    for (quantity, extractor), values in own.items():
        found = paired_difference(values, others[quantity, extractor], groups, resamples=resamples)
        rows.append(Difference(first.name, second.name, quantity, extractor, len(values), found))
    return rows


def _figures_of_sources(of: Sequences, panel: ReferenceSet) -> dict[tuple[str, str], np.ndarray]:
    """(N,) of each quantity and network; of preservation the mean over levels of each source's own ratio."""
    levels, figures = np.array(of.frame_levels), {}
    for judge in panel.judges:
        seen = of.seen[judge.name]
        figures["flip_rate", judge.name] = seen.is_target[:, -1]
        figures["calibration_image", judge.name] = progression.calibration_of_images(seen.value, levels)
        figures["monotone_share", judge.name] = progression.is_monotone(seen.value)
    for network in (*panel.judges, panel.extractor):
        own, others, _ = source_distances(of, network, panel)
        figures["preservation", network.name] = (own / others)[:, 1:].mean(1)
    if panel.estimator is not None:
        estimates = of.seen[panel.estimator.name].value
        figures["severity_error", panel.estimator.name] = progression.calibration_of_images(estimates, levels)
    return figures


def add_guidance(values: Values, guided: Sequences, unguided: Sequences, panel: ReferenceSet) -> None:
    """KID and Frechet distance to real patches of the own level, with guidance over without, on common sources."""
    with_, without = _common(guided, unguided)
    if not with_.source_ids:
        raise UserError(
            f"--unguided {unguided.folder}: none of its sources is one of {guided.folder}; translate the same ones"
        )
    found = np.empty((2, 2, len(with_.levels)))  # KID or Frechet, with or without, level
    for number, level in enumerate(with_.frame_levels, start=1):
        reference = panel.own_reference(level)
        for column, of in enumerate((with_, without)):
            distance, frechet = own_distances(of, number, reference, panel)
            found[:, column, number - 1] = distance.value, frechet
    for kind, (above, below) in zip(("kid", "frechet"), found, strict=True):
        quantity = f"guidance_{kind}_ratio"
        ratios = [_ratio(*pair) for pair in zip(above, below, strict=True)]
        each = [Estimate(ratio, np.nan, np.nan) for ratio in ratios]
        values.add_levels(subject(with_), quantity, each, by=panel.extractor)
        values.add(subject(with_), quantity, float(np.mean(ratios)), by=panel.extractor)
        values.add(subject(with_), f"{quantity}_of_means", _ratio(above.mean(), below.mean()), by=panel.extractor)


def _ratio(above: float, below: float) -> float:
    """NaN where a distance is not above 0, as an unbiased estimate may be: no share of it can be told."""
    return float(above / below) if min(above, below) > 0 else float("nan")
