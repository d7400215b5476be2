"""Published data sets: their own trees become manifests, or are refused with what was found and expected."""

import csv
import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellflux_bridge import cli
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data import published
from cellflux_bridge.data.layout.folder import Folder
from cellflux_bridge.data.published import base, gleason2019, stamp
from cellflux_bridge.images import read_rgb, write_png

DOCS = Path(__file__).parents[1] / "docs" / "datasets.md"


def image(number: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)


def put(root: Path, *names: str) -> Path:
    """Image files with these names, all different."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(root / name, image(number))
    return root


def put_text(root: Path, name: str, text: str) -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return root / name


def prepared(name: str, source: Path, out: Path, **options) -> dict[str, tuple]:
    """What `data.layout=folder` reads of it: label, split, group, score rounded to 3 digits, mpp of each path."""
    options = {"other_counts": True, **options}
    base.prepare(published.find(name), source, out, **options)
    return {
        r.id: (r.label, r.split, r.group, r.score if r.score is None else round(r.score, 3), r.mpp)
        for r in Folder(out).records()
    }


def refused(name: str, source: Path, out: Path, *expected: str, **options) -> None:
    with pytest.raises(UserError) as caught:
        prepared(name, source, out, **options)
    for part in expected:
        assert part in str(caught.value)
    assert not (out / "manifest.csv").exists()


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


# Each data set, in its own layout

MHIST = "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition\n"


@pytest.fixture
def mhist(source) -> Path:
    put(source, "images/MHIST_aaa.png", "images/MHIST_aab.png", "images/MHIST_aac.png")
    put_text(source, "annotations.csv", f"{MHIST}MHIST_aaa.png,SSA,6,train\nMHIST_aab.png,HP,2,test\n")
    return source


def test_mhist(mhist, out):
    assert prepared("mhist", mhist, out) == {
        "images/MHIST_aaa.png": ("SSA", "train", None, 0.857, None),
        "images/MHIST_aab.png": ("HP", "test", None, 0.286, None),
    }


@pytest.fixture
def chaoyang(source) -> Path:
    for split, items in (
        ("train", [("353042_4-IMG005x014-1.JPG", 1), ("535940-IMG009x024-2.JPG", 2)]),
        ("test", [("535940-IMG009x022-2.JPG", 2), ("535957-IMG005x005-3.JPG", 3), ("535943_2-IMG009x015-0.JPG", 0)]),
    ):
        put(source, *(f"{split}/{name}" for name, _ in items))
        put_text(source, f"{split}.json", json.dumps([{"name": f"{split}/{n}", "label": k} for n, k in items]))
    return source


def test_chaoyang_gives_up_its_split_for_its_slides(chaoyang, out, tmp_path):
    expected = {
        "train/353042_4-IMG005x014-1.JPG": ("serrated", "353042_4"),
        "train/535940-IMG009x024-2.JPG": ("adenocarcinoma", "535940"),
        "test/535940-IMG009x022-2.JPG": ("adenocarcinoma", "535940"),
        "test/535957-IMG005x005-3.JPG": ("adenoma", "535957"),
        "test/535943_2-IMG009x015-0.JPG": ("normal", "535943_2"),
    }
    assert prepared("chaoyang", chaoyang, out) == {
        name: (label, None, group, None, None) for name, (label, group) in expected.items()
    }
    assert prepared("chaoyang", chaoyang, tmp_path / "kept", published_split=True) == {
        name: (label, name.split("/")[0], None, None, None) for name, (label, _) in expected.items()
    }
    lines = base.prepare(published.find("chaoyang"), chaoyang, tmp_path / "again", other_counts=True)
    assert any("1 groups stand in more than one published split (535940)" in line for line in lines)


def test_gleason2019_cuts_what_most_pathologists_agree_on(source, out, monkeypatch):
    monkeypatch.setattr(gleason2019, "SIZE", 4)
    put(source, "Train Imgs/slide001_core003.png", "Train Imgs/slide001_core004.png")
    for core in ("003", "004"):
        name = source / f"Train Imgs/slide001_core{core}"
        name.with_suffix(".png").rename(name.with_suffix(".jpg"))
    grades = np.zeros((3, 8, 8), np.uint8)
    grades[:, :4, :4] = np.array([1, 6, 3])[:, None, None]  # benign, benign, grade 3
    grades[:, :4, 4:] = np.array([4, 4, 5])[:, None, None]
    grades[:, 4:, :4] = np.array([3, 4, 5])[:, None, None]  # nobody agrees
    grades[:2, 6:, 4:] = 5  # exactly half of this patch, the rest is not annotated
    for number, one in enumerate(grades, 1):
        folder = source / f"Maps{number}_T"
        folder.mkdir()
        write_png(folder / "slide001_core003_classimg_nonconvex.png", np.repeat(one[..., None], 3, axis=2))
    assert prepared("gleason2019", source, out) == {
        "patches/slide001_core003_0_0.png": ("benign", None, "slide001_core003", 0, None),
        "patches/slide001_core003_0_4.png": ("grade 4", None, "slide001_core003", 0.667, None),
        "patches/slide001_core003_4_4.png": ("grade 5", None, "slide001_core003", 1, None),
    }
    cut = read_rgb(out / "patches/slide001_core003_0_4.png")
    assert np.array_equal(cut, image(0)[:4, 4:])
    write_png(source / "Maps2_T/slide001_core003_classimg_nonconvex.png", np.full((8, 8, 3), 2, np.uint8))
    refused("gleason2019", source, out.with_name("o"), "Maps2_T/slide001_core003_classimg", "values 0, 1, 3 to 6")


def test_prcc_groups_a_patients_slides(source, out):
    slides = ("1/TCGA-KV-A6GE-01Z-00-DX6.B", "1/TCGA-KV-A6GE-01Z-00-DX7.C", "2/TCGA-2Z-A9J3-01Z-00-DX1.6", "2/own")
    put(source, *(f"{slide}/1_2_2000.png" for slide in slides))
    assert list(prepared("prcc", source, out).values()) == [
        ("type 1", None, "TCGA-KV-A6GE", None, None),
        ("type 1", None, "TCGA-KV-A6GE", None, None),
        ("type 2", None, "TCGA-2Z-A9J3", None, None),
        ("type 2", None, "own", None, None),
    ]
    put(source, "1/loose.png")
    refused("prcc", source, out.with_name("o"), "1/loose.png: lies in no slide's folder")


def test_aml(source, out):
    put(source, *(f"{label}/{label}_0001.tiff" for label in published.find("aml").classes))
    found = prepared("aml", source, out)
    assert len(found) == 15
    assert found["PMO/PMO_0001.tiff"] == ("PMO", None, None, None, None)
    put(source, "XYZ/1.tiff")
    refused("aml", source, out.with_name("o"), "holds folders that are no class: XYZ")


def test_bci_pairs_are_groups(source, out):
    names = ("train/00000_train_1+.png", "train/00001_train_3+.png", "test/00000_test_0.png")
    put(source, *(f"{stain}/{name}" for stain in ("HE", "IHC") for name in names))
    found = prepared("bci", source, out)
    assert found["HE/train/00000_train_1+.png"] == ("HE", "train", "00000_train", 0.333, None)
    assert found["IHC/train/00000_train_1+.png"] == ("IHC", "train", "00000_train", 0.333, None)
    assert found["IHC/test/00000_test_0.png"] == ("IHC", "test", "00000_test", 0, None)
    assert len(found) == 6
    (source / "IHC/test/00000_test_0.png").rename(source / "IHC/test/00001_test_0.png")
    refused("bci", source, out.with_name("o"), "test: 2 images without their pair, as 00000_test_0.png")
    put(source, "HE/test/1.png")
    refused("bci", source, out.with_name("o"), "1.png: this name says too little; expected 00000_train_1+.png")


def test_breastpathq(source, out):
    train, val = "breastpathq/datasets/train", "breastpathq/datasets/validation"
    put(source, f"{train}/99788_1.tif", f"{train}/99788_2.tif", f"{train}/99800_7.tif", f"{val}/102174_1.tif")
    put_text(source, f"{train}_labels.csv", "slide,rid,y\n99788,1,0\n99788,2,0.3\n99800,7,0.71\n")
    put_text(source, "breastpathq-test/val_labels.csv", "slide,rid,p1,p2\n102174,1,0.4,0.5\n")
    assert prepared("breastpathq", source, out) == {
        f"{train}/99788_1.tif": ("healthy", "train", "99788", 0, None),
        f"{train}/99788_2.tif": ("low", "train", "99788", 0.3, None),
        f"{train}/99800_7.tif": ("high", "train", "99800", 0.71, None),
        f"{val}/102174_1.tif": ("medium", "val", "102174", 0.45, None),
    }
    put_text(source, "breastpathq-test/val_labels.csv", "slide,rid,p1,p2\n102174,1,0.4,1.5\n")
    refused("breastpathq", source, out.with_name("o"), "val_labels.csv, row 2: '1.5'; expected a number from 0 to 1")
    put_text(source, "breastpathq-test/val_labels.csv", "slide,rid,z\n102174,1,0.4\n")
    refused("breastpathq", source, out.with_name("o"), "row 2: no column y, p1 or p2; found: slide, rid, z")


def test_nct_crc(source, out):
    classes = published.find("nct_crc").classes
    put(source, *(f"{part}/{c}/{c}-A.tif" for part in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K") for c in classes))
    found = prepared("nct-crc", source, out)
    assert found["NCT-CRC-HE-100K/TUM/TUM-A.tif"] == ("TUM", "train", None, None, 0.5)
    assert found["CRC-VAL-HE-7K/ADI/ADI-A.tif"] == ("ADI", "test", None, None, 0.5)
    assert len(found) == 18


def test_bracs(source, out):
    folders = ("0_N", "1_PB", "2_UDH", "3_FEA", "4_ADH", "5_DCIS", "6_IC")
    for number, split in enumerate(("train", "val", "test")):
        put(source, *(f"{split}/{f}/BRACS_{number}_{f[2:]}_1.png" for f in folders))
    found = prepared("bracs", source, out)
    assert found["train/0_N/BRACS_0_N_1.png"] == ("N", "train", "BRACS_0", None, None)
    assert found["test/6_IC/BRACS_2_IC_1.png"] == ("IC", "test", "BRACS_2", None, None)
    assert len(found) == 21


def renewed(path: Path) -> Path:
    """The path of a file that is there no more: HDF5 knows which files are open."""
    path.unlink()
    return path


def pcam(root: Path, *, num: int = 4) -> Path:
    h5py = pytest.importorskip("h5py")
    for seed, word in enumerate(("train", "valid", "test")):
        stem = str(root / f"camelyonpatch_level_2_split_{word}_")
        with h5py.File(f"{stem}x.h5", "w") as x, h5py.File(f"{stem}y.h5", "w") as y:
            x["x"] = np.stack([image(10 * seed + i) for i in range(num)])
            y["y"] = (np.arange(num, dtype=np.uint8) % 2).reshape(-1, 1, 1, 1)
        rows = "".join(f"{i},0,0,True,True,camelyon16_{word}_{i // 2}\n" for i in range(num))
        put_text(root, f"{Path(stem).name}meta.csv", ",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi\n" + rows)
    return root


def test_patch_camelyon_is_written_as_png(source, out):
    found = prepared("patch_camelyon", pcam(source), out)
    assert len(found) == 12
    assert found["patches/val/000/000003.png"] == ("tumor", "val", "camelyon16_valid_1", None, 0.972)
    assert found["patches/test/000/000000.png"] == ("normal", "test", "camelyon16_test_0", None, 0.972)
    assert np.array_equal(read_rgb(out / "patches/val/000/000003.png"), image(13))


def test_patch_camelyon_whose_files_disagree_is_refused(source, out):
    h5py = pytest.importorskip("h5py")
    pcam(source)
    meta = source / "camelyonpatch_level_2_split_valid_meta.csv"
    meta.write_text("\n".join(meta.read_text().splitlines()[:-1]) + "\n")
    refused("patch_camelyon", source, out, "split_valid_meta.csv: 3 rows, but 4 labels")
    with h5py.File(renewed(source / "camelyonpatch_level_2_split_train_x.h5"), "w") as x:
        x["x"] = np.zeros((3, 8, 8, 3), np.uint8)
    refused("patch_camelyon", source, out, "split_train_x.h5: 3 images, but 4 labels")
    renewed(source / "camelyonpatch_level_2_split_train_y.h5").write_bytes(b"\x89HDF\r\n\x1a\n damaged")
    refused("patch_camelyon", source, out, "split_train_y.h5: damaged, or no HDF5 file")


def test_hdf5_arrays_that_lie_in_other_files_are_refused(source, out, tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(range(4)))
    pcam(source)
    for kind in ("link", "external"):
        with h5py.File(renewed(source / "camelyonpatch_level_2_split_train_y.h5"), "w") as y:
            if kind == "link":
                y["y"] = h5py.ExternalLink(str(source / "camelyonpatch_level_2_split_test_y.h5"), "y")
            else:
                y.create_dataset("y", (4,), np.uint8, external=[(str(tmp_path / "secret"), 0, 4)])
        refused("patch_camelyon", source, out, "split_train_y.h5: holds no array 'y'")


def test_hdf5_without_h5py_says_what_to_install(source, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    put_text(source, "camelyonpatch_level_2_split_train_y.h5", "x")
    refused("patch_camelyon", source, out, "HDF5 needs h5py: pip install 'cellflux-bridge[data]'")


@pytest.fixture
def pannuke(source) -> Path:
    for fold in (1, 2, 3):
        folder = source / f"Fold {fold}" / "images" / f"fold{fold}"
        folder.mkdir(parents=True)
        np.save(folder / "images.npy", np.stack([image(10 * fold + i) for i in range(2)]).astype(float))
        np.save(folder / "types.npy", np.array(["Breast", "Bile-duct"]))
    return source


def test_pannuke_is_written_as_png(pannuke, out):
    found = prepared("pannuke", pannuke, out)
    assert found["patches/fold1/0000.png"] == ("Breast", "train", None, None, 0.25)
    assert found["patches/fold3/0001.png"] == ("Bile-duct", "test", None, None, 0.25)
    assert len(found) == 6
    assert np.array_equal(read_rgb(out / "patches/fold2/0001.png"), image(21))


def test_pannuke_that_is_damaged_is_refused_and_nothing_is_unpickled(pannuke, out, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = pannuke / "Fold 2/images/fold2"
    np.save(folder / "types.npy", np.array([Evil(), Evil()]), allow_pickle=True)
    refused("pannuke", pannuke, out, "fold2/types.npy: damaged, or no plain NumPy array")
    assert not (tmp_path / "ran").exists()
    np.save(folder / "types.npy", np.array(["Breast"]))
    refused("pannuke", pannuke, out, "fold2/images.npy: 2 images, but 1 labels")
    np.save(folder / "types.npy", np.array([1, 2]))
    refused("pannuke", pannuke, out, "fold2/types.npy: int64 of shape (2,); expected a text for each image")
    np.save(folder / "types.npy", np.array(["Breast", "Colon"]))
    np.save(folder / "images.npy", np.full((2, 8, 8, 3), 256.0))
    refused("pannuke", pannuke, out, "fold2/images.npy, image 0: values 256.0 to 256.0; expected 0 to 255")
    (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:500])
    refused("pannuke", pannuke, out, "fold2/images.npy: damaged")


def test_lc25000_takes_original_tiles_from_a_table(source, out, tmp_path):
    classes = ("lung/lung_n", "lung/lung_aca", "lung/lung_scc", "colon/colon_n", "colon/colon_aca")
    names = [c.replace("/", "_image_sets/") + f"/{c.split('/')[1]}{i}.jpeg" for c in classes for i in (1, 2)]
    put(source, *names)
    rows = "".join(f"{Path(name).name},{number // 2}\n" for number, name in enumerate(names))
    table = put_text(tmp_path, "groups.csv", "filename,group_id\n" + rows)
    found = prepared("lc25000", source, out, table=table)
    assert found["lung_image_sets/lung_aca/lung_aca2.jpeg"] == ("lung_aca", None, "1", None, None)
    assert found["colon_image_sets/colon_aca/colon_aca1.jpeg"] == ("colon_aca", None, "4", None, None)
    assert len(found) == 10
    refused(
        "lc25000",
        source,
        out.with_name("o"),
        "--table: name a CSV with the columns filename, group_id",
        "LC25000-clean",
    )
    put_text(tmp_path, "groups.csv", "filename,group_id\n" + rows.replace("lung_aca2.jpeg", "other.jpeg"))
    refused("lc25000", source, out.with_name("o"), "lung_aca2.jpeg: --table names no group of it", table=table)


def test_cpia(source, out):
    put(source, "L/MHIST/1.jpg", "M/Chaoyang/1.jpg", "M/MHIST/x/2.jpg")
    assert prepared("cpia", source, out) == {
        "L/MHIST/1.jpg": ("MHIST", None, None, None, None),
        "M/Chaoyang/1.jpg": ("Chaoyang", None, None, None, None),
        "M/MHIST/x/2.jpg": ("MHIST", None, None, None, None),
    }


def archive(root: Path, slide: str, *tiles: str, size: int = 224) -> Path:
    with zipfile.ZipFile(root / f"{slide}.{'0a' * 32}.zip", "w") as file:
        file.writestr("tiler_params.json", json.dumps({"tile_size_um": 256.0, "tile_size_px": size}))
        for number, tile in enumerate(tiles):
            write_png(root / "tile.png", image(number))
            file.write(root / "tile.png", tile)
    (root / "tile.png").unlink(missing_ok=True)
    return root


def test_stamp_reads_folders_and_archives_of_tiles(source, out, tmp_path):
    put(source, "slide A/slide A_(0,512).jpg", "slide A/slide A_(0,1024).jpg")
    archive(source, "s.1", "tile_(0.0, 256.0).png", "../tile_(0.0, 512.0).png", "note.txt")
    table = put_text(tmp_path, "t.csv", "PATIENT,FILENAME,label\np1,slide A.h5,yes\np2,s.1.h5,no\n")
    found = prepared("stamp", source, out, table=table)
    assert set(found) == {
        "slide A/slide A_(0,512).jpg",
        "slide A/slide A_(0,1024).jpg",
        "patches/s.1/0.0_256.0.png",
    }
    assert found["slide A/slide A_(0,512).jpg"] == ("yes", None, "p1", None, None)
    assert found["patches/s.1/0.0_256.0.png"] == ("no", None, "p2", None, pytest.approx(256 / 224))
    put_text(tmp_path, "t.csv", "PATIENT,FILENAME,label\np1,slide C,yes\n")
    refused(
        "stamp", source, out.with_name("o"), "row 2: slide 'slide C' has neither a folder of tiles nor", table=table
    )
    archive(source, "s.1", size=0)
    put_text(tmp_path, "t.csv", "PATIENT,FILENAME,label\np2,s.1,no\n")
    refused("stamp", source, out.with_name("o"), ".zip: damaged, or no cache of STAMP", table=table)


def test_stamp_unpacks_no_tile_that_grows_too_large(source, out, tmp_path, monkeypatch):
    monkeypatch.setattr(stamp, "_MAX_BYTES", 10)
    archive(source, "s", "tile_(0.0, 256.0).png")
    table = put_text(tmp_path, "t.csv", "PATIENT,FILENAME,label\np2,s,no\n")
    refused("stamp", source, out, "holds no images", table=table)


def test_clam_needs_pixels(source, out, tmp_path):
    h5py = pytest.importorskip("h5py")
    (source / "patches").mkdir()
    for number in range(2):
        with h5py.File(source / f"patches/slide_{number}.h5", "w") as file:
            file["imgs"] = np.stack([image(number), image(number + 5)])
            file["coords"] = np.zeros((2, 2), int)
    table = put_text(tmp_path, "t.csv", "case_id,slide_id,label\np0,slide_0,tumor\np0,slide_1,normal\n")
    found = prepared("clam", source, out, table=table)
    assert found["patches/slide_1/000001.png"] == ("normal", None, "p0", None, None)
    assert len(found) == 4
    assert np.array_equal(read_rgb(out / "patches/slide_1/000001.png"), image(6))
    with h5py.File(renewed(source / "patches/slide_1.h5"), "w") as file:
        file["coords"] = np.zeros((2, 2), int)
    refused("clam", source, out.with_name("o"), "slide_1.h5: holds no array 'imgs'; found: coords", "only", table=table)


# What all share


def test_numbers_other_than_the_published_ones_are_refused(mhist, out):
    refused(
        "mhist", mhist, out, "all: found 2, published 3152", "SSA: found 1, published 990", "--allow-other-counts",
        other_counts=False,
    )  # fmt: skip
    assert not out.exists()
    counts = {"all": 2, "train": 1, "HP": 1, "train/SSA": 1}
    base.prepare(replace(published.find("mhist"), counts=counts), mhist, out)
    with pytest.raises(UserError, match="test/SSA: found 0, published 1"):
        base.prepare(replace(published.find("mhist"), counts={"test/SSA": 1}), mhist, out.with_name("o"))


@pytest.mark.parametrize("name", published.names())
def test_an_empty_tree_is_refused_with_the_expected_one(name, source, out, tmp_path):
    entry = published.find(name)
    (source / "something").mkdir()
    table = put_text(tmp_path, "t.csv", ",".join(entry.table) + "\n" + ",".join("x" for _ in entry.table) + "\n")
    refused(name, source, out, str(source), "found: something", entry.tree, entry.source, table=table)
    refused(name, source / "none", out, "no such folder", entry.tree, table=table)
    assert not out.exists()


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/etc/x.png", "C:\\x.png", "..\\x.png", "a\0.png"])
def test_paths_that_lead_out_are_refused(chaoyang, out, path):
    items = [{"name": path.replace("x.png", "1-IMG1x1-1.JPG"), "label": 1}]
    if "\0" in path:
        items[0]["name"] = "a\0/1-IMG1x1-1.JPG"
    put_text(chaoyang, "train.json", json.dumps(items))
    put(chaoyang.parent, "1-IMG1x1-1.JPG")
    refused("chaoyang", chaoyang, out, "train.json, item 0", "names no file inside the folder")


def test_a_link_that_leads_out_is_refused(mhist, out, tmp_path):
    put(tmp_path, "elsewhere.png")
    (mhist / "images/MHIST_aaa.png").unlink()
    os.symlink(tmp_path / "elsewhere.png", mhist / "images/MHIST_aaa.png")
    refused("mhist", mhist, out, "MHIST_aaa.png: leads outside of", "by a symbolic link")


def test_nothing_is_written_through_a_link_in_out(mhist, out, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out.mkdir()
    os.symlink(tmp_path / "elsewhere", out / "images")
    refused("mhist", mhist, out, f"{out / 'images'}: leads outside of {out}")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MHIST + "MHIST_aaa.png,SSA,8,train\n", "annotations.csv, row 2: '8'; expected a number from 0 to 7"),
        (MHIST + "MHIST_aaa.png,SSA,nan,train\n", "row 2: 'nan'; expected a number"),
        (MHIST + "MHIST_aaa.png,XX,1,train\n", "row 2: label 'XX'; expected one of HP, SSA"),
        (MHIST + "MHIST_aaa.png,HP,1,trial\n", "row 2: split 'trial'; expected train, val or test"),
        (MHIST + "MHIST_zzz.png,HP,1,train\n", "row 2: images/MHIST_zzz.png: no such file"),
        (MHIST + "MHIST_aaa.png,HP,1\n", "annotations.csv, line 2: 3 cells, but the header has 4"),
        (MHIST.replace("Partition", "Part") + "MHIST_aaa.png,HP,1,train\n", "no column 'Partition'; found: Image Name"),
        (MHIST, "holds no images"),
        ("\udcff", "annotations.csv, line 0: 'utf-8' codec can't decode"),
    ],
)
def test_a_damaged_csv_is_refused_by_its_row(mhist, out, text, expected):
    (mhist / "annotations.csv").write_bytes(text.encode(errors="surrogateescape"))
    refused("mhist", mhist, out, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[{", "train.json: cannot be read as JSON"),
        ("[" * 100_000, "train.json: cannot be read as JSON"),
        ("{}", "train.json: holds dict, expected a list"),
        ('[{"name": "a", "label": true}]', "train.json, item 0: {'name': 'a', 'label': True}; expected name (str)"),
        ('[{"name": "1-IMG1x1-1.JPG", "label": 4}]', "train.json, item 0: label 4; expected 0 to 3"),
        ("[7]", "train.json, item 0: 7; expected name (str), label (int)"),
    ],
)
def test_a_damaged_json_is_refused_by_its_item(chaoyang, out, text, expected):
    put_text(chaoyang, "train.json", text)
    refused("chaoyang", chaoyang, out, expected)


def test_images_take_no_room_twice(mhist, out, monkeypatch):
    prepared("mhist", mhist, out)
    assert os.path.samefile(mhist / "images/MHIST_aaa.png", out / "images/MHIST_aaa.png")

    def no_links(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    prepared("mhist", mhist, out.with_name("copied"))
    copy = out.with_name("copied") / "images/MHIST_aaa.png"
    assert not os.path.samefile(mhist / "images/MHIST_aaa.png", copy)
    assert copy.read_bytes() == (mhist / "images/MHIST_aaa.png").read_bytes()


def test_a_stopped_preparation_goes_on(mhist, out):
    put(out, "images/MHIST_aaa.png")  # the same image, in another file
    assert len(prepared("mhist", mhist, out)) == 2


def test_a_download_may_be_prepared_where_it_lies(mhist):
    before = sorted(mhist.rglob("*"))
    assert set(prepared("mhist", mhist, mhist)) == {"images/MHIST_aaa.png", "images/MHIST_aab.png"}
    assert sorted(mhist.rglob("*")) == sorted([*before, mhist / "manifest.csv"])


def test_what_is_there_is_not_overwritten(mhist, out):
    other = put(out, "images/MHIST_aaa.png") / "images/MHIST_aaa.png"
    write_png(other, image(99))
    refused("mhist", mhist, out, "images/MHIST_aaa.png: is another file; choose an empty folder")
    assert np.array_equal(read_rgb(other), image(99))
    put_text(out, "manifest.csv", "mine")
    with pytest.raises(UserError, match=r"manifest\.csv: is there already"):
        prepared("mhist", mhist, out)
    assert (out / "manifest.csv").read_text() == "mine"


def test_an_image_that_is_listed_twice_is_refused(chaoyang, out):
    item = {"name": "train/535940-IMG009x024-2.JPG", "label": 2}
    put_text(chaoyang, "train.json", json.dumps([item, item]))
    refused("chaoyang", chaoyang, out, "manifest.csv, line", "stands already on line")


def test_a_slide_without_label_is_refused(source, out, tmp_path):
    put(source, "s/1.jpg")
    table = put_text(tmp_path, "t.csv", "PATIENT,FILENAME,label\np,s,\n")
    refused("stamp", source, out, "s/1.jpg: label ''; expected one", table=table)
    assert not out.exists()


def test_a_manifest_that_the_layout_refuses_is_not_left_behind(mhist, out):
    put(mhist, "images/.hidden.png")
    put_text(mhist, "annotations.csv", f"{MHIST}.hidden.png,SSA,6,train\n")
    refused("mhist", mhist, out, ".hidden.png is hidden")


# The command


def test_the_command_prepares_what_data_check_reads(source, out, tmp_path, write_config, capsys):
    names = [f"train/{number}-IMG001x001-{number % 2}.JPG" for number in range(24)]
    put(source, *names)
    for number, name in enumerate(names):
        write_png(source / name, image(number, 16))
    put_text(source, "train.json", json.dumps([{"name": n, "label": i % 2} for i, n in enumerate(names)]))
    put_text(source, "test.json", "[]")
    cli.main(["data", "prepare", "chaoyang", str(source), str(out), "--allow-other-counts"])
    said = capsys.readouterr().out
    for part in (
        f"read it with data.root={out}",
        "WARNING: train: found 24, published 4021",
        "licence: non-commercial",
    ):
        assert part in said
    with open(out / "manifest.csv") as file:
        assert next(csv.reader(file)) == ["path", "label", "split", "group", "score", "mpp"]
    file = write_config(tmp_path, data={"split": {"val": 0.2, "test": 0.2}})
    cli.main(["data", "check", str(file), f"data.root={out}", "data.classes=[normal, serrated]"])
    assert "the cache is filled" in capsys.readouterr().out


def test_the_command_lists_the_data_sets(capsys):
    cli.main(["data", "prepare", "--list"])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in published.names())
    with pytest.raises(SystemExit, match="no published data set called 'mhsit'; did you mean 'mhist'") as end:
        cli.main(["data", "prepare", "mhsit", "a", "b"])
    assert published.find("pannuke").title in str(end.value)
    with pytest.raises(SystemExit, match="expected NAME SRC OUT"):
        cli.main(["data", "prepare", "mhist", "a"])
    with pytest.raises(SystemExit):
        cli.main(["data", "--trust", "prepare", "mhist"])
    assert "write data prepare before its flags" in capsys.readouterr().err


def test_what_is_not_confirmed_is_said(mhist, out):
    lines = base.prepare(published.find("mhist"), mhist, out, other_counts=True)
    assert f"NOT CONFIRMED: {published.find('mhist').unconfirmed}" in lines


@pytest.mark.parametrize("name", published.names())
def test_the_docs_say_what_an_entry_says(name):
    entry, text = published.find(name), DOCS.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    for part in (entry.title, entry.groups, entry.scores, entry.licence, entry.citation, entry.source):
        assert part.replace("|", "\\|") in row, part
    assert entry.unconfirmed in text
