"""Every mistake in a data set ends in one UserError that names the file, the key or the value."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import bomb

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.coupling.independent import Independent
from cellflux_bridge.data.check import check_data
from cellflux_bridge.data.pairs import Pairs
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.settings import PairsConfig
from cellflux_bridge.images import write_png


def refusal(config, *expected: str) -> str:
    """The message that a configuration is refused with, which holds every expected part."""
    with pytest.raises(UserError) as caught:
        load_patches(config, seed=0)
    message = str(caught.value)
    for part in expected:
        assert part in message
    return message


def noise_saved_as(file: Path) -> bytes:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file)
    return file.read_bytes()


# Image files


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", ["A000.png", "new.jpg", "new.tif"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.6])
def test_truncated_and_empty_files_are_named(patch_folder, data_config, name, share):
    file = patch_folder / "A" / name
    data = file.read_bytes() if file.exists() else noise_saved_as(file)
    file.write_bytes(data[: int(share * len(data))])
    config = data_config(patch_folder)
    refusal(config, "1 of ", "images cannot be used", f"{file}: truncated or not a PNG, JPEG, TIFF or NPY image")
    assert all(folder.suffix == ".building" for folder in config.cache_dir.glob("*"))


def test_a_text_file_and_a_bomb_are_named_together(patch_folder, data_config):
    (patch_folder / "A" / "A000.png").write_text("no picture", encoding="utf-8")
    (patch_folder / "B" / "B000.png").write_bytes(bomb(60_000, 60_000))
    (patch_folder / "B" / "B001.png").write_bytes(bomb(9_000, 9_000))
    refusal(
        data_config(patch_folder),
        "3 of 48 images cannot be used",
        f"{patch_folder}/A/A000.png: truncated or not a PNG, JPEG, TIFF or NPY image",
        f"{patch_folder}/B/B000.png: refused as a decompression bomb",
        f"{patch_folder}/B/B001.png: 9000 x 9000 pixels, more than the 67,108,864 that are read",
    )


def test_of_many_broken_files_the_first_ten_are_listed(patch_folder, data_config):
    for file in sorted((patch_folder / "A").iterdir())[:13]:
        file.write_bytes(b"")
    message = refusal(data_config(patch_folder), "13 of 48 images", "and 3 more")
    assert message.count("truncated") == 10


def test_a_link_that_leads_nowhere_is_named(patch_folder, data_config, tmp_path):
    link = patch_folder / "A" / "gone.png"
    os.symlink(patch_folder / "nowhere.png", link)
    refusal(data_config(patch_folder), f"{link}: cannot be read")
    report, usable = check_data(data_config(patch_folder), seed=0, sheet=tmp_path / "sheet.png")
    assert not usable
    assert f"{link}: no such file" in report


def test_an_image_smaller_than_the_crop_is_named(patch_folder, data_config):
    write_png(patch_folder / "A" / "A000.png", np.zeros((40, 12, 3), np.uint8))
    refusal(
        data_config(patch_folder, crop=16),
        f"{patch_folder}/A/A000.png: 12 x 40 pixels, smaller than data.crop=16",
        "lower data.crop",
    )


def test_an_image_smaller_than_the_network_is_enlarged_only_where_it_is_asked_for(patch_folder, data_config):
    write_png(patch_folder / "A" / "A000.png", np.zeros((4, 5, 3), np.uint8))
    refusal(data_config(patch_folder), "A000.png: 4 px would be enlarged to data.image_size=16 (4 times)")
    assert load_patches(data_config(patch_folder, enlarge=True), seed=0).pixels.shape[1:] == (16, 16, 3)


# Classes


def test_an_empty_class_is_named(patch_folder, data_config):
    (patch_folder / "C").mkdir()
    (patch_folder / "C" / "notes.txt").touch()
    refusal(data_config(patch_folder), f"{patch_folder}/C: holds no image", "list 'C' in data.layout.ignore")
    config = data_config(patch_folder, layout={"name": "folder", "ignore": ["C"]})
    assert load_patches(config, seed=0).classes == ("A", "B")


def test_one_class_alone_is_refused(patch_folder, data_config):
    shutil.rmtree(patch_folder / "B")
    refusal(data_config(patch_folder), f"{patch_folder}: only one class (A)")
    shutil.rmtree(patch_folder / "A")
    refusal(data_config(patch_folder), f"{patch_folder}: only one class (none)")


def test_a_class_that_the_data_lacks_is_refused_with_the_nearest(patch_folder, data_config):
    (patch_folder / "A").rename(patch_folder / "adenoma")
    refusal(
        data_config(patch_folder, classes=["adenomas", "B"]),
        f"data.classes: no patch of class 'adenomas' in {patch_folder}",
        "did you mean 'adenoma'?",
        "found: B, adenoma",
    )


def test_a_label_that_the_configuration_lacks_is_refused(tmp_path, make_patches, data_config):
    root = make_patches(tmp_path / "root", num={"A": 3, "B": 3, "C": 3, "D": 3})
    refusal(data_config(root, classes=["A", "B"]), f"{root}: label 'C', 'D' is not in data.classes")


def test_a_class_asked_for_by_another_name_is_refused_with_the_nearest(patch_folder, data_config):
    patches = load_patches(data_config(patch_folder), seed=0)
    with pytest.raises(UserError, match=r"no class 'a' here; .*known: A, B|no class 'a' here; did you mean"):
        patches.indices("train", "a")


# Folders


def test_a_missing_root_and_a_file_as_root_are_refused(tmp_path, data_config):
    (tmp_path / "file").touch()
    for name, fault in (("nowhere", "no such folder"), ("file", "is a file")):
        refusal(data_config(tmp_path / name), f"{tmp_path / name}: {fault}; set data.root")


def test_split_folders_beside_other_folders_are_refused(tmp_path, make_patches, data_config):
    root = tmp_path / "root"
    for split in ("train", "test"):
        make_patches(root / split, num={"A": 4, "B": 4})
    make_patches(root, num={"extra": 2})
    refusal(data_config(root), f"{root}: the split folders test, train stand beside extra", "data.layout.ignore")
    config = data_config(root, layout={"name": "folder", "ignore": ["extra"]})
    assert load_patches(config, seed=0).classes == ("A", "B")


def test_a_cache_that_the_disk_cannot_hold_is_refused_before_it_is_begun(patch_folder, data_config, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    config = data_config(patch_folder)
    refusal(config, "data.cache_dir", "GB free")
    assert not list(config.cache_dir.glob("*"))


def test_a_folder_group_in_two_splits_is_refused(tmp_path, make_patches, data_config):
    root = tmp_path / "root"
    for split in ("train", "test"):
        make_patches(root / split, num={"A": 2, "B": 2})
        make_patches(root / split / "A", num={"patient1": 1})
    refusal(data_config(root), "1 groups stand in more than one split: patient1 (test+train)")


def test_a_cache_folder_that_is_a_file_is_refused(patch_folder, data_config, tmp_path):
    (tmp_path / "taken").touch()
    for place in (tmp_path / "taken", tmp_path / "taken" / "below"):
        refusal(data_config(patch_folder, cache_dir=place), f"data.cache_dir: {place} cannot be written to")


# Manifests


@pytest.fixture
def manifest(patch_folder, data_config):
    """`manifest(text)`: the configuration of a data set whose manifest.csv holds `text`."""

    def write(text: str | bytes):
        (patch_folder / "manifest.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return data_config(patch_folder)

    return write


GOOD = "path,label,split,group,score,mpp\nA/A000.png,A,train,p1,0.5,\nB/B000.png,B,train,p2,0.5,\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("A/gone.png,A,train,p3,0.5,", "names files that do not exist (1): A/gone.png"),
        ("A,A,train,p3,0.5,", "names files that do not exist (1): A"),
        ("../x.png,A,train,p3,0.5,", "line 4: ../x.png names no file inside"),
        ("A/../../x.png,A,train,p3,0.5,", "line 4: A/../../x.png names no file inside"),
        ("..\\x.png,A,train,p3,0.5,", "line 4: ..\\x.png names no file inside"),
        ("/etc/passwd,A,train,p3,0.5,", "line 4: /etc/passwd names no file inside"),
        (".,A,train,p3,0.5,", "line 4: . names no file inside"),
        ("A/A000.png,A,train,p1,0.5,", "line 4: A/A000.png stands already on line 2"),
        ("./B/../A/A000.png,A,train,p1,0.5,", "line 4: A/A000.png stands already on line 2"),
        (
            "A/A001.png,A,trian,p3,0.5,",
            "line 4: unknown split 'trian'; expected one of train, val, test; did you mean 'train'?",
        ),
        ("A/A001.png,A,train,p3,high,", "line 4, score: 'high' is no number"),
        ("A/A001.png,A,train,p3,1.5,", "line 4, score: 1.5 is outside [0, 1]"),
        ("A/A001.png,A,train,p3,-0.1,", "line 4, score: -0.1 is outside [0, 1]"),
        ("A/A001.png,A,train,p3,nan,", "line 4, score: nan is outside [0, 1]"),
        ("A/A001.png,A,train,p3,0.5,fine", "line 4, mpp: 'fine' is no number"),
        ("A/A001.png,,train,p3,0.5,", "line 4: path and label must not be empty"),
        ("A/A001.png,  ,train,p3,0.5,", "line 4: path and label must not be empty"),
        (",A,train,p3,0.5,", "line 4: path and label must not be empty"),
        ("A/A001.png", "line 4: path and label must not be empty"),
        ("A/A001.png,A,test,p1,0.5,", "1 groups stand in more than one split: p1 (test+train)"),
    ],
)
def test_a_bad_row_is_named_by_its_line(manifest, patch_folder, row, expected):
    refusal(manifest(f"{GOOD}{row}\n"), expected, str(patch_folder))


def test_the_line_is_right_after_blank_lines_and_quoted_breaks(manifest):
    refusal(manifest('path,label,note\n\nA/A000.png,A,"two\nlines"\n\nB/B000.png,,x\n'), "manifest.csv, line 6: path")


def test_of_many_missing_files_and_leaking_groups_some_are_listed(manifest):
    missing = "".join(f"A/gone{n}.png,A,,,,\n" for n in range(9))
    refusal(manifest(GOOD + missing), "names files that do not exist (9): A/gone0.png", "A/gone4.png and 4 more")
    leaking = "".join(
        f"{c}/{c}{n:03d}.png,{c},{split},q{n % 7},,\n"
        for c, split in (("A", "train"), ("B", "val"))
        for n in range(1, 8)
    )
    refusal(manifest(GOOD + leaking), "7 groups stand in more than one split: q0 (train+val)", "and 2 more")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,split\nA/A000.png,train\n", "no column label"),
        ("file,class\nA/A000.png,A\n", "no column path"),
        ("", "no column path"),
        ("path,label\n", "only one class (none)"),
        ("path,label\nA/é.png,A\n".encode("latin-1"), "cannot be read as CSV in UTF-8"),
        (GOOD.encode("utf-16"), "cannot be read as CSV in UTF-8"),
        (f'path,label\n"{"x" * 200_000}",A\n', "cannot be read as CSV in UTF-8"),
    ],
)
def test_a_manifest_that_is_no_table_of_patches_is_refused(manifest, patch_folder, text, expected):
    refusal(manifest(text), str(patch_folder), expected)


def test_a_manifest_that_is_a_folder_is_refused(patch_folder, data_config):
    (patch_folder / "manifest.csv").mkdir()
    refusal(data_config(patch_folder), "manifest.csv: cannot be read as CSV")


# Pairs


def make_pairs(config, *, split="train", batch_size=4, **pairs) -> Pairs:
    patches = load_patches(config, seed=0)
    settings = PairsConfig(**pairs)
    return Pairs(patches, Independent(), split=split, batch_size=batch_size, seed=0, pairs=settings, data=config)


def test_fewer_images_than_the_batch_needs_is_refused_with_what_would_fit(tmp_path, make_patches, data_config):
    config = data_config(make_patches(tmp_path / "root", num={"A": 10, "B": 40}))
    with pytest.raises(UserError, match=r"train\.batch_size=16 draws 8 patches of class 'A'.* has 7: .* at most 14"):
        make_pairs(config, batch_size=16)
    assert len(make_pairs(config, batch_size=14).batch(0).x0) == 14


def test_a_class_without_a_validation_patch_is_refused(manifest):
    rows = [f"A/A{n:03d}.png,A,{s}\n" for n, s in enumerate(["train"] * 3 + ["val"])]
    rows += [f"B/B{n:03d}.png,B,train\n" for n in range(4)]
    config = manifest("path,label,split\n" + "".join(rows))
    with pytest.raises(UserError, match="class 'B' has no patch in the val split"):
        make_pairs(config, split="val")


def test_unknown_and_missing_transitions_are_refused(patch_folder, data_config):
    config = data_config(patch_folder)
    with pytest.raises(UserError, match="no class 'C' here"):
        make_pairs(config, transitions=[("A", "C")])
    with pytest.raises(UserError, match=r"pairs\.transitions: empty"):
        make_pairs(config, transitions=[])


def test_groups_that_no_two_classes_share_cannot_be_matched(patch_folder, data_config):
    with pytest.raises(UserError, match=re.escape("pairs.match_group: no group of the train split holds both 'A'")):
        make_pairs(data_config(patch_folder), match_group=True)


# Phantoms


def test_a_phantom_size_that_cannot_be_drawn_is_refused_before_anything_is_made(tmp_path, data_config):
    for setting, expected in (({"size": 8}, "data.layout.size"), ({"num_train": -1}, "data.layout.num_train")):
        with pytest.raises(ValueError, match=re.escape(expected)):
            data_config(tmp_path / "phantom", layout={"name": "phantom", **setting})
    assert not (tmp_path / "phantom").exists()
