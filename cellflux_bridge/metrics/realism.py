"""Can made patches be told from real ones? Figures of pixels, without weights; one of what the extractor sees."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cellflux_bridge.base.statistics import Estimate, half_splits
from cellflux_bridge.metrics.bands import KINDS, radial_spectrum, statistics
from cellflux_bridge.metrics.damage import DAMAGED, DAMAGES, RESPONSE
from cellflux_bridge.metrics.fidelity import Floor, floor_of, kid, kid_floor
from cellflux_bridge.metrics.networks import RealPatches
from cellflux_bridge.metrics.progression import feature_steps
from cellflux_bridge.metrics.reference_set import MOST_PIXELS, REAL_OWN, REAL_TARGET, ReferenceSet
from cellflux_bridge.metrics.sequences import Sequences
from cellflux_bridge.metrics.sliced_wasserstein import swd
from cellflux_bridge.metrics.two_sample import feature_scores, logistic_scores, network_scores, two_sample
from cellflux_bridge.metrics.values import Recorder

# Splits of real patches: of a test by bands, of one by a network and of distances, of an extractor's response.
_SPLITS, _FEW_SPLITS, _DAMAGE_SPLITS = 5, 2, 10


def add_realism(record: Recorder, of: Sequences, reference: ReferenceSet) -> None:
    """Record, of a method or baseline, the two-sample tests by level, and of level 1 those by a network and by
    the extractor's features, the sliced Wasserstein distances and the error of the spectrum."""
    groups, bands = reference.extractor.groups_of_sources(of.source_ids), of.arrays["bands"]
    known: dict[tuple, Estimate] = {}  # a baseline has one image at all levels
    sets = [("own", reference.own(level)) for level in of.frame_levels] + [("target", reference.target)]
    for place, (to, real) in enumerate(sets, start=1):
        number = min(place, len(of.levels))
        level = of.levels[number - 1]
        for kind, part in KINDS.items():
            made = bands[:, number, part]
            key = made.tobytes(), real.bands.tobytes()
            if key not in known:
                draw = reference.generator("two-sample", kind)
                sides = (made, real.bands[:, part], groups, real.groups)
                known[key] = two_sample(*sides, scores_of=logistic_scores, generator=draw)
            record.add(f"two_sample_{kind}_{to}", known[key], level=level, n_real=len(real.numbers))
    pixels, real_groups = reference.target_pixels
    chosen = _some(len(groups), reference)
    last, options = of.arrays["last"][chosen], {"level": of.levels[-1], "n_real": len(pixels)}
    draw = reference.generator("two-sample", "network")
    found = two_sample(last, pixels, groups[chosen], real_groups, scores_of=network_scores, generator=draw)
    record.add("two_sample_network_target", found, **options)
    for figure, value in _distances(last, pixels).items():
        record.add(f"{figure}_target", value, **options)
    reference.spectra[of.name] = radial_spectrum(last).mean(0)
    features = of.outputs[reference.extractor.name].features
    sides = (features[chosen, -1], reference.target_features, groups[chosen], real_groups)
    found = two_sample(*sides, scores_of=feature_scores, generator=reference.generator("two-sample", "features"))
    record.add("two_sample_features_target", found, by=reference.extractor, **options)
    record.add("step_unevenness", _unevenness(of.arrays["steps"]))
    record.add("step_unevenness", _unevenness(feature_steps(features)), by=reference.extractor)


def _some(num: int, reference: ReferenceSet) -> np.ndarray:
    """The numbers, in order, of as many of `num` items as there are target patches in memory at most."""
    return np.sort(reference.generator("two-sample", "some").permutation(num)[:MOST_PIXELS])


def _unevenness(steps: np.ndarray) -> float:
    """The largest step over the mean one, of changes a step (N, K); NaN where nothing moves."""
    profile = steps.mean(0)
    return float(profile.max() / profile.mean()) if profile.any() else float("nan")


def _distances(made: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """The sliced Wasserstein distance of each scale, and the mean difference of the mean log10 spectra, of patches."""
    apart = np.abs(radial_spectrum(made).mean(0) - radial_spectrum(real).mean(0)).mean()
    return {**{f"swd_{scale}": value for scale, value in swd(made, real).items()}, "spectrum_error": float(apart)}


def add_floors(reference: ReferenceSet, levels: Sequence[float]) -> None:
    """Record what these figures are between halves, by group, of real patches."""
    known: dict[bytes, dict[str, Floor]] = {}  # levels share their patches with each other and with the classes
    sets = [(REAL_TARGET, None, reference.target), *((REAL_OWN, level, reference.own(level)) for level in levels)]
    for name, level, real in sets:
        key = real.bands.tobytes()
        if key not in known:
            known[key] = _band_floors(real, reference)
        for kind, floor in known[key].items():
            reference.add_floor(name, kind, floor, num=len(real.numbers), level=level)
    pixels, groups = reference.target_pixels
    reference.spectra[REAL_TARGET] = radial_spectrum(pixels).mean(0)
    values = defaultdict(list)
    for first, second in half_splits(groups, num=_FEW_SPLITS, generator=reference.generator("floor", "pixels")):
        sides = (pixels[first], pixels[second], groups[first], groups[second])
        values["two_sample_network"].append(two_sample(*sides, scores_of=network_scores).value)
        seen = (reference.target_features[part] for part in (first, second))
        values["two_sample_features"].append(two_sample(*seen, *sides[2:], scores_of=feature_scores).value)
        for figure, value in _distances(*sides[:2]).items():
            values[figure].append(value)
    for figure, each in values.items():
        by = reference.extractor if figure == "two_sample_features" else None
        reference.add_floor(REAL_TARGET, figure, floor_of(np.array(each)), by=by, num=len(pixels))


def _band_floors(real: RealPatches, reference: ReferenceSet) -> dict[str, Floor]:
    values = defaultdict(list)
    for first, second in half_splits(real.groups, num=_SPLITS, generator=reference.generator("floor", "two-sample")):
        for kind, part in KINDS.items():
            sides = real.bands[first, part], real.bands[second, part], real.groups[first], real.groups[second]
            values[f"two_sample_{kind}"].append(two_sample(*sides, scores_of=logistic_scores).value)
    return {kind: floor_of(np.array(each)) for kind, each in values.items()}


def add_damage(reference: ReferenceSet) -> None:
    """Record what real target patches with known damage get: the figures of pixels, from the half of the groups that
    is damaged to the other half; and the response of each network, its KID above the floor over the floor's spread."""
    pixels, groups = reference.target_pixels
    networks = (*reference.judges, reference.extractor)
    splits = half_splits(groups, num=_DAMAGE_SPLITS, generator=reference.generator("damage", "splits"))
    real = {network.name: network.outputs(pixels, where="real patches").features for network in networks}
    floors = {
        name: kid_floor(each, groups, generator=reference.generator("damage", "floor")) for name, each in real.items()
    }
    for name, damage in DAMAGES.items():
        damaged = damage(pixels, reference.generator("damage", name))
        record = Recorder(reference.rows, DAMAGED + name, len(pixels))
        for first, second in splits[:1]:
            sides = groups[first], groups[second]
            for kind, part in KINDS.items():
                both = statistics(damaged[first])[:, part], statistics(pixels[second])[:, part]
                found = two_sample(*both, *sides, scores_of=logistic_scores)
                record.add(f"two_sample_{kind}_target", found, n_real=len(second))
            for figure, value in _distances(damaged[first], pixels[second]).items():
                record.add(f"{figure}_target", value, n_real=len(second))
        for network in networks:
            seen = network.outputs(damaged, where=f"patches with {name}").features
            of_real, floor = real[network.name], floors[network.name]
            apart = [kid(seen[a], of_real[b], groups=groups[a], real_groups=groups[b]).value for a, b in splits]
            response = (np.mean(apart) - floor.mean) / floor.spread if apart else np.nan
            record.add(RESPONSE, response, by=network, n_real=len(pixels))
            if network is reference.extractor and apart:
                a, b = splits[0]
                found = two_sample(seen[a], of_real[b], groups[a], groups[b], scores_of=feature_scores)
                record.add("two_sample_features_target", found, by=network, n_real=len(b))
                record.add("kid_target", float(np.mean(apart)), by=network, n_real=len(b))
