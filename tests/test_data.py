"""Patches: how they are listed, split, decoded once, cut and coupled into batches."""

import csv
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, chisquare

from cellflux_bridge import images, stain
from cellflux_bridge.config import PairsConfig
from cellflux_bridge.coupling.base import Coupling
from cellflux_bridge.coupling.independent import Independent
from cellflux_bridge.coupling.minibatch_ot import MinibatchOT
from cellflux_bridge.data import patches as patches_module
from cellflux_bridge.data.check import check_data
from cellflux_bridge.data.pairs import PairBatch, Pairs
from cellflux_bridge.data.patches import Patches, list_records, load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.records import SPLITS, PatchRecord, assign_splits
from cellflux_bridge.errors import UserError
from cellflux_bridge.images import read_rgb, write_png

PHANTOM = {"name": "phantom", "size": 16, "num_train": 3, "num_val": 1, "num_test": 1, "num_range": 3}


def write_manifest(root: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(root / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def splits_of(records) -> dict[str, str]:
    return {record.id: record.split for record in records}


# Layouts


def test_folders_of_the_root_are_classes(patch_folder, data_config):
    records, classes = list_records(data_config(patch_folder), seed=0)
    assert classes == ("A", "B")
    assert Counter(record.label for record in records) == {"A": 24, "B": 24}
    assert [record.id for record in records] == sorted(record.id for record in records)
    assert all(record.file == patch_folder / record.id for record in records)
    assert all(record.group is None for record in records)


def test_classes_are_numbered_in_the_configured_order(patch_folder, data_config):
    config = data_config(patch_folder, classes=["B", "A"])
    patches = load_patches(config, seed=0)
    assert patches.classes == ("B", "A")
    assert {patches.ids[i][0] for i in np.flatnonzero(patches.labels == 0)} == {"B"}


def test_folders_named_like_splits_are_splits(tmp_path, make_patches, data_config):
    for split, count in (("train", 4), ("valid", 2), ("test", 3)):
        make_patches(tmp_path / "root" / split, num={"A": count, "B": count})
    records, classes = list_records(data_config(tmp_path / "root"), seed=0)
    assert classes == ("A", "B")
    counts = Counter((record.split, record.label) for record in records)
    assert counts == {(s, c): n for s, n in (("train", 4), ("val", 2), ("test", 3)) for c in "AB"}
    assert all(record.id.startswith("valid/") for record in records if record.split == "val")


def test_a_folder_inside_a_class_is_a_group_and_one_patient_in_two_classes_stays_one(patch_folder, data_config):
    for label in ("A", "B"):
        (patch_folder / label / "patient1" / "slide2").mkdir(parents=True)
        shutil.copy(patch_folder / label / f"{label}000.png", patch_folder / label / "patient1" / "slide2" / "x.png")
    records, _ = list_records(data_config(patch_folder), seed=0)
    assert {record.id: record.group for record in records if record.group} == {
        "A/patient1/slide2/x.png": "patient1/slide2",
        "B/patient1/slide2/x.png": "patient1/slide2",
    }


def test_hidden_files_and_other_suffixes_are_no_patches(patch_folder, data_config):
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (patch_folder / "A" / name).touch()
    (patch_folder / ".git").mkdir()
    shutil.copy(patch_folder / "A" / "A000.png", patch_folder / "A" / "upper.PNG")
    records, classes = list_records(data_config(patch_folder), seed=0)
    assert classes == ("A", "B")
    assert len(records) == 49
    assert "A/upper.PNG" in splits_of(records)


def test_a_class_can_be_left_out(tmp_path, make_patches, data_config):
    root = make_patches(tmp_path / "root", num={"A": 3, "B": 3, "C": 3})
    config = data_config(root, layout={"name": "folder", "ignore": ["C"]}, classes=["A", "B"])
    assert {record.label for record in list_records(config, seed=0)[0]} == {"A", "B"}
    write_manifest(root, [{"path": f"{c}/{c}00{n}.png", "label": c} for c in "ABC" for n in range(3)])
    assert {record.label for record in list_records(config, seed=0)[0]} == {"A", "B"}


def test_a_manifest_names_patches_splits_groups_scores_and_scale(patch_folder, data_config):
    write_manifest(
        patch_folder,
        [
            {"path": "A/A000.png", "label": "low", "split": "train", "group": "p1", "score": 0.25, "mpp": 0.5, "x": 1},
            {
                "path": "./A/../B/B001.png",
                "label": "high",
                "split": "validation",
                "group": "p2",
                "score": "",
                "mpp": "",
            },
            {"path": "B\\B002.png", "label": "high", "split": "test", "group": " p3 ", "score": "1", "mpp": ""},
            {"path": "A/A003.png", "label": "high", "split": "train", "group": "", "score": "", "mpp": ""},
        ],
    )
    records, classes = list_records(data_config(patch_folder), seed=0)
    assert classes == ("high", "low")
    assert records == [
        PatchRecord("A/A000.png", patch_folder / "A/A000.png", "low", "train", "p1", 0.25, 0.5),
        PatchRecord("A/A003.png", patch_folder / "A/A003.png", "high", "train", None, None, None),
        PatchRecord("B/B001.png", patch_folder / "B/B001.png", "high", "val", "p2", None, None),
        PatchRecord("B/B002.png", patch_folder / "B/B002.png", "high", "test", "p3", 1.0, None),
    ]
    scores = load_patches(data_config(patch_folder), seed=0).scores
    np.testing.assert_array_equal(scores, np.array([0.25, np.nan, np.nan, 1.0], np.float32))


def test_a_manifest_with_byte_order_mark_is_read(patch_folder, data_config):
    text = "path,label\r\nA/A000.png,A\r\n\r\nB/B000.png,B\r\n"
    (patch_folder / "manifest.csv").write_text(text, encoding="utf-8-sig")
    assert len(list_records(data_config(patch_folder), seed=0)[0]) == 2


def test_a_home_folder_is_expanded(patch_folder, data_config, monkeypatch):
    monkeypatch.setenv("HOME", str(patch_folder.parent))
    assert len(list_records(data_config(Path("~") / patch_folder.name), seed=0)[0]) == 48


# Splits


def records_of(groups: dict[str, tuple[str, int]], **options) -> list[PatchRecord]:
    """Records of `{group: (label, count)}`."""
    return [
        PatchRecord(f"{group}/{n}", Path(group), label, group=group, **options)
        for group, (label, count) in groups.items()
        for n in range(count)
    ]


GROUPS = {f"{label}{n}": (label, 1 + n % 4) for label in "AB" for n in range(20)}


def test_groups_go_whole_and_every_class_has_its_share_of_every_split():
    assigned = assign_splits(records_of(GROUPS), val=0.2, test=0.3, seed=0)
    of_group = {group: {r.split for r in assigned if r.group == group} for group in GROUPS}
    assert all(len(splits) == 1 for splits in of_group.values())
    for label in "AB":
        count = Counter(record.split for record in assigned if record.label == label)
        assert sum(count.values()) == 50
        # A group has at most four patches.
        assert 15 <= count["test"] < 19
        assert 10 <= count["val"] < 14


def test_splits_follow_the_seed_and_not_the_order_of_the_files():
    records = records_of(GROUPS)
    first = splits_of(assign_splits(records, val=0.2, test=0.2, seed=0))
    assert splits_of(assign_splits(records, val=0.2, test=0.2, seed=0)) == first
    assert splits_of(assign_splits(records[::-1], val=0.2, test=0.2, seed=0)) == first
    assert splits_of(assign_splits(records, val=0.2, test=0.2, seed=1)) != first


def test_patches_without_group_are_split_one_by_one(patch_folder, data_config):
    records, _ = list_records(data_config(patch_folder, split={"val": 0.25, "test": 0.25}), seed=0)
    assert Counter((r.label, r.split) for r in records) == {
        (label, split): count for label in "AB" for split, count in (("train", 12), ("val", 6), ("test", 6))
    }


@pytest.mark.parametrize(("given", "made"), [("test", "val"), ("val", "test")])
def test_a_missing_split_is_made_from_training_and_the_given_one_is_left(given, made):
    named = records_of({f"g{label}{n}": (label, 2) for label in "AB" for n in range(3)}, split=given)
    train = records_of(GROUPS, split="train")
    assigned = splits_of(assign_splits(named + train, val=0.2, test=0.2, seed=0))
    assert all(assigned[record.id] == given for record in named)
    assert {assigned[record.id] for record in train} == {"train", made}


def test_splits_that_are_all_given_stay():
    records = [r for s, g in zip(SPLITS, ("A1", "A2", "A3"), strict=True) for r in records_of({g: ("A", 2)}, split=s)]
    assert assign_splits(records, val=0.5, test=0.4, seed=0) == records


def test_a_patch_without_split_follows_its_group():
    named = records_of({"p1": ("A", 2), "p2": ("B", 2)}, split="test")
    open_ = [PatchRecord(f"more/{n}", Path("x"), "A", group="p1") for n in range(5)]
    assigned = splits_of(assign_splits(named + open_ + records_of(GROUPS), val=0.2, test=0.2, seed=0))
    assert {assigned[record.id] for record in open_} == {"test"}


def test_the_only_group_of_a_class_trains():
    assigned = assign_splits(
        records_of({"A1": ("A", 9), **{f"B{n}": ("B", 1) for n in range(9)}}), val=0.2, test=0.2, seed=0
    )
    assert {record.split for record in assigned if record.label == "A"} == {"train"}


def test_no_fraction_makes_no_split():
    assert {r.split for r in assign_splits(records_of(GROUPS), val=0.0, test=0.0, seed=0)} == {"train"}


def test_loaded_patches_record_their_splits_and_groups(patch_folder, data_config):
    rows = [{"path": f"{c}/{c}{n:03d}.png", "label": c, "group": f"p{n % 6}"} for c in "AB" for n in range(24)]
    write_manifest(patch_folder, rows)
    config = data_config(patch_folder)
    patches = load_patches(config, seed=3)
    records, _ = list_records(config, seed=3)
    assert [SPLITS[s] for s in patches.splits] == [record.split for record in records]
    assert [patches.group_names[g] for g in patches.groups] == [record.group for record in records]
    assert set(patches.indices("train")) | set(patches.indices("val")) | set(patches.indices("test")) == set(range(48))
    for label in "AB":
        assert {patches.ids[i][0] for i in patches.indices("test", label)} == {label}


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
        broken.setattr(patches_module.Preprocessing, "save", fail)
        with pytest.raises(type(error)):
            load_patches(config, seed=0)
    assert list(config.cache_dir.iterdir()) == []
    assert len(load_patches(config, seed=0).ids) == 48


def test_a_process_that_finishes_second_takes_the_cache_of_the_first(patch_folder, data_config, monkeypatch):
    config = data_config(patch_folder)
    build = patches_module._build_cache

    def overtaken(folder, config, records, *, seed, reference):
        build(folder, config, records, seed=seed, reference=reference)
        shutil.copytree(folder, patches_module.cache_folder(config, records, seed=seed))

    monkeypatch.setattr(patches_module, "_build_cache", overtaken)
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


# Drawing


def hand_made(pixels: np.ndarray, *, labels=None, groups=None, splits=None, size: int = 16) -> Patches:
    num = len(pixels)
    return Patches(
        pixels=pixels,
        ids=tuple(str(n) for n in range(num)),
        labels=np.zeros(num, np.int64) if labels is None else np.asarray(labels),
        splits=np.zeros(num, np.int64) if splits is None else np.asarray(splits),
        groups=np.arange(num) if groups is None else np.asarray(groups),
        group_names=tuple(str(n) for n in range(num)),
        scores=np.arange(num, dtype=np.float32) / max(1, num),
        classes=("A", "B", "C"),
        preprocessing=Preprocessing(size),
    )


def draw(patches: Patches, num: int, *, flips: bool, seed: int = 0) -> list[bytes]:
    drawn = patches.random([0] * num, flips=flips, generator=torch.Generator().manual_seed(seed))
    assert drawn.dtype == torch.uint8
    return [patch.permute(1, 2, 0).numpy().tobytes() for patch in drawn]


def test_flips_are_exactly_the_eight_symmetries_of_the_square_and_even():
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    symmetries = {
        np.ascontiguousarray(np.rot90(side, turns)).tobytes()
        for side in (image[0], image[0, :, ::-1])
        for turns in range(4)
    }
    assert len(symmetries) == 8
    counts = Counter(draw(hand_made(image), 800, flips=True))
    assert set(counts) == symmetries
    assert min(counts.values()) > 60
    assert set(draw(hand_made(image), 50, flips=False)) == {image[0].tobytes()}


def test_random_crops_are_every_window_of_the_image_and_even():
    image = np.random.default_rng(0).integers(0, 256, (1, 18, 17, 3), dtype=np.uint8)
    windows = {
        np.ascontiguousarray(image[0, top : top + 16, left : left + 16]).tobytes()
        for top in range(3)
        for left in range(2)
    }
    counts = Counter(draw(hand_made(image), 600, flips=False))
    assert set(counts) == windows
    assert min(counts.values()) > 60


def test_random_patches_follow_their_generator():
    image = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), dtype=np.uint8)
    assert draw(hand_made(image), 9, flips=True) == draw(hand_made(image), 9, flips=True)
    assert draw(hand_made(image), 9, flips=True) != draw(hand_made(image), 9, flips=True, seed=1)


# Pairs


def numbered(num: int = 30, **keys) -> Patches:
    """Patches whose every pixel is the patch's own number; labels 0, 1, 2 by turns unless given."""
    pixels = np.arange(num, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    return hand_made(pixels, **{"labels": np.arange(num) % 3, **keys})


def make_pairs(
    patches: Patches, data, *, split="train", batch_size=12, seed=0, coupling=None, levels=None, level_bins=4, **pairs
) -> Pairs:
    return Pairs(
        patches,
        coupling or Independent(),
        split=split,
        batch_size=batch_size,
        seed=seed,
        pairs=PairsConfig(**pairs),
        data=data,
        levels=levels,
        level_bins=level_bins,
    )


def numbers(x: torch.Tensor) -> torch.Tensor:
    return images.decode(x)[:, 0, 0, 0].long()


def soft_levels(num: int, seed: int = 0) -> np.ndarray:
    """Mixtures (num, 3) of all classes."""
    return np.random.default_rng(seed).dirichlet((0.6, 0.6, 0.6), num).astype(np.float32)


def between_ends(c: np.ndarray) -> np.ndarray:
    """Levels c (N,) between the first and the last of three classes."""
    return np.stack([1 - c, np.zeros_like(c), c], axis=1).astype(np.float32)


def equal(first: PairBatch, second: PairBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def data(tmp_path, data_config):
    return data_config(tmp_path)


@pytest.mark.parametrize("coupling", [Independent(), MinibatchOT(cost="pixels")], ids=["independent", "ot"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_scores_and_images_agree_with_the_indices(data, coupling, split):
    patches = numbered(splits=np.full(30, SPLITS.index(split)))
    batch = make_pairs(patches, data, coupling=coupling, split=split, batch_size=17).batch(0)
    assert batch.x0.shape == batch.x1.shape == (17, 3, 16, 16)
    assert batch.x0.dtype == torch.float32
    assert torch.equal(numbers(batch.x0), batch.source_index)
    assert torch.equal(numbers(batch.x1), batch.target_index)
    assert torch.equal(batch.source_class, batch.source_index % 3)
    assert torch.equal(batch.target_class, batch.target_index % 3)
    np.testing.assert_array_equal(batch.target_level, np.eye(3)[batch.target_class])
    assert batch.target_level.dtype == torch.float32
    assert (batch.source_class != batch.target_class).all()
    levels = soft_levels(30)
    batch = make_pairs(patches, data, coupling=coupling, split=split, batch_size=17, levels=levels).batch(0)
    assert torch.equal(numbers(batch.x0), batch.source_index)
    assert torch.equal(numbers(batch.x1), batch.target_index)
    assert torch.equal(batch.source_class, batch.source_index % 3)
    assert torch.equal(batch.target_class, batch.target_index % 3)
    np.testing.assert_array_equal(batch.target_level, levels[batch.target_index])
    assert batch.target_level.dtype == torch.float32


def test_a_batch_is_a_function_of_seed_step_and_rank(data):
    pairs = make_pairs(numbered(), data)
    first = pairs.batch(3, rank=1)
    pairs.batch(4)
    assert equal(pairs.batch(3, rank=1), first)
    assert equal(make_pairs(numbered(), data).batch(3, rank=1), first)
    others = [pairs.batch(4, rank=1), pairs.batch(3, rank=0), make_pairs(numbered(), data, seed=1).batch(3, rank=1)]
    assert not any(torch.equal(other.source_index, first.source_index) for other in others)


def transitions_of(batch: PairBatch) -> Counter:
    return Counter(zip(batch.source_class.tolist(), batch.target_class.tolist(), strict=True))


def test_every_transition_is_evenly_present_in_every_batch(data):
    pairs = make_pairs(numbered(), data, batch_size=20)
    total = Counter()
    for step in range(30):
        counts = transitions_of(pairs.batch(step))
        assert set(counts) == {(a, b) for a in range(3) for b in range(3) if a != b}
        assert set(counts.values()) == {3, 4}
        total += counts
    # Which transitions get the rest of the division changes from batch to batch.
    assert max(total.values()) - min(total.values()) <= 20


@pytest.mark.parametrize("match_group", [False, True])
def test_a_batch_smaller_than_the_number_of_transitions_takes_turns(data, match_group):
    patches = numbered(groups=np.zeros(30, int))
    pairs = make_pairs(patches, data, batch_size=4, match_group=match_group)
    total = Counter()
    for step in range(40):
        batch = pairs.batch(step)
        assert len(batch.x0) == 4
        total += transitions_of(batch)
    assert len(total) == 6


def test_only_the_named_transitions_are_drawn(data):
    batch = make_pairs(numbered(), data, transitions=[("A", "C"), ("B", "C")]).batch(0)
    assert transitions_of(batch) == {(0, 2): 6, (1, 2): 6}


def test_identity_adds_a_class_to_itself(data):
    batch = make_pairs(numbered(), data, transitions=[("A", "C")], identity=True).batch(0)
    assert transitions_of(batch) == {(0, 2): 4, (0, 0): 4, (2, 2): 4}
    everything = make_pairs(numbered(), data, identity=True, batch_size=18).batch(0)
    assert transitions_of(everything) == {(a, b): 2 for a in range(3) for b in range(3)}


def test_no_patch_stands_twice_on_a_side_of_a_block_where_there_are_enough(data):
    for step in range(5):
        batch = make_pairs(numbered(), data, batch_size=60).batch(step)
        rows = Counter(zip(batch.source_index.tolist(), batch.target_class.tolist(), strict=True))
        assert set(rows.values()) == {1}


def test_matched_groups_stay_together(data):
    groups = np.repeat(np.arange(5), 12)
    patches = numbered(60, groups=groups)
    pairs = make_pairs(patches, data, batch_size=48, match_group=True, coupling=MinibatchOT(cost="pixels"))
    seen = set()
    for step in range(8):
        batch = pairs.batch(step)
        assert (groups[batch.source_index] == groups[batch.target_index]).all()
        assert len(set(transitions_of(batch).values())) == 1
        seen |= set(groups[batch.source_index].tolist())
    assert seen == set(range(5))
    unmatched = make_pairs(patches, data, batch_size=48).batch(0)
    assert (groups[unmatched.source_index] != groups[unmatched.target_index]).any()


class Turned(Coupling):
    """Turns the targets of every block by one, and notes how the rows stood in blocks."""

    def permutation(self, x0, x1, *, generator):
        return torch.arange(len(x0)).roll(1)

    def pair(self, x0, x1, *, blocks, generator):
        self.blocks = blocks
        return super().pair(x0, x1, blocks=blocks, generator=generator)


def by_block(pairs: Pairs, coupling: Turned, steps: int):
    """The (sources, targets) of every block of some batches, as numbers of patches."""
    for step in range(steps):
        batch = pairs.batch(step)
        for block in coupling.blocks.unique():
            rows = coupling.blocks == block
            source, target = batch.source_index[rows].numpy(), batch.target_index[rows].numpy()
            if (source != target).any():  # a patch that met itself stands alone
                yield source, target


def test_any_source_goes_to_any_level_evenly(data):
    """Source class and level are drawn independently, whatever the levels of the classes are."""
    c = np.repeat([0.0, 0.25, 0.5, 0.75, 1.0], [64, 4, 16, 36, 100])
    labels = (c >= 0.5).astype(int) * 2
    coupling = Turned()
    pairs = make_pairs(
        numbered(len(c), labels=labels), data, coupling=coupling, batch_size=64, levels=between_ends(c),
        transitions=[("A", "C"), ("C", "A")],
    )  # fmt: skip
    table = np.zeros((2, 5))
    for source, target in by_block(pairs, coupling, 150):
        assert len(set(labels[source])) == len(set(c[target])) == 1
        table[labels[source[0]] // 2, int(4 * c[target[0]])] += 1
    assert chi2_contingency(table).pvalue > 0.01
    assert table.min() > 20
    # Rare levels are drawn more often than they are frequent: by the square root.
    share = np.sqrt([64, 4, 16, 36, 100])
    assert chisquare(table.sum(0), share / share.sum() * table.sum()).pvalue > 0.01


def test_levels_of_a_block_are_nearly_the_same(data):
    c = np.random.default_rng(0).random(90)
    for num, width in ((4, 0.25), (10, 0.1)):
        coupling = Turned()
        pairs = make_pairs(numbered(90), data, coupling=coupling, batch_size=30, levels=between_ends(c), level_bins=num)
        spreads = [np.ptp(c[target]) for _, target in by_block(pairs, coupling, 10)]
        assert max(spreads) <= width + 1e-6
        assert max(spreads) > width / 2
    mixed = soft_levels(90)
    pairs = make_pairs(numbered(90), data, coupling=coupling, batch_size=30, levels=mixed)
    assert max(np.ptp(mixed[target], axis=0).max() for _, target in by_block(pairs, coupling, 10)) <= 0.25 + 1e-6


def test_by_level_only_the_named_sources_are_drawn(data):
    pairs = make_pairs(numbered(), data, levels=soft_levels(30), transitions=[("A", "C"), ("B", "C")])
    batches = [pairs.batch(step) for step in range(10)]
    assert set(torch.cat([batch.source_class for batch in batches]).tolist()) == {0, 1}
    assert set(torch.cat([batch.target_class for batch in batches]).tolist()) == {0, 1, 2}
    levels = np.eye(3, dtype=np.float32)[np.arange(30) % 3]
    pairs = make_pairs(numbered(), data, batch_size=8, levels=levels, transitions=[("A", "C")])
    total = sum((transitions_of(pairs.batch(step)) for step in range(20)), Counter())
    assert set(total) == {(0, 0), (0, 2)}


def test_groups_are_matched_at_every_level(data):
    groups, coupling = np.arange(60) // 12, Turned()
    c = np.tile(np.repeat([0.0, 0.5, 1.0], 4), 5)
    c[:12] = 0.0  # the first group has no other level
    pairs = make_pairs(
        numbered(60, groups=groups), data, coupling=coupling, batch_size=48, match_group=True, levels=between_ends(c)
    )
    seen = set()
    for source, target in by_block(pairs, coupling, 20):
        assert len(set(groups[source]) | set(groups[target])) == 1
        assert len(set(c[target])) == 1
        seen.add((groups[source[0]], c[target[0]]))
    assert seen == {(0, 0.0), *((group, level) for group in range(1, 5) for level in (0.0, 0.5, 1.0))}


def test_groups_in_which_a_source_could_only_become_itself_are_refused(data):
    patches, ends = numbered(groups=np.arange(30)), (np.arange(30) % 3) / 2
    with pytest.raises(UserError, match=r"pairs\.match_group: no group of the train split holds a source and another"):
        make_pairs(patches, data, batch_size=8, match_group=True, transitions=[("A", "C")], levels=between_ends(ends))


def test_a_batch_by_level_is_a_function_of_seed_step_and_rank(data):
    levels = soft_levels(30)
    pairs = make_pairs(numbered(), data, levels=levels, self_pairs=0.3)
    first = pairs.batch(3, rank=1)
    pairs.batch(4)
    again = make_pairs(numbered(), data, levels=levels, self_pairs=0.3)
    assert equal(pairs.batch(3, rank=1), first)
    assert equal(again.batch(3, rank=1), first)
    assert not any(equal(other, first) for other in (again.batch(4, rank=1), again.batch(3)))


def test_levels_of_other_splits_do_not_matter(data):
    splits, levels = np.repeat([0, 1, 2], 20), soft_levels(60)
    patches = numbered(60, splits=splits)
    without = np.where((splits == 2)[:, None], np.nan, levels)
    for number, split in enumerate(SPLITS[:2]):
        batch = make_pairs(patches, data, split=split, levels=without).batch(0)
        assert (splits[torch.cat([batch.source_index, batch.target_index])] == number).all()
        assert equal(batch, make_pairs(patches, data, split=split, levels=levels).batch(0))


def test_a_share_of_the_sources_at_a_targets_level_are_their_own_targets(data_config, tmp_path):
    """The very crop and stain, at its own level; the others are coupled as ever."""
    data = data_config(tmp_path, stain={"mode": "augment", "strength": 0.2})
    pixels = np.random.default_rng(0).integers(0, 256, (300, 24, 24, 3), dtype=np.uint8)
    patches = hand_made(pixels, labels=np.arange(300) % 3)
    levels = np.eye(3, dtype=np.float32)[patches.labels]
    pairs = make_pairs(patches, data, coupling=MinibatchOT(), batch_size=64, levels=levels, self_pairs=0.4)
    shares = []
    for step in range(25):
        batch = pairs.batch(step)
        own, stays = (batch.x0 == batch.x1).flatten(1).all(1), batch.source_class == batch.target_class
        assert torch.equal(batch.source_index[own], batch.target_index[own])
        assert stays[own].all()
        shares += own[stays].tolist()
        np.testing.assert_array_equal(batch.target_level, levels[batch.target_index])
    assert np.mean(shares) == pytest.approx(0.4, abs=0.06)
    without = make_pairs(patches, data, batch_size=64, levels=levels).batch(0)
    assert (without.source_index == without.target_index).float().mean() < 0.1


def test_a_source_that_stays_is_told_any_level_of_its_bin(data):
    score = np.random.default_rng(0).uniform(0, 0.4, 200)
    levels = between_ends(score)
    patches = numbered(200)
    pairs = make_pairs(patches, data, batch_size=64, levels=levels, level_bins=2, self_pairs=1.0)
    gaps = []
    for step in range(10):
        batch = pairs.batch(step)
        stays, told = batch.source_index == batch.target_index, batch.target_level[:, 2].numpy()
        own = score[batch.source_index]
        assert (np.rint(2 * told[stays]) == np.rint(2 * own[stays])).all()
        gaps += np.abs(told - own)[stays].tolist()
    assert np.mean(gaps) > 0.05  # the mean distance of two draws is a third of the bin's width


def test_splits_do_not_mix(data):
    splits = np.repeat([0, 1, 2], 20)
    patches = numbered(60, splits=splits)
    for number, split in enumerate(SPLITS):
        batch = make_pairs(patches, data, split=split).batch(0)
        assert (splits[torch.cat([batch.source_index, batch.target_index])] == number).all()


def test_evaluation_shows_the_middle_and_training_random_parts(data_config, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    for split, is_middle in (("val", True), ("train", False)):
        patches = hand_made(pixels, labels=np.arange(12) % 3, splits=np.full(12, SPLITS.index(split)))
        batch = make_pairs(patches, data_config(tmp_path), split=split).batch(0)
        middle = images.encode(patches.centre(batch.source_index))
        assert torch.equal(batch.x0, middle) == is_middle


def test_stain_jitter_is_shared_by_a_pair_and_only_trains(data_config, tmp_path):
    """All pixels are alike, so that only jitter can tell two rows apart."""
    config = data_config(tmp_path, stain={"mode": "augment", "strength": 0.5})
    pixels = np.full((24, 16, 16, 3), (170, 110, 180), np.uint8)
    patches = hand_made(pixels, labels=np.arange(24) % 3, splits=np.repeat([0, 1], 12))
    train = make_pairs(patches, config).batch(0)
    before_coupling = train.x0[:, :, 0, 0]
    assert len(torch.unique(before_coupling, dim=0)) == 12
    assert {tuple(row.tolist()) for row in train.x1[:, :, 0, 0]} == {tuple(row.tolist()) for row in before_coupling}
    val = make_pairs(patches, config, split="val").batch(0)
    assert len(torch.unique(torch.cat([val.x0, val.x1]).flatten(1), dim=0)) == 1


def test_stain_jitter_leaves_every_image_with_its_number(data_config, tmp_path):
    config = data_config(tmp_path, stain={"mode": "augment", "strength": 0.001})
    pixels = np.arange(30, dtype=np.uint8)[:, None, None, None] * np.full((1, 16, 16, 3), 8, np.uint8)
    batch = make_pairs(hand_made(pixels, labels=np.arange(30) % 3), config).batch(0)
    for x, index in ((batch.x0, batch.source_index), (batch.x1, batch.target_index)):
        assert (numbers(x) - 8 * index).abs().max() <= 1


# Phantoms


def test_phantoms_are_made_once_read_again_and_their_range_is_no_class(tmp_path, data_config):
    root = tmp_path / "phantom"
    config = data_config(root, layout=PHANTOM)
    records, classes = list_records(config, seed=0)
    assert classes == ("A", "B")
    counts = Counter((record.label, record.split) for record in records)
    assert counts == {(c, s): n for c in "AB" for s, n in (("train", 3), ("val", 1), ("test", 1))}
    assert all(r.score <= 0.15 if r.label == "A" else r.score >= 0.85 for r in records)
    assert not any("range" in record.id for record in records)
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert list_records(config, seed=0)[0] == records
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == written
    assert load_patches(config, seed=0).pixels.shape == (10, 16, 16, 3)
    with open(root / "range" / "range.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [0.0, 0.5, 1.0]
    for row in rows:
        assert read_rgb(root / row["path"]).shape == (16, 16, 3)
        assert int(row["num_nuclei"]) >= 0
        assert 0 <= float(row["area_fraction"]) <= 1


def test_phantoms_of_the_whole_range_are_another_data_set(tmp_path, data_config):
    spec = {**PHANTOM, "num_train": 40}
    whole = data_config(tmp_path / "whole", layout={**spec, "whole_range": True})
    records, classes = list_records(whole, seed=0)
    assert classes == ("A", "B")
    scores = np.array([record.score for record in records if record.split == "train"])
    labels = np.array([record.label for record in records if record.split == "train"])
    assert ((scores >= 0.5) == (labels == "B")).all()
    assert np.histogram(scores, bins=4, range=(0, 1))[0].min() > 8
    assert list_records(whole, seed=0)[0] == records
    with pytest.raises(UserError, match="made with other settings"):
        list_records(data_config(tmp_path / "whole", layout=spec), seed=0)
    list_records(data_config(tmp_path / "ends", layout=spec), seed=0)
    assert "whole_range" not in (tmp_path / "ends" / "phantom.json").read_text()


def test_phantoms_are_the_same_wherever_they_are_made(tmp_path, data_config):
    roots = [tmp_path / "one", tmp_path / "two"]
    (tmp_path / "two").mkdir()
    for root in roots:
        list_records(data_config(root, layout=PHANTOM), seed=0)
    files = sorted(path.relative_to(roots[0]) for path in roots[0].rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(roots[1]) for path in roots[1].rglob("*") if path.is_file())
    assert all((roots[0] / file).read_bytes() == (roots[1] / file).read_bytes() for file in files)
    assert not list(tmp_path.glob("*.making"))


def test_a_folder_of_other_phantoms_is_refused(tmp_path, data_config):
    root = tmp_path / "phantom"
    list_records(data_config(root, layout=PHANTOM), seed=0)
    with pytest.raises(UserError, match=r"phantom: holds phantoms made with other settings .*\"train\": 3"):
        list_records(data_config(root, layout={**PHANTOM, "num_train": 4}), seed=0)
    (root / "phantom.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"phantom\.json: cannot be read"):
        list_records(data_config(root, layout=PHANTOM), seed=0)


def test_phantoms_are_not_made_over_something_else(tmp_path, data_config):
    (tmp_path / "precious.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no phantoms"):
        list_records(data_config(tmp_path, layout=PHANTOM), seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


# Check


def check(config, tmp_path) -> tuple[str, bool]:
    return check_data(config, seed=0, sheet=tmp_path / "sheet.png")


def test_a_check_counts_and_measures_and_draws_a_sheet(tmp_path, make_patches, data_config):
    root = make_patches(tmp_path / "root", num={"A": 10, "B": 20}, low=20, high=20)
    report, usable = check(data_config(root), tmp_path)
    assert usable
    lines = report.splitlines()
    assert lines[0] == f"{root}: 30 patches, 2 classes"
    assert lines[1].split() == list(SPLITS)
    assert lines[2].split() == ["A", "7", "1", "2"]
    assert lines[3].split() == ["B", "14", "2", "4"]
    assert "groups: none named" in report
    assert "sizes: 20 x 20 (30)" in report
    assert "unusable files: 0" in report
    assert "exact duplicates: 0 patches" in report
    assert "across" not in report
    # Rows of at most twelve tiles of 16 px, six times enlarged.
    assert read_rgb(tmp_path / "sheet.png").shape == ((2 * 18 - 2) * 6, (12 * 18 - 2) * 6, 3)


def test_a_check_finds_duplicates_within_and_across_splits_and_classes(patch_folder, tmp_path, data_config):
    rows = [
        {"path": f"{label}/{label}{n:03d}.png", "label": label, "group": f"{label}{n}", "split": SPLITS[n % 3]}
        for label in "AB"
        for n in range(12)
    ]
    write_manifest(patch_folder, rows)
    rgb = read_rgb(patch_folder / "A" / "A000.png")
    for name in ("A/A003.png", "B/B000.png"):  # train as A000 is
        write_png(patch_folder / name, rgb)
    # Other bytes, equal pixels, val and test.
    pixels = Image.fromarray(read_rgb(patch_folder / "B" / "B001.png"))
    pixels.save(patch_folder / "B" / "B002.png", compress_level=0)
    report, usable = check(data_config(patch_folder), tmp_path)
    assert usable
    assert "groups: 24" in report
    assert "exact duplicates: 3 patches repeat another one" in report
    assert "across splits: 1 sets: B/B001.png (val) = B/B002.png (test)" in report
    assert "across classes: 1 sets: A/A000.png (A) = " in report


def test_a_check_lists_files_that_cannot_be_used(patch_folder, tmp_path, data_config):
    (patch_folder / "A" / "A000.png").write_bytes(b"")
    write_png(patch_folder / "B" / "B000.png", np.zeros((9, 40, 3), np.uint8))
    report, usable = check(data_config(patch_folder, crop=16), tmp_path)
    assert not usable
    assert "unusable files: 2" in report
    assert f"{patch_folder / 'A' / 'A000.png'}: truncated or not an image" in report
    assert f"{patch_folder / 'B' / 'B000.png'}: 40 x 9 pixels, smaller than data.crop=16" in report


def test_a_check_of_nothing_but_broken_files_says_so(tmp_path, data_config):
    for label in "AB":
        (tmp_path / "root" / label).mkdir(parents=True)
        for number in range(12):
            (tmp_path / "root" / label / f"{number}.png").touch()
    report, usable = check(data_config(tmp_path / "root"), tmp_path)
    assert not usable
    assert "unusable files: 24" in report
    assert "and 4 more" in report
    assert not (tmp_path / "sheet.png").exists()


def test_a_new_group_moves_no_more_than_its_neighbours():
    before = [PatchRecord(f"{n}.png", Path("x"), "AB"[n % 2]) for n in range(200)]
    added = [PatchRecord("new.png", Path("x"), "A"), PatchRecord("newer.png", Path("x"), "B")]
    splits = [
        {r.id: r.split for r in assign_splits(records, val=0.1, test=0.2, seed=0)}
        for records in (before, [*added, *before])
    ]
    # Of either class at most two at the border of test and two at the border of val.
    assert sum(splits[0][record.id] != splits[1][record.id] for record in before) <= 8


def test_a_sample_of_more_begins_with_the_sample_of_fewer(patch_folder, data_config):
    patches = load_patches(data_config(patch_folder), seed=0)
    many, few = (patches.sample("train", "A", num=num, seed=3).tolist() for num in (9, 4))
    assert many[:4] == few
    assert set(many) <= set(patches.indices("train", "A").tolist())
    assert sorted(patches.sample("train", num=None, seed=3)) == patches.indices("train").tolist()
