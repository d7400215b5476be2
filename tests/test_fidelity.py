"""Distances and neighbourhoods of sets against implementations of others."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from cellflux_bridge.base.statistics import bootstrap, estimate, estimate_mean, half_splits
from cellflux_bridge.metrics import benchmark, fidelity
from cellflux_bridge.metrics.fidelity import (
    NEIGHBOURHOOD_FIGURES,
    frechet_distance,
    kid,
    manifold_floors,
    neighbourhoods,
)
from cellflux_bridge.metrics.values import Value
from cellflux_bridge.metrics.warnings import figure_warnings


class Features(torch.nn.Module):
    """An extractor of torchmetrics' interface: small images are their own features."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def images(num: int, shift: float, seed: int) -> torch.Tensor:
    return shift + torch.randn(num, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kid_and_the_frechet_distance_are_those_of_torchmetrics():
    real, made = images(50, 0.0, 1), images(50, 0.4, 2)
    x, y = (z.flatten(1).numpy() for z in (made, real))
    theirs = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=50)
    theirs.update(real, real=True)
    theirs.update(made, real=False)
    assert kid(x, y).value == pytest.approx(theirs.compute()[0].item(), rel=1e-6)
    theirs = FrechetInceptionDistance(feature=Features(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(made[:40], real=False)
    assert frechet_distance(x[:40], y) == pytest.approx(theirs.compute().item(), rel=1e-6)


def by_scikit_learn(frames, real):
    """The published definitions (Kynkaanniemi et al. 2019, eq. 1 to 3; Naeem et al. 2020, eq. 5 and 6)."""

    def radii(x, k):
        return NearestNeighbors(n_neighbors=k).fit(x).kneighbors()[0][:, -1]

    distances = np.sqrt(((frames[:, None] - real) ** 2).sum(2))
    precise = (distances <= radii(real, 3)).any(1)
    recalled = (distances <= radii(frames, 3)[:, None]).any(0)
    inside = distances <= radii(real, 5)
    return precise.mean(), recalled.mean(), inside.sum() / (5 * len(frames)), inside.any(0).mean()


@pytest.mark.parametrize(("num", "num_real"), [(60, 60), (17, 90), (90, 25)])
def test_neighbourhoods_are_the_published_ones_for_any_block_size(num, num_real, monkeypatch):
    rng = np.random.default_rng(num)
    frames, real = 0.8 * rng.normal(size=(num, 4)) + 0.6, rng.normal(size=(num_real, 4))
    expected = by_scikit_learn(frames, real)
    assert 0 < min(expected[:2]) < max(expected[:2]) < 1
    for block in (7, 512):
        monkeypatch.setattr(fidelity, "_BLOCK", block)
        found = [each.mean() for each in neighbourhoods(frames, real)]
        assert found == pytest.approx(expected)


def test_pairs_of_one_group_are_no_neighbours():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 6)) * 10
    groups = np.arange(40) // 2
    copies = real + 0.01 * rng.normal(size=real.shape)  # of patches that stand among the real ones themselves
    assert neighbourhoods(copies, real).precision.mean() == 1
    found = neighbourhoods(copies, real, groups=groups, real_groups=groups)

    def nearest(x, others, k):
        distances = np.sqrt(((x[:, None] - others) ** 2).sum(2))
        distances[groups[:, None] == groups] = np.inf
        return distances, np.sort(distances, axis=1)[:, k - 1]

    distances, _ = nearest(copies, real, 1)
    np.testing.assert_array_equal(found.precision, (distances <= nearest(real, real, 3)[1]).any(1))
    np.testing.assert_array_equal(found.coverage, (distances <= nearest(real, real, 5)[1]).any(0))
    np.testing.assert_array_equal(found.recall, (distances <= nearest(copies, copies, 3)[1][:, None]).any(0))


def test_images_that_miss_half_are_precise_and_recall_little():
    rng = np.random.default_rng(3)
    real = np.concatenate([rng.normal(0, 1, (100, 3)), rng.normal(20, 1, (100, 3))])
    found = neighbourhoods(rng.normal(0, 1, (100, 3)), real)
    assert found.precision.mean() > 0.8
    assert found.recall[:100].mean() > 0.8
    assert found.recall[100:].mean() == found.coverage[100:].mean() == 0


def test_neighbourhoods_of_too_few_are_undefined_one_by_one():
    rng = np.random.default_rng(4)
    few, many, enough = rng.normal(size=(3, 2)), rng.normal(size=(30, 2)), rng.normal(size=(5, 2))

    def undefined(*sets, **options):
        return [bool(np.isnan(each).all()) for each in neighbourhoods(*sets, **options)]

    assert undefined(many, many + 0.1) == [False] * 4
    assert undefined(few, many) == [False, True, False, False]
    assert undefined(many, enough) == [False, False, True, True]
    assert undefined(many, few) == [True] * 4
    assert undefined(many, few[:0]) == [True] * 4
    assert np.isnan(estimate_mean(np.empty(0), [], num=5, generator=rng).value)
    assert undefined(many, many, groups=range(30), real_groups=["one"] * 30) == [True] * 4


def test_floors_of_neighbourhoods_are_of_halves():
    rng = np.random.default_rng(5)
    features, groups = rng.normal(size=(60, 3)), np.arange(60) // 2
    found = manifold_floors(features, groups, generator=np.random.default_rng(1), num_splits=4)
    assert tuple(found) == NEIGHBOURHOOD_FIGURES
    halves = half_splits(groups, num=4, generator=np.random.default_rng(1))
    expected = [
        neighbourhoods(features[i], features[j], groups=groups[i], real_groups=groups[j]).density.mean()
        for i, j in halves
    ]
    assert found["density"].mean == pytest.approx(np.mean(expected))
    assert np.isnan(manifold_floors(features, [0] * 60, generator=rng)["recall"].mean)


def test_the_mean_of_many_has_the_interval_of_the_cluster_bootstrap():
    rng = np.random.default_rng(6)
    groups = rng.integers(20, size=200)
    values = rng.normal(size=200) + 0.1 * groups
    found = estimate_mean(values, groups, num=300, generator=np.random.default_rng(2))
    expected = estimate(lambda i: values[i].mean(), bootstrap(groups, num=300, generator=np.random.default_rng(2)))
    assert found == pytest.approx(expected, rel=1e-12)


def test_too_few_images_are_warned_of():
    def value(quantity, number, n, n_real, level=None):
        return Value("", "path", quantity, level, "x", n, n_real, "test", number, np.nan, np.nan)

    few, undefined = figure_warnings(
        [
            value("frechet_own", 3.0, 5000, 2047, 0.5),
            value("frechet_target", 3.0, 5000, 6000, 1.0),
            value("recall_own", np.nan, 3, 40, 0.5),
            value("recall_own", np.nan, 3, 40, 1.0),
            value("guidance_kid_ratio", np.nan, 3, None),
        ]
    )
    assert "as few as 2047 images" in few
    assert undefined == (
        "Not known: recall, same level (path) at level 0.5 and 1. This rests on 3 images against 40; it needs 4 frames "
        "and 4 real patches of different groups."
    )
    assert list(figure_warnings([value("frechet_own", 3.0, 2048, 2048)])) == []
    (floor,) = figure_warnings([value("kid_floor", np.nan, 2, 2), value("kid_floor_spread", np.nan, 2, 2)])
    assert floor == "Not known: floor of KID (path). This rests on 2 images against 2; it needs 4 groups."


def test_a_judge_that_is_no_better_than_chance_is_warned_of_first():
    def value(method, number, judge):
        return Value("", method, "flip_rate", None, judge, 40, None, "test", number, np.nan, np.nan)

    few = Value("", "path", "frechet_own", 0.5, "x", 5, 5, "test", 3.0, np.nan, np.nan)
    judged = [value("real target", 0.95, "good"), value("real source", 0.05, "good")]
    judged += [value("real target", 1.0, "poor"), value("real source", 0.95, "poor")]
    first, second = figure_warnings([few, *judged])
    assert first.startswith("poor recognises 5% of the real source patches and 100% of the real target patches")
    assert "accuracy 0.53" in first
    assert "as few as 5 images" in second


def test_the_benchmark_times_every_part(capsys):
    benchmark.main(["--images", "40", "--size", "16", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    parts = [line.partition(" s  ")[2] for line in lines]
    assert parts[:2] == ["features", "KID with its interval"]
    assert parts[-1].startswith("all of 40 images of 16 px, peak ")
    assert float(lines[-1].split()[0]) >= sum(float(line.split()[0]) for line in lines[:-1]) - 0.5
