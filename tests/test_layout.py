"""How trees and manifests are read: understood by stated rules, or refused with the reading."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.walk import image_files
from cellflux_bridge.data.layout.base import split_of
from cellflux_bridge.data.layout.folder import Folder
from cellflux_bridge.data.layout.trajectory import Trajectory as TrajectoryLayout
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.soft_labels import soft_labels
from cellflux_bridge.images import read_rgb, write_png
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, TrajectoryWriter, linear_soft_labels


@pytest.fixture
def tree(tmp_path):
    """`tree("A/1.png", ...)` is a root that holds these image files, all different."""

    def make(*names: str, root: str = "root") -> Path:
        for number, name in enumerate(names):
            file = tmp_path / root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_png(file, np.full((2, 2, 3), number, np.uint8))
        return tmp_path / root

    return make


def read(root: Path, **settings) -> dict[str, tuple]:
    return {r.id: (r.label, r.split, r.group) for r in Folder(root, **settings).records()}


def refused(root: Path, *expected: str, **settings) -> None:
    with pytest.raises(UserError) as caught:
        read(root, **settings)
    for part in expected:
        assert part in str(caught.value)


# Trees


@pytest.mark.parametrize(
    ("word", "split"),
    [
        *[
            (word, "train")
            for word in ("Train", "TRAIN", "training", "train_set", "Training-Data", "trainset", "train1")
        ],
        *[(word, "val") for word in ("Val", "valid", "VALIDATION", "validation set", "dev", "val_images", "eval")],
        *[(word, "test") for word in ("Test", "TESTING", "testset", "test-split", "test 2", "tests", "hold-out")],
        *[(word, None) for word in ("evalu", "testis", "trained", "valve", "A", "control", "strain", "1", "")],
    ],
)
def test_a_word_names_a_split_or_none(word, split):
    assert split_of(word) == split


def test_splits_may_lie_above_or_below_the_classes(tree):
    expected = {("A", "train", None), ("B", "train", None), ("A", "test", "p1"), ("B", "test", None)}
    above = tree("Training/A/1.png", "Training/B/1.png", "TEST/A/p1/s/1.png", "TEST/B/1.png", root="above")
    below = tree("A/Training/1.png", "B/Training/1.png", "A/TEST/p1/s/1.png", "B/TEST/1.png", root="below")
    assert set(read(above).values()) == set(read(below).values()) == expected
    for root, form in ((above, "root/<split>/<class>"), (below, "root/<class>/<split>")):
        layout = Folder(root)
        layout.records()
        assert layout.reading() == [
            f"read as {form} (TEST = test, Training = train)/<group>/...: 2 classes, 1 groups named by the folder "
            "below the class, 3 patches in none"
        ]


def test_the_first_folder_below_a_class_is_the_group_however_deep_files_lie(tree):
    found = read(
        tree("A/p1/40X/1.png", "A/p1/100X/roi/1.png", "A/p1/1.png", "B/p1/40X/1.png", "B/40X/1.png", "B/1.png")
    )
    assert {name: group for name, (_, _, group) in found.items()} == {
        **{name: "p1" for name in ("A/p1/40X/1.png", "A/p1/100X/roi/1.png", "A/p1/1.png", "B/p1/40X/1.png")},
        **{"B/40X/1.png": "40X", "B/1.png": None},
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Train/A/1.png", "Test/A/2.png", "extra/3.png"], "the split folders Test, Train stand beside extra"),
        (["A/train/1.png", "A/p1/2.png", "B/train/1.png"], "the split folders train stand beside p1"),
        (["A/train/1.png", "A/test/2.png", "B/p1/1.png"], "the split folders test, train stand beside p1"),
        (
            ["A/train/1.png", "A/test/2.png", "B/1.png"],
            "B: read as root/<class>/<split>/..., but it holds no such folder",
        ),
        (
            ["A/train/1.png", "A/2.png", "B/train/1.png"],
            "A: read as root/<class>/<split>/..., but it holds images beside",
        ),
        (["train/A/1.png", "test/2.png"], "test: read as root/<split>/<class>/..., but it holds no such folder"),
        (["A/p1/train/1.png", "B/p2/test/1.png"], "p1/train: names a split, but is read as a group below"),
        (["train/A/val/1.png", "train/B/val/1.png"], "A/val: names a split, but is read as a group below"),
        (["set/A/1.png", "set/B/1.png"], "holds one folder only, set, so only one class; if A, B are the classes"),
        (["set/train/A/1.png", "set/train/B/1.png"], "set data.root="),
        (["fold0/A/1.png", "fold_1/A/1.png"], "fold0, fold_1 would be classes, but are called like folds"),
        (["1.png", "2.png"], "holds 2 images and no folder for each class"),
        (["Benign/1.png", "benign/2.png"], "'Benign' and 'benign' differ by letter case only"),
    ],
)
def test_a_tree_of_another_form_is_refused_with_the_reading(tree, names, expected):
    refused(tree(*names), expected)


HIDDEN = (".ipynb_checkpoints", ".thumbnails", "@eaDir", "@eaDir/1.png", "__MACOSX", "$RECYCLE.BIN", "#recycle", "old~")


@pytest.mark.parametrize("place", ["", "A/", "A/p1/", "A/p1/deep/"])
def test_hidden_and_system_folders_yield_no_patches_at_any_depth(tree, place):
    kept = ("A/1.png", "A/p1/2.png", "B/3.png")
    root = tree(*kept, *(f"{place}{name}/copy.png" for name in HIDDEN))
    for name in ("._1.png", ".hidden.png", "~1.png"):
        (root / place / name).touch()
    (root / "A" / "Thumbs.db").touch()
    assert sorted(read(root)) == sorted(kept)
    assert image_files(root) == sorted(root / name for name in kept)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("A/back", ".."),
        ("A/p1/back", "../.."),
        ("A/self", "."),
        ("A/other", "../B"),
        ("A/copy.png", "1.png"),
        ("A/copy.png", "../B/1.png"),
        ("C", "B"),
    ],
)
def test_links_that_show_a_file_twice_are_refused(tree, link, target):
    root = tree("A/1.png", "A/p1/2.png", "B/1.png")
    os.symlink(target, root / link)
    refused(root, "are the same")
    with pytest.raises(UserError, match="are the same"):
        image_files(root)


def test_a_hard_link_under_another_label_is_refused(tree):
    root = tree("A/1.png", "B/1.png")
    os.link(root / "A/1.png", root / "B/other.png")
    refused(root, str(root / "A/1.png"), str(root / "B/other.png"), "are the same file")


@pytest.mark.parametrize("name", [b"A/\xe9.png", b"A/p\xe9/1.png", b"\xe9/1.png"])
def test_a_name_that_is_not_utf8_is_refused_when_it_is_listed(tree, name):
    root = tree("A/1.png", "B/1.png")
    file = os.path.join(os.fsencode(root), name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    shutil.copy(root / "A/1.png", file)
    (root / "B" / os.fsdecode(b"notes \xe9.txt")).touch()  # no image, no matter
    refused(root, "\\udce9", "is not UTF-8; rename")
    if name.startswith(b"A"):
        with pytest.raises(UserError, match="is not UTF-8"):
            image_files(root)


def test_links_to_folders_elsewhere_are_followed(tree, tmp_path):
    store = tree("1.png", "2.png", root="store")
    root = tree("B/3.png")
    os.symlink(store, root / "A")
    assert Counter(label for label, _, _ in read(root).values()) == {"A": 2, "B": 1}
    assert next(record.file for record in Folder(root).records()) == root / "A/1.png"


def test_image_files_of_other_kinds_are_named_by_class(tree):
    root = tree("A/1.png", "B/2.png", "overview.png")
    for name in ("A/1.bmp", "A/2.BMP", "A/deep/3.svs", "B/1.webp", "A/.hidden.bmp"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    layout = Folder(root)
    layout.records()
    warning = layout.reading()[1]
    for part in ("2 .bmp of class A", "1 .svs of class A", "1 .webp of class B", "1 images beside the class folders"):
        assert part in warning
    shutil.rmtree(root / "A")
    (root / "A").mkdir()
    (root / "A" / "x.bmp").touch()
    refused(root, "A: holds no image", "but 1 .bmp")


def test_a_manifest_by_another_name_is_not_passed_over(tree):
    for name in ("Manifest.csv", "manifest.CSV", "manifest.xlsx", "manifest.tsv"):
        root = tree("A/1.png", "B/1.png")
        (root / name).touch()
        refused(root, f"{name}: is not read; save it as manifest.csv")
        (root / name).unlink()


# Manifests


@pytest.fixture
def manifest(tree):
    """`manifest(text)` is a root with A/1.png, A/2.png, B/1.png, B/2.png and this manifest.csv."""
    root = tree("A/1.png", "A/2.png", "B/1.png", "B/2.png")

    def write(text: str | bytes) -> Path:
        (root / "manifest.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return root

    return write


ROWS = "A/1.png,A,p1\nB/1.png,B,p2\n"


@pytest.mark.parametrize(
    "text",
    [
        "Path, LABEL ,Group\n" + ROWS,
        "\ufeffpath,\ufefflabel,group\n" + ROWS,
        "\n,,\npath,label,group\n\n , ,\n" + ROWS,
        ("path,label,group\n" + ROWS).replace(",", ";"),
        ("path,label,group\n" + ROWS).replace(",", "\t"),
        "sep=;\n" + ("path,label,group\n" + ROWS).replace(",", ";"),
        'path,"la\nbel",group\r\n"A/1.png","A",p1\r\nB\\1.png,B,p2',
    ],
)
def test_headings_differ_in_case_blanks_and_delimiter(manifest, text):
    assert read(manifest(text)) == {"A/1.png": ("A", None, "p1"), "B/1.png": ("B", None, "p2")}


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("path,lable,group", "column 'lable': did you mean 'label'?"),
        ("path,label,grup", "column 'grup': did you mean 'group'?"),
        ("path,label,groups", "column 'groups': did you mean 'group'?"),
        ("path,label,gruop", "column 'gruop': did you mean 'group'?"),
        ("pth,label,group", "column 'pth': did you mean 'path'?"),
        ("path,label,Label", "2 columns are called 'label'"),
        ("path,label,spilt", "column 'spilt': did you mean 'split'?"),
    ],
)
def test_a_column_that_is_nearly_a_known_one_is_never_ignored(manifest, heading, expected):
    refused(manifest(f"{heading}\n{ROWS}"), expected)


def test_other_columns_are_ignored_and_named(manifest):
    root = manifest(f"path,label,stain,caption\nA/1.png,A,he,{'x' * 5000}\nB/1.png,B,he,40\n")
    layout = Folder(root)
    assert len(layout.records()) == 2
    assert layout.reading() == ["read from manifest.csv; columns ignored: stain, caption"]


@pytest.mark.parametrize(
    "word", ["NA", "n/a", "NaN", "nan", "None", "null", "NULL", "-", "#N/A", "<NA>", "unknown", " "]
)
def test_a_word_for_no_group_makes_no_group(manifest, word):
    rows = "".join(f"{c}/{n}.png,{c},{word if n == 1 else 'p1'},{word}\n" for c in "AB" for n in (1, 2))
    layout = Folder(manifest("path,label,group,split\n" + rows))
    assert {r.id: (r.group, r.split) for r in layout.records()} == {
        **{f"{c}/1.png": (None, None) for c in "AB"},
        **{f"{c}/2.png": ("p1", None) for c in "AB"},
    }
    assert "2 patches name no group" in layout.reading()[1]


def test_a_label_that_is_not_given_is_refused_or_left_out(manifest):
    root = manifest("path,label\nA/1.png,A\nB/1.png,NA\n")
    refused(root, "line 3: label 'NA' means that no label is given", "data.layout.ignore")
    assert list(read(root, ignore=["NA"])) == ["A/1.png"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("A/1.png,A,0,5", "line 2: has 4 cells, the heading 3"),
        ("A/1.png,A,1,", "line 2: has 4 cells, the heading 3"),
        ('A/1.png,A,"0,5"', "line 2, score: '0,5' is no number; write it with a decimal point"),
        ("A/1.png,A,inf", "line 2, score: inf is outside"),
        ("A/1.png,A,nan", "line 2, score: nan is outside"),
        ("A/1.png,A,0_1", "line 2, score: '0_1' is no number"),
        ("A//1.png,A,\n./A/1.png,A,", "line 3: A/1.png stands already on line 2"),
        ("C:\\A\\1.png,A,", "names no file inside"),
        ("//server/A/1.png,A,", "names no file inside"),
        ("A/1\0.png,A,", "names no file inside"),
        ("A/.ipynb_checkpoints/1.png,A,", "line 2: A/.ipynb_checkpoints/1.png: .ipynb_checkpoints is hidden"),
        (f"{'x' * 5000}.png,A,", "line 2: a cell has 5004 characters"),
        (f"{'x' * 300}.png,A,", "names files that do not exist (1)"),
        ('"A/1.png,A,\nB/1.png,B,', "cannot be read as CSV in UTF-8"),
        ("A/1.png,A,NA\nA/2.png,a,NA", "'A' and 'a' differ by letter case only"),
    ],
)
def test_a_row_is_refused_by_its_line(manifest, row, expected):
    refused(manifest(f"path,label,score\n{row}\n"), expected)


def test_a_manifest_reaches_outside_of_the_root_only_where_the_user_says_so(manifest, tree):
    outside, root = tree("1.png", "2.png", root="outside"), manifest("path,label\nlink.png,A\n")
    os.symlink(outside / "1.png", root / "link.png")
    refused(root, "line 2: link.png leads outside of", "data.layout.follow_links=true")
    assert list(read(root, follow_links=True)) == ["link.png"]
    os.symlink(outside, root / "folder")
    refused(manifest("path,label\nfolder/2.png,A\n"), "line 2: folder/2.png leads outside of")
    os.symlink("A/1.png", root / "inside.png")
    assert list(read(manifest("path,label\ninside.png,A\n"))) == ["inside.png"]
    refused(manifest("path,label\ninside.png,A\nA/1.png,B\n"), "are the same file")


def test_a_root_behind_a_link_is_its_own_inside(manifest, tmp_path):
    os.symlink(manifest("path,label\nA/1.png,A\n"), tmp_path / "link")
    assert list(read(tmp_path / "link")) == ["A/1.png"]


# Trajectories


@pytest.fixture
def stairs(tmp_path):
    """A trajectory folder of two sequences of A to B, of the classes given, at levels 0, 0.25, 0.75 and 1."""

    def make(classes: tuple[str, ...] = ("A", "B")) -> Path:
        header = TrajectoryHeader("progression", "A", "B", classes, (0.0, 0.25, 0.75, 1.0), "0@1", mpp=0.5)
        writer = TrajectoryWriter(tmp_path / "stairs", header)
        frames = np.arange(8, dtype=np.uint8).reshape(4, 2, 1, 1, 1) + np.zeros((4, 2, 3, 8, 8), np.uint8)
        labels = linear_soft_labels(header, 2)
        writer.append(Trajectory(header, frames, labels, ("one", "two"), (1, 1), (0, 0)), numbers=[0, 1])
        writer.finish()
        return tmp_path / "stairs"

    return make


@pytest.mark.parametrize(
    ("frames", "expected"),
    [("inner", [0.25, 0.75]), ("ends", [0.0, 1.0]), ("all", [0.0, 0.25, 0.75, 1.0])],
)
def test_frames_of_a_trajectory_are_patches_with_soft_labels(stairs, frames, expected):
    found = TrajectoryLayout(stairs(), frames=frames).records()
    assert sorted({record.score for record in found}) == expected
    assert len(found) == 2 * len(expected)
    assert {record.group for record in found} == {"one", "two"}
    assert all(record.label == ("B" if record.score > 0.5 else "A") for record in found)
    assert {(record.split, record.mpp) for record in found} == {("train", 0.5)}
    for record in found:
        level = (0.0, 0.25, 0.75, 1.0).index(record.score)
        assert read_rgb(record.file)[0, 0, 0] == 2 * level + (record.group == "two")


def test_a_soft_label_over_a_third_class_is_no_score(stairs):
    folder = stairs(("A", "C", "B"))
    assert len(TrajectoryLayout(folder).records()) == 8
    manifest = folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("0.75,0,0.25", "0.5,0.5,0"))
    with pytest.raises(UserError, match=r"line \d: a soft label over other classes than A and B"):
        TrajectoryLayout(folder).records()


def test_a_trajectory_trains_a_classifier_of_soft_labels(stairs, data_config):
    config = data_config(stairs(), layout="trajectory", image_size=8, split={"val": 0, "test": 0})
    patches = load_patches(config, seed=0)
    labels = soft_labels(patches, "score", needed=patches.indices("train"), key="k")
    assert sorted(labels[:, 1].tolist()) == [0, 0, 0.25, 0.25, 0.75, 0.75, 1, 1]
