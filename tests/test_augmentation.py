"""Augmentations of a batch agree with their definitions."""

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from torch.nn import functional as F

from cellflux_bridge.augmentation.saliencymix import SaliencyMix, saliency
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import registry

NAMES = registry.names("augmentation")
PASTES = ["cutmix", "fmix", "resizemix", "saliencymix"]
ALWAYS = {"cutmix": {"probability": 1.0}, "saliencymix": {"probability": 1.0}}


def build(name: str, **keys):
    return registry.build("augmentation", registry.validate("augmentation", {"name": name, **keys}, key="a"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coded(num: int = 64, height: int = 32, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i is i / num everywhere and is class i alone, so that a pixel and a label tell where they come from."""
    values = torch.arange(num) / num
    return values.view(-1, 1, 1, 1).expand(num, 3, height, width).contiguous(), torch.eye(num)


def test_all_published_spatial_augmentations_are_there():
    assert {*PASTES, "cutout", "mixup", "stain_jitter"} == set(NAMES)
    with pytest.raises(UserError, match="did you mean 'resizemix'"):
        build("resizmix")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num", [1, 5])
def test_draws_follow_the_generator_alone_and_inputs_stay(name, num):
    x, y = torch.rand(num, 3, 20, 28, generator=generator()) * 2 - 1, torch.eye(5)[torch.arange(num)]
    before, state = (x.clone(), y.clone()), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    augment = build(name, **ALWAYS.get(name, {}))
    one, two, other = (augment(x, y, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert num == 1 or not torch.equal(one[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert one[0].shape == x.shape
    assert torch.allclose(one[1].sum(1), torch.ones(num))


@pytest.mark.parametrize("name", PASTES)
def test_a_label_is_the_share_of_the_area_that_comes_from_each_image(name):
    x, y = coded()
    made, labels = build(name, **ALWAYS.get(name, {}))(x, y, generator=generator())
    origin = (made * len(x)).round().long()
    assert torch.equal(origin[:, 0], origin[:, 2]), "all channels of a pixel come from one image"
    shares = F.one_hot(origin[:, 0], len(x)).float().mean((1, 2))
    assert torch.allclose(labels, shares, atol=1e-6)
    assert ((shares > 0).sum(1) <= 2).all()
    assert (shares.diagonal() < 1).float().mean() > 0.7, "most images get a part of another one"


@pytest.mark.parametrize("name", ["cutmix", "resizemix", "saliencymix"])
def test_what_is_pasted_is_a_box(name):
    x, y = coded()
    x = x + torch.rand(x.shape[0], 1, *x.shape[2:], generator=generator()) * 1e-4
    made, _ = build(name, **ALWAYS.get(name, {}))(x, y, generator=generator())
    for number, image in enumerate(made):
        other = ((image[0] * len(x)).floor() != number).nonzero()
        if len(other):
            tall, wide = (other.max(0).values - other.min(0).values + 1).tolist()
            assert len(other) == tall * wide


def test_fmix_pastes_few_connected_regions_and_their_area_is_as_drawn():
    x, y = coded(200)
    made, _ = build("fmix")(x, y, generator=generator())
    masks = [((image[0] * len(x)).round() != number).numpy() for number, image in enumerate(made)]
    parts = [label(mask)[1] for mask in masks if mask.any()]
    noise = [label(torch.rand(32, 24, generator=generator(i)).numpy() < 0.5)[1] for i in range(20)]
    assert np.median(parts) <= 2
    assert np.mean(noise) > 10 * np.mean(parts)
    shares = np.sort([mask.mean() for mask in masks])
    assert np.abs(shares - (np.arange(200) + 0.5) / 200).max() < 0.1, "Beta(1, 1) is even"


def test_resizemix_shows_the_other_image_whole():
    ramp = torch.linspace(-1, 1, 32).view(1, 1, 1, 32).expand(8, 3, 32, 32).clone()
    ramp[1::2] += 10  # two kinds of image, told apart by their level
    made, _ = build("resizemix", smallest=0.5, largest=0.5)(ramp, torch.eye(8), generator=generator())
    seen = 0
    for image, own in zip(made, ramp, strict=True):
        foreign = (image[0] > 5) != (own[0] > 5)
        if foreign.any():
            rows, columns = foreign.nonzero().T
            assert (len(rows.unique()), len(columns.unique())) == (16, 16)
            line = image[0, rows[0]][foreign[rows[0]]]
            assert (line.max() - line.min()).item() == pytest.approx(2, abs=0.2), "from its left to its right border"
            seen += 1
    assert seen


def test_saliencymix_pastes_the_most_salient_pixel_of_the_other_image():
    x = 0.1 * torch.rand(6, 3, 32, 32, generator=generator())
    for number, (row, column) in enumerate([(5, 25), (16, 16), (26, 6), (8, 9), (20, 25), (25, 14)]):
        x[number, :2, row - 1 : row + 2, column - 1 : column + 2] = 1.0
        x[number, 2] = number  # tells where a pixel comes from, and changes no difference
    peaks = [divmod(int(i), 32) for i in saliency(x).flatten(1).argmax(1)]
    assert peaks[1] == (16, 16)
    made, labels = SaliencyMix(probability=1.0)(x, torch.eye(6), generator=generator())
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j and labels[i, j] > 0]
    assert len(pairs) >= 3
    for number, other in pairs:
        assert made[number, 2][peaks[other]] == other


def test_cutout_blanks_half_of_the_side_and_labels_stay():
    x, y = torch.ones(300, 1, 32, 32), torch.rand(300, 4, generator=generator())
    made, labels = build("cutout")(x, y, generator=generator())
    assert labels is y
    blank = (made == 0).flatten(1).sum(1)
    assert blank.max() == 256, "16 x 16 of 32 x 32 where the square lies inside"
    assert blank.min() >= 64, "a quarter of it where it is centred in a corner"
    assert (made == 0).float().mean((0, 1)).min() > 0, "every pixel is blanked sometimes"


def test_mixup_is_linear_in_images_and_labels_alike():
    x, y = coded(400)
    made, labels = build("mixup")(x, y, generator=generator())
    values = torch.arange(400) / 400
    assert torch.allclose(made[:, 0, 0, 0], labels @ values, atol=1e-5)
    own = labels.diagonal()
    assert own.mean().item() == pytest.approx(0.5, abs=0.06)
    sure = build("mixup", alpha=0.05)(x, y, generator=generator())[1].max(1).values
    assert sure.mean() > own.maximum(1 - own).mean(), "a small alpha mixes little"


def test_stain_jitter_is_of_rgb_alone():
    with pytest.raises(UserError, match="is for RGB images, found 5 channels"):
        build("stain_jitter")(torch.zeros(2, 5, 8, 8), torch.eye(2), generator=generator())


@pytest.mark.parametrize("name", ["cutmix", "saliencymix"])
def test_a_probability_leaves_the_other_samples_as_they_are(name):
    x, y = coded(200)
    made, _ = build(name, probability=0.3)(x, y, generator=generator())
    changed = (made != x).flatten(1).any(1).float().mean().item()
    assert 0.15 < changed < 0.4
