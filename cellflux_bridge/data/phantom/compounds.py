"""Phantom compounds: embeddings, and the linear map from these to what a compound does to cells."""

from typing import NamedTuple

import numpy as np
from scipy.special import expit

from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.data.phantom.cells import Effect

WIDTH = 16
# Modes of action: directions over the fields of Effect. Those two places apart are the most opposed.
MOAS = {
    "DNA damage": (1.0, -0.6, 0.8, 0.0, -0.7),
    "actin disruption": (0.0, 0.2, -0.8, -1.0, 0.1),
    "condensation": (-1.0, 1.0, -0.4, 0.0, -0.7),
    "contractility": (0.0, -0.2, 0.5, 1.0, 0.4),
}
STRENGTH = (0.27, 0.5, 0.6, 2.6, 1.0)  # of a whole unit along each field, in logarithms (of the texture: in log odds)


class Compounds(NamedTuple):
    """Compounds (n,), those that are seen first."""

    names: list[str]
    moas: list[str]
    embeddings: np.ndarray  # (n, WIDTH), of norm 1 up to rounding
    effect_map: np.ndarray  # (5, WIDTH): logarithms of an effect at full response, of an embedding

    def effect(self, number: int, response: float) -> Effect:
        """What compound `number` does at a response in [0, 1]."""
        return effect_of_logs(response * self.effect_map @ self.embeddings[number])


def effect_of_logs(logs: np.ndarray) -> Effect:
    """The effect of logarithms (5,) of its factors and log odds of its texture, all 0 at control."""
    size, intensity, area, _, count = map(float, np.exp(logs))
    return Effect(size, intensity, area, float(expit(logs[3])), count)


def response(dose: float, *, largest: float) -> float:
    """Hill's curve in [0, 1): 0 at dose 0, 0.5 at a ninth of the largest dose, 0.9 at the largest."""
    return dose / (dose + largest / 9)


def draw_compounds(num_seen: int, num_unseen: int, *, seed: int) -> Compounds:
    """At least 4 compounds that are seen, whose modes of action take turns, and unseen ones between two modes.

    An unseen compound's embedding is a convex combination of two seen ones, scaled to norm 1, and its mode of action
    that of the nearest seen one.
    """
    rng = numpy_generator(seed, "compounds")
    basis = np.linalg.qr(rng.standard_normal((WIDTH, len(STRENGTH))))[0].T
    centres = _unit(np.array(list(MOAS.values()))) @ basis
    modes = np.arange(num_seen) % len(MOAS)
    seen = _unit(centres[modes] + 0.4 * _unit(rng.standard_normal((num_seen, WIDTH))))
    between = np.zeros((num_unseen, num_seen))
    for number, weights in enumerate(between):
        parents = [rng.choice(np.flatnonzero(modes == turn % len(MOAS))) for turn in (number, number + 1)]
        weights[parents] = 0.5 + rng.uniform(-0.1, 0.1) * np.array([1, -1])
    unseen = _unit(between @ seen)
    modes = [*modes, *modes[(unseen @ seen.T).argmax(axis=1)]]
    return Compounds(
        names=[f"cmpd{number + 1:02d}" for number in range(num_seen + num_unseen)],
        moas=[list(MOAS)[mode] for mode in modes],
        embeddings=np.concatenate([seen, unseen]).round(6),
        effect_map=np.array(STRENGTH)[:, None] * basis,
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
