"""Index CSVs of high-content screens, and images of several channels in one file or in one file each."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellflux_bridge import cli, images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.check import check_data
from cellflux_bridge.data.index import list_records, patch_index
from cellflux_bridge.data.layout.imaging import Imaging
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.images import UnreadableImage

# Of each screen: index, channels, its columns, and rows with the path that follows from the key.
BBBC021 = (
    "metadata/bbbc021_df_all.csv",
    3,
    ["SAMPLE_KEY", "SPLIT", "STATE", "CPD_NAME", "ANNOT", "BATCH", "DOSE", "SMILES"],
    {
        "Week1_22123_1_11_3.0": ("train", 0, "DMSO", "DMSO", "Week1", 0.0, "CS(C)=O"),
        "Week1_22123_2_12_7.0": ("train", 1, "taxol", "Microtubule stabilizers", "Week1", 0.3, "CC1"),
        "Week2_24121_1_11_4.0": ("test", 1, "mevinolin/lovastatin", "Cholesterol-lowering", "Week2", 1.5, "CC2"),
        "Week2_24121_1_12_9.0": ("test", 0, "DMSO", "DMSO", "Week2", 0.0, "CS(C)=O"),
    },
    ["Week1/22123/1_11_3.0.npy", "Week1/22123/2_12_7.0.npy", "Week2/24121/1_11_4.0.npy", "Week2/24121/1_12_9.0.npy"],
)
RXRX1 = (
    "metadata/rxrx1_df.csv",
    6,
    ["SAMPLE_KEY", "SPLIT", "ANNOT", "CPD_NAME", "BATCH"],
    {
        "U2OS-01_2_B03_s1_4": ("train", "negative_control", "EMPTY", 1),
        "U2OS-01_2_B04_s1_0": ("train", "treated", "A4GALT", 1),
        "U2OS-03_1_C05_s2_11": ("test", "treated", "ABCA7", 3),
        "U2OS-03_1_C06_s2_1": ("test", "positive_control", "COPB2", 3),
    },
    ["01_2/B03/s1_4.npy", "01_2/B04/s1_0.npy", "03_1/C05/s2_11.npy"],
)
CPG0000 = (
    "metadata/metadata_large.csv",
    5,
    ["SAMPLE_KEY", "SPLIT", "STATE", "BROAD_SAMPLE", "ANNOT", "PLATE"],
    {
        "BR00116991_r01c02_f1_5": ("train", "control", "", "Compound", "BR00116991"),
        "BR00116991_r01c03_f1_6": ("train", "trt", "BRD-K18", "Compound", "BR00116991"),
        "BR00117000_r05c03_f2_0": ("test", "trt", "BRDN0001487609", "CRISPR", "BR00117000"),
    },
    [
        "BR00116991/r01c02_f1/r01c02_f1_5.npy",
        "BR00116991/r01c03_f1/r01c03_f1_6.npy",
        "BR00117000/r05c03_f2/r05c03_f2_0.npy",
    ],
)
SCREENS = {"bbbc021": BBBC021, "rxrx1": RXRX1, "cpg0000": CPG0000}


def cell(channels: int, number: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 200, (side, side, channels), dtype=np.uint8)


def write_index(file: Path, columns, rows: dict | list) -> None:
    """A CSV as pandas writes it, its first column without a name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [(key, *row) for key, row in rows.items()] if isinstance(rows, dict) else rows
    with open(file, "w", newline="") as text:
        csv.writer(text).writerows([["", *columns], *([i, *row] for i, row in enumerate(rows))])


@pytest.fixture
def screen(tmp_path):
    """`screen("rxrx1", rows=..., **changed rows)` is a root as it is published."""

    def make(name: str, rows=None, columns=None) -> Path:
        index, channels, named, published, paths = SCREENS[name]
        root = tmp_path / name
        write_index(root / index, columns or named, published if rows is None else rows)
        for number, path in enumerate(paths):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            np.save(root / path, cell(channels, number))
        return root

    return make


def refused(layout: Imaging, *expected: str) -> None:
    with pytest.raises(UserError) as caught:
        layout.records()
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", SCREENS)
def test_the_published_trees_are_read(screen, data_config, name):
    paths, channels = SCREENS[name][4], SCREENS[name][1]
    root = screen(name)
    records = Imaging(root, preset=name).records()
    assert [record.id for record in records] == sorted(paths)
    assert [record.split for record in records][:1] == ["train"]
    config = data_config(root, layout={"name": "imaging", "preset": name}, channels=channels)
    patches = load_patches(config, seed=0)
    for number, path in enumerate(patches.ids):
        assert np.array_equal(patches.pixels[number], np.load(root / path))


def test_labels_batches_and_doses_come_from_the_columns(screen):
    layout = Imaging(screen("bbbc021"), preset="bbbc021")
    found = [(r.label, r.split, r.batch, r.dose) for r in layout.records()]
    assert found == [
        ("DMSO", "train", "Week1", None),
        ("taxol", "train", "Week1", 0.3),
        ("mevinolin/lovastatin", "test", "Week2", 1.5),
        ("DMSO", "test", "Week2", None),
    ]
    assert layout.reading() == [
        "read from metadata/bbbc021_df_all.csv: 4 rows, 4 used",
        "2 controls (STATE 0, class 'DMSO'), 2 perturbations, 2 batches, 2 doses",
    ]
    layout = Imaging(screen("rxrx1"), preset="rxrx1")
    assert [(r.label, r.batch) for r in layout.records()] == [("control", "1"), ("A4GALT", "1"), ("ABCA7", "3")]
    assert layout.reading() == [
        "read from metadata/rxrx1_df.csv: 4 rows, 3 used; left out: 1 of ANNOT 'positive_control'",
        "1 controls (ANNOT negative_control, class 'control'), 2 perturbations, 2 batches, 0 doses",
        "WARNING: 1 batches hold a single cell: 3",
        "WARNING: 1 batches hold no control: 3",
    ]


def test_a_column_of_groups_keeps_a_well_in_one_split(screen, data_config):
    root = screen("rxrx1")
    layout = Imaging(root, preset="rxrx1", group="BATCH")
    assert [record.group for record in layout.records()] == ["1", "1", "3"]
    settings = {"name": "imaging", "preset": "rxrx1", "group": "SPLIT", "split": ""}
    index = patch_index(data_config(root, layout=settings, channels=6), seed=0)
    assert index.splits[0] == index.splits[1], "one group stays together"


def test_what_is_given_wins_over_the_preset(screen):
    root = screen("bbbc021")
    os.rename(root / "metadata/bbbc021_df_all.csv", root / "mine.csv")
    layout = Imaging(
        root, preset="bbbc021", index="mine.csv", control=1, treated=0, control_label="x", dose="", batch=""
    )
    assert [(r.label, r.batch, r.dose) for r in layout.records()][1] == ("x", None, None)
    layout = Imaging(root, preset="bbbc021", index="mine.csv", ignore=["taxol"], perturbation="cpd_name")
    assert len(layout.records()) == 3
    assert "1 of ignored classes" in layout.reading()[0]


def test_columns_of_ones_own_need_no_preset(tmp_path):
    np.save(tmp_path / "a1.npy", cell(3, 0))
    np.save(tmp_path / "b2.npy", cell(3, 1))
    (tmp_path / "index.csv").write_text("Well ID;row;drug;plate\n1;a;none;p\n2;b;taxol;p\n")
    settings = {"key": "Well ID", "file": "{row}{well id}.npy", "perturbation": "drug", "state": "drug", "split": ""}
    records = Imaging(tmp_path, **settings, control="none", batch="plate").records()
    # 'none' is a word for no value, but here it is the state that is looked for.
    assert [(r.id, r.label, r.split, r.batch) for r in records] == [
        ("a1.npy", "control", None, "p"),
        ("b2.npy", "taxol", None, "p"),
    ]


ROW = ("train", 1, "taxol", "m", "Week1", 0.3, "C")


@pytest.mark.parametrize(
    ("key", "changed", "expected"),
    [
        ("", {}, "line 2: SAMPLE_KEY is empty"),
        ("Week1_22123_1_11_3.0", {2: ""}, "CPD_NAME of a treated row is empty"),
        ("Week1_22123_1_11_3.0", {2: "DMSO"}, "is control_label ('DMSO')"),
        ("Week1_22123_1_11_3.0", {5: "0,3"}, "line 2, DOSE: '0,3' is no number; write it with a decimal point"),
        ("Week1_22123_1_11_3.0", {5: -1}, "line 2, DOSE: -1.0 is outside"),
        ("Week1_22123_1_11_3.0", {0: "trian"}, "line 2: unknown split 'trian'"),
        ("Week1", {}, "'Week1' does not match key_pattern (?P<week>"),
        (".._.._secret", {}, "names no file inside"),
        ("Week1_22123_../../../x", {}, "names no file inside"),
        ("/etc_x_passwd", {}, "names no file inside"),
        (".git_x_y", {}, "hidden"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named_by_its_line(screen, key, changed, expected):
    row = [changed.get(i, value) for i, value in enumerate(ROW)]
    good = ("Week1_22123_2_12_7.0", *ROW)
    for missing in ("error", "leave_out"):
        layout = Imaging(screen("bbbc021", rows=[(key, *row), good]), preset="bbbc021", missing=missing)
        refused(layout, "bbbc021_df_all.csv: 1 of 2 rows cannot be read", expected)


def test_repeats_and_many_faults_are_counted(screen):
    rows = [("Week1_22123_2_12_7.0", *ROW)] * 2 + [("Week1", *ROW), *[(f"x{i}", *ROW) for i in range(12)]]
    layout = Imaging(screen("bbbc021", rows=rows), preset="bbbc021")
    refused(layout, "14 of 15 rows", "line 3: Week1_22123_2_12_7.0 stands already on line 2", "and 4 more")


def test_rows_without_files_stop_or_are_left_out(screen):
    root = screen("bbbc021")
    (root / SCREENS["bbbc021"][4][0]).unlink()
    refused(Imaging(root, preset="bbbc021"), "1 of 4 rows name files", "1_11_3.0.npy (line 2)", "missing=leave_out")
    layout = Imaging(root, preset="bbbc021", missing="leave_out")
    assert len(layout.records()) == 3
    assert layout.reading()[0].endswith("4 rows, 3 used; left out: 1 without files")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"index": "no.csv"}, "no such file; set data.layout.index"),
        ({"index": "../x.csv"}, "names no file inside"),
        ({"state": "STAT"}, "no column 'stat' (data.layout.state); did you mean 'state'?"),
        ({"file": "{plat}.npy"}, "no column 'plat' (data.layout.file, {plat})"),
        ({"key": ""}, "data.layout.key: names no column"),
        ({"key_pattern": "("}, "key_pattern: no regular expression"),
        ({"channel_names": ["a", "b"]}, "channel_names and {channel} in file belong together"),
        ({"file": "{plate}_{channel}.png"}, "channel_names and {channel} in file belong together"),
        ({"file": "{plate}_{channel}.png", "channel_names": ["a", "../b"]}, "channel_names: '../b'"),
        ({"file": "{plate}_{channel}.png", "channel_names": ["a", "a"]}, "channel_names: 'a'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_told(screen, settings, expected):
    root = screen("bbbc021")
    with pytest.raises(UserError) as caught:
        Imaging(root, preset="bbbc021", **settings).records()
    assert expected in str(caught.value)


def test_a_link_that_leaves_the_root_is_refused(screen, tmp_path):
    root, secret = screen("bbbc021"), tmp_path / "secret.npy"
    np.save(secret, cell(3, 7))
    first = root / SCREENS["bbbc021"][4][0]
    first.unlink()
    first.symlink_to(secret)
    refused(Imaging(root, preset="bbbc021"), "leads outside of")
    assert len(Imaging(root, preset="bbbc021", follow_links=True).records()) == 4


def test_an_index_that_was_edited_in_its_folder_is_read_again(screen, data_config):
    root = screen("bbbc021")
    config = data_config(root, layout={"name": "imaging", "preset": "bbbc021"})
    assert "taxol" in patch_index(config, seed=0).classes
    index = root / SCREENS["bbbc021"][0]
    index.write_text(index.read_text().replace("taxol", "docetaxel"))
    assert "docetaxel" in patch_index(config, seed=0).classes


# Channels in one file


STACKS = {
    "ImageJ": {"imagej": True, "metadata": {"axes": "CYX"}},
    "OME": {"ome": True, "metadata": {"axes": "CYX"}},
    "unnamed pages": {"photometric": "minisblack"},
    "deflated": {"photometric": "minisblack", "compression": "zlib"},
    "planes": {"photometric": "minisblack", "planarconfig": "separate", "metadata": None},
}


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("channels", [2, 3, 5])
def test_a_tiff_stack_is_read(tmp_path, kind, channels):
    values = cell(channels, 1, side=24)[:20]
    tifffile.imwrite(tmp_path / "x.tif", np.ascontiguousarray(values.transpose(2, 0, 1)), **STACKS[kind])
    wide = {"value_range": (0, 255)} if channels == 3 else {}  # three of uint8 are RGB
    assert np.array_equal(images.read(tmp_path / "x.tif", channels=channels, **wide), values)
    assert images.read_size(tmp_path / "x.tif", channels=channels, **wide) == (20, 24)
    for read in (images.read, images.read_size):
        with pytest.raises(UnreadableImage, match=rf"x\.tif: has {channels} channels .*data\.channels=4"):
            read(tmp_path / "x.tif", channels=4)


@pytest.mark.parametrize("settings", [{}, {"photometric": "minisblack", "planarconfig": "contig"}])
def test_the_channels_of_a_tiff_may_be_last(tmp_path, settings):
    values = cell(5, 2, side=24)[:20]
    tifffile.imwrite(tmp_path / "x.tif", values, **settings)
    assert np.array_equal(images.read(tmp_path / "x.tif", channels=5), values)
    assert images.read_size(tmp_path / "x.tif", channels=5) == (20, 24)


@pytest.mark.parametrize("axes", ["ZYX", "TYX"])
def test_a_z_stack_is_no_stack_of_channels(tmp_path, axes):
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((5, 8, 8), np.uint8), imagej=True, metadata={"axes": axes})
    with pytest.raises(UnreadableImage, match="no stack of 5 channels"):
        images.read(tmp_path / "x.tif", channels=5)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits"])
def test_compressed_grey_tiff_files_are_channels(tmp_path, compression):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 64
    Image.fromarray(values).save(tmp_path / "x.tif", compression=compression)
    read = images.read(tmp_path / "x.tif", channels=1, value_range=(0, 4080))
    assert np.array_equal(read[..., 0], np.rint(values / 16))


# Values


@pytest.mark.parametrize("suffix", ["npy", "tif"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
@pytest.mark.parametrize("channels", [3, 5])
def test_a_value_range_scales_what_is_no_uint8(tmp_path, suffix, dtype, channels):
    values = np.linspace(0, 5000, 12 * 10 * channels).reshape(12, 10, channels).astype(dtype)
    file = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(file, values)
    else:
        tifffile.imwrite(file, np.ascontiguousarray(values.transpose(2, 0, 1)), photometric="minisblack")
    for read in (images.read, images.read_size) if channels == 5 or suffix == "npy" else ():
        with pytest.raises(UnreadableImage, match=r"set data\.value_range=\[low, high\]"):
            read(file, channels=channels)
    expected = np.rint(255 * ((values.astype(float) - 100) / 4000).clip(0, 1))
    found = images.read(file, channels=channels, value_range=(100, 4100))
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 1  # the half of a value may fall to either side
    assert found.min() == 0
    assert found.max() == 255


def test_values_that_are_no_numbers_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.full((4, 4, 5), np.nan, np.float32))
    with pytest.raises(UnreadableImage, match="NaN or infinite"):
        images.read(tmp_path / "x.npy", channels=5, value_range=(0, 1))
    np.save(tmp_path / "y.npy", np.ones((4, 4, 5), complex))
    with pytest.raises(UnreadableImage, match="complex"):
        images.read(tmp_path / "y.npy", channels=5, value_range=(0, 1))
    np.save(tmp_path / "z.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match="Python objects"):
        images.read(tmp_path / "z.npy", channels=5)


def test_a_value_range_travels_and_makes_a_cache_of_its_own(screen, data_config, tmp_path):
    root = screen("cpg0000")
    for path in SCREENS["cpg0000"][4]:
        np.save(root / path, np.load(root / path).astype(np.uint16) * 16)
    settings = {"layout": {"name": "imaging", "preset": "cpg0000"}, "channels": 5}
    pixels = {}
    for high in (4080, 2040):
        patches = load_patches(data_config(root, **settings, value_range=[0, high]), seed=0)
        assert patches.preprocessing.value_range == (0, high)
        pixels[high] = np.array(patches.pixels)
    assert np.array_equal(pixels[2040], (2 * pixels[4080].astype(int)).clip(max=255))
    patches.preprocessing.save(tmp_path / "new.json")
    assert Preprocessing.load(tmp_path / "new.json") == patches.preprocessing
    old = json.loads((tmp_path / "new.json").read_text())
    del old["value_range"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Preprocessing.load(tmp_path / "old.json") == Preprocessing(16, channels=5)
    for bad in ([1, 1], [2, 1], [0, float("nan")], [0]):
        with pytest.raises(ValueError, match="value_range"):
            data_config(root, value_range=bad)


# One file per channel


@pytest.fixture
def wells(tmp_path):
    """A root with six wells of three grey PNG files each, in a folder per channel, and their index."""
    rows = []
    for number in range(6):
        rows.append((f"B{number}", ("train", "test")[number > 3], number % 2, "taxol", "p1"))
        for k, channel in enumerate(("w1", "w2", "w3")):
            (tmp_path / "wells" / channel).mkdir(parents=True, exist_ok=True)
            Image.fromarray(cell(3, number)[..., k]).save(tmp_path / "wells" / channel / f"B{number}_{channel}.png")
    columns = ["well", "split", "state", "drug", "plate"]
    write_index(tmp_path / "wells" / "index.csv", columns, rows)
    settings = {"key": "well", "file": "{channel}/{well}_{channel}.png", "channel_names": ["w1", "w2", "w3"]}
    settings |= {"perturbation": "drug", "batch": "plate", "control": 0}
    return tmp_path / "wells", {"layout": {"name": "imaging", **settings}}


def test_one_file_per_channel_is_one_image(wells, data_config):
    root, settings = wells
    config = data_config(root, **settings)
    patches = load_patches(config, seed=0)
    assert patches.ids[0] == "{w1,w2,w3}/B0_{w1,w2,w3}.png"
    for number in range(6):
        assert np.array_equal(patches.pixels[number], cell(3, number))
    assert list_records(config, seed=0)[0][0].batch == "p1"
    file = root / "w3" / "B0_w3.png"
    Image.fromarray(cell(3, 99)[..., 0]).save(file)
    assert np.array_equal(load_patches(config, seed=0).pixels[0][..., 2], cell(3, 99)[..., 0])  # the cache saw it
    with pytest.raises(UserError, match=r"names 3 files of one channel each; data\.channels=5"):
        load_patches(data_config(root, **settings, channels=5), seed=0)
    Image.fromarray(np.zeros((16, 20), np.uint8)).save(file)
    with pytest.raises(UserError, match=r"differ in size: B0_w1\.png \(16 x 16\), .*B0_w3\.png \(20 x 16\)"):
        load_patches(config, seed=0)
    file.unlink()
    with pytest.raises(UserError, match=r"1 of 6 rows name files that do not exist: \{w1,w2,w3\}/B0"):
        load_patches(config, seed=0)


def test_a_colour_picture_is_no_channel(wells, data_config):
    root, settings = wells
    images.write_png(root / "w2" / "B0_w2.png", cell(3, 0))
    with pytest.raises(UserError, match=r"B0_w2\.png: a picture; data\.channels=1 .*one grey file per channel"):
        load_patches(data_config(root, **settings), seed=0)


def test_names_in_braces_stay_in_their_folders(tmp_path):
    assert images.files_of(tmp_path / "a_{x,y}.png") == [tmp_path / "a_x.png", tmp_path / "a_y.png"]
    for name in ("a_{x}.png", "a_{../x,y}.png", "{}.png", "a.png"):
        assert images.files_of(tmp_path / name) == [tmp_path / name]
    images.write_png(tmp_path / "a_{x,y}.png", np.zeros((2, 2, 3), np.uint8))
    assert images.read(tmp_path / "a_{x,y}.png").shape == (2, 2, 3)


# What a researcher sees


def test_the_check_counts_what_differs_and_draws_the_channels(screen, data_config, tmp_path):
    root = screen("cpg0000")
    config = data_config(root, layout={"name": "imaging", "preset": "cpg0000"}, channels=5, split={"val": 0})
    report, _ = check_data(config, seed=0, sheet=tmp_path / "sheet.png")
    assert "batches: 2, of 1 to 2 patches" in report
    assert "unusable files: 0" in report
    assert (
        images.read_rgb(tmp_path / "channels.png").shape[1] == ((16 + 2) * 6 - 2) * 6
    )  # false colour and five channels
    np.save(root / SCREENS["cpg0000"][4][0], cell(4, 0))
    report, usable = check_data(config, seed=0, sheet=tmp_path / "sheet.png")
    assert not usable
    assert "unusable files: 1" in report
    assert "r01c02_f1_5.npy: an array of uint8 of shape (16, 16, 4); data.channels=5" in report
    with pytest.raises(UserError, match=r"1 of 3 images cannot be used.*\n.*\(16, 16, 4\)"):
        load_patches(config, seed=0)


def test_many_classes_are_tabled_shortly(tmp_path, data_config):
    rows = []
    for number in range(120):
        rows.append((f"k{number}", "train", number % 4, f"gene{number // 4:03d}", f"b{number % 5}"))
        np.save(tmp_path / f"k{number}.npy", cell(3, number))
    write_index(tmp_path / "index.csv", ["SAMPLE_KEY", "SPLIT", "STATE", "CPD_NAME", "BATCH"], rows)
    config = data_config(tmp_path, layout={"name": "imaging", "control": 0}, split={"val": 0.2, "unseen": ["gene007"]})
    report, _ = check_data(config, seed=0, sheet=tmp_path / "sheet.png")
    assert "120 patches, 31 classes" in report
    assert "(11 smaller classes)" in report
    assert report.count("  gene") < 45  # in two tables of twenty
    assert "If these are patients" not in report
    assert "30 controls (STATE 0, class 'control'), 30 perturbations, 5 batches, 0 doses" in report
    index = patch_index(config, seed=0)
    assert {index.splits[i] for i in np.flatnonzero(index.labels == index.classes.index("gene007"))} == {2}


def test_a_screen_of_five_channels_trains(screen, tmp_path, write_config, capsys):
    rows, root = {}, tmp_path / "cpg0000"
    for number in range(24):
        state = ("control", "trt")[number % 2]
        rows[f"BR1_r01c{number:02d}_f1_0"] = (("train", "test")[number > 15], state, "BRD-K1", "Compound", "BR1")
    screen("cpg0000", rows=rows)
    for key in rows:
        plate, well, view, number = key.split("_")
        (root / plate / f"{well}_{view}").mkdir(parents=True)
        np.save(root / plate / f"{well}_{view}" / f"{well}_{view}_{number}.npy", cell(5, int(well[-2:])))
    data = {
        "root": str(root),
        "layout": {"name": "imaging", "preset": "cpg0000"},
        "channels": 5,
        "split": {"val": 0.25},
    }
    config = str(write_config(tmp_path, data=data))
    cli.main(["data", "check", config])
    assert "training can start" in capsys.readouterr().out
    cli.main(["train", config])
    assert (tmp_path / "runs" / "tiny" / "checkpoints").is_dir()
