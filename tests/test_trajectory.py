"""Trajectory folders: what is written reads back, a stopped run resumes, and damage is named."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images import write_png
from cellflux_bridge.trajectory import (
    Trajectory,
    TrajectoryHeader,
    TrajectoryWriter,
    iter_trajectory,
    linear_soft_labels,
    load_trajectory,
    read_header,
)

HEADER = TrajectoryHeader("path", "A", "C", ("A", "B", "C"), (0.0, 1 / 3, 1.0), "0123@7")


def sequences(*ids: str, header: TrajectoryHeader = HEADER, size: int = 4) -> Trajectory:
    """A sequence an id, its pixels decided by the id alone."""
    shape = (len(header.levels), 3, size, size)
    frames = [
        np.random.default_rng(list(source_id.encode())).integers(0, 256, shape, dtype=np.uint8) for source_id in ids
    ]
    nfe = tuple(10 + len(source_id) for source_id in ids)
    gradients = tuple(3 * count for count in nfe)
    return Trajectory(header, np.stack(frames, axis=1), linear_soft_labels(header, len(ids)), ids, nfe, gradients)


def assert_equal(found: Trajectory, expected: Trajectory) -> None:
    assert found.header == expected.header
    assert found.source_ids == expected.source_ids
    assert found.nfe == expected.nfe
    assert found.gradients == expected.gradients
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
    with pytest.raises(UserError, match=f"holds another run .its {next(iter(change))} differ"):
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
    with pytest.raises(UserError, match=r"trajectory\.json: mpp 'small': expected microns per pixel"):
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
    with pytest.raises(UserError, match="expected format 2"):
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


def test_a_missing_truncated_or_resized_frame_is_named(tmp_path):
    write(tmp_path, "a", "b").finish()
    frame = one_frame(tmp_path, 1, 2)
    data = frame.read_bytes()
    write_png(frame, np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(UserError, match=r"000001_b/002\.png: 6 x 4 pixels, unlike the others"):
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
    manifest.write_text(good.replace("0.666667", "two thirds"), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.csv: a: .*two thirds"):
        load_trajectory(tmp_path)
    manifest.write_text(good.replace("p_B", "p_X"), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.csv: expected the columns file, source_id"):
        load_trajectory(tmp_path)
    manifest.write_bytes(b"\xff\xfe\r\n")
    with pytest.raises(UserError, match=r"manifest\.csv: cannot be read"):
        load_trajectory(tmp_path)
