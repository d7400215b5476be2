"""Classifier two-sample tests (Lopez-Paz & Oquab 2017): can made patches be told from real ones?

A classifier learns to tell them apart on some groups, and is asked on others. An area under the ROC curve (AUC) of 0.5
means that it cannot, 1 that it always can.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from cellflux_bridge.base.seeds import derive_seed, torch_generator
from cellflux_bridge.base.statistics import COVERAGE, NUM_RESAMPLES, Estimate
from cellflux_bridge.images import encode

_NUM_FOLDS = 5
# The network: its updates, its batch, and the side of what it learns on.
_UPDATES, _BATCH, _WINDOW, _CHUNK = 200, 32, 32, 64
_BLOCK = 512  # rows of pairs at a time

# How much each of N items looks made, (N,), of the items themselves, whether they are made, and their groups.
Scores = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def folds(is_made: np.ndarray, groups: np.ndarray, *, num: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most `num` divisions of items into (learnt, asked), each group whole in one of them, both kinds in both; none
    where a kind has fewer than two groups."""
    num = min(num, *(len(np.unique(groups[is_made == kind])) for kind in (False, True)))
    if num < 2:
        return []
    found = [*StratifiedGroupKFold(num, shuffle=True, random_state=seed).split(is_made, is_made, groups)]
    return found if all(len(np.unique(is_made[part])) == 2 for pair in found for part in pair) else []


def logistic_scores(
    features: np.ndarray, is_made: np.ndarray, groups: np.ndarray, *, seed: int = 0, strength: float = 1.0
) -> np.ndarray:
    """`Scores` of features (N, D) by a logistic regression on the other four fifths of the groups; the less its
    `strength`, the smaller its weights."""
    scores = np.full(len(is_made), np.nan)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000, class_weight="balanced"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for learnt, asked in folds(is_made, groups, num=_NUM_FOLDS, seed=seed):
            scores[asked] = model.fit(features[learnt], is_made[learnt]).decision_function(features[asked])
    return scores


# A network has hundreds of features, so their weights are held small.
feature_scores = partial(logistic_scores, strength=0.01)


class _Network(nn.Module):
    """Three convolutions of patches (B, C, H, W) in [-1, 1] folded by two, mean and spread of their maps, a logit (B,).

    H and W are even.
    """

    def __init__(self, channels: int = 3):
        super().__init__()
        widths, layers = (4 * channels, 32, 48, 64), [nn.PixelUnshuffle(2)]
        for number, (before, width) in enumerate(pairwise(widths)):
            conv = nn.Conv2d(before, width, 3, stride=2 if number else 1, padding=1)
            layers += [conv, nn.GroupNorm(8, width), nn.SiLU()]
        self.maps, self.head = nn.Sequential(*layers), nn.Linear(2 * widths[-1], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.maps(x).flatten(2)
        return self.head(torch.cat([maps.mean(2), maps.std(2)], dim=1))[:, 0]


@contextmanager
def _one_thread() -> Iterator[None]:
    """A block in which torch uses one thread: so small a network is no faster on more, and on a busy machine they wait
    for one another most of the time."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num)


@_one_thread()
def network_scores(patches: np.ndarray, is_made: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """`Scores` of uint8 patches (N, C, H, W) by a small network that learned on the other half of the groups.

    It learns from windows of at most 32 px, turned and mirrored. On a CPU the same patches give the same scores.
    """
    scores = np.full(len(is_made), np.nan)
    for number, (learnt, asked) in enumerate(folds(is_made, groups, num=2, seed=seed)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "two-sample", number))
            network = _Network(patches.shape[1]).to(memory_format=torch.channels_last)
        generator = torch_generator(seed, "two-sample", "batches", number)
        updates = min(_UPDATES, 2 * len(learnt))
        optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=updates)
        kinds = [learnt[is_made[learnt] == kind] for kind in (False, True)]
        for _ in range(updates):
            half = [of[torch.randint(len(of), (_BATCH // 2,), generator=generator).numpy()] for of in kinds]
            x = _turned_windows(torch.from_numpy(patches[np.concatenate(half)]), generator)
            logit = network(encode(x))
            wanted = (torch.arange(_BATCH) >= _BATCH // 2).float()
            loss = F.binary_cross_entropy_with_logits(logit, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        with torch.inference_mode():
            parts = np.array_split(asked, -(-len(asked) // _CHUNK))
            height, width = (side // 2 * 2 for side in patches.shape[2:])
            even = (torch.from_numpy(patches[part, :, :height, :width]) for part in parts)
            found = [network.eval()(encode(part)).numpy() for part in even]
        scores[asked] = np.concatenate(found)
    return scores


def _turned_windows(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One window of all patches (B, C, H, W), in one of the square's eight positions."""
    side = min(_WINDOW, *x.shape[-2:]) // 2 * 2
    top, left, turn, mirror = (
        int(torch.randint(most, (), generator=generator))
        for most in (x.shape[-2] - side + 1, x.shape[-1] - side + 1, 4, 2)
    )
    x = x[..., top : top + side, left : left + side].rot90(turn, (-2, -1))
    return x.flip(-1) if mirror else x


def auc(scores: np.ndarray, is_made: np.ndarray) -> float:
    """The area under the ROC curve, ties counted half (Mann & Whitney 1947); NaN without scores or with one kind."""
    num_made, num_real = int(is_made.sum()), int((~is_made).sum())
    if not (num_made and num_real and np.isfinite(scores).all()):
        return float("nan")
    above = rankdata(scores)[is_made].sum() - num_made * (num_made + 1) / 2
    return float(above / (num_made * num_real))


def two_sample(
    made: np.ndarray,
    real: np.ndarray,
    groups: np.ndarray,
    real_groups: np.ndarray,
    *,
    scores_of: Scores,
    generator: np.random.Generator | None = None,
) -> Estimate:
    """The AUC of made (N, ...) against real items (M, ...), all of them asked by a classifier that knows neither them
    nor their groups; with `generator` its 95 % interval over resampled groups of both, for classifiers as learned."""
    is_made = np.arange(len(made) + len(real)) < len(made)
    scores = scores_of(np.concatenate([made, real]), is_made, np.concatenate([groups, real_groups]))
    value = auc(scores, is_made)
    if generator is None or np.isnan(value):
        return Estimate(value, float("nan"), float("nan"))
    made_times, real_times = (_times_drawn(of, generator) for of in (groups, real_groups))
    above = np.zeros(NUM_RESAMPLES)
    for start in range(0, len(made), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(made)))
        apart = scores[rows, None] - scores[None, len(made) :]
        above += ((made_times[:, rows] @ (0.5 + 0.5 * np.sign(apart))) * real_times).sum(1)
    low, high = np.percentile(above / (made_times.sum(1) * real_times.sum(1)), COVERAGE)
    return Estimate(value, float(low), float(high))


def _times_drawn(groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """How often each item is drawn, (1000, N), where groups are drawn with replacement."""
    names, codes = np.unique(groups, return_inverse=True)
    draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=NUM_RESAMPLES)
    return draws[:, codes].astype(np.float32)
