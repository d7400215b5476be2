"""Patches: how they are decoded once, scaled and brought to one stain."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import load_config, registry
from cellflux_bridge.data import cache as cache_module
from cellflux_bridge.data.check import check_data
from cellflux_bridge.data.index import patch_index, taken_from_training
from cellflux_bridge.data.layout.base import SPLITS, Layout, PatchRecord
from cellflux_bridge.data.layout.folder import Folder
from cellflux_bridge.data.patches import Patches, list_records, load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.images import read_rgb, stain, write_png

# Cache


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The files that were decoded, in any order."""
    files = []
    read = images.read

    def counting(path, **options):
        files.append(path)
        return read(path, **options)

    monkeypatch.setattr(images, "read", counting)
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
    once = len(decoded)
    assert len(set(decoded[48:])) == 48
    load_patches(data_config(patch_folder), seed=0)
    load_patches(data_config(patch_folder, **settings), seed=0)
    assert len(decoded) == once


def test_settings_that_do_not_touch_pixels_share_a_cache(patch_folder, data_config, decoded):
    load_patches(data_config(patch_folder), seed=0)
    load_patches(data_config(patch_folder, flips=False, workers=1, stain={"mode": "augment"}), seed=5)
    assert len(decoded) == 48


def test_a_normalised_cache_follows_the_split_its_reference_came_from(patch_folder, data_config):
    config = data_config(patch_folder, stain={"mode": "normalise"})
    references = [load_patches(config, seed=seed).preprocessing.reference for seed in (0, 1, 0)]
    assert references[0] == references[2] != references[1]


# Index


@pytest.fixture
def listings(monkeypatch) -> list[Path]:
    """The roots that were listed."""
    roots, records = [], Folder.records

    def counting(self):
        roots.append(self.root)
        return records(self)

    monkeypatch.setattr(Folder, "records", counting)
    return roots


def test_a_process_lists_once_and_maps_once_whatever_asks(patch_folder, data_config, listings):
    config = data_config(patch_folder)
    first = load_patches(config, seed=0)
    for other in (config, data_config(patch_folder, classes=["A", "B"], flips=False)):
        again = load_patches(other, seed=0)
        assert again.pixels is first.pixels
        np.testing.assert_array_equal(again.splits, first.splits)
    assert load_patches(config, seed=0).splits is first.splits
    other_seed = load_patches(config, seed=1)
    assert other_seed.pixels is first.pixels
    assert (other_seed.splits != first.splits).any()
    records, classes = list_records(config, seed=0)
    assert (tuple(r.id for r in records), classes) == (first.ids, first.classes)
    assert [SPLITS.index(r.split) for r in records] == first.splits.tolist()
    assert taken_from_training(patch_index(config, seed=0)) is None
    assert listings == [patch_folder]
    reversed_ = load_patches(data_config(patch_folder, classes=["B", "A"]), seed=0)
    np.testing.assert_array_equal(reversed_.labels, 1 - first.labels)
    assert "read as root/<class>/*: 2 classes" in check_data(config, seed=0, sheet=config.cache_dir / "sheet.png")[0]
    assert listings == [patch_folder]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "linked", "manifest", "edit"])
def test_what_changes_in_a_folder_or_a_manifest_is_listed_anew(patch_folder, data_config, tmp_path, change):
    config, rows = data_config(patch_folder), ["path,label", "A/A000.png,A", "B/B000.png,B"]
    linked = tmp_path / "linked"
    if change == "linked":
        (patch_folder / "B").rename(linked)
        (patch_folder / "B").symlink_to(linked)
    if change == "edit":
        (patch_folder / "manifest.csv").write_text("\n".join(rows))
    before = {r.id for r in list_records(config, seed=0)[0]}
    file = patch_folder / "A" / "A000.png"
    if change in ("add", "linked"):
        shutil.copy(file, (patch_folder / "A" if change == "add" else linked) / "new.png")
        expected = before | {"A/new.png" if change == "add" else "B/new.png"}
    elif change == "remove":
        file.unlink()
        expected = before - {"A/A000.png"}
    elif change == "rename":
        status = file.parent.stat()
        file.rename(file.with_name("A999.png"))
        os.utime(file.parent, ns=(status.st_atime_ns, status.st_mtime_ns))
        expected = before - {"A/A000.png"} | {"A/A999.png"}
    elif change == "manifest":
        (patch_folder / "manifest.csv").write_text("\n".join(rows))
        expected = {"A/A000.png", "B/B000.png"}
    else:
        status = (patch_folder / "manifest.csv").stat()
        (patch_folder / "manifest.csv").write_text("\n".join(rows).replace("A000", "A001"))
        os.utime(patch_folder / "manifest.csv", ns=(status.st_atime_ns, status.st_mtime_ns))
        expected = {"A/A001.png", "B/B000.png"}
    assert {r.id for r in list_records(config, seed=0)[0]} == expected


class Elsewhere(Layout):
    """A layout of a user's own, whose files lie beside the root."""

    def __init__(self, root: Path):
        self._folder = root.parent / "elsewhere"

    def records(self) -> list[PatchRecord]:
        files = sorted(self._folder.glob("*.png"))
        return [PatchRecord(f"p/{file.stem}", file, file.stem[0], group=f"g{file.stem[1:]}") for file in files]


def test_a_layout_of_the_users_own_is_always_asked_anew(tmp_path, make_patches, data_config):
    make_patches(tmp_path / "made")
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for file in (tmp_path / "made").glob("*/*[0-4].png"):
        shutil.copy(file, tmp_path / "elsewhere")
    with registry.trusting():
        config = data_config(tmp_path / "root", layout=f"{__name__}:Elsewhere")
        patches = load_patches(config, seed=0)
        (tmp_path / "elsewhere" / "A000.png").unlink()
        records, classes = list_records(config, seed=0)
    assert [r.id for r in records] == list(patches.ids)[1:]
    assert classes == ("A", "B")
    assert {(r.file, r.group) for r in records} == {
        (tmp_path / "elsewhere" / f"{r.id[2:]}.png", f"g{r.id[3:]}") for r in records
    }
    np.testing.assert_array_equal(
        patches.preprocessing(read_rgb(records[3].file), name=""), patches.centre([4])[0].permute(1, 2, 0)
    )


# Builds that are stopped


def assert_the_files_pixels(patches: Patches, root: Path) -> None:
    """Every patch's middle is what `preprocessing` makes of its file."""
    for i, name in enumerate(patches.ids):
        direct = patches.preprocessing(read_rgb(root / name), name=name)
        np.testing.assert_array_equal(patches.centre([i])[0].permute(1, 2, 0).numpy(), direct)


def stop_after(monkeypatch, num: int, error: BaseException) -> None:
    """Reading images raises `error` from the one after `num` on."""
    files, read = [], images.read

    def stopping(path, **options):
        files.append(path)
        if len(files) > num:
            raise error
        return read(path, **options)

    monkeypatch.setattr(images, "read", stopping)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full"), UserError("unreadable")])
@pytest.mark.parametrize("stain", [{}, {"mode": "normalise"}], ids=["none", "normalise"])
def test_a_build_that_was_stopped_goes_on_where_it_was(patch_folder, data_config, monkeypatch, decoded, error, stain):
    config = data_config(patch_folder, workers=1, stain=stain)
    reference = sum(r.split == "train" for r in list_records(config, seed=0)[0]) if stain else 0
    with monkeypatch.context() as patch:
        stop_after(patch, reference + 30, error)
        with pytest.raises(type(error)):
            load_patches(config, seed=0)
    assert len(decoded) == reference + 30
    resumed = load_patches(config, seed=0)
    assert len(decoded) == 2 * reference + 48
    (cache,) = config.cache_dir.iterdir()
    assert not (cache / "made_from.npy").exists()
    whole = load_patches(config.model_copy(update={"cache_dir": config.cache_dir / "other"}), seed=0)
    np.testing.assert_array_equal(resumed.pixels, whole.pixels)
    assert resumed.preprocessing == whole.preprocessing


def test_what_was_decoded_stays_when_an_unreadable_file_is_mended(patch_folder, data_config, decoded):
    file, config = patch_folder / "B" / "B005.png", data_config(patch_folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(UserError, match=r"1 of 48 images cannot be used; mend or remove them, or .*:\n.*B005"):
        load_patches(config, seed=0)
    del decoded[:]
    file.write_bytes(whole)
    changed = patch_folder / "A" / "A003.png"
    write_png(changed, 255 - read_rgb(changed))
    del decoded[:]
    patches = load_patches(config, seed=0)
    assert sorted(decoded) == [changed, file]
    assert_the_files_pixels(patches, patch_folder)


def test_a_build_that_began_with_another_reference_starts_anew(patch_folder, data_config, monkeypatch):
    config = data_config(patch_folder, workers=1, stain={"mode": "normalise"})
    with monkeypatch.context() as patch:
        stop_after(patch, 48 + 12, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            load_patches(config, seed=0)
    of_train = load_patches(data_config(patch_folder), seed=0).indices("train")[0]
    file = patch_folder / load_patches(data_config(patch_folder), seed=0).ids[of_train]
    write_png(file, read_rgb(file) // 2)
    patches = load_patches(config, seed=0)
    assert_the_files_pixels(patches, patch_folder)


def test_a_killed_process_loses_no_more_than_what_was_not_yet_on_the_disk(
    patch_folder, data_config, decoded, monkeypatch
):
    config = data_config(patch_folder, workers=1)
    read, files = images.read, []

    def killed(path, **options):
        files.append(path)
        return os.kill(os.getpid(), signal.SIGKILL) if len(files) > 30 else read(path, **options)

    monkeypatch.setattr(cache_module, "_NUM_AT_RISK", 8)
    if (process := os.fork()) == 0:
        images.read = killed
        load_patches(config, seed=0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    patches = load_patches(config, seed=0)
    assert len(decoded) == 48 - 24
    assert_the_files_pixels(patches, patch_folder)


def test_processes_that_build_at_once_wait_for_each_other(patch_folder, data_config, decoded, monkeypatch):
    config, started = data_config(patch_folder), Event()
    read = images.read

    def slow(path, **options):
        started.set()
        time.sleep(0.03)
        return read(path, **options)

    monkeypatch.setattr(images, "read", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(load_patches, config, seed=0)
        started.wait()
        second = pool.submit(load_patches, config, seed=0)
        assert len(first.result().ids) == len(second.result().ids) == 48
    assert len(decoded) == 48
    assert len(list(config.cache_dir.iterdir())) == 1


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "cut", "text", "pickle", "archive", "larger", "floats", "other"]
)
def test_a_damaged_cache_is_refused_by_name_and_takes_no_memory(patch_folder, data_config, damage):
    config = data_config(patch_folder)
    load_patches(config, seed=0)
    (file,) = config.cache_dir.glob("*/pixels.npy")
    whole, shape = file.read_bytes(), (48, 16, 16, 3)
    file.unlink()
    if damage == "empty":
        file.touch()
    elif damage == "cut":
        file.write_bytes(whole[:-1])
    elif damage == "text":
        file.write_bytes(whole[:10] + b"{(" * 59 + whole[128:])
    elif damage == "pickle":
        np.save(file, np.array([{}]), allow_pickle=True)
    elif damage == "archive":
        np.savez(file.with_suffix(".npz"), np.zeros(shape, np.uint8))
        file.with_suffix(".npz").rename(file)
    elif damage == "larger":
        header = whole[10:128].rstrip().replace(b"(48, ", b"(99999999999, ")
        file.write_bytes(whole[:10] + header.ljust(117) + b"\n" + whole[128:])
    elif damage == "floats":
        np.save(file, np.zeros(shape, np.float32))
    elif damage == "other":
        np.save(file, np.zeros((48, 16, 15, 3), np.uint8))
    with pytest.raises(UserError, match=r"a damaged cache \(.*\); remove this folder, it is made anew"):
        load_patches(config, seed=0)


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


SIZES = [(16, 16), (17, 20), (19, 16), (18, 31), (40, 23), (21, 21)]


@pytest.fixture(scope="module")
def unequal_folder(tmp_path_factory) -> Path:
    """Tissue of two classes, in images of every parity of height and width, some with glass at the sides."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("unequal")
    for label, nuclei in (("A", 0.2), ("B", 0.5)):
        (root / label).mkdir()
        for number, size in enumerate(SIZES):
            is_nucleus = rng.random(size) < nuclei
            amounts = np.stack([is_nucleus * rng.uniform(0.8, 1.4), ~is_nucleus * rng.uniform(0.4, 1.0)], axis=-1)
            rgb = stain.from_optical_density(amounts * rng.uniform(0.8, 1.2, (*size, 1)) @ stain.RUIFROK_HE)
            if number % 2:
                rgb[:, :4] = rgb[:, -3:] = 245
            write_png(root / label / f"{number}.png", rgb)
    return root


@pytest.mark.parametrize("scale", [{}, {"crop": 15}, {"crop": 7}, {"image_size": 33}], ids=str)
@pytest.mark.parametrize("method", ["none", "reinhard", "macenko"])
def test_training_and_translation_see_the_same_pixels_of_a_file_of_any_size(unequal_folder, data_config, method, scale):
    mode = {} if method == "none" else {"mode": "normalise", "method": method}
    patches = load_patches(data_config(unequal_folder, stain=mode, enlarge=True, **scale), seed=0)
    assert (patches.preprocessing.reference is None) == (method == "none")
    assert_the_files_pixels(patches, unequal_folder)
    for i, name in enumerate(patches.ids):
        whole = patches.preprocessing.prepare(read_rgb(unequal_folder / name), name=name)
        np.testing.assert_array_equal(patches.preprocessing.cut(whole, *patches.pixels.shape[1:3]), patches.pixels[i])


def test_preprocessing_travels_through_a_file(tmp_path):
    reference = stain.StainReference("macenko", tuple(np.random.default_rng(0).random(8).tolist()))
    for preprocessing in (Preprocessing(16), Preprocessing(32, 72, reference)):
        preprocessing.save(tmp_path / "preprocessing.json")
        assert Preprocessing.load(tmp_path / "preprocessing.json") == preprocessing


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', '{"image_size": 0}', '{"image_size": 1e12}', '{"reference": {"method": 1}}']
)
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


# Caches of somebody else's configuration


@pytest.fixture
def received(patch_folder, tmp_path, write_config, monkeypatch):
    """The config.yaml of a received run whose cache_dir is tmp_path/cache, and where caches belong by default."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write_config(tmp_path, file="config.yaml")
    return path, tmp_path / "home" / ".cache" / "cellflux_bridge"


def test_a_received_configuration_makes_no_cache_where_it_says(received, tmp_path):
    path, default = received
    load_patches(load_config(path).data, seed=0)
    assert len(list(default.iterdir())) == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("allow", ["own file", "override", "trust", "block"])
def test_the_user_decides_where_a_cache_is_made_and_a_run_uses_it_afterwards(received, tmp_path, allow):
    path, default = received
    options = {
        "own file": lambda: load_config(shutil.copy(path, tmp_path / "own.yaml")),
        "override": lambda: load_config(path, [f"data.cache_dir={tmp_path}/cache"]),
        "trust": lambda: load_config(path, trust=True),
        "block": lambda: load_config(path),
    }
    with registry.trusting(allow == "block"):
        load_patches(options[allow]().data, seed=0)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    load_patches(load_config(path).data, seed=0)
    assert not default.exists()
