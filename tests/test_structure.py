"""Memorisation and structure: each figure against its definition."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as multiscale_ssim

from cellflux_bridge.classifier.model import PatchClassifier
from cellflux_bridge.images.stain import RUIFROK_HE, from_optical_density
from cellflux_bridge.metrics.memorisation import NearestTraining, held_out_distances, nearest
from cellflux_bridge.metrics.structure import haematoxylin_ms_ssim, layer_distance, num_scales, stain_share
from cellflux_bridge.metrics.values import Value
from cellflux_bridge.metrics.warnings import figure_warnings


def test_the_nearest_is_found():
    rng = np.random.default_rng(0)
    x, others = rng.normal(size=(23, 4)), rng.normal(size=(31, 4))
    x[3] = others[7]
    others[20] = others[7]  # of two as near the first is found
    for dtype in (np.float64, np.float32):
        distances, numbers = nearest(x.astype(dtype), others.astype(dtype))
        np.testing.assert_allclose(distances, cdist(x, others).min(1), atol=1e-6)
        np.testing.assert_array_equal(numbers, cdist(x, others).argmin(1))
    assert distances[3] == 0


def test_nearest_training_compares_frames_with_held_out_patches():
    rng = np.random.default_rng(1)
    held_out = [np.sort(rng.uniform(1, 3, 50)), np.array([1.0, 2.0, 2.0, 4.0])]
    distances = np.stack([rng.uniform(0.5, 2, 30), np.full(30, 2.0)])
    kinds = np.stack([np.zeros(30, int), np.ones(30, int)])
    nearest_training = NearestTraining(distances, np.zeros((2, 30), int), kinds, held_out)
    chosen = np.arange(30)
    np.testing.assert_allclose(nearest_training.ratio(chosen), [np.median(distances[0]) / np.median(held_out[0]), 1.0])
    expected = mannwhitneyu(held_out[0], distances[0]).statistic / (50 * 30)
    assert nearest_training.closer()[0].mean() == pytest.approx(expected)
    assert nearest_training.closer()[1, 0] == pytest.approx((1 + 0.5 * 2) / 4)
    np.testing.assert_array_equal(nearest_training.is_near_copy(), [distances[0] < held_out[0].min(), [False] * 30])


def test_a_leak_between_the_splits_hides_no_copy():
    training = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    is_target = np.array([False, False, True])
    leaked = np.array([[0.0, 1e-9], [10.0, 2.0], [0.0, 13.0]])  # the first repeats a training patch
    held_out, num_repeated = held_out_distances(leaked, training, is_target, same=1e-6)
    assert num_repeated == 1
    assert [list(each) for each in held_out] == [[2.0], [3.0]]
    distances = np.array([[0.0, 1.0, 2.5, 5e-7]])
    nearest_training = NearestTraining(distances, np.zeros((1, 4), int), np.zeros((1, 4), int), held_out, same=1e-6)
    assert nearest_training.is_near_copy().tolist() == [[True, True, False, True]]
    held_out, num_repeated = held_out_distances(training, training, is_target, same=1e-6)
    assert num_repeated == 3
    alone = nearest_training._replace(
        held_out=held_out
    )  # nothing to compare to: copies remain copies, the rest is undefined
    assert alone.is_near_copy().tolist() == [[True, False, False, True]]
    assert np.isnan(alone.closer()).all()
    assert np.isnan(alone.ratio(np.arange(4))).all()


def test_as_many_scales_as_an_image_has_room_for():
    assert [num_scales(size) for size in (8, 16, 32, 64, 96, 128, 256)] == [0, 1, 2, 3, 3, 4, 5]
    for size in (11, 22, 44, 99, 176):  # torchmetrics takes them, and a smaller image has a scale fewer
        weights = (1 / num_scales(size),) * num_scales(size)
        x = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(size))
        assert multiscale_ssim(x, x, data_range=1.0, betas=weights) == pytest.approx(1)
        assert num_scales(size - 1) == num_scales(size) - 1


def stained(haematoxylin: np.ndarray, eosin: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) of concentrations (N, H, W)."""
    density = haematoxylin[..., None] * RUIFROK_HE[0] + eosin[..., None] * RUIFROK_HE[1]
    return from_optical_density(density).transpose(0, 3, 1, 2)


def test_ms_ssim_sees_haematoxylin_and_not_eosin():
    rng = np.random.default_rng(2)
    nuclei = np.kron(rng.uniform(0.2, 1.5, (3, 8, 8)), np.ones((4, 4)))
    nuclei[1] = nuclei[0]
    frames = stained(nuclei, rng.uniform(0, 0.3, (3, 32, 32)))[None]
    own, same, other = haematoxylin_ms_ssim(frames)[0]
    assert own == pytest.approx(1, abs=1e-6)
    assert same > 0.9 > 0.5 > other >= 0
    inverted = stained(np.stack([nuclei[0], 1.7 - nuclei[0]]), np.zeros((2, 32, 32)))
    assert haematoxylin_ms_ssim(inverted[None])[0, 1] == pytest.approx(0, abs=0.05)
    assert np.isnan(haematoxylin_ms_ssim(frames[..., :10, :10])).all()


def test_the_layer_distance_is_its_definition_for_any_number_of_sequences():
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, (40, 3, 3, 4, 4), dtype=np.uint8)
    frames[:, 2] = frames[:, 0]

    def maps(batch):
        x = batch.double()
        return [x, torch.nn.functional.avg_pool2d(x, 2)[:, :2]]

    found = layer_distance(frames, maps)
    expected = 0.0
    for layer in maps(torch.from_numpy(frames[5])):
        unit = (layer / layer.norm(dim=1, keepdim=True)).numpy()
        expected += ((unit[1] - unit[0]) ** 2).sum(0).mean() / 2
    assert found[5, 1] == pytest.approx(expected)
    np.testing.assert_array_equal(found[:, [0, 2]], 0)


@pytest.mark.parametrize(("backbone", "num"), [("small", 3), ("fast", 3), ("test_resnet", 5)])
def test_classifiers_show_their_stages(backbone, num):
    model = PatchClassifier(2, backbone=backbone, view="grey").eval()
    maps = model.feature_maps(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert len(maps) == num
    sides = [one.shape[-1] for one in maps]
    assert sides == sorted(sides, reverse=True)
    assert {one.shape[0] for one in maps} == {2}


def test_the_stain_share_is_what_lies_along_the_transfer():
    source, stain = np.array([1.0, 1.0, 0.0]), np.array([3.0, 1.0, 0.0])
    changes = np.array([[4.0, 0, 0], [0, 0, 5.0], [1.0, 0, 4.0], [-2.0, 0, 0], [0, 0, 0]])
    features = np.concatenate([source[None], source + changes])[None]
    whole, explained = stain_share(features, stain[None])
    np.testing.assert_allclose(whole[0], [16, 25, 17, 4, 0])
    # The transfer goes 2 along the first axis: no farther than itself, and half-way for the third change.
    np.testing.assert_allclose(explained[0], [16 - 4, 0, 1, 0, 0], atol=1e-12)
    assert stain_share(features, source[None])[1].sum() == 0  # a transfer that moves nothing explains nothing


def test_near_copies_and_mere_recolouring_are_warned_of():
    def value(quantity, number, level, n_real, trajectory="t"):
        return Value(trajectory, "path", quantity, level, "x", 20, n_real, "test", number, np.nan, np.nan)

    copies, stain = figure_warnings(
        [
            value("near_copy_share", 0.05, None, 99),
            value("near_copy_share", 0.015, None, 99),
            value("near_copy_share", 0.5, 1.0, 99),
            value("near_copy_share", 0.5, None, 99, trajectory=""),
            value("stain_share", 0.7, 1.0, None),
            value("stain_share", 0.7, 0.5, None),
        ]
    )
    assert copies.startswith("5.0% of the frames of path lie nearer")
    assert "By chance it would be about 1.0%" in copies
    assert "the change that x sees: 70% in path. Use judges of structure" in stain
