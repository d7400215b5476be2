"""Patches: how they are listed, split, made and checked."""

import csv
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import derive_seed
from cellflux_bridge.config import load_config
from cellflux_bridge.data.check import check_data
from cellflux_bridge.data.index import frame_mpp, list_records, patch_index, taken_from_training
from cellflux_bridge.data.layout.base import SPLITS, PatchRecord
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.phantom import make_phantom
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.split import assign_splits
from cellflux_bridge.images import read_rgb, write_png
from cellflux_bridge.training.run import record_splits

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
        "A/patient1/slide2/x.png": "patient1",
        "B/patient1/slide2/x.png": "patient1",
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


def test_a_manifest_names_batches_and_doses_and_the_index_keeps_them(patch_folder, data_config, tmp_path):
    rows = [
        ("A/A000.png", "p2", "0"),
        ("A/A001.png", "", "NA"),
        ("B/B000.png", "p10", "0.5"),
        ("B/B001.png", "p2", "20"),
    ]
    columns = ("path", "batch", "dose")
    rows = [{"label": row[0][0], "patch": 7, **dict(zip(columns, row, strict=True))} for row in rows]
    write_manifest(patch_folder, rows)
    index = patch_index(data_config(patch_folder), seed=0)
    assert index.batch_names == ("p10", "p2")
    assert index.batches.tolist() == [1, -1, 0, 1]
    expected = [("p2", None), (None, None), ("p10", 0.5), ("p2", 20.0)]
    assert [(record.batch, record.dose) for record in index.records()] == expected
    known = load_patches(data_config(patch_folder, batches=["p2", "p3"]), seed=0)
    assert known.batch_names == ("p2", "p3")
    assert known.batches.tolist() == [0, -1, -1, 0], "a batch that the configuration does not know is none"
    text, _ = check_data(data_config(patch_folder), seed=0, sheet=tmp_path / "sheet.png")
    assert "batches: 2, of 1 to 2 patches" in text
    assert "doses: 2, from 0.5 to 20" in text
    write_manifest(patch_folder, [{**rows[0], "dose": "-1"}])
    with pytest.raises(UserError, match=r"line 2, dose: -1.0 is outside"):
        list_records(data_config(patch_folder), seed=0)


def test_an_unseen_class_is_all_test_and_no_problem(patch_folder, make_patches, data_config, tmp_path):
    make_patches(patch_folder, num={"C": 6})
    config = data_config(patch_folder, split={"unseen": ["C"]})
    patches = load_patches(config, seed=0)
    whole = load_patches(data_config(patch_folder), seed=0)
    assert len(patches.indices("test", "C")) == 6
    others = patches.labels != patches.class_index("C")
    assert np.array_equal(patches.splits[others], whole.splits[others])
    assert "PROBLEM" not in check_data(config, seed=0, sheet=tmp_path / "sheet.png")[0]
    two = load_patches(data_config(patch_folder, classes=["A", "B"], split={"unseen": ["C"]}), seed=0)
    assert two.classes == ("A", "B")
    assert two.pixels is patches.pixels
    assert np.array_equal(two.splits, np.where(others, whole.splits, 3))
    with pytest.raises(UserError, match=r"data.split.unseen: no class 'c' .* known: A, B, C"):
        load_patches(data_config(patch_folder, split={"unseen": ["c"]}), seed=0)


def test_microns_per_pixel_are_brought_to_the_networks_scale(tmp_path):
    def record(name: str, height: int, width: int, mpp: float | None) -> PatchRecord:
        file = tmp_path / f"{name}.png"
        write_png(file, np.zeros((height, width, 3), np.uint8))
        return PatchRecord(name, file, "A", mpp=mpp)

    one, wide, near, far, unknown = (
        record(name, height, width, mpp)
        for name, height, width, mpp in (
            ("one", 40, 40, 0.5),
            ("wide", 20, 30, 1.0),
            ("near", 40, 40, 0.52),
            ("far", 40, 40, 0.6),
            ("unknown", 40, 40, None),
        )
    )
    # A network's pixel covers crop / image_size, or shorter side / image_size, of the file's.
    assert frame_mpp([one], Preprocessing(16, 24)) == pytest.approx(0.75)
    assert frame_mpp([one, wide], Preprocessing(16)) == pytest.approx(0.5 * 40 / 16)
    assert frame_mpp([one, wide], Preprocessing(16, 16)) is None
    assert frame_mpp([one, near], Preprocessing(80)) == pytest.approx(0.255)
    for others in ([far], [unknown]):
        assert frame_mpp([one, *others], Preprocessing(16, 24)) is None


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


def test_a_named_training_split_that_gives_up_patches_is_told_and_can_stay_whole(tmp_path, make_patches, data_config):
    for split, count in (("train", 40), ("val", 10)):
        make_patches(tmp_path / "root" / split, num={"A": count, "B": count})
    config = data_config(tmp_path / "root")
    records, _ = list_records(config, seed=0)
    assert Counter(record.split for record in records) == {"train": 64, "test": 16, "val": 20}
    told = taken_from_training(patch_index(config, seed=0))
    assert told.startswith("WARNING: the data names 80 patches train and none test: of these 16 test;")
    assert "set data.split.test=0" in told
    assert told in check(config, tmp_path)[0].splitlines()
    whole = data_config(tmp_path / "root", split={"test": 0})
    assert Counter(record.split for record in list_records(whole, seed=0)[0]) == {"train": 80, "val": 20}
    assert taken_from_training(patch_index(whole, seed=0)) is None
    assert "WARNING" not in check(whole, tmp_path)[0]


def test_nothing_is_told_where_the_data_names_no_training_split(patch_folder, data_config):
    assert taken_from_training(patch_index(data_config(patch_folder), seed=0)) is None


def test_splits_that_are_all_given_stay():
    records = [r for s, g in zip(SPLITS, ("A1", "A2", "A3"), strict=True) for r in records_of({g: ("A", 2)}, split=s)]
    assert assign_splits(records, val=0.5, test=0.4, seed=0) == records


def test_a_patch_without_split_follows_its_group():
    named = records_of({"p1": ("A", 2), "p2": ("B", 2)}, split="test")
    open_ = [PatchRecord(f"more/{n}", Path("x"), "A", group="p1") for n in range(5)]
    assigned = splits_of(assign_splits(named + open_ + records_of(GROUPS), val=0.2, test=0.2, seed=0))
    assert {assigned[record.id] for record in open_} == {"test"}


def shares_of(assigned, label: str) -> dict[str, float]:
    count = Counter(record.split for record in assigned if record.label == label)
    return {split: count[split] / sum(count.values()) for split in SPLITS}


def test_few_unequal_groups_come_as_near_to_the_asked_shares_as_any_assignment():
    sizes = {"a": (9, 0), "b": (1, 8), "c": (5, 5), "d": (2, 2), "e": (3, 1), "f": (0, 4), "g": (6, 2), "h": (2, 7)}
    records = [
        PatchRecord(f"{group}/{label}{n}", Path("x"), label, group=group)
        for group, counts in sizes.items()
        for label, count in zip("AB", counts, strict=True)
        for n in range(count)
    ]
    counts = np.array(list(sizes.values()))
    asked = np.array([0.7, 0.1, 0.2])

    def deviation(sums) -> float:
        return float(((sums / counts.sum(0) - asked[:, None]) ** 2).sum())

    places = np.array(list(product(range(3), repeat=len(sizes))))
    every = [np.stack([counts[place == split].sum(0) for split in range(3)]) for place in places]
    best = min(deviation(sums) for sums in every if sums.all())
    for seed in range(3):
        assigned = assign_splits(records, val=0.1, test=0.2, seed=seed)
        found = np.array([[shares_of(assigned, label)[split] for label in "AB"] for split in SPLITS])
        assert (found > 0).all()
        assert ((found - asked[:, None]) ** 2).sum() <= best + 0.003


def test_sixteen_unequal_groups_come_within_two_points():
    rng = np.random.default_rng(0)
    for seed in range(5):
        sizes = rng.lognormal(3, 1, 16).astype(int) + 1
        groups = {f"{c}{n}": (c, size) for c in "AB" for n, size in enumerate(sizes)}
        assigned = assign_splits(records_of(groups), val=0.1, test=0.2, seed=seed)
        for label in "AB":
            found = shares_of(assigned, label)
            assert abs(found["val"] - 0.1) < 0.02
            assert abs(found["test"] - 0.2) < 0.02


def test_three_groups_or_patches_of_a_class_serve_all_splits_and_fewer_train_first():
    groups = {"A1": ("A", 50), "A2": ("A", 40), "A3": ("A", 30), "B1": ("B", 5)}
    alone = [PatchRecord(f"{n}", Path("x"), "CDD"[n % 3]) for n in range(3)]
    alone += [PatchRecord(f"E{n}", Path("x"), "E") for n in range(3)]
    found = {r.id: r for r in assign_splits(records_of(groups) + alone, val=0.1, test=0.2, seed=0)}.values()
    splits = {label: {r.split for r in found if r.label == label} for label in "ABCDE"}
    assert splits == {"A": set(SPLITS), "B": {"train"}, "C": {"train"}, "D": {"train", "val"}, "E": set(SPLITS)}


def test_patches_without_a_group_make_up_for_what_groups_miss():
    groups = {f"A{n}": ("A", 30) for n in range(3)}
    alone = [PatchRecord(f"{n}", Path("x"), "A") for n in range(110)]
    for seed in range(3):
        assigned = assign_splits(records_of(groups) + alone, val=0.1, test=0.2, seed=seed)
        assert shares_of(assigned, "A") == pytest.approx({"train": 0.65, "val": 0.15, "test": 0.2}, abs=0.051)
        assert Counter(r.split for r in assigned)["test"] == 40


def test_a_new_group_moves_few_others_where_shares_are_near_already():
    groups = {f"{c}{n}": (c, 1 + n % 3) for c in "AB" for n in range(300)}
    before = splits_of(assign_splits(records_of(groups), val=0.1, test=0.2, seed=0))
    after = splits_of(assign_splits(records_of({**groups, "new": ("A", 2)}), val=0.1, test=0.2, seed=0))
    moved = {name.split("/")[0] for name, split in before.items() if after[name] != split}
    assert len(moved) <= 30


def test_the_only_group_of_a_class_trains():
    assigned = assign_splits(
        records_of({"A1": ("A", 9), **{f"B{n}": ("B", 1) for n in range(9)}}), val=0.2, test=0.2, seed=0
    )
    assert {record.split for record in assigned if record.label == "A"} == {"train"}


def test_groups_that_train_leave_the_others_aside_and_the_rest_as_it_was(tmp_path, make_patches, data_config):
    root = tmp_path / "patches"
    for split, group in (*(("train", f"t{n}") for n in range(3)), ("val", "v"), ("test", "x")):
        make_patches(tmp_path / "made" / group, num={"A": 2, "B": 2})
        for label in "AB":
            (root / split / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "made" / group / label).rename(root / split / label / group)
    whole = load_patches(data_config(root), seed=0)
    config = data_config(root, split={"train_groups": ["t2", "t0"]})
    part = load_patches(config, seed=0)
    assert {part.ids[i].split("/")[2] for i in part.indices("train")} == {"t0", "t2"}
    for split in ("val", "test"):
        assert np.array_equal(part.indices(split), whole.indices(split))
    assert len(part.indices("train")) == len(whole.indices("train")) - 4 == 8
    assert part.pixels is whole.pixels, "one cache serves every choice of groups"
    record_splits(tmp_path / "run", part)
    assert len((tmp_path / "run" / "splits.csv").read_text().splitlines()) == 1 + 8 + 8
    text, ready = check_data(config, seed=0, sheet=tmp_path / "sheet.png")
    assert ready
    assert "left aside by data.split.train_groups: 4 patches" in text
    for wrong in ("v", "unknown"):
        with pytest.raises(UserError, match=rf"train_groups: {wrong}: no training group"):
            load_patches(data_config(root, split={"train_groups": ["t0", wrong]}), seed=0)


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
    for number, row in enumerate(rows):
        phantom = make_phantom(float(row["score"]), size=16, seed=derive_seed(0, "range", number))
        np.testing.assert_array_equal(read_rgb(root / row["path"]), phantom.image)
        assert int(row["num_nuclei"]) == len(np.unique(phantom.labels)) - 1 > 0
        assert float(row["area_fraction"]) == pytest.approx((phantom.labels > 0).mean(), abs=1e-6)


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


def test_a_received_configuration_makes_no_phantoms_where_it_says(tmp_path, write_config):
    root = tmp_path / "patches"
    path = write_config(tmp_path, file="config.yaml", data={"layout": PHANTOM})
    with pytest.raises(UserError, match=r"data\.root=.*patches: holds no phantoms, and none are made .*--trust"):
        list_records(load_config(path).data, seed=0)
    assert not root.exists()
    named = load_config(path, [f"data.root={root}"])
    assert list_records(named.data, seed=0) == list_records(load_config(path).data, seed=0)
    list_records(load_config(path, ["data.root=" + str(tmp_path / "other")]).data, seed=0)
    shutil.rmtree(root)
    list_records(load_config(path, trust=True).data, seed=0)


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
    assert "microns" not in report
    # Rows of at most twelve tiles of 16 px, six times enlarged.
    assert read_rgb(tmp_path / "sheet.png").shape == (2 * 24 + (2 * 18 - 2) * 6, (12 * 18 - 2) * 6, 3)
    for other, told in ((0.4, "0.5"), (0.8, "not known")):
        rows = [{"path": f"{label}/{label}000.png", "label": label, "mpp": 0.4} for label in "AB"]
        write_manifest(root, [*rows, {"path": "B/B001.png", "label": "B", "mpp": other}])
        assert f"microns per pixel at 16 px: {told}" in check(data_config(root), tmp_path)[0]


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
    assert f"{patch_folder / 'A' / 'A000.png'}: truncated or not a PNG, JPEG, TIFF or NPY image" in report
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
