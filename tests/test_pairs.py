"""Patches as they are drawn, cut and coupled into batches."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chi2_contingency, chisquare

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import torch_generator
from cellflux_bridge.coupling.base import Coupling
from cellflux_bridge.coupling.independent import Independent
from cellflux_bridge.coupling.minibatch_ot import MinibatchOT
from cellflux_bridge.data.balanced import BalancedPatches
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.data.pairs import PairBatch, Pairs, named_transitions
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.settings import PairsConfig

# Drawing


def hand_made(pixels: np.ndarray, *, labels=None, groups=None, splits=None, size: int = 16) -> Patches:
    num = len(pixels)
    return Patches(
        pixels=pixels,
        ids=tuple(str(n) for n in range(num)),
        labels=np.zeros(num, np.int64) if labels is None else np.asarray(labels),
        splits=np.zeros(num, np.int64) if splits is None else np.asarray(splits),
        groups=np.arange(num) if groups is None else np.asarray(groups),
        group_names=tuple(str(n) for n in range(num)),
        scores=np.arange(num, dtype=np.float32) / max(1, num),
        classes=("A", "B", "C"),
        preprocessing=Preprocessing(size),
        batches=np.full(num, -1),
        batch_names=(),
        doses=np.zeros(num, np.float32),
    )


def draw(patches: Patches, num: int, *, flips: bool, seed: int = 0) -> list[bytes]:
    drawn = patches.random([0] * num, flips=flips, generator=torch.Generator().manual_seed(seed))
    assert drawn.dtype == torch.uint8
    return [patch.permute(1, 2, 0).numpy().tobytes() for patch in drawn]


def test_flips_are_exactly_the_eight_symmetries_of_the_square_and_even():
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    symmetries = {
        np.ascontiguousarray(np.rot90(side, turns)).tobytes()
        for side in (image[0], image[0, :, ::-1])
        for turns in range(4)
    }
    assert len(symmetries) == 8
    counts = Counter(draw(hand_made(image), 800, flips=True))
    assert set(counts) == symmetries
    assert min(counts.values()) > 60
    assert set(draw(hand_made(image), 50, flips=False)) == {image[0].tobytes()}


def test_random_crops_are_every_window_of_the_image_and_even():
    image = np.random.default_rng(0).integers(0, 256, (1, 18, 17, 3), dtype=np.uint8)
    windows = {
        np.ascontiguousarray(image[0, top : top + 16, left : left + 16]).tobytes()
        for top in range(3)
        for left in range(2)
    }
    counts = Counter(draw(hand_made(image), 600, flips=False))
    assert set(counts) == windows
    assert min(counts.values()) > 60


def test_random_patches_follow_their_generator():
    image = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), dtype=np.uint8)
    assert draw(hand_made(image), 9, flips=True) == draw(hand_made(image), 9, flips=True)
    assert draw(hand_made(image), 9, flips=True) != draw(hand_made(image), 9, flips=True, seed=1)


def test_balanced_draws_are_even_between_classes_and_within_them(data_config, tmp_path):
    labels = np.array([0] * 4 + [1] * 20 + [2] * 6)
    pixels = np.arange(30, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    balanced = BalancedPatches(hand_made(pixels, labels=labels), np.arange(1, 29), data=data_config(tmp_path))
    generator = torch.Generator().manual_seed(0)
    x, y, chosen = balanced.draw(6000, generator=generator, jitter=generator)
    assert torch.equal(numbers(x), torch.tensor(chosen))
    assert torch.equal(y, torch.from_numpy(labels[chosen]))
    assert chisquare(np.bincount(y)).pvalue > 0.01
    for number, members in enumerate((np.arange(1, 4), np.arange(4, 24), np.arange(24, 29))):
        counts = np.bincount(np.array(chosen)[y == number], minlength=30)
        assert counts[members].sum() == counts.sum()
        assert chisquare(counts[members]).pvalue > 0.01
    with pytest.raises(UserError, match="class 'B' has no patch in the train split"):
        BalancedPatches(hand_made(pixels, labels=labels), np.array([0, 25]), data=data_config(tmp_path))


# Pairs


def numbered(num: int = 30, **keys) -> Patches:
    """Patches whose every pixel is the patch's own number; labels 0, 1, 2 by turns unless given."""
    pixels = np.arange(num, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    return hand_made(pixels, **{"labels": np.arange(num) % 3, **keys})


def make_pairs(
    patches: Patches, data, *, split="train", batch_size=12, seed=0, coupling=None, levels=None, level_bins=4, **pairs
) -> Pairs:
    return Pairs(
        patches,
        coupling or Independent(),
        split=split,
        batch_size=batch_size,
        seed=seed,
        pairs=PairsConfig(**pairs),
        data=data,
        levels=levels,
        level_bins=level_bins,
    )


def numbers(x: torch.Tensor) -> torch.Tensor:
    return (x if x.dtype == torch.uint8 else images.decode(x))[:, 0, 0, 0].long()


def soft_levels(num: int, seed: int = 0) -> np.ndarray:
    """Mixtures (num, 3) of all classes."""
    return np.random.default_rng(seed).dirichlet((0.6, 0.6, 0.6), num).astype(np.float32)


def between_ends(c: np.ndarray) -> np.ndarray:
    """Levels c (N,) between the first and the last of three classes."""
    return np.stack([1 - c, np.zeros_like(c), c], axis=1).astype(np.float32)


def equal(first: PairBatch, second: PairBatch) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def data(tmp_path, data_config):
    return data_config(tmp_path)


@pytest.mark.parametrize("coupling", [Independent(), MinibatchOT(cost="pixels")], ids=["independent", "ot"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_scores_and_images_agree_with_the_indices(data, coupling, split):
    patches = numbered(splits=np.full(30, SPLITS.index(split)))
    batch = make_pairs(patches, data, coupling=coupling, split=split, batch_size=17).batch(0)
    assert batch.x0.shape == batch.x1.shape == (17, 3, 16, 16)
    assert batch.x0.dtype == torch.uint8
    assert torch.equal(numbers(batch.x0), batch.source_index)
    assert torch.equal(numbers(batch.x1), batch.target_index)
    assert torch.equal(batch.source_class, batch.source_index % 3)
    assert torch.equal(batch.target_class, batch.target_index % 3)
    np.testing.assert_array_equal(batch.target_level, np.eye(3)[batch.target_class])
    assert batch.target_level.dtype == torch.float32
    assert (batch.source_class != batch.target_class).all()
    levels = soft_levels(30)
    batch = make_pairs(patches, data, coupling=coupling, split=split, batch_size=17, levels=levels).batch(0)
    assert torch.equal(numbers(batch.x0), batch.source_index)
    assert torch.equal(numbers(batch.x1), batch.target_index)
    assert torch.equal(batch.source_class, batch.source_index % 3)
    assert torch.equal(batch.target_class, batch.target_index % 3)
    np.testing.assert_array_equal(batch.target_level, levels[batch.target_index])
    assert batch.target_level.dtype == torch.float32


def test_a_batch_is_a_function_of_seed_step_and_rank(data):
    pairs = make_pairs(numbered(), data)
    first = pairs.batch(3, rank=1)
    pairs.batch(4)
    assert equal(pairs.batch(3, rank=1), first)
    assert equal(make_pairs(numbered(), data).batch(3, rank=1), first)
    others = [pairs.batch(4, rank=1), pairs.batch(3, rank=0), make_pairs(numbered(), data, seed=1).batch(3, rank=1)]
    assert not any(torch.equal(other.source_index, first.source_index) for other in others)


def transitions_of(batch: PairBatch) -> Counter:
    return Counter(zip(batch.source_class.tolist(), batch.target_class.tolist(), strict=True))


def test_every_transition_is_evenly_present_in_every_batch(data):
    pairs = make_pairs(numbered(), data, batch_size=20)
    total = Counter()
    for step in range(30):
        counts = transitions_of(pairs.batch(step))
        assert set(counts) == {(a, b) for a in range(3) for b in range(3) if a != b}
        assert set(counts.values()) == {3, 4}
        total += counts
    # Which transitions get the rest of the division changes from batch to batch.
    assert max(total.values()) - min(total.values()) <= 20


@pytest.mark.parametrize("match_group", [False, True])
def test_a_batch_smaller_than_the_number_of_transitions_takes_turns(data, match_group):
    patches = numbered(groups=np.zeros(30, int))
    pairs = make_pairs(patches, data, batch_size=4, match_group=match_group)
    total = Counter()
    for step in range(40):
        batch = pairs.batch(step)
        assert len(batch.x0) == 4
        total += transitions_of(batch)
    assert len(total) == 6


def test_only_the_named_transitions_are_drawn(data):
    batch = make_pairs(numbered(), data, transitions=[("A", "C"), ("B", "C")]).batch(0)
    assert transitions_of(batch) == {(0, 2): 6, (1, 2): 6}


def test_identity_adds_a_class_to_itself(data):
    batch = make_pairs(numbered(), data, transitions=[("A", "C")], identity=True).batch(0)
    assert transitions_of(batch) == {(0, 2): 4, (0, 0): 4, (2, 2): 4}
    everything = make_pairs(numbered(), data, identity=True, batch_size=18).batch(0)
    assert transitions_of(everything) == {(a, b): 2 for a in range(3) for b in range(3)}


def test_no_patch_stands_twice_on_a_side_of_a_block_where_there_are_enough(data):
    for step in range(5):
        batch = make_pairs(numbered(), data, batch_size=60).batch(step)
        rows = Counter(zip(batch.source_index.tolist(), batch.target_class.tolist(), strict=True))
        assert set(rows.values()) == {1}


@pytest.mark.parametrize("groups", [np.arange(60) // 12, np.arange(60) // 3 % 5], ids=["in a row", "interleaved"])
def test_matched_groups_stay_together(data, groups):
    patches = numbered(60, groups=groups)
    pairs = make_pairs(patches, data, batch_size=48, match_group=True, coupling=MinibatchOT(cost="pixels"))
    seen = set()
    for step in range(8):
        batch = pairs.batch(step)
        assert (groups[batch.source_index] == groups[batch.target_index]).all()
        assert len(set(transitions_of(batch).values())) == 1
        seen |= set(groups[batch.source_index].tolist())
    assert seen == set(range(5))
    unmatched = make_pairs(patches, data, batch_size=48).batch(0)
    assert (groups[unmatched.source_index] != groups[unmatched.target_index]).any()


class Turned(Coupling):
    """Turns the targets of every block by one, and notes the (sources, targets) of each of a pool, as numbers of
    patches."""

    def __init__(self):
        self.pools = []

    def pair(self, x0, x1, **options):
        self.pools.append([])
        return super().pair(x0, x1, **options)

    def permutation(self, x0, x1, *, generator):
        self.pools[-1].append((numbers(x0).numpy(), numbers(x1).numpy()))
        return torch.arange(len(x0)).roll(1)


def by_block(pairs: Pairs, coupling: Turned, steps: int, *, pool: int = 1):
    for step in range(steps):
        pairs.batch(step)
    return [block for blocks in coupling.pools[: steps // pool] for block in blocks]  # the next one is made beforehand


def test_any_source_goes_to_any_level_evenly(data):
    """Source class and level are drawn independently, whatever the levels of the classes are."""
    c = np.repeat([0.0, 0.25, 0.5, 0.75, 1.0], [64, 4, 16, 36, 100])
    labels = (c >= 0.5).astype(int) * 2
    coupling = Turned()
    pairs = make_pairs(
        numbered(len(c), labels=labels), data, coupling=coupling, batch_size=64, levels=between_ends(c),
        transitions=[("A", "C"), ("C", "A")],
    )  # fmt: skip
    table = np.zeros((2, 5))
    for source, target in by_block(pairs, coupling, 150):
        assert len(set(labels[source])) == len(set(c[target])) == 1
        table[labels[source[0]] // 2, int(4 * c[target[0]])] += -(-len(source) // 8)  # draws of eight, less own targets
    assert chi2_contingency(table).pvalue > 0.01
    assert table.min() > 20
    # Rare levels are drawn more often than they are frequent: by the square root.
    share = np.sqrt([64, 4, 16, 36, 100])
    assert chisquare(table.sum(0), share / share.sum() * table.sum()).pvalue > 0.01


def test_levels_of_a_block_are_nearly_the_same(data):
    c = np.random.default_rng(0).random(90)
    for num, width in ((4, 0.25), (10, 0.1)):
        coupling = Turned()
        pairs = make_pairs(numbered(90), data, coupling=coupling, batch_size=30, levels=between_ends(c), level_bins=num)
        spreads = [np.ptp(c[target]) for _, target in by_block(pairs, coupling, 10)]
        assert max(spreads) <= width + 1e-6
        assert max(spreads) > width / 2
    mixed, coupling = soft_levels(90), Turned()
    pairs = make_pairs(numbered(90), data, coupling=coupling, batch_size=30, levels=mixed)
    assert max(np.ptp(mixed[target], axis=0).max() for _, target in by_block(pairs, coupling, 10)) <= 0.25 + 1e-6


def test_by_level_only_the_named_sources_are_drawn(data):
    pairs = make_pairs(numbered(), data, levels=soft_levels(30), transitions=[("A", "C"), ("B", "C")])
    batches = [pairs.batch(step) for step in range(10)]
    assert set(torch.cat([batch.source_class for batch in batches]).tolist()) == {0, 1}
    assert set(torch.cat([batch.target_class for batch in batches]).tolist()) == {0, 1, 2}
    levels = np.eye(3, dtype=np.float32)[np.arange(30) % 3]
    pairs = make_pairs(numbered(), data, batch_size=8, levels=levels, transitions=[("A", "C")])
    total = sum((transitions_of(pairs.batch(step)) for step in range(20)), Counter())
    assert set(total) == {(0, 0), (0, 2)}


def test_groups_are_matched_at_every_level(data):
    groups, coupling = np.arange(60) // 12, Turned()
    c = np.tile(np.repeat([0.0, 0.5, 1.0], 4), 5)
    c[:12] = 0.0  # the first group has no other level
    pairs = make_pairs(
        numbered(60, groups=groups), data, coupling=coupling, batch_size=48, match_group=True, levels=between_ends(c)
    )
    seen = set()
    for source, target in by_block(pairs, coupling, 20):
        assert len(set(groups[source]) | set(groups[target])) == 1
        assert len(set(c[target])) == 1
        seen.add((groups[source[0]], c[target[0]]))
    assert seen == {(0, 0.0), *((group, level) for group in range(1, 5) for level in (0.0, 0.5, 1.0))}


def test_groups_in_which_a_source_could_only_become_itself_are_refused(data):
    patches, ends = numbered(groups=np.arange(30)), (np.arange(30) % 3) / 2
    with pytest.raises(UserError, match=r"pairs\.match_group: no group of the train split holds a source and another"):
        make_pairs(patches, data, batch_size=8, match_group=True, transitions=[("A", "C")], levels=between_ends(ends))


def test_a_batch_by_level_is_a_function_of_seed_step_and_rank(data):
    levels = soft_levels(30)
    pairs = make_pairs(numbered(), data, levels=levels, self_pairs=0.3)
    first = pairs.batch(3, rank=1)
    pairs.batch(4)
    again = make_pairs(numbered(), data, levels=levels, self_pairs=0.3)
    assert equal(pairs.batch(3, rank=1), first)
    assert equal(again.batch(3, rank=1), first)
    assert not any(equal(other, first) for other in (again.batch(4, rank=1), again.batch(3)))


def test_levels_of_other_splits_do_not_matter(data):
    splits, levels = np.repeat([0, 1, 2], 20), soft_levels(60)
    patches = numbered(60, splits=splits)
    without = np.where((splits == 2)[:, None], np.nan, levels)
    for number, split in enumerate(SPLITS[:2]):
        batch = make_pairs(patches, data, split=split, levels=without).batch(0)
        assert (splits[torch.cat([batch.source_index, batch.target_index])] == number).all()
        assert equal(batch, make_pairs(patches, data, split=split, levels=levels).batch(0))


def test_a_share_of_the_sources_at_a_targets_level_are_their_own_targets(data_config, tmp_path):
    """The very crop and stain, at its own level; the others are coupled as ever."""
    data = data_config(tmp_path, stain={"mode": "augment", "strength": 0.2})
    pixels = np.random.default_rng(0).integers(0, 256, (300, 24, 24, 3), dtype=np.uint8)
    patches = hand_made(pixels, labels=np.arange(300) % 3)
    levels = np.eye(3, dtype=np.float32)[patches.labels]
    pairs = make_pairs(patches, data, coupling=MinibatchOT(), batch_size=64, levels=levels, self_pairs=0.4)
    shares = []
    for step in range(25):
        batch = pairs.batch(step)
        own, stays = (batch.x0 == batch.x1).flatten(1).all(1), batch.source_class == batch.target_class
        assert torch.equal(batch.source_index[own], batch.target_index[own])
        assert stays[own].all()
        shares += own[stays].tolist()
        np.testing.assert_array_equal(batch.target_level, levels[batch.target_index])
    assert np.mean(shares) == pytest.approx(0.4, abs=0.06)
    without = make_pairs(patches, data, batch_size=64, levels=levels).batch(0)
    assert (without.source_index == without.target_index).float().mean() < 0.1


def test_a_source_that_stays_is_told_any_level_of_its_bin(data):
    score = np.random.default_rng(0).uniform(0, 0.4, 200)
    levels = between_ends(score)
    patches = numbered(200)
    pairs = make_pairs(patches, data, batch_size=64, levels=levels, level_bins=2, self_pairs=1.0)
    gaps = []
    for step in range(10):
        batch = pairs.batch(step)
        stays, told = batch.source_index == batch.target_index, batch.target_level[:, 2].numpy()
        own = score[batch.source_index]
        assert (np.rint(2 * told[stays]) == np.rint(2 * own[stays])).all()
        gaps += np.abs(told - own)[stays].tolist()
    assert np.mean(gaps) > 0.05  # the mean distance of two draws is a third of the bin's width


def far(batch: PairBatch) -> float:
    """The mean distance between the numbers of a batch's sources and targets."""
    return float((batch.source_index - batch.target_index).abs().float().mean())


@pytest.mark.parametrize("by_level", [False, True], ids=["class", "level"])
def test_a_pool_of_batches_chooses_among_the_targets_of_them_all(data, by_level):
    """Ranks of 120 uniform numbers differ by 120 / sqrt(n) or so; sources and their kinds are as without a pool."""
    levels = np.eye(3, dtype=np.float32)[np.arange(120) % 3] if by_level else None

    def batches(pool: int) -> list[PairBatch]:
        coupling = MinibatchOT(cost="pixels")
        pairs = make_pairs(numbered(120), data, coupling=coupling, batch_size=24, levels=levels, pool=pool)
        return [pairs.batch(step) for step in range(32)]

    alone, pooled = batches(1), batches(16)
    for one, other in zip(alone, pooled, strict=True):
        assert torch.equal(one.source_index, other.source_index)
        assert transitions_of(one) == transitions_of(other)
        assert torch.equal(numbers(other.x0), other.source_index)
        assert torch.equal(numbers(other.x1), other.target_index)
        if by_level:
            np.testing.assert_array_equal(other.target_level, levels[other.target_index])
    # Every target is used, by the same pool of batches.
    for part in (slice(0, 16), slice(16, 32)):
        used = [Counter(torch.cat([batch.target_index for batch in which[part]]).tolist()) for which in (alone, pooled)]
        assert used[0] == used[1]
    assert np.mean([far(batch) for batch in pooled]) < 0.5 * np.mean([far(batch) for batch in alone])


def test_a_pooled_batch_is_a_function_of_seed_step_and_rank(data):
    levels = soft_levels(30)

    def make() -> Pairs:
        return make_pairs(numbered(), data, levels=levels, self_pairs=0.3, pool=4, coupling=MinibatchOT())

    pairs = make()
    first = pairs.batch(6, rank=1)
    for step, rank in ((0, 1), (6, 0), (9, 1)):
        assert not equal(pairs.batch(step, rank=rank), first)
    assert equal(pairs.batch(6, rank=1), first)
    assert equal(make().batch(6, rank=1), first)


def straightforward(pairs: Pairs, patches: Patches, data, coupling, *, split: str, number: int, size: int, pool: int):
    """x0, x1 (pool * size, 3, S, S) in [-1, 1] and patches' numbers of the batches of a pool: all pixels are drawn,
    and all images encoded and coupled at once."""
    x0, x1, drawn = [], [], []
    for step in range(number * pool, (number + 1) * pool):
        generator = torch_generator(0, "pairs", split, step, 0)
        drawn.append([torch.from_numpy(column) for column in pairs._draw_indices(generator)])
        for indices, x in zip(drawn[-1][:2], (x0, x1), strict=True):
            is_train = split == "train"
            x.append(
                patches.random(indices, flips=data.flips, generator=generator) if is_train else patches.centre(indices)
            )
    source, target, stays, block, _ = map(torch.cat, zip(*drawn, strict=True))
    x0, x1 = images.encode(torch.cat(x0)), images.encode(torch.cat(x1))
    moves = torch.nonzero(~stays).squeeze(1)
    _, j = coupling.pair(
        coupling.features(x0[moves]),
        coupling.features(x1[moves]),
        blocks=block[moves],
        generator=torch_generator(0, "coupling", split, number, 0),
        patches=(source[moves], target[moves]),
    )
    x1[moves], target[moves] = x1[moves[j]], target[moves[j]]
    target = torch.where(stays, source, target)
    x1[source == target] = x0[source == target]
    return x0, x1, source, target


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "coupling", [Independent(), MinibatchOT(), MinibatchOT(cost="thumbnail", thumbnail=5)], ids=["none", "grey", "rgb"]
)
def test_pairs_are_bit_for_bit_those_of_all_images_at_once(data, coupling, split):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 23, 20, 3), dtype=np.uint8)
    patches = hand_made(pixels, labels=np.arange(60) % 3, splits=np.full(60, SPLITS.index(split)))
    size, pool, levels = 10, 4, soft_levels(60)
    pairs = make_pairs(
        patches, data, coupling=coupling, split=split, batch_size=size, levels=levels, self_pairs=0.5, pool=pool
    )
    for number in (0, 1):
        whole = straightforward(pairs, patches, data, coupling, split=split, number=number, size=size, pool=pool)
        for place, expected in enumerate(zip(*(part.split(size) for part in whole), strict=True)):
            batch = pairs.batch(number * pool + place)
            for found, one in zip((*batch.patches(), batch.source_index, batch.target_index), expected, strict=True):
                assert torch.equal(found, one)


@pytest.mark.parametrize("coupling", [Independent(), MinibatchOT(cost="pixels"), Turned()], ids=["any", "ot", "own"])
@pytest.mark.parametrize("match_group", [False, True], ids=["all", "groups"])
@pytest.mark.parametrize("kind", ["class", "level", "self"])
def test_no_source_gets_another_crop_of_itself(data, coupling, match_group, kind):
    """Optimal transport would choose it before any other, since it resembles the source most. Of n rows of which s show
    a patch as source and t as target, s + t - n cannot but pair it with itself."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 20, 20, 3), dtype=np.uint8)
    patches = hand_made(pixels, labels=np.arange(60) % 3, groups=np.arange(60) // 20)
    by_class = {"identity": True, "transitions": [("A", "C")]}
    by_level = {"levels": np.eye(3, dtype=np.float32)[patches.labels], "self_pairs": 0.5 if kind == "self" else 0.0}
    more = by_class if kind == "class" else by_level
    pairs = make_pairs(patches, data, coupling=coupling, batch_size=24, pool=4, match_group=match_group, **more)
    num_stay = num_own = 0
    for number in range(6):
        pool = pairs._coupled(number, 0)
        rows = [np.concatenate(column) for column in zip(*pool, strict=True)]
        source, target, stays, kinds, groups, *_ = rows
        for block in set(zip(kinds, groups, strict=True)):
            of = (kinds == block[0]) & (groups == block[1]) & ~stays
            same = int((source[of] == target[of]).sum())
            counts = np.bincount(np.concatenate([source[of], target[of]]), minlength=60)
            assert same == max(0, counts.max() - of.sum())
            num_own += same
        num_stay += stays.sum()
    assert num_own < 3
    assert (num_stay > 0) == (kind == "self")
    for step in range(12):
        batch = pairs.batch(step)
        own = batch.source_index == batch.target_index
        assert torch.equal(own, (batch.x0 == batch.x1).flatten(1).all(1))


def test_a_source_without_any_other_target_is_its_own(data):
    """In a group of one patch: the same crop at its own level, though no self pair was asked for."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), dtype=np.uint8)
    groups, c = np.array([0] * 6 + [1] * 5 + [2]), np.linspace(0, 1, 12)
    patches, levels = hand_made(pixels, labels=(c > 0.5) * 2, groups=groups), between_ends(c)
    pairs = make_pairs(
        patches, data, batch_size=6, match_group=True, levels=levels, level_bins=1, transitions=[("C", "A")]
    )
    batches = [pairs.batch(step) for step in range(20)]
    alone = torch.cat([batch.source_index == 11 for batch in batches])
    own = torch.cat([batch.source_index == batch.target_index for batch in batches])
    assert alone.any()
    assert own[alone].all()
    same = torch.cat([(batch.x0 == batch.x1).flatten(1).all(1) for batch in batches])
    assert torch.equal(own, same)
    np.testing.assert_array_equal(
        torch.cat([batch.target_level for batch in batches])[alone], levels[[11] * alone.sum()]
    )


def test_a_coupling_is_never_shown_more_images_than_a_batch_has(data):
    class Watched(MinibatchOT):
        shown = 0

        def features(self, images):
            self.shown = max(self.shown, len(images))
            return super().features(images)

    coupling = Watched()
    make_pairs(numbered(60), data, coupling=coupling, batch_size=12, pool=8).batch(0)
    assert coupling.shown == 12


def test_batches_that_threads_ask_for_at_once_are_those_of_one_after_another(data):
    def make() -> Pairs:
        return make_pairs(numbered(60), data, coupling=MinibatchOT(cost="pixels"), pool=3)

    pairs, alone = make(), make()
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(pairs.batch, range(20)))
    assert all(equal(batch, alone.batch(step)) for step, batch in enumerate(together))


def test_an_assignment_is_never_larger_than_1024(data):
    coupling = Turned()
    pairs = make_pairs(numbered(30), data, coupling=coupling, batch_size=10, transitions=[("A", "B")], pool=240)
    assert [len(source) for source, _ in by_block(pairs, coupling, 240, pool=240)] == [1024, 1024, 352]


def test_splits_do_not_mix(data):
    splits = np.repeat([0, 1, 2], 20)
    patches = numbered(60, splits=splits)
    for number, split in enumerate(SPLITS):
        batch = make_pairs(patches, data, split=split).batch(0)
        assert (splits[torch.cat([batch.source_index, batch.target_index])] == number).all()


def test_evaluation_shows_the_middle_and_training_random_parts(data_config, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    for split, is_middle in (("val", True), ("train", False)):
        patches = hand_made(pixels, labels=np.arange(12) % 3, splits=np.full(12, SPLITS.index(split)))
        batch = make_pairs(patches, data_config(tmp_path), split=split).batch(0)
        middle = patches.centre(batch.source_index)
        assert torch.equal(batch.x0, middle) == is_middle


def test_stain_jitter_is_shared_by_a_pair_and_only_trains(data_config, tmp_path):
    """All pixels are alike, so that only jitter can tell two rows apart."""
    config = data_config(tmp_path, stain={"mode": "augment", "strength": 0.5})
    pixels = np.full((24, 16, 16, 3), (170, 110, 180), np.uint8)
    patches = hand_made(pixels, labels=np.arange(24) % 3, splits=np.repeat([0, 1], 12))
    train = make_pairs(patches, config).batch(0)
    (x0, x1), colours = train.patches(), lambda x: x[:, :, 0, 0]
    before_coupling = colours(x0)
    assert len(torch.unique(before_coupling, dim=0)) == 12
    assert {tuple(row.tolist()) for row in colours(x1)} == {tuple(row.tolist()) for row in before_coupling}
    val = make_pairs(patches, config, split="val").batch(0)
    assert len(torch.unique(torch.cat(val.patches()).flatten(1), dim=0)) == 1


def test_stain_jitter_leaves_every_image_with_its_number(data_config, tmp_path):
    config = data_config(tmp_path, stain={"mode": "augment", "strength": 0.001})
    pixels = np.arange(30, dtype=np.uint8)[:, None, None, None] * np.full((1, 16, 16, 3), 8, np.uint8)
    batch = make_pairs(hand_made(pixels, labels=np.arange(30) % 3), config).batch(0)
    for x, index in zip(batch.patches(), (batch.source_index, batch.target_index), strict=True):
        assert (numbers(x) - 8 * index).abs().max() <= 1


# Batches of cells


def cells(num: int = 48, *, batches=None, **keys) -> Patches:
    """A is the control, B and C are treated; three batches take turns, and doses follow the number."""
    numbers = np.arange(num)
    batches = (numbers // 3) % 3 if batches is None else np.asarray(batches)
    fields = {"batches": batches, "batch_names": ("p0", "p1", "p2"), "doses": numbers.astype(np.float32)}
    return replace(numbered(num, **keys), **fields)


STAR = {"transitions": [("A", "*")], "match_batch": True}


@pytest.mark.parametrize("coupling", [Independent(), MinibatchOT(cost="pixels")])
def test_a_control_comes_from_the_batch_of_its_target(data, coupling):
    patches = cells()
    pairs = make_pairs(patches, data, batch_size=24, coupling=coupling, **STAR)
    seen = Counter()
    for step in range(12):
        batch = pairs.batch(step)
        source, target = batch.source_index.numpy(), batch.target_index.numpy()
        assert np.array_equal(patches.batches[source], patches.batches[target])
        assert np.array_equal(batch.batch.numpy(), patches.batches[target])
        assert np.array_equal(batch.dose.numpy(), patches.doses[target])
        assert set(patches.labels[source]) == {0}
        seen.update(zip(patches.labels[target].tolist(), patches.batches[target].tolist(), strict=True))
    assert set(seen) == {(label, batch) for label in (1, 2) for batch in range(3)}
    assert not pairs.unmatched


def test_of_many_perturbations_a_few_are_drawn_at_once_so_that_rows_have_a_choice(data):
    num = 20
    labels = np.concatenate([np.zeros(40, np.int64), 1 + np.repeat(np.arange(num), 10)])
    patches = replace(
        numbered(240, labels=labels), classes=tuple(f"c{n}" for n in range(num + 1)), batches=np.zeros(240, np.int64)
    )
    pairs = make_pairs(patches, data, batch_size=32, **{**STAR, "transitions": [("c0", "*")]})
    drawn = [Counter(pairs.batch(step).target_class.tolist()) for step in range(40)]
    assert all(sorted(counts.values()) == [8] * 4 for counts in drawn)
    assert len({label for counts in drawn for label in counts}) == num


def test_a_batch_without_controls_is_told_or_left_out_and_counted(data):
    batches = (np.arange(48) // 3) % 3
    batches[np.arange(48) % 3 == 0] %= 2  # no control is left in p2
    patches = cells(batches=batches)
    message = r"pairs\.match_batch: 1 batches of the train split have targets and no source: p2 \(10 targets\)"
    with pytest.raises(UserError, match=message):
        make_pairs(patches, data, **STAR)
    pairs = make_pairs(patches, data, batch_without_source="leave_out", **STAR)
    assert pairs.unmatched == {"p2": 10}
    assert {b for step in range(9) for b in pairs.batch(step).batch.tolist()} == {0, 1}
    alone = np.where(np.arange(48) % 3 == 2, 2, batches)  # class C stands in p2 alone
    pairs = make_pairs(cells(batches=alone), data, batch_without_source="leave_out", **STAR)
    assert {c for step in range(9) for c in pairs.batch(step).target_class.tolist()} == {1}
    assert pairs.unmatched["p2"] > 16
    with pytest.raises(UserError, match=r"pairs\.match_batch: no batch of the train split holds both 'A' and 'B'"):
        make_pairs(replace(patches, batches=np.full(48, -1)), data, **STAR)
    with pytest.raises(ValidationError, match="match_group and match_batch are both on"):
        PairsConfig(match_group=True, match_batch=True)


def test_a_star_is_any_other_class_and_no_unseen_one():
    classes, star = ("A", "B", "C"), PairsConfig(transitions=[("A", "*")])
    assert named_transitions(classes, star) == [("A", "B"), ("A", "C")]
    assert named_transitions(classes, star, unseen=["C"]) == [("A", "B")]
    assert named_transitions(classes, PairsConfig(transitions=[("*", "A")])) == [("B", "A"), ("C", "A")]
    assert named_transitions(classes, PairsConfig(), unseen=["C"]) == [("A", "B"), ("B", "A")]
    assert named_transitions(classes, PairsConfig(transitions=[("A", "A")])) == [("A", "A")]
