"""Couplings: permutations inside their blocks, reproducible, and optimal where they say so."""

from itertools import permutations

import pytest
import torch

from cellflux_bridge.config import registry
from cellflux_bridge.coupling.independent import Independent
from cellflux_bridge.coupling.minibatch_ot import MinibatchOT

BLOCKS = torch.tensor([2, 2, 0, 0, 0, 7, 2, 0, 2, 7])


def pictures(num: int, *, seed: int, size: int = 16) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pairs(coupling, x0, x1, *, blocks, seed: int = 0):
    features = coupling.features(x0), coupling.features(x1)
    return coupling.pair(*features, blocks=blocks, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", registry.names("coupling"))
def test_every_coupling_is_a_permutation_inside_its_blocks(name):
    coupling = registry.build("coupling", registry.validate("coupling", name, key="coupling"))
    i, j = pairs(coupling, pictures(10, seed=0), pictures(10, seed=1), blocks=BLOCKS)
    assert i.tolist() == list(range(10))
    assert j.dtype == torch.int64
    assert sorted(j.tolist()) == list(range(10))
    assert torch.equal(BLOCKS[i], BLOCKS[j])


@pytest.mark.parametrize("name", registry.names("coupling"))
def test_every_coupling_repeats_itself_by_its_generator(name):
    coupling = registry.build("coupling", registry.validate("coupling", name, key="coupling"))
    x0, x1 = pictures(10, seed=0), pictures(10, seed=1)
    assert torch.equal(pairs(coupling, x0, x1, blocks=BLOCKS)[1], pairs(coupling, x0, x1, blocks=BLOCKS)[1])


def test_independent_draws_follow_the_seed_and_ignore_the_images():
    one_block = torch.zeros(10, dtype=torch.long)
    draws = [pairs(Independent(), pictures(10, seed=s), pictures(10, seed=s + 1), blocks=one_block)[1] for s in (0, 5)]
    assert torch.equal(*draws)
    other = pairs(Independent(), pictures(10, seed=0), pictures(10, seed=1), blocks=one_block, seed=1)[1]
    assert not torch.equal(draws[0], other)


def grey_structure(x: torch.Tensor, cells: int) -> torch.Tensor:
    grey = x.mean(1).unfold(1, 16 // cells, 16 // cells).unfold(2, 16 // cells, 16 // cells).mean((3, 4)).flatten(1)
    return (grey - grey.mean(1, keepdim=True)) / grey.std(1, keepdim=True)


def thumbnails(x: torch.Tensor, cells: int) -> torch.Tensor:
    return x.unfold(2, 16 // cells, 16 // cells).unfold(3, 16 // cells, 16 // cells).mean((4, 5)).flatten(1)


@pytest.mark.parametrize(
    ("cost", "features"),
    [
        ("pixels", lambda x: x.flatten(1)),
        ("thumbnail", lambda x: thumbnails(x, 4)),
        ("structure", lambda x: grey_structure(x, 4)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_optimal_transport_has_the_least_summed_squared_distance_of_all_permutations(cost, features, seed):
    # Unequal contrasts: the least sum of distances is not the least sum of their squares.
    contrast = torch.tensor([0.1, 1.0, 0.5, 0.2, 0.9, 0.3])[:, None, None, None]
    x0, x1 = contrast * pictures(6, seed=seed), contrast.flip(0) * pictures(6, seed=100 + seed)
    blocks = torch.tensor([0, 1, 0, 0, 0, 0])
    _, j = pairs(MinibatchOT(cost=cost, thumbnail=4), x0, x1, blocks=blocks)
    squared = (features(x0)[:, None] - features(x1)[None]).square().sum(-1)
    allowed = [p for p in permutations(range(6)) if torch.equal(blocks[list(p)], blocks)]
    best = min(allowed, key=lambda p: squared[range(6), p].sum().item())
    assert j.tolist() == list(best)


@pytest.mark.parametrize("seed", range(3))
def test_optimal_transport_is_the_least_sum_without_a_patch_on_both_sides(seed):
    x0 = pictures(6, seed=seed)
    x1 = x0 + 0.1 * pictures(6, seed=100 + seed)  # another crop of the same patch, nearer than any other
    patches = torch.arange(6), torch.tensor([0, 1, 2, 3, 9, 5])
    coupling, blocks = MinibatchOT(cost="pixels"), torch.tensor([0, 1, 0, 0, 0, 0])
    options = {"blocks": blocks, "generator": torch.Generator()}
    _, j = coupling.pair(coupling.features(x0), coupling.features(x1), **options, patches=patches)
    squared = (x0.flatten(1)[:, None] - x1.flatten(1)).square().sum(-1)
    allowed = [
        p for p in permutations(range(6)) if p[1] == 1 and not {(k, k) for k in (0, 2, 3, 5)} & set(enumerate(p))
    ]
    assert j.tolist() == list(min(allowed, key=lambda p: squared[range(6), p].sum().item()))


@pytest.mark.parametrize("name", registry.names("coupling"))
def test_a_patch_on_both_sides_is_exchanged_and_the_other_pairs_stay(name):
    coupling = registry.build("coupling", registry.validate("coupling", name, key="coupling"))
    x0, x1, blocks = pictures(40, seed=0), pictures(40, seed=1), torch.arange(40) % 2
    free = pairs(coupling, x0, x1, blocks=blocks)[1]
    source, target = torch.arange(40), 100 + torch.arange(40)

    def apart():
        features = coupling.features(x0), coupling.features(x1)
        generator = torch.Generator().manual_seed(0)
        return coupling.pair(*features, blocks=blocks, generator=generator, patches=(source, target))[1]

    assert torch.equal(apart(), free)
    target[free[4]] = 4
    changed = apart()
    assert changed[4] != free[4]
    assert torch.equal(blocks[changed], blocks)
    assert torch.equal(changed[1::2], free[1::2])  # the other block
    if name == "independent":
        assert (changed != free).sum() == 2
    target[:] = 4
    source[::2] = 4
    assert torch.equal(apart().sort().values, torch.arange(40))  # one block has no other target


def test_shuffled_copies_are_found_again():
    x0 = pictures(12, seed=0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for cost in ("pixels", "thumbnail", "structure"):
        _, j = pairs(MinibatchOT(cost=cost), x0, x0[order], blocks=torch.zeros(12, dtype=torch.long))
        assert torch.equal(order[j], torch.arange(12))


def test_structure_ignores_tint_brightness_and_contrast():
    x0, x1 = pictures(12, seed=0), pictures(12, seed=1)
    blocks = torch.zeros(12, dtype=torch.long)
    draw = torch.Generator().manual_seed(2)
    contrast = 0.2 + torch.rand(12, 1, 1, 1, generator=draw)
    tint = 0.5 * torch.randn(12, 3, 1, 1, generator=draw)
    changed = contrast * x1 + tint
    expected = pairs(MinibatchOT(cost="structure"), x0, x1, blocks=blocks)[1]
    assert torch.equal(pairs(MinibatchOT(cost="structure"), x0, changed, blocks=blocks)[1], expected)
    colour = MinibatchOT(cost="pixels")
    assert not torch.equal(pairs(colour, x0, changed, blocks=blocks)[1], pairs(colour, x0, x1, blocks=blocks)[1])


def test_flat_images_and_blocks_of_one_are_paired_too():
    flat = torch.ones(4, 3, 16, 16)
    blocks = torch.tensor([0, 0, 0, 1])
    _, j = pairs(MinibatchOT(cost="structure"), flat, -flat, blocks=blocks)
    assert sorted(j.tolist()) == [0, 1, 2, 3]
    assert j[3] == 3


def test_a_thumbnail_may_be_larger_than_the_image():
    x0, x1 = pictures(3, seed=0, size=8), pictures(3, seed=1, size=8)
    _, j = pairs(MinibatchOT(cost="thumbnail", thumbnail=64), x0, x1, blocks=torch.zeros(3, dtype=torch.long))
    _, exact = pairs(MinibatchOT(cost="pixels"), x0, x1, blocks=torch.zeros(3, dtype=torch.long))
    assert torch.equal(j, exact)
