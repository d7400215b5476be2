"""Augmentations: what each is defined to do, on images whose every pixel says where it comes from."""

import random

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms.v2.functional import resize

from cellflux_bridge.augmentation import fmix, saliencymix
from cellflux_bridge.augmentation.base import draw_shares
from cellflux_bridge.augmentation.cutmix import CutMix
from cellflux_bridge.augmentation.cutout import Cutout
from cellflux_bridge.augmentation.fmix import FMix
from cellflux_bridge.augmentation.mixup import Mixup
from cellflux_bridge.augmentation.resizemix import ResizeMix
from cellflux_bridge.augmentation.saliencymix import SaliencyMix, saliency
from cellflux_bridge.augmentation.stain_jitter import StainJitter
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import registry
from cellflux_bridge.images import stain

NAMES = registry.names("augmentation")
MIXING = ["cutmix", "fmix", "mixup", "resizemix", "saliencymix"]
MASKED = {
    "cutmix": CutMix(probability=1),
    "fmix": FMix(),
    "resizemix": ResizeMix(),
    "saliencymix": SaliencyMix(probability=1),
}


def build(name: str):
    return registry.build("augmentation", registry.validate("augmentation", name, key="augmentation"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(num: int, *, channels: int = 3, height: int = 12, width: int = 20) -> torch.Tensor:
    """Images whose pixels all differ."""
    return torch.rand(num, channels, height, width, generator=generator(num)) * 2 - 1


def numpy_state() -> str:
    return str(np.random.get_state(legacy=False))  # noqa: NPY002


def mixed(augmentation, x: torch.Tensor, *, seed: int = 0):
    """Results, who is whose partner, and the partner's weight; every image's label is its own number."""
    changed, y = augmentation(x, torch.eye(len(x)), generator=generator(seed))
    own = torch.arange(len(x))
    weights = y.clone()
    weights[own, own] = 0
    weight, partner = weights.max(dim=1)
    assert (y.count_nonzero(dim=1) <= 2).all()  # the labels of two images alone
    torch.testing.assert_close(weight + y[own, own], torch.ones(len(x)))
    return changed, torch.where(weight > 0, partner, own), weight


def spans(mask: torch.Tensor) -> tuple[slice, slice]:
    """The rows and columns between which a mask (H, W) is true somewhere."""
    (rows, columns) = (mask.any(dim).nonzero()[[0, -1], 0].tolist() for dim in (1, 0))
    return slice(rows[0], rows[1] + 1), slice(columns[0], columns[1] + 1)


# What all do


@pytest.mark.parametrize(
    "shape", [(1, 3, 8, 8), (6, 3, 12, 20), (5, 3, 9, 7), (3, 1, 8, 8), (4, 5, 16, 6), (2, 3, 1, 1)]
)
@pytest.mark.parametrize("name", NAMES)
def test_form_range_and_sums_stay_inputs_too_and_no_global_generator_is_touched(name, shape):
    if name == "stain_jitter" and shape[1] != 3:
        pytest.skip("RGB only")
    x = torch.rand(shape, generator=generator()) * 2 - 1
    y = torch.rand(shape[0], 3, generator=generator(1)).log_softmax(1).exp()
    given, states = (x.clone(), y.clone()), (torch.get_rng_state(), numpy_state(), random.getstate())
    for seed in range(5):
        changed, labels = build(name)(x, y, generator=generator(seed))
        assert (changed.shape, changed.dtype) == (x.shape, torch.float32)
        assert (labels.shape, labels.dtype) == (y.shape, torch.float32)
        assert changed.abs().max() <= 1 + 1e-6
        torch.testing.assert_close(labels.sum(1), torch.ones(len(y)))
        assert (labels >= 0).all()
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert numpy_state() == states[1]
    assert random.getstate() == states[2]


@pytest.mark.parametrize("name", NAMES)
def test_results_follow_the_generator_alone(name):
    x, y = noise(8), torch.eye(8)
    results = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002
        results.append(build(name)(x, y, generator=generator(seed)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    drawn = generator()
    first = build(name)(x, y, generator=drawn)[0]
    assert not torch.equal(first, build(name)(x, y, generator=drawn)[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_image_has_its_own_draws(name):
    if name in MIXING:
        weight = mixed(build(name), noise(16, height=32, width=32))[2]
        assert weight[weight > 0].unique().numel() >= max(4, 0.8 * (weight > 0).sum())  # areas may be equal by chance
    else:
        x = noise(1).expand(16, -1, -1, -1)
        assert len(build(name)(x, torch.eye(16), generator=generator())[0].unique(dim=0)) == 16


@pytest.mark.parametrize("name", MIXING)
def test_an_image_alone_keeps_its_label_and_mixed_with_itself_its_pixels(name):
    x = noise(1)
    changed, y = build(name)(x, torch.tensor([[0.25, 0.75]]), generator=generator())
    assert torch.equal(y, torch.tensor([[0.25, 0.75]]))
    assert torch.equal(changed, x) == (name != "resizemix")


@pytest.mark.parametrize("name", ["cutout", "stain_jitter"])
def test_one_image_keeps_its_label(name):
    y = torch.rand(4, 3, generator=generator())
    assert torch.equal(build(name)(noise(4), y, generator=generator())[1], y)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"augmentation\.name: no augmentation called 'cutmx'; did you mean 'cutmix'\?"):
        registry.validate("augmentation", "cutmx", key="augmentation")
    with pytest.raises(UserError, match=r"augmentation\.alpha"):
        registry.validate("augmentation", {"name": "mixup", "alpha": 0}, key="augmentation")


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_shares_are_of_the_symmetric_beta_distribution(alpha):
    shares = draw_shares(20_000, alpha=alpha, generator=generator())
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("cutout", {"length": 0.5}),
        ("mixup", {"alpha": 1.0}),
        ("cutmix", {"alpha": 1.0, "probability": 0.5}),
        ("fmix", {"alpha": 1.0, "decay": 3.0}),
        ("resizemix", {"smallest": 0.1, "largest": 0.8}),
        ("saliencymix", {"alpha": 1.0, "probability": 0.5}),
        ("stain_jitter", {"strength": 0.05}),
    ],
)
def test_defaults_are_those_published(name, published):
    assert registry.validate("augmentation", name, key="augmentation") == {"name": name, **published}


# Masks: cutmix, fmix, resizemix, saliencymix


@pytest.mark.parametrize("shape", [(32, 32), (12, 20), (9, 7)])
@pytest.mark.parametrize("name", MASKED)
def test_the_labels_weight_is_exactly_the_area_and_pixels_are_of_two_images(name, shape):
    values = torch.linspace(-1, 1, 32)
    x = values.view(-1, 1, 1, 1).expand(-1, 2, *shape)
    changed, partner, weight = mixed(MASKED[name], x)
    number = ((changed + 1) / 2 * 31).round()
    assert torch.allclose(changed, values[number.long()], atol=1e-5)  # no pixel between two
    own = torch.arange(32).view(-1, 1, 1, 1)
    is_other = number != own
    assert torch.equal(number, torch.where(is_other, partner.view(-1, 1, 1, 1), own).float())
    assert torch.equal(is_other[:, 0], is_other[:, 1])
    torch.testing.assert_close(weight, is_other[:, 0].float().mean((1, 2)))
    assert weight.unique().numel() > 4


@pytest.mark.parametrize("name", ["cutmix", "resizemix", "saliencymix"])
def test_the_region_is_one_box(name):
    x = noise(64)
    changed, _, weight = mixed(MASKED[name], x)
    for image, before in zip(changed[weight > 0], x[weight > 0], strict=True):
        mask = (image != before).any(0)
        assert mask[spans(mask)].all()


@pytest.mark.parametrize("name", ["cutmix", "fmix", "saliencymix"])
def test_pasted_pixels_lie_where_they_lay(name):
    x = noise(32)
    changed, partner, weight = mixed(MASKED[name], x)
    is_other = (changed != x).any(1, keepdim=True)
    assert torch.equal(changed, torch.where(is_other, x[partner], x))
    torch.testing.assert_close(is_other.float().mean((1, 2, 3)), weight)


@pytest.mark.parametrize("kind", [CutMix, SaliencyMix])
def test_the_boxs_sides_are_the_root_of_the_area_and_probability_is_of_each_image(kind):
    x = noise(400, channels=1, height=20, width=60)
    changed, _, _ = mixed(kind(alpha=1000, probability=1), x)
    sides = []
    for image, before in zip(changed, x, strict=True):
        mask = (image != before).any(0)
        if mask.any():
            rows, columns = spans(mask)
            sides.append((rows.stop - rows.start, columns.stop - columns.start))
    assert np.max(sides, axis=0) == pytest.approx((20 * 0.5**0.5, 60 * 0.5**0.5), abs=2.5)
    assert np.min(sides, axis=0) == pytest.approx((10 * 0.5**0.5, 30 * 0.5**0.5), abs=4)  # cut off at the border
    assert torch.equal(mixed(kind(probability=0), x)[0], x)
    weight = mixed(kind(alpha=1000, probability=0.25), x)[2]
    assert (weight > 0).float().mean() == pytest.approx(0.25, abs=0.07)


def test_centres_of_cutmix_are_any_pixel_alike():
    x = noise(4000, channels=1, height=4, width=6)
    centres = CutMix()._centres(x, generator())
    counts = torch.bincount(centres[:, 0] * 6 + centres[:, 1], minlength=24)
    assert counts.min() > 4000 / 24 * 0.7
    assert counts.max() < 4000 / 24 * 1.3


# Each on its own


def test_mixup_is_the_convex_combination_that_its_labels_say():
    x = noise(16)
    changed, partner, weight = mixed(Mixup(), x)
    share = weight.view(-1, 1, 1, 1)
    torch.testing.assert_close(changed, (1 - share) * x + share * x[partner])
    assert weight.unique().numel() > 10


@pytest.mark.parametrize("length", [0.25, 0.5, 1.0])
def test_cutout_blanks_a_square_about_any_pixel(length):
    x = torch.ones(2000, 2, 12, 16)
    blank = build("cutout").__class__(length=length)(x, torch.eye(2000), generator=generator())[0] == 0
    assert torch.equal(blank[:, 0], blank[:, 1])
    side, areas = round(12 * length), []
    for mask in blank[:, 0]:
        rows, columns = spans(mask)
        assert mask[rows, columns].all()
        assert rows.stop - rows.start <= side
        assert columns.stop - columns.start <= side
        areas.append(int(mask.sum()))
    assert max(areas) == (side**2 if side < 12 else 12 * 12)
    assert min(areas) < side**2  # a square may reach over the border
    starts = [np.arange(size) - side // 2 for size in (12, 16)]
    expected = [np.mean(np.minimum(s + side, n) - np.maximum(s, 0)) for s, n in zip(starts, (12, 16), strict=True)]
    assert np.mean(areas) == pytest.approx(np.prod(expected), rel=0.03)


def test_cutout_leaves_the_rest_and_its_length_is_of_the_shorter_side():
    x = noise(50, height=8, width=24)
    changed = Cutout()(x, torch.eye(50), generator=generator())[0]
    assert torch.equal(changed, torch.where(changed == 0, 0, x))
    assert ((changed == 0).sum((1, 2, 3)) // 3).max() == 4 * 4


@pytest.mark.parametrize("shape", [(32, 32), (24, 17)])
def test_fmix_has_the_drawn_area_to_a_pixel(monkeypatch, shape):
    shares = torch.linspace(0, 1, 24)
    monkeypatch.setattr(fmix, "draw_shares", lambda num, **options: shares)
    _, partner, weight = mixed(FMix(), noise(24, height=shape[0], width=shape[1]))
    others = partner != torch.arange(24)
    expected = (shares * shape[0] * shape[1]).round() / (shape[0] * shape[1])
    torch.testing.assert_close(weight[others], expected[others])


def components(augmentation, *, height: int = 32, width: int = 48) -> float:
    """Mean number of connected parts of the partner's region."""
    x = noise(40, height=height, width=width)
    changed, _, weight = mixed(augmentation, x)
    masks = (changed != x).any(1)[weight > 0].numpy()
    return float(np.mean([ndimage.label(mask)[1] for mask in masks]))


def test_fmix_masks_are_few_connected_regions():
    white, published = components(FMix(alpha=1000, decay=0)), components(FMix(alpha=1000))
    assert white > 60
    assert published < 6
    assert published < components(FMix(alpha=1000, decay=1.5)) < white


def test_fmix_amplitudes_fall_with_frequency_alike_in_both_directions():
    grey = FMix()._low_frequencies(3000, torch.Size((32, 64)), generator())
    assert grey.shape == (3000, 32, 64)
    power = torch.fft.rfft2(grey).abs().square().mean(0)
    assert power[1, 0] / power[2, 0] == pytest.approx(2**6, rel=0.15)
    assert power[0, 4] / power[0, 8] == pytest.approx(2**6, rel=0.15)
    assert power[3, 8] / power[4, 6] == pytest.approx(1, rel=0.15)  # 3/32 and 4/32 of a period a pixel, and turned
    odd = FMix()._low_frequencies(2, torch.Size((9, 7)), generator())
    assert odd.shape == (2, 9, 7)


def test_resizemix_pastes_the_whole_partner_resized():
    x = noise(24, height=24, width=40)
    changed, partner, weight = mixed(ResizeMix(), x)
    for image, before, other in zip(changed[weight > 0], x[weight > 0], x[partner[weight > 0]], strict=True):
        rows, columns = spans((image != before).any(0))
        size = [rows.stop - rows.start, columns.stop - columns.start]
        torch.testing.assert_close(image[:, rows, columns], resize(other, size, antialias=True), atol=1e-5, rtol=0)
        assert abs(size[0] / 24 - size[1] / 40) < 1 / 24  # one scale for both sides


def test_resizemix_draws_scales_evenly_and_places_inside():
    x = noise(1000, channels=1, height=30, width=30)
    changed, _, weight = mixed(ResizeMix(), x)
    found = [spans(mask) for mask in (changed != x)[weight > 0, 0]]
    sides = np.array([rows.stop - rows.start for rows, _ in found])
    assert sides.min() == 3
    assert sides.max() == 23  # 0.8 of 30, rounded down, is never reached
    assert sides.mean() == pytest.approx(0.45 * 30 - 0.5, abs=0.6)
    left = np.array([columns.start for _, columns in found])
    assert (left / (30 - sides)).mean() == pytest.approx(0.5, abs=0.03)
    assert left.min() == 0
    assert (left + sides).max() == 30
    with pytest.raises(UserError, match=r"augmentation\.smallest: 0\.9 is above augmentation\.largest=0\.8"):
        ResizeMix(smallest=0.9)


def dots(num: int, *, value: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat images with a little noise and one spot of 3 x 3 pixels, and the rows and columns (num, 2) of the spots."""
    x = 0.02 * noise(num, height=24, width=32)
    at = torch.stack([torch.randint(2, side - 2, (num,), generator=generator(side)) for side in (24, 32)], 1)
    for image, (row, column) in zip(x, at.tolist(), strict=True):
        image[:, row - 1 : row + 2, column - 1 : column + 2] += value * 0.9
    return x, at


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_the_most_salient_pixel_is_the_one_that_differs(value):
    x, at = dots(16, value=value)
    found = saliency(x).flatten(1).argmax(1)
    assert torch.equal(torch.stack([found // 32, found % 32], 1), at)
    assert torch.isfinite(saliency(torch.full((2, 3, 8, 8), 0.3))).all()


def test_saliency_is_its_formula(monkeypatch):
    monkeypatch.setattr(saliencymix, "_REACHES", (1, 3, 20))
    x = noise(2, height=9, width=7)
    for image, found in zip(x.double().mean(1).numpy(), saliency(x).numpy(), strict=True):
        kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
        grey = ndimage.convolve(ndimage.convolve(image, kernel, mode="nearest"), kernel, mode="nearest")
        expected = np.zeros((9, 7))
        for reach in (1, 3, 20):
            for row, column in np.ndindex(9, 7):
                near = grey[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
                expected[row, column] += abs(grey[row, column] - (near.sum() - grey[row, column]) / (near.size - 1))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_saliencymix_pastes_the_partners_most_salient_pixel_in_the_middle():
    x, at = dots(32)
    changed, partner, weight = mixed(SaliencyMix(probability=1), x)
    assert (weight > 0).sum() > 20
    for i in (weight > 0).nonzero()[:, 0].tolist():
        row, column = at[partner[i]].tolist()
        assert torch.equal(changed[i, :, row, column], x[partner[i], :, row, column])
        rows, columns = spans((changed[i] != x[i]).any(0))
        for span, middle, end in ((rows, row, 24), (columns, column, 32)):
            above, below = middle - span.start, span.stop - middle
            assert above == below or above + 1 == below or span.start == 0 or span.stop == end


def test_stain_jitter_is_that_of_the_stain_room():
    x, y = noise(4), torch.eye(4)
    changed = StainJitter(strength=0.3)(x, y, generator=generator(3))[0]
    assert torch.equal(changed, stain.augment(x, strength=0.3, generator=generator(3)))
    with pytest.raises(UserError, match="stain_jitter is for RGB images, found 4 channels"):
        StainJitter()(noise(2, channels=4), torch.eye(2), generator=generator())
