"""The figures of trajectories, each against its definition."""

from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.statistics import bootstrap, estimate, half_splits, paired_difference, rank_correlation
from cellflux_bridge.images.stain import RUIFROK_HE, from_optical_density
from cellflux_bridge.metrics import fidelity, progression
from cellflux_bridge.metrics.fidelity import (
    frechet_distance,
    frechet_floor,
    kid,
    kid_by_level,
    kid_floor,
    require_finite,
)
from cellflux_bridge.metrics.sequences import choose_frames
from cellflux_bridge.metrics.structure import TISSUE, tissue_figures


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Distances between sets


def looped_kid(a, b, groups_a, groups_b) -> float:
    """The definition of KID, pair by pair."""

    def mean(x, y, gx, gy):
        kernels = [
            (u @ v / len(u) + 1) ** 3 for u, g in zip(x, gx, strict=True) for v, h in zip(y, gy, strict=True) if g != h
        ]
        return sum(kernels) / len(kernels)

    own = mean(a, a, groups_a, groups_a) + mean(b, b, groups_b, groups_b)
    return own - 2 * mean(a, b, groups_a, groups_b)


def test_kid_is_its_definition_for_any_block_size(monkeypatch):
    rng = draw()
    a, b = rng.normal(size=(11, 4)), rng.normal(0.4, 1, size=(7, 4))
    expected = looped_kid(a, b, range(11), range(11, 18))
    for block in (1, 3, 1024):
        monkeypatch.setattr(fidelity, "_BLOCK", block)
        assert kid(a, b).value == pytest.approx(expected, rel=1e-12)
    assert kid(a.astype(np.float32), b).value == pytest.approx(expected, rel=1e-5)


def test_kid_leaves_out_pairs_of_one_group(monkeypatch):
    rng = draw(1)
    a = rng.normal(size=(8, 3))
    b = np.concatenate([a[:4], rng.normal(size=(4, 3))])  # real patches that frames were made from stand among them
    groups_a, groups_b = list("ppqqrrss"), list("ppqqttuu")
    expected = looped_kid(a, b, groups_a, groups_b)
    for block in (3, 1024):
        monkeypatch.setattr(fidelity, "_BLOCK", block)
        found = kid(a, b, groups=groups_a, real_groups=groups_b).value
        assert found == pytest.approx(expected, rel=1e-12)
    assert abs(expected - kid(a, b).value) > 1e-3


def test_kid_of_one_distribution_is_zero_on_average_and_grows_with_the_distance():
    rng = draw()
    same = [kid(rng.normal(size=(40, 8)), rng.normal(size=(40, 8))).value for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    assert min(same) < 0 < max(same)  # unbiased, so it must fall below
    near, far = (kid(rng.normal(size=(40, 8)), rng.normal(shift, 1, (40, 8))).value for shift in (0.5, 1.0))
    assert max(same) < near < far


def test_the_interval_of_kid_covers_the_truth():
    rng = draw()
    a, b = rng.normal(size=(4000, 6)), rng.normal(0.5, 1, (4000, 6))
    truth, covered = kid(a, b).value, 0
    for repeat in range(50):
        x, y = rng.normal(size=(60, 6)), rng.normal(0.5, 1, (60, 6))
        found = kid(x, y, num_subsamples=60, generator=draw(repeat))
        assert found.low < found.value < found.high
        covered += found.low <= truth <= found.high
    assert 42 <= covered <= 50


def test_the_interval_of_kid_is_the_basic_one_of_halves_by_group():
    rng = draw(7)
    a, b = rng.exponential(size=(24, 3)), 0.3 + rng.exponential(size=(30, 3))
    groups, real_groups = np.arange(24) // 2, 100 + np.arange(30) // 3
    found = kid(a, b, groups=groups, real_groups=real_groups, num_subsamples=25, generator=draw(3))
    generator = draw(3)
    halves = (half_splits(of, num=25, generator=generator) for of in (groups, real_groups))
    drawn = [
        looped_kid(a[i], b[j], groups[i], real_groups[j]) - found.value for (i, _), (j, _) in zip(*halves, strict=True)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((found.value - high, found.value - low), rel=1e-9)
    assert abs(high + low) > 0.2 * (high - low)  # so skewed that a mirrored interval is another one


def test_kid_by_level_is_kid_of_every_level():
    rng = draw()
    frames, real = rng.normal(size=(20, 3, 5)), rng.normal(size=(30, 5))
    options = {"groups": np.arange(20) // 2, "real_groups": 100 + np.arange(30) // 3, "num_subsamples": 20}
    found = kid_by_level(frames, real, generator=draw(5), **options)
    for level in range(3):
        expected = kid(frames[:, level], real, generator=draw(5), **options)
        assert found[level] == pytest.approx(expected, rel=1e-9)


def test_a_distance_of_too_few_is_undefined():
    rng = draw()
    a, b = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    assert np.isnan(kid(a[:1], b).value)
    assert np.isnan(kid(a, b, groups=[0] * 6, real_groups=range(1, 7)).value)
    assert np.isnan(frechet_distance(a, b[:1]))
    few = kid(a, b[:3], num_subsamples=10, generator=rng)
    assert np.isfinite(few.value)
    assert np.isnan(few.low)
    assert np.isnan(kid_floor(a, [0] * 6, generator=rng).mean)


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    rng = draw()
    mean, spread = np.array([1.0, -2.0, 0.5]), np.array([2.0, 0.5, 1.0])
    a, b = rng.normal(size=(200_000, 3)), mean + spread * rng.normal(size=(200_000, 3))
    assert frechet_distance(a, b) == pytest.approx((mean**2).sum() + ((spread - 1) ** 2).sum(), rel=0.01)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    x, y = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(50, 5))
    cov = [np.cov(z.T) for z in (x, y)]
    root = np.trace(sqrtm(cov[0] @ cov[1])).real
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(apart + np.trace(cov[0]) + np.trace(cov[1]) - 2 * root, rel=1e-8)


def test_the_frechet_distance_is_stable_with_fewer_images_than_features():
    rng = draw()
    a, b = rng.normal(size=(10, 64)), rng.normal(size=(12, 64))
    # tr (C_a C_b)^(1/2) is the nuclear norm of the product of the centred sets.
    centred = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (a, b)]
    root = np.linalg.norm(centred[0] @ centred[1].T, ord="nuc")
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((z**2).sum() for z in centred) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert 0 <= frechet_distance(a, a) < 1e-5


def test_the_floor_is_of_halves_that_keep_groups_whole():
    rng = draw()
    features, groups = rng.normal(size=(60, 4)), np.repeat(np.arange(20), 3)
    floor = kid_floor(features, groups, generator=draw(1), num_splits=30)
    values = [
        kid(features[i], features[j], groups=groups[i], real_groups=groups[j]).value
        for i, j in half_splits(groups, num=30, generator=draw(1))
    ]
    assert floor == pytest.approx((np.mean(values), np.std(values, ddof=1), *np.percentile(values, [2.5, 97.5])))
    assert floor.spread > 0
    for first, second in half_splits(groups, num=5, generator=rng):
        assert sorted([*first, *second]) == list(range(60))
        assert not set(groups[first]) & set(groups[second])
    halves = half_splits(groups, num=20, generator=draw(2))
    expected = np.mean([frechet_distance(features[i], features[j]) for i, j in halves])
    assert frechet_floor(features, groups, generator=draw(2)).mean == pytest.approx(expected)


def test_features_that_are_not_numbers_are_refused():
    features = np.zeros((5, 3))
    require_finite(features, name="judge")
    features[2, 1] = np.nan
    features[4, 0] = np.inf
    with pytest.raises(UserError, match=r"judge: 2 of 5 images .* not finite"):
        require_finite(features, name="judge")


# Intervals and tests


def test_the_bootstrap_draws_whole_groups():
    groups = np.array(list("aabbbc"))
    for indices in bootstrap(groups, num=50, generator=draw()).draws:
        counts = np.bincount(indices, minlength=6)
        assert counts[0] == counts[1]
        assert counts[2] == counts[3] == counts[4]
        assert counts[0] + counts[2] + counts[5] == 3


def test_the_bootstrap_by_group_covers_where_single_patches_would_not():
    rng, covered, covered_naively = draw(), 0, 0
    for repeat in range(100):
        groups = np.repeat(np.arange(25), 8)
        values = np.repeat(rng.normal(size=25), 8) + 0.1 * rng.normal(size=200)
        for by, count in ((groups, "grouped"), (np.arange(200), "naive")):
            found = estimate(lambda i, v=values: v[i].mean(), bootstrap(by, num=80, generator=draw(repeat)))
            assert found.value == pytest.approx(values.mean())
            inside = found.low <= 0 <= found.high
            covered += inside and count == "grouped"
            covered_naively += inside and count == "naive"
    assert covered >= 85
    assert covered_naively < 70


def test_a_paired_difference_is_found_and_none_is_not():
    rng = draw()
    own, groups = rng.normal(size=60), np.arange(60) // 2
    lower = own - 0.2 + 0.1 * rng.normal(size=60)
    resamples = bootstrap(groups, num=300, generator=draw())
    found = paired_difference(own, lower, groups, resamples=resamples)
    assert found.difference == pytest.approx(0.2, abs=0.05)
    assert 0.1 < found.low < found.difference < found.high < 0.3
    assert found.p < 1e-4
    assert found.num_groups == 30
    assert paired_difference(own, own, groups, resamples=resamples).p == 1
    assert paired_difference(own, own + rng.normal(size=60), groups, resamples=resamples).p > 0.01


# Progression


def test_calibration_of_means_and_of_images():
    levels = np.array([0.5, 1.0])
    p = np.array([[0.0, 0.3, 0.9], [0.9, 0.7, 0.9]])
    assert progression.calibration_of_means(p, levels) == pytest.approx(0.05)
    np.testing.assert_allclose(progression.calibration_of_images(p, levels), [0.15, 0.15])


def test_monotone_sequences_may_fall_by_a_fiftieth():
    p = np.array([[0.1, 0.5, 0.9], [0.5, 0.48, 0.9], [0.5, 0.47, 0.9], [0.5, 0.9, 0.8]], np.float32)
    assert progression.is_monotone(p).tolist() == [True, True, False, False]


def test_the_rank_correlation_is_spearmans():
    rng = draw()
    p = np.round(rng.uniform(size=(6, 9)), 1)
    expected = [spearmanr(row, np.arange(9)).statistic for row in p]
    np.testing.assert_allclose(rank_correlation(p, np.linspace(0, 1, 9) ** 2), expected)
    values = np.array([[1, 2, 4, 3], [5, 5, 5, 5], [1, np.nan, 2, 3], [1, np.nan, np.nan, 2]])
    found = rank_correlation(values, (0, 0.3, 0.6, 1))
    assert found[:3] == pytest.approx([0.8, 0, 1])
    assert np.isnan(found[3])


def test_distances_to_the_own_source_and_to_others():
    rng = draw()
    features, others = rng.normal(size=(3, 4, 5)), rng.normal(size=(6, 5))
    own = progression.distance_to_source(features)
    np.testing.assert_allclose(own, [[np.linalg.norm(f - s[0]) for f in s] for s in features])
    groups, other_groups = np.array(list("xyz")), np.array(list("xxyabz"))
    found = progression.distance_to_others(features, others, groups=groups, other_groups=other_groups)
    for n in range(3):
        expected = cdist(features[n], others[other_groups != groups[n]]).mean(1)
        np.testing.assert_allclose(found[n], expected)
    all_own = progression.distance_to_others(features, others[:2], groups=groups, other_groups=other_groups[:2])
    assert np.isnan(all_own[0]).all()
    assert np.isfinite(all_own[1:]).all()


def test_smoothness_of_a_straight_a_bent_and_a_sudden_way():
    straight = np.linspace([0.0, 0.0], [3.0, 0.0], 4)
    bent = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [2.0, 4.0]])
    sudden = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [5.0, 0.0]])
    still = np.zeros((4, 2))
    features = np.stack([straight, bent, sudden, still])
    np.testing.assert_allclose(progression.path_over_straight(features), [1, 6 / np.sqrt(20), 1, np.nan])
    np.testing.assert_allclose(progression.largest_over_mean_step(features), [1, 2, 3, np.nan])


# Tissue


def test_tissue_figures_of_patches_that_are_known():
    density = np.zeros((1, 8, 8, 3))
    density[:, :2] = 1.2 * RUIFROK_HE[0]  # a quarter is stained above the threshold, a quarter below
    density[:, 2:4] = 0.8 * RUIFROK_HE[0]
    stained = from_optical_density(density).transpose(0, 3, 1, 2)
    stripes = np.zeros((1, 3, 8, 8), np.uint8)
    stripes[:, 1, :, ::2] = 60  # one channel of three
    figures = tissue_figures(np.concatenate([stained, stripes]))
    assert figures.shape == (2, len(TISSUE))
    assert figures[0, 0] == 0.25
    assert figures[1, 1] == pytest.approx(30 / 255 / 3)


def test_noise_of_any_strength_is_no_outline():
    noise = draw().normal(size=(2, 3, 128, 128)) * np.array([5, 20]).reshape(2, 1, 1, 1)
    edges = np.where(np.hypot(*np.mgrid[-64:64, -64:64]) < 40, 60, 190)[None, None].repeat(3, 1)
    outlines = tissue_figures(np.rint(np.concatenate([noise + 128, edges])).astype(np.uint8))[:, 2]
    assert outlines[:2] == pytest.approx(0, abs=0.02)
    assert outlines[2] > 0.6


# Levels


@pytest.mark.parametrize(
    ("levels", "num", "expected"),
    [
        (np.linspace(0, 1, 26), 5, [0, 5, 10, 15, 20, 25]),
        (np.linspace(0, 1, 11), 10, list(range(11))),
        ([0.0, 0.05, 0.1, 1.0], 3, [0, 1, 2, 3]),  # as many as are asked for: all, however they lie
        (np.linspace(0, 1, 8), 2, [0, 3, 7]),
    ],
)
def test_frames_nearest_to_the_levels_are_chosen(levels, num, expected):
    assert choose_frames(levels, num, folder=Path("t")) == expected


def test_frames_that_cannot_stand_for_the_levels_are_refused():
    with pytest.raises(UserError, match=r"t: its 4 levels are too few .* 10; give --levels 4"):
        choose_frames(np.linspace(0, 1, 5), 10, folder=Path("t"))
