"""Figures that tell made patches from real ones without weights: bands, two-sample tests, sliced Wasserstein distance,
known damage."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from cellflux_bridge.data.phantom import make_phantom
from cellflux_bridge.metrics import bands, two_sample
from cellflux_bridge.metrics.damage import DAMAGED, DAMAGES, MUST_SEE, blind_for
from cellflux_bridge.metrics.realism import _unevenness
from cellflux_bridge.metrics.sliced_wasserstein import laplacian_pyramid, swd
from cellflux_bridge.metrics.values import Value
from cellflux_bridge.metrics.warnings import figure_warnings


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def phantoms() -> np.ndarray:
    return np.stack([make_phantom(0.9, size=32, seed=n).image.transpose(2, 0, 1) for n in range(120)])


def blurred(patches: np.ndarray, sigma: float) -> np.ndarray:
    return DAMAGES[f"blur of {sigma:g} px"](patches, draw())


# Bands


def test_every_octave_has_its_own_detail():
    waves = [np.sin(2 * np.pi * np.arange(64) / period) for period in (3, 8, 16, 32)]
    images = np.stack([np.broadcast_to(100 * wave, (64, 64)) for wave in waves])[:, None].astype(np.float32)
    power = bands.band_statistics(images).reshape(4, 4, 3)[..., 0]
    assert power.argmax(axis=1).tolist() == [0, 1, 2, 3]
    assert bands.band_statistics(2 * images).reshape(4, 4, 3)[..., 0] == pytest.approx(power + np.log(4), abs=1e-3)


def test_statistics_of_noise_and_of_nothing_are_known():
    noise = draw().normal(size=(1, 1, 256, 256)).astype(np.float32) * 30
    _, skewness, kurtosis = bands.band_statistics(noise).reshape(4, 3)[0]
    assert (skewness, kurtosis) == (pytest.approx(0, abs=0.05), pytest.approx(0, abs=0.05))
    flat = bands.band_statistics(np.full((1, 1, 16, 16), 7, np.float32)).reshape(4, 3)
    assert flat[:, 1:].tolist() == [[0, 0]] * 4
    assert np.isfinite(flat).all()


def test_grey_sees_no_colour_and_colour_sees_it():
    noise = draw().integers(-20, 20, (4, 1, 32, 32))
    coloured = (128 + noise * np.array([1, -1, 0]).reshape(1, 3, 1, 1)).astype(np.uint8)  # the mean stays
    found, flat = bands.statistics(coloured), bands.statistics(np.full_like(coloured, 128))
    assert found[:, bands.KINDS["grey"]] == pytest.approx(flat[:, bands.KINDS["grey"]], abs=1e-6)
    assert (found[:, bands.KINDS["colour"]][:, 0] > flat[:, bands.KINDS["colour"]][:, 0] + 5).all()


def test_the_spectrum_peaks_at_the_period_of_a_wave():
    wave = 128 + 100 * np.sin(2 * np.pi * 5 * np.arange(40) / 40)
    image = np.broadcast_to(wave, (1, 3, 40, 40)).astype(np.uint8)
    spectrum = bands.radial_spectrum(image)
    assert spectrum.shape == (1, 20)
    assert spectrum[0].argmax() + 1 == 5


# Two-sample tests


def test_the_area_under_the_curve_is_scikit_learns_with_ties():
    scores, is_made = draw().integers(0, 5, 60).astype(float), draw(1).random(60) < 0.4
    assert two_sample.auc(scores, is_made) == pytest.approx(roc_auc_score(is_made, scores))
    assert np.isnan(two_sample.auc(np.full(60, np.nan), is_made))


def test_no_group_is_learnt_and_asked():
    groups, is_made = np.array([f"g{n // 4}" for n in range(48)]), np.arange(48) % 4 < 2
    for learnt, asked in two_sample.folds(is_made, groups, num=5, seed=0):
        assert not set(groups[learnt]) & set(groups[asked])
    assert two_sample.folds(is_made, np.zeros(48), num=5, seed=0) == []


def test_one_distribution_is_not_told_apart_and_a_shift_is():
    first, second, shifted = (draw(n).normal(size=(150, 12)) + (n == 2) * 1.0 for n in range(3))
    groups = np.arange(300)
    options = {"scores_of": two_sample.logistic_scores, "generator": draw()}
    same = two_sample.two_sample(first, second, groups[:150], groups[150:], **options)
    assert same.value == pytest.approx(0.5, abs=0.1)
    apart = two_sample.two_sample(first, shifted, groups[:150], groups[150:], **options)
    assert apart.low > 0.9


def test_what_a_group_shares_is_no_difference_between_kinds():
    """Each group has a colour of its own: a classifier that saw it would know the group, and with it the kind."""
    groups = np.repeat(np.arange(20), 10)
    own = draw().normal(size=(20, 30))[groups] + 0.01 * draw(1).normal(size=(200, 30))
    found = two_sample.two_sample(
        own[:100], own[100:], groups[:100], groups[100:], scores_of=two_sample.logistic_scores
    )
    assert found.value < 0.8


def test_the_interval_draws_whole_groups():
    """Of groups of ten equal items it is as wide as that of single items from as many groups."""
    scores, codes = draw().normal(size=40) + np.repeat([0.5, 0], 20), np.repeat(np.arange(40), 10)

    def interval(of: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
        half, given = len(of) // 2, {"scores_of": lambda items, *_: items, "generator": draw()}
        found = two_sample.two_sample(of[:half], of[half:], groups[:half], groups[half:], **given)
        return found.low, found.high

    assert interval(scores[codes], codes) == pytest.approx(interval(scores, np.arange(40)))


def test_a_network_tells_blends_from_patches_and_patches_not_from_patches(phantoms):
    half, groups = len(phantoms) // 2, np.arange(len(phantoms))
    for made, bound in ((phantoms[:half], 0.75), (DAMAGES["blends of two patches"](phantoms[:half], draw()), None)):
        sides = made, phantoms[half:], groups[:half], groups[half:]
        found = two_sample.two_sample(*sides, scores_of=two_sample.network_scores).value
        assert found < bound if bound else found > 0.9
    again = two_sample.two_sample(*sides, scores_of=two_sample.network_scores).value
    assert again == found


# Distances


def test_the_pyramid_adds_up_to_the_image(phantoms):
    fine, coarse = laplacian_pyramid(phantoms[:3])
    assert (fine.shape, coarse.shape) == ((3, 3, 32, 32), (3, 3, 16, 16))
    from skimage.transform import pyramid_expand

    larger = pyramid_expand(coarse.reshape(9, 16, 16).transpose(1, 2, 0), channel_axis=-1).transpose(2, 0, 1)
    assert fine + larger.reshape(fine.shape) == pytest.approx(phantoms[:3] / 127.5 - 1, abs=1e-5)
    assert [len(laplacian_pyramid(np.zeros((1, 3, side, side), np.uint8))) for side in (16, 31, 64, 512)] == [
        1,
        1,
        3,
        5,
    ]


def test_the_distance_finds_the_scale_that_is_wrong(phantoms):
    half = len(phantoms) // 2
    floor, blur = swd(phantoms[:half], phantoms[half:]), swd(blurred(phantoms[:half], 0.5), phantoms[half:])
    assert blur["full"] > 3 * floor["full"]
    assert blur["half"] < 2 * floor["half"]
    shift = swd(np.minimum(phantoms[:half], 235) + np.uint8(20), phantoms[half:])
    assert shift["half"] > 3 * floor["half"]
    assert shift["full"] < 2 * floor["full"]
    assert swd(phantoms, phantoms)["full"] < floor["full"]


# Damage


def test_damage_is_what_it_is_called(phantoms):
    few = phantoms[:6]
    damaged = {name: damage(few, draw()) for name, damage in DAMAGES.items()}
    assert all(of.shape == few.shape and of.dtype == np.uint8 for of in damaged.values())
    soft = gaussian_filter(few.astype(float), (0, 0, 2, 2))
    assert damaged["blur of 2 px"] == pytest.approx(soft, abs=1)
    shuffled = damaged["tiles that changed places"]
    assert np.array_equal(np.sort(shuffled.reshape(6, 3, -1)), np.sort(few.reshape(6, 3, -1)))
    squares = shuffled.reshape(6, 3, 4, 8, 4, 8), few.reshape(6, 3, 4, 8, 4, 8)
    assert np.array_equal(*(of.astype(int).sum((3, 5)) for of in squares))  # a tile stays in its square
    assert (shuffled != few).any((1, 2, 3)).all()
    assert damaged["blends of two patches"][0] == pytest.approx((few[0].astype(float) + few[3]) / 2, abs=1)
    assert (damaged["noise of 8 grey levels"].astype(float) - few).std() == pytest.approx(8, rel=0.1)


def test_a_network_that_sees_too_little_is_blind():
    def row(name: str, by: str, value: float) -> Value:
        return Value("", DAMAGED + name, "damage_response", None, by, 9, 9, "test", value, np.nan, np.nan)

    rows = [row(name, by, value) for by, value in (("sharp", 5), ("dull", 1), ("unknown", np.nan)) for name in DAMAGES]
    assert blind_for(rows) == {"dull": list(MUST_SEE), "unknown": list(MUST_SEE)}
    assert blind_for([row("JPEG of quality 30", "sharp", 0)]) == {}


def test_even_steps_and_one_jump():
    assert _unevenness(np.ones((3, 5))) == 1
    assert _unevenness(np.eye(5)[:1].repeat(3, axis=0)) == 5
    assert np.isnan(_unevenness(np.zeros((3, 5))))


def test_warnings_name_what_is_told_apart_uneven_and_blind():
    def row(quantity: str, value: float, by: str = "", method: str = "m") -> Value:
        return Value("folder" if method == "m" else "", method, quantity, None, by, 9, 9, "test", value, np.nan, np.nan)

    told, uneven, seen = row("two_sample_grey_target", 0.95), row("step_unevenness", 2.5, "eye"), DAMAGED + MUST_SEE[0]
    texts = [*figure_warnings([told, uneven, row("damage_response", 9, "eye", seen)])]
    assert ["AUC 0.95" in texts[0], "2.5 times" in texts[1], len(texts)] == [True, True, 2]
    (blind,) = figure_warnings([uneven, row("damage_response", 1, "eye", seen)])
    assert f"eye is blind for {MUST_SEE[0]}" in blind
    fine = [row("two_sample_grey_target", 0.6), row("step_unevenness", 1.9), row("damage_response", 3.5, "eye", seen)]
    assert [*figure_warnings(fine)] == []
