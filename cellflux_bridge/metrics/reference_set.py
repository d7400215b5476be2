"""The panel that frames stand before: its networks, the real patches they compare frames to, and the floors."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.base.statistics import NUM_RESAMPLES, Estimate, Resamples, bootstrap, estimate_mean
from cellflux_bridge.data.patches import near_level
from cellflux_bridge.images.stain import StainReference, fit_reference
from cellflux_bridge.metrics.fidelity import Floor, frechet_floor, kid_floor
from cellflux_bridge.metrics.manifold import manifold_floors
from cellflux_bridge.metrics.memorisation import Training
from cellflux_bridge.metrics.networks import Network, NetworkOutputs, RealPatches
from cellflux_bridge.metrics.structure import FIGURES as STRUCTURE
from cellflux_bridge.metrics.tissue import FIGURES, tissue_figures
from cellflux_bridge.metrics.values import Subject, Values

NUM_SUBSAMPLES = 100
REAL_SOURCE, REAL_TARGET, REAL_POOLED, REAL_SCORED = "real source", "real target", "real pooled", "real scored"
REAL_OWN = "real own"  # what frames of a level are compared to
_CHUNK = 256
_NUM_PAIRS, _NUM_FOR_STAIN = 256, 2000


class Real(NamedTuple):
    """Real test patches of source and target, what a network makes of them, and its floor of KID on all of them."""

    patches: RealPatches
    seen: NetworkOutputs
    floor: Floor


class Scored(NamedTuple):
    """Real test patches with scores, their scores in the direction of the target, and the extractor's features."""

    patches: RealPatches
    scores: np.ndarray
    features: np.ndarray


class ReferenceSet:
    """Networks with what they make of real patches, whose figures go to `values`.

    `judges` give probabilities, `extractor` is the network that neither guided nor judges, `estimator` (or None) tells
    severities. `levels` are those whose own real patches are told a floor of; at most `max_real` real patches of a
    class, or with a score, are looked at. Every draw is seeded by `seed` and a purpose.
    """

    def __init__(
        self, networks: Sequence[Network], *, levels: Sequence[float], seed: int, max_real: int | None, values: Values
    ):
        self.networks, self.seed, self._max_real, self._values = tuple(networks), seed, max_real, values
        self.judges = [network for network in networks if network.use == "judge"]
        self.extractor = next(network for network in networks if network.use == "features")
        self.estimator = next((network for network in networks if network.use == "scores"), None)
        self.real = {network.name: self._look(network) for network in (*self.judges, self.extractor)}
        self.training = Training.look(self.extractor, self.real[self.extractor.name].seen.features)
        self._add_extractors_own()
        self._add_structure()
        self.scored = None if self.estimator is None else self._look_at_scored(self.estimator)
        self._add_floors(levels)

    def generator(self, *purpose: str) -> np.random.Generator:
        return numpy_generator(self.seed, "evaluate", *purpose)

    def resamples(self, groups: np.ndarray) -> Resamples:
        return bootstrap(groups, num=NUM_RESAMPLES, generator=self.generator("bootstrap"))

    def mean(self, values: np.ndarray, groups: np.ndarray) -> Estimate:
        """The mean of values (N,) with its interval over their groups."""
        return estimate_mean(values, groups, num=NUM_RESAMPLES, generator=self.generator("bootstrap"))

    def groups(self, source_ids: Sequence[str]) -> np.ndarray:
        """The groups of sources, among which resamples are drawn."""
        return self.judges[0].groups_of_sources(source_ids)

    def own_reference(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """The extractor's features, and groups, of the real patches that frames of a level are compared to.

        With scores: patches of the level (`data.patches.near_level`). Else the source class below 0.5, the target class
        above, both at 0.5.
        """
        if self.scored is not None:
            chosen = near_level(self.scored.scores, level)
            return self.scored.features[chosen], self.scored.patches.groups[chosen]
        real = self.real[self.extractor.name]
        is_target = real.patches.is_target
        chosen = np.ones_like(is_target) if abs(level - 0.5) < 1e-6 else is_target == (level > 0.5)
        return real.seen.features[chosen], real.patches.groups[chosen]

    def stain_reference(self) -> StainReference:
        """The mean colours of real target patches of the training split (Reinhard)."""
        patches = self.extractor.patches
        chosen = patches.sample("train", self.extractor.target, num=_NUM_FOR_STAIN, seed=self.seed)
        return fit_reference("reinhard", list(patches.centre(chosen).permute(0, 2, 3, 1).numpy()))

    def target_reference(self) -> tuple[np.ndarray, np.ndarray]:
        """The extractor's features, and groups, of real target patches."""
        real = self.real[self.extractor.name]
        return real.seen.features[real.patches.is_target], real.patches.groups[real.patches.is_target]

    def pooled_reference(self) -> tuple[np.ndarray, np.ndarray]:
        """The extractor's features, and groups, of real patches of both classes."""
        real = self.real[self.extractor.name]
        return real.seen.features, real.patches.groups

    def _look(self, network: Network) -> Real:
        patches = network.real_patches(num=self._max_real, seed=self.seed)
        seen = network.look_at_patches(network.patches, patches.numbers)
        floor = kid_floor(seen.features, patches.groups, generator=self.generator("floor", REAL_POOLED, "kid"))
        self._add_floor(REAL_POOLED, "kid", floor, by=network, num=len(seen.features))
        for name, chosen in _by_class(patches):
            of = Subject(name, int(chosen.sum()))
            known = {} if network.weights is None else {"probability": seen.value, "flip_rate": seen.is_target}
            for quantity, each in known.items():
                self._values.add(of, quantity, self.mean(each[chosen], patches.groups[chosen]), by=network)
        return Real(patches, seen, floor)

    def _add_floor(self, name: str, kind: str, floor: Floor, *, by: Network, num: int, level=None) -> None:
        """A floor between halves of `num` patches."""
        of, other = Subject(name, num // 2), num - num // 2
        found = Estimate(floor.mean, floor.low, floor.high)
        self._values.add(of, f"{kind}_floor", found, level=level, by=by, n_real=other)
        self._values.add(of, f"{kind}_floor_spread", floor.spread, level=level, by=by, n_real=other)

    def _add_floors(self, levels: Sequence[float]) -> None:
        """The extractor's floors among target patches, among both classes, and among the own patches of each level."""
        sets = [(REAL_POOLED, None, self.pooled_reference()), (REAL_TARGET, None, self.target_reference())]
        sets += [(REAL_OWN, level, self.own_reference(level)) for level in levels]
        known: dict[bytes, dict[str, Floor]] = {}  # levels share their patches with each other and with the classes
        for name, level, (features, groups) in sets:
            same = hashlib.blake2b(features.tobytes()).digest()
            if same not in known:
                known[same] = self._floors(name, features, groups)
            for kind, floor in known[same].items():
                if (name, kind) != (REAL_POOLED, "kid"):  # which every network has
                    self._add_floor(name, kind, floor, by=self.extractor, num=len(features), level=level)

    def _floors(self, name: str, features: np.ndarray, groups: np.ndarray) -> dict[str, Floor]:
        """Of KID, the Frechet distance and the figures of `metrics.manifold`, between random halves."""
        draw, of_pooled = partial(self.generator, "floor", name), self.real[self.extractor.name].floor
        return {
            "kid": of_pooled if name == REAL_POOLED else kid_floor(features, groups, generator=draw("kid")),
            "frechet": frechet_floor(features, groups, generator=draw("frechet")),
            **manifold_floors(features, groups, generator=draw("manifold")),
        }

    def _add_extractors_own(self) -> None:
        """What no network was trained on, of real patches."""
        real = self.real[self.extractor.name].patches
        parts = [real.numbers[i : i + _CHUNK] for i in range(0, len(real.numbers), _CHUNK)]
        figures = np.concatenate([tissue_figures(self.extractor.patches.centre(part).numpy()) for part in parts])
        for name, chosen in _by_class(real):
            for figure, each in zip(FIGURES, figures[chosen].T, strict=True):
                self._values.add(Subject(name, int(chosen.sum())), figure, self.mean(each, real.groups[chosen]))

    def _add_structure(self) -> None:
        """How far real source patches of different groups are apart, which is what a frame keeps that keeps nothing."""
        real, generator = self.real[self.extractor.name].patches, self.generator("structure")
        of_source = generator.permutation(np.flatnonzero(~real.is_target))
        pairs = [
            (i, j) for i, j in zip(of_source, np.roll(of_source, 1), strict=True) if real.groups[i] != real.groups[j]
        ]
        if not pairs:
            return
        chosen = np.array(pairs[:_NUM_PAIRS])
        both = np.stack([self.extractor.patches.centre(real.numbers[column]).numpy() for column in chosen.T], axis=1)
        for figure, each in zip(STRUCTURE, self.extractor.structure(both)[:, 1].T, strict=True):
            by = self.extractor if figure == "layer_distance" else None
            self._values.add(
                Subject(REAL_SOURCE, len(chosen)), figure, self.mean(each, real.groups[chosen[:, 0]]), by=by
            )

    def _look_at_scored(self, estimator: Network) -> Scored:
        real, patches = estimator.real_patches(num=self._max_real, seed=self.seed), estimator.patches
        scores = estimator.scores(real.numbers)
        error = np.abs(estimator.look_at_patches(patches, real.numbers).value - scores)
        found = self.mean(error, real.groups)
        self._values.add(Subject(REAL_SCORED, len(error)), "severity_error", found, by=estimator)
        return Scored(real, scores, self.extractor.look_at_patches(patches, real.numbers).features)


def _by_class(patches: RealPatches) -> tuple[tuple[str, np.ndarray], ...]:
    return (REAL_SOURCE, ~patches.is_target), (REAL_TARGET, patches.is_target)
