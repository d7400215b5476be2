"""Nuclei by rules of colour: found where they are known, split at necks, at every magnification."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from drawn_nuclei import discs, lattice, require_nuclei_of_phantoms, stained
from skimage.draw import ellipse

from cellflux_bridge.cellularity import nuclei, splitting, validation
from cellflux_bridge.cellularity.classical import haematoxylin
from cellflux_bridge.cellularity.nuclei import Parameters
from cellflux_bridge.images.stain import RUIFROK_HE, from_optical_density, two_stains

segment = partial(nuclei.segment, parameters=Parameters(method="classical"))


@pytest.mark.parametrize("darkness", [0.35, 1.0, 2.5])
def test_separate_discs_are_found_with_their_outlines_however_dark(darkness):
    rgb, truth = discs(lattice(24), darkness=darkness)
    found = segment(rgb)
    assert found.dtype == np.int32
    assert sorted(np.unique(found)) == list(range(len(lattice(24)) + 1))
    compared = validation.compare(truth, found)
    assert compared.num_matched == compared.num_true
    assert compared.area_found == pytest.approx(compared.area_true, rel=0.1)


@pytest.mark.parametrize("radius", [4, 8, 16])
def test_touching_discs_are_split_at_every_magnification(radius):
    size = 12 * radius
    pairs = [(y + d, x) for y in (3 * radius, 9 * radius) for x in (3 * radius, 9 * radius) for d in (-0.9, 0.9)]
    pairs = [(y + (radius - 1) * np.sign(y % 1 - 0.5), x) for y, x in pairs]  # 0.1 or 0.9 after the point: up or down
    rgb, truth = discs(pairs, radius=radius, size=size)
    compared = validation.compare(truth, segment(rgb))
    assert compared.num_found == compared.num_true == 8
    assert compared.num_matched == 8


def test_a_long_nucleus_stays_whole():
    density = np.full((96, 96), 0.05)
    for row in (24, 72):
        density[ellipse(row, 48, 7, 18)] = 1.2
    assert segment(stained(density)).max() == 2


def test_pale_nuclei_count_beside_dark_ones():
    dark, pale = lattice(24)[::2], lattice(24)[1::2]
    density = np.full((96, 96), 0.05)
    for centres, amount in ((dark, 2.2), (pale, 0.9)):
        density[discs(centres)[1] > 0] = amount
    assert segment(stained(density)).max() == len(lattice(24))


@pytest.mark.parametrize("size", [128, 256])
def test_nuclei_of_phantoms_of_every_severity_and_stain(size):
    require_nuclei_of_phantoms(segment, size)


@pytest.mark.parametrize("stains", ["red", "ruifrok", "macenko"])
def test_every_separation_finds_the_nuclei_and_not_the_eosin(stains):
    rgb, truth = discs(lattice(24))
    rgb[:, :8] = from_optical_density(2.5 * RUIFROK_HE[1])  # a band of eosin as dark as nuclei
    inside = truth > 0
    inside[:, :8] = False
    absorption, density = haematoxylin(rgb, stains)
    assert absorption[inside].min() > absorption[~inside].max() + 0.1
    assert np.allclose(absorption, 1 - np.exp(-density), atol=0.01)
    assert (
        abs(int(segment(rgb, parameters=Parameters(method="classical", stains=stains)).max()) - len(lattice(24))) <= 4
    )


def test_one_stain_only_is_unmixed_by_fixed_vectors():
    rgb = from_optical_density(np.linspace(0.1, 2, 64 * 64).reshape(64, 64, 1) * RUIFROK_HE[0])
    assert np.allclose(haematoxylin(rgb, "macenko")[1], haematoxylin(rgb, "ruifrok")[1])


def test_vectors_that_do_not_tell_nuclei_from_the_rest_are_not_used():
    # Thick, purple tissue: its extreme hues are of pale blue and of pink, and nuclei a violet between them.
    pale_blue, violet, pink = np.array([[0.75, 0.66, 0.3], [0.6, 0.78, 0.2], [0.36, 0.91, 0.2]])
    density = np.full((64, 64, 3), 0.35 * pale_blue) + 0.01 * np.random.default_rng(0).standard_normal((64, 64, 3))
    density[:, 48:] += 0.25 * pink
    density[16:32, 8:40] = 1.4 * violet
    rgb = from_optical_density(density)
    assert two_stains(rgb) is not None
    assert np.array_equal(haematoxylin(rgb, "macenko")[0], haematoxylin(rgb, "ruifrok")[0])


def test_microns_bound_the_size():
    rgb, _ = discs(lattice(24), radius=4)
    assert segment(rgb).max() == len(lattice(24))
    # At 0.05 um a pixel a disc of 4 px is 0.4 um across its radius: a granule, no nucleus.
    assert segment(rgb, mpp=0.05).max() == 0


def test_nothing_is_found_on_glass_and_in_even_tissue():
    noise = np.random.default_rng(0).normal(0, 1.5, (64, 64, 3))
    for colour in ((246, 244, 247), (225, 165, 205)):
        rgb = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
        assert segment(rgb).max() == 0


def test_basins_with_no_neck_between_them_are_one():
    mask = np.zeros((20, 40), bool)
    mask[4:16, 4:36] = True
    density = np.zeros(mask.shape, np.float32)
    options = {"density_smoothing": 0.2, "density_reach": 1.0, "density_weight": 0.0, "neck_power": 1}
    parameters = Parameters(method="classical", landscape_smoothing=0.2, **options)
    distance = np.minimum(np.minimum.reduce([*(np.indices(mask.shape)[0] - 3, 16 - np.indices(mask.shape)[0])]), 6)
    distance = (distance * mask).astype(np.float32)
    distance[:, 19:21] -= 1.5  # a shallow pass between two hills
    distance *= mask
    whole, parted = (
        len(np.unique(splitting.split(mask, distance, density, 6.0, replace(parameters, split_depth=depth)))) - 1
        for depth in (0.6, 0.01)
    )
    assert whole == 1
    assert parted == 2
