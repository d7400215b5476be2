"""Patches: how they are decoded once, scaled and brought to one stain."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data import cache as cache_module
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.images import read_rgb, stain, write_png

# Cache


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The files that were decoded, in any order."""
    files = []
    read = images.read_rgb

    def counting(path):
        files.append(path)
        return read(path)

    monkeypatch.setattr(images, "read_rgb", counting)
    return files


def test_a_second_load_decodes_nothing_and_is_mapped(patch_folder, data_config, decoded):
    first = load_patches(data_config(patch_folder), seed=0)
    assert len(decoded) == 48
    second = load_patches(data_config(patch_folder), seed=0)
    assert len(decoded) == 48
    assert isinstance(second.pixels, np.memmap)
    assert not second.pixels.flags.writeable
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert (first.ids, first.preprocessing) == (second.ids, second.preprocessing)


def test_the_cache_holds_each_file_cut_to_the_common_size(tmp_path, data_config):
    rng = np.random.default_rng(0)
    sizes = {"A/a.png": (16, 20), "A/b.png": (18, 18), "B/c.png": (22, 16), "B/d.png": (16, 16)}
    for name, size in sizes.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(tmp_path / "root" / name, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    patches = load_patches(data_config(tmp_path / "root", crop=16), seed=0)
    assert patches.pixels.shape == (4, 16, 16, 3)
    for pixels, name in zip(patches.pixels, patches.ids, strict=True):
        np.testing.assert_array_equal(pixels, images.centre_crop(read_rgb(tmp_path / "root" / name), 16, 16))


@pytest.mark.parametrize("change", ["changed", "added", "removed", "touched"])
def test_a_file_that_is_changed_added_or_removed_makes_a_new_cache(patch_folder, data_config, decoded, change):
    config = data_config(patch_folder)
    before = load_patches(config, seed=0)
    file = patch_folder / "A" / "A000.png"
    if change == "changed":
        write_png(file, np.zeros((17, 17, 3), np.uint8))
    elif change == "added":
        shutil.copy(file, patch_folder / "A" / "new.png")
    elif change == "removed":
        file.unlink()
    else:
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after = load_patches(config, seed=0)
    assert len(decoded) == 48 + len(after.ids)
    assert len(after.ids) == len(before.ids) + {"added": 1, "removed": -1}.get(change, 0)
    if change == "changed":
        assert (after.pixels[after.ids.index("A/A000.png")] == 0).all()


def test_data_sets_whose_files_share_names_sizes_and_times_do_not_share_a_cache(tmp_path, data_config):
    roots = [tmp_path / name for name in ("one", "two")]
    for root, value in zip(roots, (10, 200), strict=True):
        for label in "AB":
            (root / label).mkdir(parents=True)
            Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(root / label / "x.tif")
            os.utime(root / label / "x.tif", (0, 0))
    assert [load_patches(data_config(root), seed=0).pixels[0, 0, 0, 0] for root in roots] == [10, 200]


@pytest.mark.parametrize(
    "settings",
    [{"image_size": 8}, {"crop": 16}, {"stain": {"mode": "normalise"}}],
    ids=["image_size", "crop", "stain"],
)
def test_settings_that_touch_pixels_make_a_cache_of_their_own(patch_folder, data_config, decoded, settings):
    load_patches(data_config(patch_folder), seed=0)
    load_patches(data_config(patch_folder, **settings), seed=0)
    assert len(decoded) == 96
    load_patches(data_config(patch_folder), seed=0)
    load_patches(data_config(patch_folder, **settings), seed=0)
    assert len(decoded) == 96


def test_settings_that_do_not_touch_pixels_share_a_cache(patch_folder, data_config, decoded):
    load_patches(data_config(patch_folder), seed=0)
    load_patches(data_config(patch_folder, flips=False, workers=1, stain={"mode": "augment"}), seed=5)
    assert len(decoded) == 48


def test_a_normalised_cache_follows_the_split_its_reference_came_from(patch_folder, data_config):
    config = data_config(patch_folder, stain={"mode": "normalise"})
    references = [load_patches(config, seed=seed).preprocessing.reference for seed in (0, 1, 0)]
    assert references[0] == references[2] != references[1]


@pytest.mark.parametrize("error", [UserError("stop"), KeyboardInterrupt(), OSError("disk full")])
def test_a_build_that_fails_leaves_nothing_behind_and_the_next_one_works(patch_folder, data_config, monkeypatch, error):
    config = data_config(patch_folder)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(cache_module.Preprocessing, "save", fail)
        with pytest.raises(type(error)):
            load_patches(config, seed=0)
    assert list(config.cache_dir.iterdir()) == []
    assert len(load_patches(config, seed=0).ids) == 48


def test_a_process_that_finishes_second_takes_the_cache_of_the_first(patch_folder, data_config, monkeypatch):
    config = data_config(patch_folder)
    build = cache_module._build_cache

    def overtaken(folder, config, records, *, seed, reference):
        build(folder, config, records, seed=seed, reference=reference)
        shutil.copytree(folder, cache_module.cache_folder(config, records, seed=seed))

    monkeypatch.setattr(cache_module, "_build_cache", overtaken)
    assert len(load_patches(config, seed=0).ids) == 48
    assert len(list(config.cache_dir.iterdir())) == 1


# Scale and stain


def test_a_crop_is_taken_in_the_files_pixels_and_then_shrunk(tmp_path, data_config):
    """With crop=32 and image_size=16 a file of 48 x 64 px is seen at half its scale, 24 x 32."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for label in "AB":
        (tmp_path / "root" / label).mkdir(parents=True)
        write_png(tmp_path / "root" / label / "x.png", blocks.repeat(2, 0).repeat(2, 1))
    patches = load_patches(data_config(tmp_path / "root", crop=32), seed=0)
    np.testing.assert_array_equal(patches.pixels[0], blocks)
    centre = patches.centre([0])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(centre, blocks[4:20, 8:24])
    whole = load_patches(data_config(tmp_path / "root"), seed=0)
    assert whole.pixels.shape[1:3] == (16, round(64 / 3))


def test_preprocessing_of_a_file_equals_the_middle_of_the_cached_image(tmp_path, make_patches, data_config):
    root = make_patches(tmp_path / "root", num={"A": 8, "B": 8}, low=20, high=20)
    for settings in ({}, {"crop": 18}, {"stain": {"mode": "normalise"}}):
        patches = load_patches(data_config(root, **settings), seed=0)
        for i in (0, 9):
            direct = patches.preprocessing(read_rgb(root / patches.ids[i]), name=patches.ids[i])
            np.testing.assert_array_equal(patches.centre([i])[0].permute(1, 2, 0).numpy(), direct)


def test_preprocessing_travels_through_a_file(tmp_path):
    reference = stain.StainReference("macenko", tuple(np.random.default_rng(0).random(8).tolist()))
    for preprocessing in (Preprocessing(16), Preprocessing(32, 72, reference)):
        preprocessing.save(tmp_path / "preprocessing.json")
        assert Preprocessing.load(tmp_path / "preprocessing.json") == preprocessing


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"image_size": 3}', '{"reference": {"method": 1}}'])
def test_broken_preprocessing_is_refused_by_name(tmp_path, text):
    (tmp_path / "preprocessing.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"preprocessing\.json: cannot be read"):
        Preprocessing.load(tmp_path / "preprocessing.json")


def spread_of_colour(pixels: np.ndarray) -> float:
    return float(pixels.reshape(len(pixels), -1, 3).mean(axis=1).std(axis=0).mean())


@pytest.fixture
def stained_folder(tmp_path) -> Path:
    """Tissue of two classes whose every image has a stain of its own."""
    rng = np.random.default_rng(0)
    for label, nuclei in (("A", 0.2), ("B", 0.5)):
        (tmp_path / "stained" / label).mkdir(parents=True)
        for number in range(20):
            vectors = np.abs(stain.RUIFROK_HE + 0.08 * rng.standard_normal((2, 3)))
            is_nucleus = rng.random((32, 32)) < nuclei
            amounts = np.stack([is_nucleus * rng.uniform(0.8, 1.4), ~is_nucleus * rng.uniform(0.4, 1.0)], axis=-1)
            amounts = amounts * rng.uniform(0.8, 1.2, (32, 32, 1)) * rng.uniform(0.6, 1.5)
            write_png(tmp_path / "stained" / label / f"{number}.png", stain.from_optical_density(amounts @ vectors))
    return tmp_path / "stained"


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_normalised_patches_are_closer_in_colour_than_raw_ones(stained_folder, data_config, method):
    raw = load_patches(data_config(stained_folder), seed=0)
    normalised = load_patches(data_config(stained_folder, stain={"mode": "normalise", "method": method}), seed=0)
    assert normalised.preprocessing.reference.method == method
    for label in range(2):
        before, after = (spread_of_colour(p.pixels[p.labels == label]) for p in (raw, normalised))
        assert after < 0.5 * before


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_the_reference_comes_from_the_training_split_alone(stained_folder, data_config, method):
    settings = {"mode": "normalise", "method": method}
    patches = load_patches(data_config(stained_folder, stain=settings), seed=0)
    raw = load_patches(data_config(stained_folder), seed=0)
    expected = stain.fit_reference(method, [raw.pixels[i] for i in raw.indices("train")])
    assert patches.preprocessing.reference == expected
    for i in raw.indices("test"):
        write_png(stained_folder / raw.ids[i], np.full((32, 32, 3), 40, np.uint8))
    again = load_patches(data_config(stained_folder, stain=settings), seed=0)
    assert again.preprocessing.reference == expected
