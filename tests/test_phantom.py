"""Phantom tissue: what a picture, its labels and its severity promise each other."""

from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.phantom import Phantom, make_phantom
from cellflux_bridge.data.phantom.drawing import nucleus_diameter_for
from cellflux_bridge.images.stain import concentrations, optical_density

SEVERITIES = (0.0, 0.5, 1.0)


@cache
def phantoms(severity: float, size: int, count: int) -> tuple[Phantom, ...]:
    return tuple(make_phantom(severity, size=size, seed=seed) for seed in range(count))


def brightest(phantom: Phantom) -> np.ndarray:
    """Median colour of the 40 brightest pixels: open lumen, where nothing but the tint absorbs."""
    pixels = phantom.image.reshape(-1, 3)
    return np.median(pixels[np.argsort(pixels.sum(axis=1, dtype=int))[-40:]], axis=0)


def nuclear_density(phantom: Phantom) -> np.ndarray:
    """Mean optical density (3,) of the nuclei over that of open lumen."""
    nuclei = optical_density(phantom.image)[phantom.labels > 0].mean(axis=0)
    return nuclei - optical_density(brightest(phantom))


def test_a_seed_repeats_itself_and_differs_from_the_next():
    first, again, other = (make_phantom(0.6, size=64, seed=seed) for seed in (7, 7, 8))
    for name in ("image", "labels", "centres", "areas"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.labels, other.labels)
    assert not np.array_equal(first.image, other.image)


def test_no_global_random_state_is_read_or_moved():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    make_phantom(0.5, size=32, seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("size", [16, 32, 51, 64, 256])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_labels_areas_and_centres_agree(size, severity):
    for seed in range(3):
        phantom = make_phantom(severity, size=size, seed=seed)
        count = len(phantom.areas)
        assert phantom.image.shape == (size, size, 3)
        assert phantom.image.dtype == np.uint8
        assert phantom.labels.shape == (size, size)
        assert phantom.labels.dtype == np.uint16
        assert phantom.severity == severity
        assert phantom.centres.shape == (count, 2)
        assert phantom.centres.dtype == np.float32
        numbers = np.arange(1, count + 1)
        np.testing.assert_array_equal(np.unique(phantom.labels[phantom.labels > 0]), numbers)
        np.testing.assert_array_equal(np.bincount(phantom.labels.ravel(), minlength=count + 1)[1:], phantom.areas)
        middles = ndimage.center_of_mass(np.ones((size, size)), phantom.labels, numbers)
        np.testing.assert_allclose(np.reshape(middles, (-1, 2)), phantom.centres, atol=1e-3)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_nuclei_can_be_counted(severity):
    for phantom in phantoms(severity, 64, 25):
        pieces = sum(ndimage.label(phantom.labels == i + 1, np.ones((3, 3)))[1] for i in range(len(phantom.areas)))
        assert pieces == len(phantom.areas)
        assert phantom.areas.min() >= 6


@pytest.mark.parametrize("size", [32, 64, 256])
def test_every_patch_shows_nuclei_several_pixels_wide(size):
    low, high = {32: (4.5, 7), 64: (5.5, 9), 256: (8, 14)}[size]
    for severity in SEVERITIES:
        made = phantoms(severity, size, 3 if size == 256 else 25)
        assert min(len(phantom.areas) for phantom in made) >= 3
        areas = np.concatenate([phantom.areas for phantom in made])
        assert low <= 2 * np.sqrt(areas.mean() / np.pi) <= high


def test_nuclei_are_as_wide_as_asked_for():
    areas = [make_phantom(0.5, size=128, seed=4, nucleus_diameter=d).areas.mean() for d in (7.0, 14.0)]
    assert 3 < areas[1] / areas[0] < 5
    assert nucleus_diameter_for(32) == 6.0


@pytest.mark.parametrize("size", [32, 64])
def test_count_and_area_fraction_rise_with_severity(size):
    counts = [np.mean([len(p.areas) for p in phantoms(s, size, 25)]) for s in SEVERITIES]
    fractions = [np.mean([np.mean(p.labels > 0) for p in phantoms(s, size, 25)]) for s in SEVERITIES]
    assert np.all(np.diff(counts) > 0.05 * counts[0])
    assert np.all(np.diff(fractions) > 0.25 * fractions[0])


def test_nuclear_size_varies_more_at_high_severity():
    spread = [np.concatenate([p.areas for p in phantoms(s, 256, 3)]) for s in (0.0, 1.0)]
    relative = [areas.std() / areas.mean() for areas in spread]
    assert relative[1] > 1.2 * relative[0]


def test_severity_moves_tissue_gradually():
    steps = [make_phantom(s, size=128, seed=2).labels > 0 for s in (0.0, 0.02, 1.0)]
    assert np.mean(steps[0] != steps[1]) < 0.3 * np.mean(steps[0] != steps[2])


def test_severity_leaves_the_colour_of_lumen_alone():
    for calm, wild in zip(phantoms(0.0, 256, 3), phantoms(1.0, 256, 3), strict=True):
        np.testing.assert_allclose(brightest(calm), brightest(wild), atol=3)


def test_severity_darkens_nuclei_but_keeps_their_hue():
    for calm, wild in zip(phantoms(0.0, 256, 3), phantoms(1.0, 256, 3), strict=True):
        low, high = nuclear_density(calm), nuclear_density(wild)
        assert 1.0 < high.sum() / low.sum() < 1.5
        np.testing.assert_allclose(low / np.linalg.norm(low), high / np.linalg.norm(high), atol=0.04)


def test_stain_seed_moves_colour_only():
    made = [make_phantom(0.5, size=128, seed=5, stain_seed=stain) for stain in range(6)]
    for phantom in made[1:]:
        np.testing.assert_array_equal(phantom.labels, made[0].labels)
    colours = np.array([phantom.image.mean(axis=(0, 1)) for phantom in made])
    assert colours.std(axis=0).max() > 3
    own = make_phantom(0.5, size=128, seed=5, stain_seed=5)
    np.testing.assert_array_equal(own.image, make_phantom(0.5, size=128, seed=5).image)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_masks_sit_on_haematoxylin(severity):
    for phantom in phantoms(severity, 64, 25):
        haematoxylin = concentrations(phantom.image)[..., 0]
        mask = phantom.labels > 0
        ring = ndimage.binary_dilation(mask, iterations=4) & ~ndimage.binary_dilation(mask)
        assert haematoxylin[mask].mean() > 2 * haematoxylin[ring].mean()
        inside = ndimage.mean(haematoxylin, phantom.labels, np.arange(1, len(phantom.areas) + 1))
        assert np.min(inside) > np.percentile(haematoxylin[ring], 60)
        # Nothing outside the labels is drawn as a nucleus.
        assert np.mean(haematoxylin[~ndimage.binary_dilation(mask)] > np.median(inside)) < 0.001


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"severity": -0.1, "size": 64}, "severity -0.1"),
        ({"severity": 1.5, "size": 64}, "severity 1.5"),
        ({"severity": float("nan"), "size": 64}, "severity nan"),
        ({"severity": 0.5, "size": 15}, "size 15"),
        ({"severity": 0.5, "size": 64, "nucleus_diameter": 1.0}, "nucleus_diameter 1.0"),
    ],
)
def test_a_value_out_of_range_is_named(arguments, named):
    with pytest.raises(UserError, match=named):
        make_phantom(seed=0, **arguments)
