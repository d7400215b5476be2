"""The nuclei network as an extractor: what its features are, what they see, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_nuclei import discs, lattice

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity.maps import maps_of, scale_factor
from cellflux_bridge.cellularity.network import load_network
from cellflux_bridge.cli.run import stages
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.metrics.damage import DAMAGES
from cellflux_bridge.metrics.loading import cell_extractor, is_name
from cellflux_bridge.metrics.nuclei import NucleiExtractor


@pytest.fixture
def patches(tmp_path, patch_folder, write_config):
    config = load_config(write_config(tmp_path))
    return load_patches(config.data, seed=config.seed)


def tissue(num: int, *, seed: int) -> np.ndarray:
    """Images (N, 3, 96, 96) uint8 of as many discs each, elsewhere in each."""
    draw = np.random.default_rng(seed)
    return np.stack([discs(draw.integers(10, 86, (12, 2)).tolist(), radius=5)[0] for _ in range(num)]).transpose(
        0, 3, 1, 2
    )


def test_features_are_mean_and_spread_of_every_map_at_the_scale_of_the_patches(patches):
    model = NucleiExtractor(patches).eval()
    model._factor = 2.0
    x = images.encode(torch.from_numpy(tissue(2, seed=0).copy()))
    with torch.no_grad():
        found, maps = model.features(x), maps_of(load_network(), x, factor=2.0)
    assert maps[0].shape[2:] == (96, 96)  # at half of twice the size
    start = 0
    for seen in maps:
        num = seen.shape[1]
        torch.testing.assert_close(found[:, start : start + num], seen.mean((2, 3)))
        torch.testing.assert_close(found[:, start + num : start + 2 * num], seen.std((2, 3), correction=0))
        start += 2 * num
    assert start == found.shape[1]


@pytest.mark.parametrize(("radius", "factor"), [(4.5, 2.0), (9, 1.0)])
def test_the_scale_brings_nuclei_to_those_that_it_was_trained_on(patches, radius, factor):
    draw = np.random.default_rng(0)
    images_of = [discs(draw.permutation(lattice(24))[:6], radius=radius)[0] for _ in range(len(patches.pixels))]
    of = replace(patches, pixels=np.stack(images_of))
    of = replace(of, preprocessing=replace(of.preprocessing, image_size=96))
    assert scale_factor(of, load_network(), seed=0) == pytest.approx(factor, rel=0.2)


def test_run_trains_no_third_classifier_where_it_has_these_features(tmp_path):
    lines = [line for _, line in stages("my.yaml", (), tmp_path, features="nuclei")]
    assert not [line for line in lines if f"output={tmp_path / 'features'}" in line]
    evaluated = next(line for line in lines if line[0] == "evaluate")
    assert evaluated[evaluated.index("--features") + 1] == "nuclei"
    lines = [line for _, line in stages("my.yaml", (), tmp_path)]
    assert [line for line in lines if f"output={tmp_path / 'features'}" in line]
    evaluated = next(line for line in lines if line[0] == "evaluate")
    assert evaluated[evaluated.index("--features") + 1] == str(tmp_path / "features" / "judge_rgb")


def test_a_blur_moves_them_more_than_other_tissue_does(patches):
    model = NucleiExtractor(patches).eval()
    model._factor = 1.0
    of = tissue(16, seed=0)
    blurred = DAMAGES["blur of 1 px"](of, np.random.default_rng(0))

    def features(stack):
        with torch.no_grad():
            return model.features(images.encode(torch.from_numpy(stack.copy()))).numpy()

    first, second, third = features(of), features(tissue(16, seed=1)), features(blurred)
    spread = first.std(0) + 1e-6
    by_chance, by_blur = (np.abs((other - first).mean(0) / spread).mean() for other in (second, third))
    assert by_blur > 2 * by_chance


def test_what_it_cannot_look_at_is_refused_by_name(patches):
    assert is_name("nuclei")
    with pytest.raises(UserError, match="--features nuclei: the network finds no nuclei in the training patches"):
        NucleiExtractor(replace(patches, pixels=np.full_like(patches.pixels, 250)))
    with pytest.raises(UserError, match=r"--features nuclei: .*in RGB, the patches have 5 channels"):
        NucleiExtractor(replace(patches, preprocessing=replace(patches.preprocessing, channels=5)))
    with pytest.raises(UserError, match="--features nuclei: knows stained tissue, no cells"):
        cell_extractor("nuclei", channels=3, device=torch.device("cpu"))
