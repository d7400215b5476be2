"""What `data check` says of readiness, compression and near copies."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from cellflux_bridge import cli
from cellflux_bridge.data.check import check_data
from cellflux_bridge.data.compression import compare, encoding
from cellflux_bridge.data.near_copies import near_copies, thumbnail
from cellflux_bridge.images import read_rgb


def tissue(seed: int, side: int = 64) -> np.ndarray:
    """A patch (side, side, 3) uint8 of smooth blobs, unlike that of any other seed."""
    noise = np.random.default_rng(seed).normal(size=(side, side))
    blobs = gaussian_filter(noise, side / 20, mode="wrap")
    grey = 150 + 40 * blobs / blobs.std()
    return np.clip(grey[..., None] + [30, -20, 20], 0, 255).astype(np.uint8)


def data_set(root: Path, names: list[str], *, suffix: str = ".png", **options) -> Path:
    for number, name in enumerate(names):
        file = root / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tissue(sum(name.encode()) * 1000 + number, side=32)).save(file, **options)
    return root


def check(config, tmp_path) -> tuple[str, bool]:
    return check_data(config, seed=0, sheet=tmp_path / "sheet.png")


# Readiness


def test_a_class_without_a_split_fails_the_check_and_the_command(tmp_path, data_config, write_config, capsys):
    root = data_set(tmp_path / "patches", [f"A/{n}" for n in range(20)] + ["B/1", "B/2"])
    report, usable = check(data_config(root), tmp_path)
    assert not usable
    assert "PROBLEM: no patch of class 'B' in the test split: add patches or groups of it, or raise" in report
    with pytest.raises(SystemExit, match="a class lacks patches"):
        cli.main(["data", "check", str(write_config(tmp_path))])
    assert "training can start" not in capsys.readouterr().out
    # Who wants no test split gets none; two patches train and validate.
    report, usable = check(data_config(root, split={"test": 0}), tmp_path)
    assert usable
    assert "PROBLEM" not in report


def test_groups_that_leave_no_validation_patches_fail_the_check(tmp_path, data_config):
    root = data_set(tmp_path / "patches", [f"{c}/images/{n}" for c in "AB" for n in range(9)])
    report, usable = check(data_config(root), tmp_path)
    assert not usable
    assert "no patch of class 'A', 'B' in the val split" in report
    assert "read as root/<class>/<group>/...: 2 classes, 1 groups named by the folder below the class" in report


def test_shares_far_from_the_asked_ones_are_told_with_the_reason(tmp_path, data_config):
    names = [f"{c}/p{p}/{n}" for c in "AB" for p, num in enumerate((14, 3, 3)) for n in range(num)]
    report, usable = check(data_config(data_set(tmp_path / "patches", names)), tmp_path)
    assert usable
    assert "split val: asked 10%, got 15% of A, 15% of B" in report
    assert "split test: asked 20%, got 15% of A, 15% of B" in report
    assert "WARNING: class" not in report
    report, _ = check(data_config(tmp_path / "patches", split={"val": 0.05}), tmp_path)
    assert (
        "WARNING: class 'B' has 15% of its patches in val, asked were 5%: groups go whole, it has 3, and the largest "
        "holds 70%"
    ) in report


def test_what_training_would_refuse_is_refused_or_said(patch_folder, tmp_path, write_config, capsys):
    def printed(**sections) -> str:
        cli.main(["data", "check", str(write_config(tmp_path, **sections))])
        return capsys.readouterr().out.splitlines()[-1]

    assert printed() == "the cache is filled: training can start"
    score = {"target": "level", "level": "score"}
    for sections, expected in (
        ({"pairs": {"transitions": [["A", "C"]]}}, "no class 'C' here"),
        ({"pairs": {"match_group": True}}, "pairs.match_group: no group"),
        ({"condition": score}, "condition.level=score: 38 patches have no score"),
        (
            {"condition": score | {"level": "crossfit"}, "classifier": {"folds": 39}},
            "classifier.folds=39: the training",
        ),
        ({"train": {"batch_size": 64}}, "before training mend this: train.batch_size=64 draws"),
        ({"data": {"image_size": 15}}, "before training mend this: data.image_size=15: not divisible"),
    ):
        with pytest.raises(SystemExit, match=re.escape(expected)):
            printed(**sections)


# Compression


@pytest.mark.parametrize("quality", [20, 75, 94, 100])
@pytest.mark.parametrize(("subsampling", "name"), [(0, "4:4:4"), (1, "4:2:2"), (2, "4:2:0")])
def test_quality_and_subsampling_of_a_jpeg_are_read_off_its_header(tmp_path, quality, subsampling, name):
    file = tmp_path / "x.jpeg"
    Image.fromarray(tissue(0)).save(file, quality=quality, subsampling=subsampling)
    found = encoding(file)
    assert (found.codec, found.quality, found.chroma) == ("JPEG", quality, name)
    assert found.size == file.stat().st_size / 1000


def test_the_codec_is_the_files_own_whatever_its_suffix(tmp_path):
    image = Image.fromarray(tissue(0))
    image.save(tmp_path / "a.tif", compression="tiff_lzw")
    image.save(tmp_path / "b.jpg", format="PNG")
    image.convert("L").save(tmp_path / "c.jpg")
    found = [encoding(tmp_path / name) for name in ("a.tif", "b.jpg", "c.jpg")]
    assert [one.codec for one in found] == ["TIFF tiff_lzw", "PNG", "JPEG"]
    assert found[2].chroma == "grey"


def test_classes_that_differ_in_compression_are_told(tmp_path, data_config):
    root = data_set(tmp_path / "patches", [f"A/{n}" for n in range(12)], suffix=".jpg", quality=95, subsampling=0)
    data_set(root, [f"B/{n}" for n in range(12)], suffix=".jpg", quality=90, subsampling=0)
    report, _ = check(data_config(root), tmp_path)
    assert re.search(r"A  JPEG \(12\); 95 / 95 / 95; 4:4:4 \(12\); ", report)
    assert "WARNING: classes differ in JPEG quality: that alone tells 'A' from 'B' in 100% of cases" in report
    assert "differ in codec" not in report
    assert "differ in chroma" not in report


def test_a_difference_that_chance_makes_is_no_warning(tmp_path):
    file = tmp_path / "x"
    Image.fromarray(tissue(0)).save(file, format="JPEG", quality=80)
    jpeg, rng = encoding(file), np.random.default_rng(0)

    def warnings(of_a, of_b):
        labels = ["A"] * len(of_a) + ["B"] * len(of_b)
        return [line for line in compare([*of_a, *of_b], labels) if "WARNING" in line]

    def drawn(num, low):
        return [jpeg._replace(quality=int(q)) for q in rng.integers(low, 95, num)]

    assert not any(warnings(drawn(20, 60), drawn(20, 60)) for _ in range(20))
    assert not warnings(drawn(3, 90), drawn(3, 60))
    assert "in JPEG quality" in warnings(drawn(60, 60), drawn(60, 85))[0]
    png = jpeg._replace(codec="PNG", quality=None, chroma=None)
    told = warnings([jpeg] * 30 + [png] * 10, [png] * 40)
    assert len(told) == 1  # no JPEG of B to compare A's with
    assert "differ in codec: that alone tells 'A' from 'B' in 88% of cases" in told[0]


# Near copies


def altered(rgb: np.ndarray, tmp_path: Path) -> dict[str, np.ndarray]:
    image = Image.fromarray(rgb)
    image.save(tmp_path / "x.jpg", quality=50)
    return {
        "jpeg": read_rgb(tmp_path / "x.jpg"),
        "half": np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)),
        "lighter": np.clip(rgb * 0.8 + 40, 0, 255).astype(np.uint8),
        "cropped": rgb[1:, 1:],
        **{f"turned {k}": np.rot90(rgb, k).copy() for k in (1, 2, 3)},
        **{f"mirrored {k}": np.rot90(rgb[:, ::-1], k).copy() for k in range(4)},
    }


def test_altered_copies_are_found_and_no_others(tmp_path):
    others = [tissue(seed) for seed in range(1, 200)]
    copies = altered(tissue(0), tmp_path)
    thumbnails = np.stack([thumbnail(rgb) for rgb in [tissue(0), *copies.values(), *others]])
    pairs, likeness = near_copies(thumbnails, counts=lambda i, j: np.minimum(i, j) == 0)
    assert pairs.tolist() == sorted(pairs.tolist(), key=lambda pair: -likeness[pairs.tolist().index(pair)])
    assert sorted(pairs[:, 1].tolist()) == list(range(1, len(copies) + 1))
    assert (pairs[:, 0] == 0).all()
    assert likeness.min() >= 0.9
    everything, _ = near_copies(thumbnails, counts=lambda i, j: np.maximum(i, j) > len(copies))
    assert len(everything) == 0


def test_plain_patches_are_no_copies_of_each_other():
    plain = np.stack([np.full((16, 16), 240 - n, np.uint8) for n in range(20)])
    assert len(near_copies(plain, counts=lambda i, j: i != j)[0]) == 0


def test_near_copies_across_splits_and_classes_are_listed_and_drawn(tmp_path, data_config):
    names = [f"{split}/{c}/{n}" for split in ("train", "val", "test") for c in "AB" for n in range(4)]
    root = data_set(tmp_path / "patches", names)
    picture = tmp_path / "near_copies.png"
    picture.touch()  # of an earlier check
    report, _ = check(data_config(root), tmp_path)
    assert "near copies (saved again, resized, turned, mirrored) of different groups: 0 pairs" in report
    assert not picture.exists()
    for name in ("test/A/copy", "test/B/copy", "train/A/copy"):
        Image.fromarray(read_rgb(root / "train/A/0.png")).resize((48, 48)).rotate(90).save(root / f"{name}.jpg")
    report, usable = check(data_config(root), tmp_path)
    assert usable
    assert "across splits: 2 pairs: test/A/copy.jpg (test) ~ train/A/0.png (train), r = " in report
    assert "across classes: 1 pairs: test/B/copy.jpg (B) ~ train/A/0.png (A), r = " in report
    assert read_rgb(picture).shape == (2 * 98 - 2, 2 * 98 - 2, 3)
    # Copies within one group are what groups are for.
    (root / "grouped").mkdir()
    rows = [
        f"{file.relative_to(root)},{file.parent.name},p{file.stem if file.stem not in '0copy' else 'x'}"
        for file in root.rglob("*.*g")
    ]
    (root / "manifest.csv").write_text("path,label,group\n" + "\n".join(rows))
    assert "of different groups: 0 pairs" in check(data_config(root), tmp_path)[0]


def test_patients_read_as_classes_are_told(tmp_path, data_config):
    root = data_set(tmp_path / "root", [f"P00{p}/{n}" for p in range(4) for n in range(4)])
    report, _ = check(data_config(root), tmp_path)
    assert "WARNING: 4 classes: P000, P001, P002, P003. If these are patients or slides, data.root must be" in report
    assert f"(is it {tmp_path}?)" in report
    report, _ = check(data_config(root, classes=[f"P00{p}" for p in range(4)]), tmp_path)
    assert "patients or slides" not in report


def test_a_split_by_patch_is_told(tmp_path, data_config):
    patches = [f"{c}/{n}" for c in "AB" for n in range(9)]
    warning = "WARNING: patches are split one by one, because no groups are named"
    assert warning in check(data_config(data_set(tmp_path / "alone", patches)), tmp_path)[0]
    grouped = [f"{c}/{c}{p}/{n}" for c in "AB" for p in range(5) for n in range(3)]
    assert warning not in check(data_config(data_set(tmp_path / "grouped", grouped)), tmp_path)[0]
    named = [f"{split}/{name}" for split in ("train", "val", "test") for name in patches]
    assert warning not in check(data_config(data_set(tmp_path / "named", named)), tmp_path)[0]
