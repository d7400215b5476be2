"""The reference set of an evaluation: networks, real patches, training patches, and floors between real patches."""

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.base.statistics import NUM_RESAMPLES, Estimate, bootstrap, estimate_mean
from cellflux_bridge.data.patches import near_level
from cellflux_bridge.metrics.fidelity import Floor, frechet_floor, kid_floor, manifold_floors
from cellflux_bridge.metrics.memorisation import Training
from cellflux_bridge.metrics.networks import Network, RealPatches, bands_of, extractor_of
from cellflux_bridge.metrics.sequences import Sequences
from cellflux_bridge.metrics.structure import TISSUE, tissue_figures, with_networks
from cellflux_bridge.metrics.values import Recorder, Value

NUM_SUBSAMPLES = 100
REAL_SOURCE, REAL_TARGET, REAL_POOLED, REAL_SCORED = "real source", "real target", "real pooled", "real scored"
REAL_OWN = "real own"  # real patches of a level
_CHUNK = 256
# Target patches whose pixels are compared with those of frames, at most.
MOST_PIXELS = 1000
_NUM_PAIRS = 256


class ReferenceSet:
    """Networks with their outputs for real patches; figures of these, and of all that is compared, go to `rows`.

    `real[network]` are its real test patches of both classes, `kid_floors[network]` their floor; `pooled` are the
    extractor's, `target` only the target class of these, `target_pixels` at most 1,000 of them and their groups,
    `target_features` what the extractor sees in these. The own real patches of each of the `levels` get a floor.
    `spectra` are mean log10 powers by subject (`metrics.bands`). At most `max_real` real patches of a class, or with a
    score, are used. `seed` and a purpose seed each draw.
    """

    def __init__(self, networks: Sequence[Network], *, levels: Sequence[float], seed: int, max_real: int | None):
        self.networks, self.seed, self.max_real = tuple(networks), seed, max_real
        self.rows: list[Value] = []
        self.spectra: dict[str, np.ndarray] = {}
        self.judges = [network for network in networks if network.use == "judge"]
        self.extractor = extractor_of(networks)
        self.estimator = next((network for network in networks if network.use == "scores"), None)
        self.real: dict[str, RealPatches] = {}
        self.kid_floors: dict[str, Floor] = {}
        for network in (*self.judges, self.extractor):
            self._add_real(network)
        self.pooled = self.real[self.extractor.name]
        self.pooled = self.pooled._replace(bands=bands_of(self.extractor.patches, self.pooled.numbers))
        self.target = self.pooled.at(self.pooled.is_target)
        self.target_pixels, self.target_features = self._some_of_the_target()
        self.training = Training(self.extractor, self.pooled.features)
        self._add_tissue(self.pooled)
        self._add_structure(self.pooled)
        self._scored = None if self.estimator is None else self._scored_patches(self.estimator)
        self._add_floors(levels)

    def generator(self, *purpose: str) -> np.random.Generator:
        return numpy_generator(self.seed, "evaluate", *purpose)

    def groups(self, source_ids: Sequence[str]) -> np.ndarray:
        """The groups of sources, among which resamples are drawn."""
        return self.judges[0].groups_of_sources(source_ids)

    def recorder(self, of: Sequences) -> Recorder:
        """For figures of sequences, with intervals over the groups of their sources."""
        draw, num = self.generator("bootstrap"), len(of.source_ids)
        resamples = bootstrap(self.groups(of.source_ids), num=NUM_RESAMPLES, generator=draw)
        return Recorder(self.rows, of.name, num, str(of.folder or ""), of.levels, of.split, resamples)

    def mean(self, values: np.ndarray, groups: np.ndarray) -> Estimate:
        """The mean of values (N,) with its interval over their groups."""
        return estimate_mean(values, groups, num=NUM_RESAMPLES, generator=self.generator("bootstrap"))

    def own(self, level: float) -> RealPatches:
        """The real patches that frames of a level are compared to.

        With scores: patches of the level (`data.patches.near_level`). Else the source class below 0.5, the target class
        above, both at 0.5.
        """
        if self._scored is not None:
            scores, real = self._scored
            return real.at(near_level(scores, level))
        return self.pooled if abs(level - 0.5) < 1e-6 else self.pooled.at(self.pooled.is_target == (level > 0.5))

    def _some_of_the_target(self) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """At most 1,000 of the target patches, (M, 3, S, S) uint8, with their groups, group by group; and the
        extractor's features (M, D) of them."""
        chosen = self.generator("pixels").permutation(len(self.target.numbers))[:MOST_PIXELS]
        chosen = chosen[np.argsort(self.target.groups[chosen], kind="stable")]
        pixels = self.extractor.patches.centre(self.target.numbers[chosen]).numpy()
        return (pixels, self.target.groups[chosen]), self.target.features[chosen]

    def _add_real(self, network: Network) -> None:
        real = network.real_patches(num=self.max_real, seed=self.seed)
        outputs = network.outputs_of_patches(network.patches, real.numbers)
        floor = kid_floor(outputs.features, real.groups, generator=self.generator("floor", REAL_POOLED, "kid"))
        self.add_floor(REAL_POOLED, "kid", floor, by=network, num=len(real.numbers))
        known = {} if network.weights is None else {"probability": outputs.value, "flip_rate": outputs.is_target}
        self._add_by_class(real, known, by=network)
        self.real[network.name], self.kid_floors[network.name] = real._replace(outputs=outputs), floor

    def _add_by_class(self, patches: RealPatches, figures: dict[str, np.ndarray], *, by: Network | None = None) -> None:
        """The means of figures (M,) of either class."""
        for name, chosen in ((REAL_SOURCE, ~patches.is_target), (REAL_TARGET, patches.is_target)):
            record = Recorder(self.rows, name, int(chosen.sum()))
            for figure, each in figures.items():
                record.add(figure, self.mean(each[chosen], patches.groups[chosen]), by=by)

    def add_floor(self, name: str, kind: str, floor: Floor, *, num: int, by: Network | None = None, level=None) -> None:
        """A floor between halves of `num` patches."""
        record = Recorder(self.rows, name, num // 2)
        found = Estimate(floor.mean, floor.low, floor.high)
        record.add(f"{kind}_floor", found, level=level, by=by, n_real=num - num // 2)
        record.add(f"{kind}_floor_spread", floor.spread, level=level, by=by, n_real=num - num // 2)

    def _add_floors(self, levels: Sequence[float]) -> None:
        """The extractor's floors among target patches, among both classes, and among the own patches of each level."""
        sets = [(REAL_POOLED, None, self.pooled), (REAL_TARGET, None, self.target)]
        sets += [(REAL_OWN, level, self.own(level)) for level in levels]
        known: dict[bytes, dict[str, Floor]] = {}  # levels share their patches with each other and with the classes
        for name, level, real in sets:
            same = hashlib.blake2b(real.features.tobytes()).digest()
            if same not in known:
                known[same] = self._floors(name, real)
            for kind, floor in known[same].items():
                if (name, kind) != (REAL_POOLED, "kid"):  # which every network has
                    self.add_floor(name, kind, floor, by=self.extractor, num=len(real.features), level=level)

    def _floors(self, name: str, real: RealPatches) -> dict[str, Floor]:
        """Of KID, the Frechet distance and the four figures of neighbourhoods, between random halves."""
        draw, of = partial(self.generator, "floor", name), (real.features, real.groups)
        pooled = self.kid_floors[self.extractor.name]
        return {
            "kid": pooled if name == REAL_POOLED else kid_floor(*of, generator=draw("kid")),
            "frechet": frechet_floor(*of, generator=draw("frechet")),
            **manifold_floors(*of, generator=draw("manifold")),
        }

    def _add_tissue(self, real: RealPatches) -> None:
        parts = [real.numbers[i : i + _CHUNK] for i in range(0, len(real.numbers), _CHUNK)]
        figures = np.concatenate([tissue_figures(self.extractor.patches.centre(part).numpy()) for part in parts])
        self._add_by_class(real, dict(zip(TISSUE, figures.T, strict=True)))

    def _add_structure(self, real: RealPatches) -> None:
        """Between real source patches of different groups: the figures of a frame that keeps nothing of its source."""
        of_source = self.generator("structure").permutation(np.flatnonzero(~real.is_target))
        pairs = np.stack([of_source, np.roll(of_source, 1)])
        first, second = pairs[:, real.groups[pairs[0]] != real.groups[pairs[1]]][:, :_NUM_PAIRS]
        if len(first) == 0:
            return
        both = np.stack([self.extractor.patches.centre(real.numbers[c]).numpy() for c in (first, second)], axis=1)
        record = Recorder(self.rows, REAL_SOURCE, len(first))
        for figure, each, by in with_networks(self.extractor.structure(both), self.extractor):
            record.add(figure, self.mean(each[:, 1], real.groups[first]), by=by)

    def _scored_patches(self, estimator: Network) -> tuple[np.ndarray, RealPatches]:
        """Real test patches with a score: their scores in the direction of the target, and the extractor's outputs."""
        real, patches = estimator.real_patches(num=self.max_real, seed=self.seed), estimator.patches
        scores = patches.scores_towards(estimator.target, real.numbers)
        error = np.abs(estimator.outputs_of_patches(patches, real.numbers).value - scores)
        record = Recorder(self.rows, REAL_SCORED, len(error))
        record.add("severity_error", self.mean(error, real.groups), by=estimator)
        outputs = self.extractor.outputs_of_patches(patches, real.numbers)
        return scores, real._replace(outputs=outputs, bands=bands_of(patches, real.numbers))
