"""Stain: the mathematics of optical density, transfer toward a reference, and jitter that keeps tissue as it is."""

import numpy as np
import pytest
import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.phantom import make_phantom
from cellflux_bridge.images import encode, stain

STAINS = np.array([[0.60, 0.72, 0.35], [0.15, 0.95, 0.27]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)


def tissue(seed: int, *, stains: np.ndarray = STAINS, strength: float = 1.0, size: int = 64) -> np.ndarray:
    """An RGB image that holds nuclei (haematoxylin) among eosin under the given stain vectors."""
    rng = np.random.default_rng(seed)
    nuclear = (rng.random((size, size)) < 0.3).astype(float)
    amounts = np.stack([nuclear * rng.uniform(0.8, 1.5, nuclear.shape), (1 - nuclear) * rng.uniform(0.3, 1.0)], axis=-1)
    return stain.from_optical_density(strength * amounts @ stains)


def distance(image: np.ndarray, other: np.ndarray) -> float:
    """Distance of mean colours, of spreads, and of their darkest parts."""
    measures = [np.concatenate([x.mean((0, 1)), x.std((0, 1)), np.percentile(x, 5, (0, 1))]) for x in (image, other)]
    return float(np.linalg.norm(measures[0] - measures[1]))


def test_optical_density_is_beer_lambert_and_inverts():
    rgb = np.arange(1, 256, dtype=np.uint8).reshape(-1, 1).repeat(3, 1)
    np.testing.assert_allclose(stain.optical_density(rgb), -np.log(rgb / 255), atol=1e-6)
    np.testing.assert_array_equal(stain.from_optical_density(stain.optical_density(rgb)), rgb)
    assert np.isfinite(stain.optical_density(np.zeros(3, np.uint8))).all()


def test_concentrations_are_what_an_image_was_mixed_from():
    amounts = np.random.default_rng(0).uniform(0.1, 1.0, (20, 20, 2))
    density = amounts @ stain.RUIFROK_HE
    found = stain.concentrations(255 * np.exp(-density))
    np.testing.assert_allclose(found, amounts, atol=1e-4)


@pytest.mark.parametrize("strength", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(
    "stains", [STAINS, [[0.72, 0.62, 0.30], [0.05, 0.85, 0.50]], [[0.45, 0.78, 0.43], [0.30, 0.94, 0.14]]]
)
def test_macenko_finds_the_stain_vectors_haematoxylin_first(stains, strength):
    stains = np.array(stains) / np.linalg.norm(stains, axis=1, keepdims=True)
    found = stain.macenko_stains(tissue(0, stains=stains, strength=strength))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    degrees = np.degrees(np.arccos(np.clip((found * stains).sum(axis=1), -1, 1)))
    assert degrees.max() < 2


def test_an_image_without_stain_gets_the_published_vectors():
    glass = np.full((16, 16, 3), 250, np.uint8)
    np.testing.assert_array_equal(stain.macenko_stains(glass), stain.RUIFROK_HE)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_images_of_another_stain_come_much_closer_to_the_reference(method):
    other = np.array([[0.72, 0.62, 0.30], [0.05, 0.85, 0.50]])
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    references = [tissue(seed) for seed in range(6)]
    reference = stain.fit_reference(method, references)
    for seed in range(6, 9):
        # The same tissue under both stains: what is left after normalising is stain alone.
        same, foreign = tissue(seed), tissue(seed, stains=other, strength=0.6)
        before = distance(foreign, same)
        after = distance(stain.normalise(foreign, reference), stain.normalise(same, reference))
        assert after < 0.35 * before


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_an_image_of_the_references_own_stain_hardly_changes(method):
    image = tissue(0)
    normalised = stain.normalise(image, stain.fit_reference(method, [image]))
    assert np.abs(normalised.astype(int) - image).mean() < 3


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_flat_image_can_be_normalised(method, value):
    flat = np.full((16, 16, 3), value, np.uint8)
    normalised = stain.normalise(flat, stain.fit_reference(method, [tissue(0)]))
    assert normalised.shape == flat.shape
    assert (normalised == normalised[0, 0]).all()


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="expected 'reinhard' or 'macenko'"):
        stain.fit_reference("vahadane", [tissue(0)])


@pytest.fixture
def stained() -> torch.Tensor:
    """(4, 2, 3, 16, 16) float in [-1, 1]: four pairs of the same image twice."""
    images = np.stack([tissue(seed, size=16, strength=0.8) for seed in range(4)])
    tensor = encode(torch.from_numpy(images).permute(0, 3, 1, 2))
    return torch.stack([tensor, tensor], dim=1)


def jitter(images: torch.Tensor, *, strength: float, seed: int = 0) -> torch.Tensor:
    return stain.augment(images, strength=strength, generator=torch.Generator().manual_seed(seed))


def test_jitter_is_shared_by_a_pair_and_differs_between_pairs(stained):
    out = jitter(stained, strength=0.3)
    assert torch.equal(out[:, 0], out[:, 1])
    same_image = jitter(stained[:1].expand(4, -1, -1, -1, -1), strength=0.3)
    changes = (same_image - stained[:1]).flatten(1).mean(1)
    assert len({round(change.item(), 4) for change in changes}) == 4


def test_jitter_repeats_itself_by_its_generator(stained):
    assert torch.equal(jitter(stained, strength=0.2), jitter(stained, strength=0.2))
    assert not torch.equal(jitter(stained, strength=0.2), jitter(stained, strength=0.2, seed=1))


def test_jitter_keeps_shape_and_range_and_vanishes_with_its_strength(stained):
    out = jitter(stained, strength=1.0)
    assert out.shape == stained.shape
    assert out.dtype == stained.dtype
    assert out.min() >= -1
    assert out.max() <= 1
    assert (jitter(stained, strength=1e-6) - stained).abs().max() < 1e-4
    assert (jitter(stained[:, 0], strength=0.3) - jitter(stained, strength=0.3)[:, 0]).abs().max() < 1e-6


def test_jitter_scales_and_shifts_each_stain_alone(stained):
    """In the basis of the two stains and their normal, density is an affine map with the normal untouched."""
    basis = np.vstack([stain.RUIFROK_HE, np.cross(*stain.RUIFROK_HE)])
    basis[2] /= np.linalg.norm(basis[2])
    before, after = stained[:, 0].double(), jitter(stained, strength=0.1)[:, 0].double()
    for old, new in zip(before, after, strict=True):
        inside = ((new > -0.98) & (new < 0.98)).all(0)
        density = [-np.log(((x[:, inside] + 1) / 2).numpy()).T @ np.linalg.inv(basis) for x in (old, new)]
        for component in range(2):
            slope, offset = np.polyfit(density[0][:, component], density[1][:, component], 1)
            assert 0.9 <= slope <= 1.1
            assert abs(offset) <= 0.1 / 4 + 1e-6
            line = slope * density[0][:, component] + offset
            np.testing.assert_allclose(density[1][:, component], line, atol=1e-4)
        np.testing.assert_allclose(density[1][:, 2], density[0][:, 2], atol=1e-4)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_glass_is_not_made_into_tissue(method):
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal(246, 2, (32, 32, 3)), 0, 255).astype(np.uint8)
    tissue = np.clip(np.array([190.0, 120, 180]) + rng.normal(0, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
    reference = stain.fit_reference(method, [tissue])
    np.testing.assert_array_equal(stain.normalise(glass, reference), glass)


def unevenly(amount: float, vector: np.ndarray, *, noise: float, seed: int = 0) -> np.ndarray:
    """A 64 px patch of one stain, by half more and less of it, with noise in its optical density."""
    rng = np.random.default_rng(seed)
    density = amount * rng.uniform(0.5, 1.5, (64, 64, 1)) * vector + noise * rng.standard_normal((64, 64, 3))
    return stain.from_optical_density(np.maximum(density, 0))


@pytest.fixture(scope="module")
def phantom_reference() -> stain.StainReference:
    phantoms = [make_phantom(n / 19, size=64, seed=n).image for n in range(20)]
    return stain.fit_reference("macenko", phantoms)


@pytest.mark.parametrize("noise", [0.005, 0.01, 0.02])
@pytest.mark.parametrize("amount", [0.46, 1.5])
@pytest.mark.parametrize("kind", [0, 1], ids=["haematoxylin", "eosin"])
def test_a_patch_of_one_stain_stays_of_that_stain(phantom_reference, kind, amount, noise):
    vectors = np.reshape(phantom_reference.values[:6], (2, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    patch = unevenly(amount, vectors[kind], noise=noise)
    np.testing.assert_array_equal(stain.macenko_stains(patch), stain.RUIFROK_HE)
    normalised = stain.normalise(patch, phantom_reference)
    assert np.abs(normalised.astype(int) - patch).mean((0, 1)).max() < 8
    # The other stain, of which there is only noise.
    other = stain.concentrations(normalised, vectors)[..., 1 - kind]
    assert np.abs(other).max() < 0.1 + 15 * noise


def test_an_even_patch_has_no_stains_of_its_own(phantom_reference):
    rng = np.random.default_rng(0)
    for noise in (0.005, 0.01, 0.02):
        patch = stain.from_optical_density(0.5 * stain.RUIFROK_HE[1] + noise * rng.standard_normal((64, 64, 3)))
        assert stain.two_stains(patch) is None
        assert (stain.concentrations(stain.normalise(patch, phantom_reference))[..., 0] < 0.3).all()


def test_a_stain_that_hardly_any_pixel_holds_is_not_made_of_the_others_noise():
    """Pale eosin with too few nuclei for the 99th percentile: both stains are known, one is weak."""
    rng = np.random.default_rng(0)
    amounts = np.stack([np.zeros((64, 64)), rng.uniform(0.05, 0.4, (64, 64))], axis=-1)
    amounts[:4, :9] = [1.2, 0.1]  # of 4,096 pixels 36; of those that are stained enough to be looked at, above 1 %
    patch = stain.from_optical_density(amounts @ STAINS + 0.01 * rng.standard_normal((64, 64, 3)).clip(-2, 2))
    assert stain.two_stains(patch) is not None
    reference = stain.fit_reference("macenko", [tissue(seed) for seed in range(6)])
    normalised = stain.normalise(patch, reference)
    nuclear = np.zeros((64, 64), bool)
    nuclear[:4, :9] = True
    haematoxylin = stain.concentrations(normalised, STAINS)[..., 0]
    assert haematoxylin[~nuclear].max() < 0.5
    assert haematoxylin[nuclear].min() > 1


def test_a_reference_is_of_the_images_that_show_both_stains():
    both = [tissue(seed) for seed in range(3)]
    eosin = [unevenly(0.8, STAINS[1], noise=0.01, seed=seed) for seed in range(3)]
    assert stain.fit_reference("macenko", [*both, *eosin]) == stain.fit_reference("macenko", both)
    vectors = np.reshape(stain.fit_reference("macenko", eosin).values[:6], (2, 3))
    np.testing.assert_allclose(vectors, stain.RUIFROK_HE)


def test_tissue_of_two_stains_is_normalised_by_the_equations_and_glass_stays(phantom_reference):
    reference = np.array(phantom_reference.values)
    target = reference[:6].reshape(2, 3) / np.linalg.norm(reference[:6].reshape(2, 3), axis=1, keepdims=True)
    for image in (tissue(0), tissue(1, strength=1.3), make_phantom(0.3, size=64, seed=50).image):
        density, mask = stain.optical_density(image), stain.tissue_mask(image)
        amounts = np.maximum(density @ np.linalg.pinv(stain.macenko_stains(image)), 0)
        scaled = amounts / np.percentile(amounts[mask], 99, axis=0) * reference[6:]
        expected = 255 * np.exp(-scaled @ target)
        found = stain.normalise(image, phantom_reference)
        glass, inner = ~mask & (density.mean(axis=-1) < 0.07), mask & (density.mean(axis=-1) > 0.13)
        np.testing.assert_allclose(found[inner], expected[inner], atol=0.51)
        np.testing.assert_array_equal(found[glass], image[glass])
        low, high = np.minimum(image, expected), np.maximum(image, expected)  # between them both are mixed
        assert ((found >= low - 0.51) & (found <= high + 0.51)).all()
    assert glass.any()


PENS = {
    "black": (0, 0, 0),
    "scan edge": (60, 62, 65),
    "grey": (128, 128, 128),
    "blue pen": (30, 60, 170),
    "dark blue pen": (20, 40, 120),
    "pure blue pen": (0, 0, 200),
    "green pen": (40, 140, 70),
    "red pen": (200, 30, 40),
    "yellow pen": (240, 220, 40),
    "brown pen": (139, 69, 19),
    "glass": (250, 250, 250),
}


def even_tissue(seed: int, *, strength: float = 1.0, size: int = 96) -> np.ndarray:
    """Round nuclei in eosin, the same everywhere, so that any part of the image has the statistics of the whole."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:size, :size] % 12
    nuclear = ((yy - 6) ** 2 + (xx - 6) ** 2 < 9)[..., None]
    amounts = np.where(nuclear, [1.4, 0.3], [0.05, 0.5]) * rng.uniform(0.9, 1.1, (size, size, 1))
    return stain.from_optical_density(strength * amounts @ STAINS)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
@pytest.mark.parametrize("colour", PENS.values(), ids=PENS)
def test_an_artefact_stays_and_does_not_colour_the_tissue_beside_it(method, colour):
    reference = stain.fit_reference(method, [even_tissue(seed) for seed in range(3)])
    image = even_tissue(3, strength=0.6)
    alone = stain.normalise(image, reference).astype(int)
    yy, xx = np.mgrid[:96, :96]
    corners = (yy - 47.5) ** 2 + (xx - 47.5) ** 2 > 56**2
    for artefact in (xx < 3, xx < 10, xx < 28, (yy > 40) & (yy < 46), abs(xx - yy) < 5, corners):
        marked = np.where(artefact[..., None], colour, image).astype(np.uint8)
        found = stain.normalise(marked, reference).astype(int)
        np.testing.assert_array_equal(found[artefact], marked[artefact])
        assert np.abs(found - alone)[~artefact].mean() < 2
    solid = np.full_like(image, colour)
    assert not stain.tissue_mask(solid).any()
    np.testing.assert_array_equal(stain.normalise(solid, reference), solid)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_noise_on_a_border_is_no_tissue(method):
    reference = stain.fit_reference(method, [even_tissue(seed) for seed in range(3)])
    image = even_tissue(3, strength=0.6)
    rng = np.random.default_rng(0)
    for colour in (PENS["black"], PENS["blue pen"], PENS["scan edge"]):
        marked = image.copy()
        marked[:, :20] = np.clip(colour + rng.normal(0, 12, (96, 20, 3)), 0, 255)
        found = stain.normalise(marked, reference).astype(int)
        assert np.abs(found - marked)[:, :20].mean() < 3
        assert np.abs(found - stain.normalise(image, reference))[:, 20:].mean() < 4


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_a_reference_is_of_tissue_whatever_else_is_shown(method):
    images = [even_tissue(seed) for seed in range(4)]
    expected = stain.fit_reference(method, images).values
    for colour in PENS.values():
        solid = np.full_like(images[0], colour)
        assert stain.fit_reference(method, [*images, solid, solid, solid]).values == expected
        half = [np.vstack([image[:48], solid[:48]]) for image in images]
        np.testing.assert_allclose(stain.fit_reference(method, half).values, expected, rtol=0.03, atol=0.02)
    # By its share of tissue: a scrap of another stain in a blank image moves the mean of whole images little.
    scrap = np.full_like(images[0], 250)
    scrap[:12, :24] = even_tissue(9, strength=0.4)[:12, :24]
    np.testing.assert_allclose(stain.fit_reference(method, [*images, scrap]).values, expected, rtol=0.03, atol=0.3)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_a_reference_without_tissue_is_refused(method):
    with pytest.raises(UserError, match="no image shows tissue"):
        stain.fit_reference(method, [np.full((16, 16, 3), value, np.uint8) for value in (0, 128, 250)])


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 1), (16, 16, 4), (2, 16, 16, 3)])
def test_images_of_other_channels_are_refused(shape):
    with pytest.raises(UserError, match="RGB images only"):
        stain.normalise(np.full(shape, 100, np.uint8), stain.StainReference("reinhard", (0.0,) * 6))


@pytest.mark.parametrize(
    "colour",
    [(60, 50, 120), (80, 58, 243), (45, 30, 70), (120, 100, 170), (230, 150, 190), (190, 60, 90), (225, 90, 120)],
    ids=["nucleus", "bluish nucleus", "dark nucleus", "pale nucleus", "eosin", "red cell", "strong eosin"],
)
def test_colours_of_tissue_are_tissue(colour):
    """Nuclei of stains that look blue, too, and specks of grey in them."""
    image = even_tissue(0)
    image[30:60, 30:60] = colour
    assert stain.tissue_mask(image)[30:60, 30:60].all()
    image[40:43, 40:43] = (40, 40, 40)
    assert stain.tissue_mask(image)[30:60, 30:60].all()


def test_tissue_of_phantoms_is_kept():
    for seed in range(4):
        image = make_phantom(seed / 3, size=96, seed=seed).image
        stained = stain.optical_density(image).mean(-1) > 0.2
        assert stain.tissue_mask(image)[stained].mean() > 0.99
