"""Trajectory folders: what is written reads back, a stopped run resumes, damage is named, and nothing leads outside."""

import csv
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images import read_rgb, write_png
from cellflux_bridge.trajectory import (
    Trajectory,
    TrajectoryHeader,
    TrajectoryWriter,
    count_incomplete,
    export_cellflow,
    iter_trajectory,
    linear_soft_labels,
    load_trajectory,
    read_header,
    read_source_ids,
    reader,
)

HEADER = TrajectoryHeader("path", "A", "C", ("A", "B", "C"), (0.0, 1 / 3, 1.0), "0123@7")


def sequences(
    *ids: str, header: TrajectoryHeader = HEADER, size: int = 4, channels: int = 3, has_depth: bool = False
) -> Trajectory:
    """A sequence an id, its pixels (and depths) decided by the id alone."""
    shape = (len(header.levels), channels, size, size)
    frames = [
        np.random.default_rng(list(source_id.encode())).integers(0, 256, shape, dtype=np.uint8) for source_id in ids
    ]
    nfe = tuple(10 + len(source_id) for source_id in ids)
    gradients = tuple(3 * count for count in nfe)
    depths = np.array([[0.0, len(source_id), 90.5] for source_id in ids]).T if has_depth else None
    return Trajectory(
        header, np.stack(frames, axis=1), linear_soft_labels(header, len(ids)), ids, nfe, gradients, depths
    )


def assert_equal(found: Trajectory, expected: Trajectory) -> None:
    assert found.header == expected.header
    assert found.source_ids == expected.source_ids
    assert found.nfe == expected.nfe
    assert found.gradients == expected.gradients
    np.testing.assert_array_equal(found.depths, expected.depths)
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_allclose(found.soft_labels, expected.soft_labels, atol=1e-5)


def write(folder, *ids: str, start: int = 0, **options) -> TrajectoryWriter:
    writer = TrajectoryWriter(folder, HEADER, **options)
    if ids:
        writer.append(sequences(*ids), numbers=range(start, start + len(ids)))
    return writer


def test_soft_labels_move_in_a_straight_line_from_source_to_target():
    labels = linear_soft_labels(HEADER, 2)
    np.testing.assert_allclose(labels[:, 1], [[1, 0, 0], [2 / 3, 0, 1 / 3], [0, 0, 1]], atol=1e-6)
    same = linear_soft_labels(replace(HEADER, target="A"), 1)
    np.testing.assert_allclose(same[:, 0], [[1, 0, 0]] * 3)


def test_what_is_written_reads_back(tmp_path):
    ids = ("A/one.png", 'A/näme, with "odd" signs.png', "B\\two.png", "three")
    write(tmp_path / "run", *ids).finish()
    assert read_header(tmp_path / "run") == HEADER
    assert_equal(load_trajectory(tmp_path / "run"), sequences(*ids))
    assert_equal(load_trajectory(tmp_path / "run", start=1, num=2), sequences(*ids[1:3]))


def test_batches_of_a_folder_join_to_the_whole(tmp_path):
    ids = [f"{n}.png" for n in range(7)]
    write(tmp_path, *ids).finish()
    parts = list(iter_trajectory(tmp_path, batch_size=3))
    assert [len(part.source_ids) for part in parts] == [3, 3, 1]
    assert_equal(Trajectory.cat(parts), sequences(*ids))


def test_a_sequence_as_images_has_channels_last():
    trajectory = sequences("a", "b")
    np.testing.assert_array_equal(trajectory.sequence(1)[2, :, :, 0], trajectory.frames[2, 1, 0])


def test_sequences_stand_in_the_runs_order_whatever_the_order_of_writing(tmp_path):
    write(tmp_path, "c", "d", start=2)
    write(tmp_path, "a", "b").finish()
    assert_equal(load_trajectory(tmp_path), sequences("a", "b", "c", "d"))


def test_more_than_a_thousand_frames_keep_their_order(tmp_path):
    header = replace(HEADER, levels=tuple(np.linspace(0, 1, 1002).tolist()))
    trajectory = sequences("a", header=header, size=1)
    writer = TrajectoryWriter(tmp_path, header)
    writer.append(trajectory, numbers=[0])
    writer.finish()
    assert_equal(load_trajectory(tmp_path), trajectory)


def test_ids_with_the_same_stem_do_not_overwrite_each_other(tmp_path):
    ids = ("A/p1/x.png", "A/p2/x.png", "A/p2/x.tif", "A/" + "y" * 90 + "1.png", "A/" + "y" * 90 + "2.png")
    write(tmp_path, *ids).finish()
    assert_equal(load_trajectory(tmp_path), sequences(*ids))


def test_a_run_that_is_opened_again_knows_what_is_done(tmp_path):
    assert write(tmp_path, "a", "b").done == {"a", "b"}
    writer = write(tmp_path)
    assert writer.done == {"a", "b"}
    writer.append(sequences("c"), numbers=[2])
    assert writer.done == {"a", "b", "c"}
    writer.finish()
    assert_equal(load_trajectory(tmp_path), sequences("a", "b", "c"))


def cut_points() -> list[int]:
    """Places in a manifest of two sequences: in its heading, its first and second sequence, at line ends, in digits."""
    return [0, 3, 20, 47, 48, 49, 70, 91, 130, 200, 205, 206, 240, 249, 280, 310, 340, 350, -1, -2, -3, -5, -9]


@pytest.mark.parametrize("cut", cut_points())
def test_a_run_cut_anywhere_keeps_whole_sequences_and_redoes_the_rest(tmp_path, cut):
    write(tmp_path, "a", "b")
    manifest = tmp_path / "manifest.csv"
    text = manifest.read_bytes()
    manifest.write_bytes(text[:cut])
    writer = write(tmp_path)
    whole = [text.find(f"_{name}/002.png".encode()) for name in "ab"]
    ends = [text.find(b"\n", place) + 1 for place in whole]
    assert writer.done == {name for name, end in zip("ab", ends, strict=True) if end <= len(text[:cut])}
    for number, name in enumerate("abc"):
        if name not in writer.done:
            writer.append(sequences(name), numbers=[number])
    writer.finish()
    assert_equal(load_trajectory(tmp_path), sequences("a", "b", "c"))


def test_a_run_stopped_between_its_first_files_resumes(tmp_path):
    write(tmp_path)
    (tmp_path / "frames").rmdir()
    (tmp_path / "manifest.csv.tmp").touch()
    write(tmp_path, "a").finish()
    assert_equal(load_trajectory(tmp_path), sequences("a"))


def test_the_manifests_of_several_processes_merge(tmp_path):
    TrajectoryWriter(tmp_path, HEADER)
    writers = [TrajectoryWriter(tmp_path, HEADER, rank=rank) for rank in range(3)]
    for rank in (2, 0, 1):
        ids = [f"{n}" for n in range(rank, 7, 3)]
        writers[rank].append(sequences(*ids), numbers=[int(n) for n in ids])
    expected = sequences(*[str(n) for n in range(7)])
    assert_equal(load_trajectory(tmp_path), expected)
    writers[0].finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", "manifest.csv", "trajectory.json"]
    assert_equal(load_trajectory(tmp_path), expected)


def test_a_run_of_several_processes_resumes_with_fewer(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b", "c", start=1, rank=1)
    manifest = tmp_path / "manifest.rank1.csv"
    manifest.write_bytes(manifest.read_bytes()[:-30])
    writer = write(tmp_path)
    assert writer.done == {"a", "b"}
    writer.append(sequences("c"), numbers=[2])
    writer.finish()
    assert_equal(load_trajectory(tmp_path), sequences("a", "b", "c"))


def test_a_merge_stopped_half_way_counts_nothing_twice(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b", start=1, rank=1)
    part = (tmp_path / "manifest.rank1.csv").read_bytes()
    write(tmp_path).finish()
    (tmp_path / "manifest.rank1.csv").write_bytes(part)
    assert_equal(load_trajectory(tmp_path), sequences("a", "b"))
    write(tmp_path).finish()
    assert_equal(load_trajectory(tmp_path), sequences("a", "b"))


@pytest.mark.parametrize(
    "change",
    [{"config_hash": "other"}, {"target": "B"}, {"levels": (0.0, 0.5, 1.0)}, {"classes": ("A", "C")}],
    ids=lambda change: next(iter(change)),
)
def test_another_run_is_refused_with_what_differs(tmp_path, change):
    write(tmp_path, "a")
    told = next(iter(change)).replace("config_hash", "settings or weights")
    with pytest.raises(UserError, match=f"what differs: {told}"):
        TrajectoryWriter(tmp_path, replace(HEADER, **change))


def test_a_foreign_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "precious.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no trajectory"):
        write(tmp_path)
    with pytest.raises(UserError, match=r"precious\.txt: is a file"):
        write(tmp_path / "precious.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_microns_per_pixel_go_along_and_may_be_missing(tmp_path):
    header = replace(HEADER, mpp=0.37)
    TrajectoryWriter(tmp_path, header)
    assert read_header(tmp_path) == header
    path = tmp_path / "trajectory.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "mpp": "small"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"trajectory\.json: mpp: .*number.* found 'small'"):
        read_header(tmp_path)
    del content["mpp"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_header(tmp_path) == HEADER


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', json.dumps({"format": 2, "method": 1, **dict.fromkeys(
        ("source", "target", "classes", "levels", "config_hash"), 3)})]
)  # fmt: skip
def test_a_broken_header_is_refused_by_name(tmp_path, text):
    write(tmp_path, "a")
    (tmp_path / "trajectory.json").write_text(text, encoding="utf-8")
    for use in (load_trajectory, read_header, write):
        with pytest.raises(UserError, match=r"trajectory\.json: "):
            use(tmp_path)


def test_a_header_of_another_format_is_refused(tmp_path):
    write(tmp_path, "a")
    path = tmp_path / "trajectory.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"format": 2', '"format": 99'), encoding="utf-8")
    with pytest.raises(UserError, match="expected a mapping of format 2, found 99"):
        read_header(tmp_path)


def test_a_folder_without_trajectory_or_without_sequences_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no trajectory\.json here"):
        load_trajectory(tmp_path)
    write(tmp_path / "run")
    with pytest.raises(UserError, match="holds no whole sequence"):
        load_trajectory(tmp_path / "run")
    assert list(iter_trajectory(tmp_path / "run")) == []


def one_frame(folder, number: int, level: int):
    return next(folder.glob(f"frames/{number:06d}_*")) / f"{level:03d}.png"


def test_a_missing_truncated_or_resized_frame_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a", "b").finish()
    frame = one_frame(tmp_path, 1, 2)
    data = frame.read_bytes()
    write_png(frame, np.zeros((4, 6, 3), np.uint8))
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_rgb", None)  # sizes come from the headers: nothing is decoded
        with pytest.raises(UserError, match=r"000001_b/002\.png: 6 x 4 pixels, 3 channels, unlike the others"):
            load_trajectory(tmp_path)
    frame.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"000001_b/002\.png: truncated"):
        load_trajectory(tmp_path)
    frame.unlink()
    with pytest.raises(UserError, match=r"000001_b/002\.png: no such file"):
        load_trajectory(tmp_path)
    assert_equal(load_trajectory(tmp_path, num=1), sequences("a"))


def test_a_manifest_that_is_not_ours_is_refused_by_name(tmp_path):
    write(tmp_path, "a").finish()
    manifest = tmp_path / "manifest.csv"
    good = manifest.read_text(encoding="utf-8")
    manifest.write_text(good.replace("p_B", "p_X"), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.csv, line 1: expected the columns file, source_id"):
        load_trajectory(tmp_path)
    manifest.write_bytes(b"\xff\xfe\r\n")
    with pytest.raises(UserError, match=r"manifest\.csv: cannot be read"):
        load_trajectory(tmp_path)


def test_a_folder_of_an_earlier_version_is_read(tmp_path):
    header = {"format": 2, "method": "path", "source": "A", "target": "B", "classes": ["A", "B"], "levels": [0, 1]}
    (tmp_path / "trajectory.json").write_text(json.dumps({**header, "config_hash": "ab@3:cd"}))
    lines = ["file,source_id,level,nfe,gradients,p_A,p_B", "frames/000000_=x/000.png,A/=x.png,0.0,4,0,1,0"]
    lines += ["frames/000000_=x/001.png,A/=x.png,1.0,4,0,0,1", ""]
    (tmp_path / "manifest.csv").write_text("\r\n".join(lines))
    (tmp_path / "frames" / "000000_=x").mkdir(parents=True)
    for level in (0, 1):
        write_png(tmp_path / "frames" / "000000_=x" / f"00{level}.png", np.full((2, 3, 3), 100 + level, np.uint8))
    found = load_trajectory(tmp_path)
    assert (found.source_ids, found.nfe, found.gradients, found.depths) == (("A/=x.png",), (4,), (0,), None)
    assert found.header == TrajectoryHeader("path", "A", "B", ("A", "B"), (0.0, 1.0), "ab@3:cd")
    assert (found.frames == np.array([100, 101])[:, None, None, None, None]).all()
    TrajectoryWriter(tmp_path, found.header).finish()
    assert_equal(load_trajectory(tmp_path), found)


# --- what an id, a label and a frame may be ---------------------------------------------------------------------------


def test_any_id_reads_back_and_stays_in_its_folder(tmp_path):
    ids = (
        "=x.png",
        "'=x.png",
        "''+x",
        "'x",
        "-5.png",
        "@a",
        "+",
        "..",
        "../../x",
        "/etc/x",
        "a\0b",
        'a,"b"\r\nc\n',
        "",
    )
    ids += ("\t=1", " a ", ".hidden", "A/" + "ä" * 300, "A\\..\\x", "C:\\x", "名/组织.png")
    write(tmp_path / "run", *ids).finish()
    assert_equal(load_trajectory(tmp_path / "run"), sequences(*ids))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    names = sorted(os.listdir(tmp_path / "run" / "frames"))
    assert [name[:7] for name in names] == [f"{number:06d}_" for number in range(len(ids))]
    assert max(len(os.fsencode(name)) for name in names) <= 255
    with open(tmp_path / "run" / "manifest.csv", newline="", encoding="utf-8") as file:
        assert not any(cell[:1] in tuple("=+-@\t\r") for row in csv.reader(file) for cell in row if cell)


def test_any_class_label_reads_back(tmp_path):
    classes = ("a,b", 'say "so"', "two\nlines", "=1+1", "", "../x")
    header = replace(HEADER, source="a,b", target="=1+1", classes=classes)
    writer = TrajectoryWriter(tmp_path, header)
    writer.append(sequences("a", header=header), numbers=[0])
    writer.finish()
    assert_equal(load_trajectory(tmp_path), sequences("a", header=header))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_frames_have_any_number_of_channels(tmp_path, channels):
    expected = sequences("a", "b", channels=channels)
    TrajectoryWriter(tmp_path, HEADER).append(expected, numbers=[0, 1])
    found = load_trajectory(tmp_path)
    assert found.frames.shape == (3, 2, channels, 4, 4)
    assert_equal(found, expected)
    kinds = {path.suffix for path in tmp_path.glob("frames/*/*")}
    assert kinds == ({".png"} if channels == 3 else {".npy"})


def test_frames_of_arrays_are_whole_and_hold_no_code(tmp_path):
    TrajectoryWriter(tmp_path, HEADER).append(sequences("a", channels=5), numbers=[0])
    frame = next(tmp_path.glob("frames/*/001.npy"))
    good = frame.read_bytes()
    huge = good.replace(b"(4, 4, 5)", b"(9**9,1,5)").replace(
        b"'shape': (9**9,1,5), }  ", b"'shape': (99999999, 9, 5), }"
    )
    for content, message in (
        (good[:-3], r"001\.npy: truncated or no array"),
        (huge, r"001\.npy: truncated or no array"),
        (pickle.dumps([1]), r"001\.npy: truncated or no array"),
        (None, r"001\.npy: no such file"),
    ):
        frame.unlink() if content is None else frame.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_trajectory(tmp_path)
    for array in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 5)), np.zeros((4, 0, 5), np.uint8)):
        np.save(frame, array)
        with pytest.raises(UserError, match=r"001\.npy: .*expected uint8 .H, W, C."):
            load_trajectory(tmp_path)


def test_depths_go_along_where_a_method_has_them(tmp_path):
    with_depth = sequences("a", "bcd", has_depth=True)
    writer = TrajectoryWriter(tmp_path / "with", HEADER)
    writer.append(with_depth, numbers=[0, 1])
    writer.finish()
    assert_equal(load_trajectory(tmp_path / "with"), with_depth)
    resumed = TrajectoryWriter(tmp_path / "with", HEADER)
    resumed.append(sequences("e", has_depth=True), numbers=[2])
    parts = list(iter_trajectory(tmp_path / "with", batch_size=2))
    assert_equal(Trajectory.cat(parts), sequences("a", "bcd", "e", has_depth=True))
    write(tmp_path / "without", "a").finish()
    assert load_trajectory(tmp_path / "without").depths is None
    assert "depth" not in (tmp_path / "without" / "manifest.csv").read_text()


def test_a_folder_written_without_depths_goes_on_with_them(tmp_path):
    write(tmp_path, "a")
    writer = TrajectoryWriter(tmp_path, HEADER)
    writer.append(sequences("b", has_depth=True), numbers=[1])
    writer.append(sequences("c"), numbers=[2])
    writer.finish()
    found = load_trajectory(tmp_path)
    assert found.source_ids == ("a", "b", "c")
    none = [np.nan] * 3
    np.testing.assert_array_equal(found.depths.T, [none, [0, 1, 90.5], none])
    joined = Trajectory.cat([sequences("a"), sequences("b", has_depth=True)])
    np.testing.assert_array_equal(joined.depths, found.depths[:, :2])


# --- a folder that comes from somebody else ---------------------------------------------------------------------------


def rows_of(folder) -> list[list[str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def put_rows(folder, rows) -> None:
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize("kind", ["absolute", "parent", "parent_within", "frame_link", "folder_link", "nul"])
def test_frames_outside_the_folder_are_refused_with_their_line(tmp_path, kind):
    run, outside = tmp_path / "run", tmp_path / "outside"
    write(run, "a").finish()
    write(outside, "a").finish()
    rows, taken = rows_of(run), next(outside.glob("frames/*/001.png"))
    frame = run / rows[2][0]
    if kind == "frame_link":
        frame.unlink()
        frame.symlink_to(taken)
    elif kind == "folder_link":
        (run / "frames").rename(run / "old")
        (run / "frames").symlink_to(outside / "frames")
    else:
        name = {"absolute": str(taken), "parent": f"../outside/{taken.relative_to(outside)}", "nul": "a\0"}
        rows[2][0] = name.get(kind, f"frames/../{rows[2][0]}")
        put_rows(run, rows)
    line = 2 if kind == "folder_link" else 3
    with pytest.raises(UserError, match=rf"run, manifest, line {line}: .*leads out of the trajectory"):
        load_trajectory(run)
    with pytest.raises(UserError, match="leads out of the trajectory"):
        list(iter_trajectory(run))


@pytest.mark.parametrize("name", ["trajectory.json", "manifest.csv"])
def test_linked_tables_are_not_read(tmp_path, name):
    write(tmp_path / "run", "a").finish()
    (tmp_path / "run" / name).rename(tmp_path / name)
    (tmp_path / "run" / name).symlink_to(tmp_path / name)
    for use in (load_trajectory, read_source_ids, count_incomplete):
        with pytest.raises(UserError, match=rf"'{name}': leads out"):
            use(tmp_path / "run")


@pytest.mark.parametrize("name", ["manifest.csv.tmp", "frames", "frames/000001_b", "frames/000000_a/000.png.tmp"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    run, precious = tmp_path / "run", tmp_path / "precious"
    write(run, "a")
    if name == "frames":
        (run / "frames").rename(tmp_path / "old")
    precious.mkdir()
    (run / name).symlink_to(precious)
    with pytest.raises(UserError, match=rf"{name}: is a symbolic link; remove it"):
        write(run, "b", start=1)
    assert list(precious.iterdir()) == []


@pytest.mark.parametrize("channels", [3, 5])
def test_frames_are_not_written_through_a_link_at_a_temporary_name(tmp_path, channels):
    """Also not through one that appears after the folder was opened."""
    run, precious = tmp_path / "run", tmp_path / "precious"
    writer = TrajectoryWriter(run, HEADER)
    precious.write_text("mine")
    (run / "frames" / "000000_a").mkdir()
    for name in (f"frames/000000_a/000.{'png' if channels == 3 else 'npy'}", "manifest.csv"):
        (run / f"{name}.{os.getpid()}.tmp").symlink_to(precious)
    writer.append(sequences("a", channels=channels), numbers=[0])
    writer.finish()
    assert precious.read_text() == "mine"
    assert_equal(load_trajectory(run), sequences("a", channels=channels))
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": [0, 1, 0.5]}, "levels: .*numbers that rise"),
        ({"levels": [0, 0.5, 0.5]}, "levels: .*numbers that rise"),
        ({"levels": [0, float("nan"), 1]}, r"levels\.1: "),
        ({"levels": [0, 1.5]}, r"levels\.1: .*less than or equal to 1"),
        ({"levels": [-0.5, 1]}, r"levels\.0: .*greater than or equal to 0"),
        ({"levels": [0]}, "levels: .*at least 2 items"),
        ({"levels": [0, 10**400]}, ""),
        ({"levels": 3}, "levels: "),
        ({"classes": ["A", "C", "A"]}, "classes: .*different labels"),
        ({"classes": ["A", "B"]}, "source and target: expected labels of its classes"),
        ({"classes": ["A", 3, "C"]}, r"classes\.1: .*string"),
        ({"source": None}, "source: .*string"),
        ({"mpp": float("inf")}, "mpp: "),
        ({"mpp": 0}, "mpp: .*greater than 0"),
        ({"extra": 1}, "extra: "),
    ],
)
def test_a_header_that_cannot_be_is_refused_by_name(tmp_path, change, message):
    write(tmp_path, "a")
    path = tmp_path / "trajectory.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/trajectory\.json: {message}"):
        read_header(tmp_path)


def test_large_tables_are_refused_before_they_are_read(tmp_path, monkeypatch):
    write(tmp_path, "a").finish()
    for name, size in (("trajectory.json", 2**21), ("manifest.csv", 2**29)):
        path = tmp_path / name
        good = path.read_bytes()
        with open(path, "ab") as file:
            file.truncate(size)
        with pytest.raises(UserError, match=rf"{name}: {size:,} bytes, more than"):
            load_trajectory(tmp_path)
        path.write_bytes(good)
    (tmp_path / "trajectory.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"trajectory\.json: cannot be read"):
        load_trajectory(tmp_path)


def test_frames_are_refused_before_memory_is_taken_and_batches_stay_small(tmp_path, monkeypatch):
    write(tmp_path, "a", "b", "c").finish()
    of_one = 3 * 3 * 4 * 4
    monkeypatch.setattr(reader, "_BATCH_BYTES", 2 * of_one)
    assert [len(part.source_ids) for part in iter_trajectory(tmp_path)] == [2, 1]
    monkeypatch.setattr(reader, "_BATCH_BYTES", 1)
    assert_equal(Trajectory.cat(list(iter_trajectory(tmp_path))), sequences("a", "b", "c"))
    monkeypatch.setattr(reader, "_MAX_BYTES", 3 * of_one)
    assert_equal(load_trajectory(tmp_path), sequences("a", "b", "c"))
    monkeypatch.setattr(reader, "_MAX_BYTES", 3 * of_one - 1)
    monkeypatch.setattr(reader, "read_rgb", None)
    with pytest.raises(UserError, match=r"3 sequences of 3 frames of 4 x 4 pixels are .* read them in parts"):
        load_trajectory(tmp_path)


@pytest.mark.parametrize(
    ("row", "cells", "message"),
    [
        (2, {7: "two thirds"}, "line 3: .*two thirds"),
        (2, {3: "many"}, "line 3: .*many"),
        (2, {2: "0.5"}, "line 3: expected level 0.333333"),
        (3, {2: "nan"}, "line 4: .*not finite"),
        (3, {5: "1e999"}, "line 4: .*not finite"),
        (1, {5: "-0.5", 6: "1.5"}, "line 2: probabilities -0.5, 1.5, 0: expected numbers from 0 to 1 that sum to 1"),
        (1, {5: "0.5"}, "line 2: probabilities 0.5, 0, 0: "),
        (1, {5: "1.5"}, "line 2: probabilities 1.5, 0, 0: "),
        (2, {8: "surplus"}, "line 3: 9 cells, expected 8"),
        (2, {7: None}, "line 3: 7 cells, expected 8"),
        (4, {1: "a", 2: "0.5"}, "line 5: more frames of 'a'|line 4: more frames of 'a'"),
        (2, {1: "x" * 200_000}, "line 3: field larger"),
    ],
)
def test_damaged_rows_are_named_by_their_line(tmp_path, row, cells, message):
    write(tmp_path, "a", "b").finish()
    rows = rows_of(tmp_path)
    for column, cell in cells.items():
        rows[row][column : column + 1] = [] if cell is None else [cell]
    put_rows(tmp_path, rows)
    for use in (load_trajectory, read_source_ids, write):
        with pytest.raises(UserError, match=rf"^{tmp_path}/manifest\.csv, (?:{message})"):
            use(tmp_path)


def test_sources_without_all_their_rows_are_counted_and_left_out(tmp_path):
    write(tmp_path, "a", "b", "c").finish()
    rows = rows_of(tmp_path)
    put_rows(tmp_path, [*rows[:5], *rows[7:]])
    assert read_source_ids(tmp_path) == ("a", "c")
    assert count_incomplete(tmp_path) == 1


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddim", "path"])
def test_sequences_are_exported_in_cellflows_layout(tmp_path, monkeypatch, method):
    header = replace(HEADER, method=method, source="A")
    made = sequences("x/a.png", "bb", "ccc", header=header, has_depth=method == "ddim")
    TrajectoryWriter(tmp_path / "run", header).append(made, numbers=range(3))
    monkeypatch.setattr(reader, "_BATCH_BYTES", 1)
    (tmp_path / "out" / "A_C.tmp" / "source_img").mkdir(parents=True)  # of an export that was stopped
    folder = export_cellflow(tmp_path / "run", tmp_path / "out")
    assert folder == tmp_path / "out" / "A_C"
    assert list(folder.parent.iterdir()) == [folder]
    source, target, depths = (np.load(folder / f"{name}.npy") for name in ("source", "target", "diffway"))
    assert (source.dtype, target.dtype, depths.dtype) == (np.float32, np.uint8, np.int64)
    np.testing.assert_array_equal(np.rint((source + 1) * 127.5), made.frames[0])
    np.testing.assert_array_equal(target, made.frames[1:].transpose(1, 0, 2, 3, 4))
    expected = [[len(name), 90] for name in made.source_ids] if method == "ddim" else [[1, 2]] * 3
    assert depths.tolist() == expected
    for n, (first, last) in enumerate(expected):
        found = read_rgb(folder / "target_img" / f"A-C_batch{n:04d}_img0000_step{last:04d}.png")
        np.testing.assert_array_equal(found, made.sequence(n)[2])
        assert (folder / "target_img" / f"A-C_batch{n:04d}_img0000_step{first:04d}.png").exists()
        found = read_rgb(folder / "source_img" / f"source_batch{n:04d}_img0000.png")
        np.testing.assert_array_equal(found, made.sequence(n)[0])
    assert len(list(folder.glob("*_img/*"))) == 9
    with pytest.raises(UserError, match="A_C: is there already"):
        export_cellflow(tmp_path / "run", tmp_path / "out")


def test_an_export_stays_in_its_folder_and_is_of_rgb_only(tmp_path):
    header = replace(HEADER, source="../" + "B" * 300, classes=("A", "../" + "B" * 300, "C"))
    TrajectoryWriter(tmp_path / "run", header).append(sequences("a", header=header), numbers=[0])
    folder = export_cellflow(tmp_path / "run", tmp_path / "out")
    assert folder.parent == tmp_path / "out"
    assert len(list(folder.glob("target_img/*"))) == 2
    TrajectoryWriter(tmp_path / "many", HEADER).append(sequences("a", channels=5), numbers=[0])
    with pytest.raises(UserError, match=r"frames of 5 channels; .* RGB images only"):
        export_cellflow(tmp_path / "many", tmp_path / "other")
