"""Bridge: a trained run as a Python object, and the folders of sequences that it writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cellflux_bridge import Bridge, cli, transport
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.images import read_rgb, write_png
from cellflux_bridge.trajectory import load_trajectory

QUICK = ("translate.steps=4", "translate.frames=3")


def trained(root: Path, write_config, *overrides: str, **sections) -> Path:
    file = write_config(root, data={"split": {"val": 0.2, "test": 0.4}}, **sections)
    cli.main(["train", str(file), "train.steps=2", "train.validate_pairs=8", "train.lr=0.01", *QUICK, *overrides])
    return root / "runs" / "tiny"


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory, make_patches, write_config) -> Path:
    root = tmp_path_factory.mktemp("plain")
    make_patches(root / "patches")
    return trained(root, write_config)


@pytest.fixture
def train(patch_folder, plain_run, tmp_path, write_config):
    """`train("key=value", ..., section={...})` trains a tiny run for two updates and returns its folder; without
    arguments it is a copy of one run."""

    def train(*overrides: str, **sections) -> Path:
        if overrides or sections:
            return trained(tmp_path, write_config, *overrides, **sections)
        run = Path(shutil.copytree(plain_run, tmp_path / "runs" / "tiny"))
        for file in run.rglob("config.yaml"):
            file.write_text(file.read_text().replace(str(plain_run.parents[1]), str(tmp_path)))
        return run

    return train


@pytest.fixture
def bridge(train) -> Bridge:
    return Bridge.load(train())


@pytest.fixture
def files(patch_folder) -> list[Path]:
    return sorted((patch_folder / "A").glob("*.png"))[:5]


def nearly_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to one grey level, which rounding of float32 noise can turn."""
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_files_are_carried_and_named(bridge, files):
    result = bridge.translate(files, steps=4, frames=5)
    assert result.frames.shape == (5, 5, 3, 16, 16)
    assert result.frames.dtype == np.uint8
    assert result.levels == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert result.source_ids == tuple(map(str, files))
    assert result.nfe == (8,) * 5
    assert (result.header.method, result.header.source, result.header.target) == ("path", "A", "B")
    np.testing.assert_allclose(result.soft_labels[:, 0], [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1]])
    for b, file in enumerate(files):
        patch = bridge.preprocessing(read_rgb(file), name=str(file))
        np.testing.assert_array_equal(result.sequence(b)[0], patch)
    assert not nearly_equal(result.frames[-1], result.frames[0])


def test_files_arrays_and_patches_are_one_thing(bridge, files):
    ids = [file.name for file in files]
    by_file = bridge.translate(files, ids=ids)
    by_text = bridge.translate([str(file) for file in files], ids=ids)
    by_array = bridge.translate([read_rgb(file) for file in files], ids=ids)
    by_patch = bridge.translate(torch.from_numpy(by_file.frames[0]), ids=ids)
    for other in (by_text, by_array, by_patch):
        np.testing.assert_array_equal(other.frames, by_file.frames)
    assert bridge.translate([read_rgb(files[0])]).source_ids == ("0",)


def test_an_image_alone_is_the_same_as_in_a_batch(bridge, files):
    together = bridge.translate(files, guidance_scale=2.0)
    alone = bridge.translate(files[3:4], guidance_scale=2.0)
    assert nearly_equal(alone.frames, together.frames[:, 3:4])
    split = bridge.translate(files, guidance_scale=2.0, batch_size=2)
    assert split.source_ids == together.source_ids
    assert nearly_equal(split.frames, together.frames)
    assert alone.nfe == (2 * 2 * 4,)


def test_ids_seed_the_noise(bridge, files):
    first, again, other = (bridge.translate(files[:1], ids=[name]) for name in ("a", "a", "b"))
    np.testing.assert_array_equal(first.frames, again.frames)
    assert not nearly_equal(first.frames[-1], other.frames[-1])


def test_both_directions_and_a_named_target(bridge, files):
    back = bridge.translate(files[:2], source="B", target="A")
    there = bridge.translate(files[:2], source="A", target="B")
    assert (back.header.source, back.header.target) == ("B", "A")
    assert not np.array_equal(back.frames[-1], there.frames[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "A", "target": "b"}, r"translate\.target: 'b' is no class of this run.*known: A, B"),
        ({"source": "A"}, r"translate\.target: not named; give --source and --target, each one of A, B"),
        ({"source": "A", "target": "A"}, r"translate\.target: 'A' is the source, too"),
        ({"step": 4}, r"translate\.step: unknown key; did you mean 'translate\.steps'"),
        ({"frames": 1}, r"translate\.frames: .*found 1"),
        ({"solver": "eulr"}, r"translate\.solver: .*'eulr'"),
        ({"frames": 9}, "4 steps have 5 states"),
        ({"reverse": True}, r"translate\.reverse: path NoisedSource"),
        ({"ids": ["x", "x"]}, "2 images need as many different ids, found 1 in 2"),
        ({"ids": ["x", "x", "y"]}, "2 images need as many different ids, found 2 in 3"),
    ],
)
def test_mistakes_in_a_call_are_named(bridge, files, options, message):
    with pytest.raises(UserError, match=message):
        bridge.translate(files[:2], **options)


def test_a_class_that_is_nearly_right_is_suggested(tmp_path, make_patches, write_config):
    make_patches(tmp_path / "patches", num={"lung_aca": 12, "lung_n": 12})
    bridge = Bridge.load(trained(tmp_path, write_config))
    with pytest.raises(UserError, match=r"'lung_ac' is no class of this run; did you mean 'lung_aca'\?"):
        bridge.translate(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), source="lung_n", target="lung_ac")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            r"expected uint8 \(B, 3, 16, 16\), found torch.uint8 \(2, 3, 8, 8\)",
        ),
        (torch.zeros(2, 3, 16, 16), r"found torch\.float32"),
        (torch.zeros(0, 3, 16, 16, dtype=torch.uint8), r"found torch\.uint8 \(0, 3, 16, 16\)"),
        ([], "none given"),
        ([np.zeros((16, 16), np.uint8)], r"images\[0\]: expected RGB uint8 \(H, W, 3\), found uint8 \(16, 16\)"),
        ([np.zeros((16, 16, 3))], r"images\[0\]: .*found float64"),
        (["nowhere.png"], r"nowhere\.png: no such file"),
    ],
)
def test_images_that_cannot_be_carried_are_named(bridge, images, message):
    with pytest.raises(UserError, match=message):
        bridge.translate(images)


def test_images_of_any_size_are_scaled_and_cropped(bridge):
    wide = np.asarray(Image.new("RGB", (200, 50), (200, 30, 90)))
    result = bridge.translate([wide])
    assert result.frames.shape[2:] == (3, 16, 16)
    assert (result.sequence(0)[0] == (200, 30, 90)).all()


def test_a_transition_that_was_not_trained_is_refused(train, files):
    bridge = Bridge.load(train("pairs.transitions=[[A, B]]"))
    assert bridge.translate(files[:1]).header.target == "B"
    with pytest.raises(UserError, match="never saw B -> A; it was trained on A -> B"):
        bridge.translate(files[:1], source="B", target="A")


def test_identity_may_be_carried_where_it_was_trained(train, files):
    result = Bridge.load(train("pairs.identity=true")).translate(files[:1], source="A", target="A")
    np.testing.assert_allclose(result.soft_labels[:, 0], [[1, 0]] * 3)


def test_a_straight_path_goes_back(train, files):
    run = train("path=straight", "velocity.predict=velocity")
    bridge = Bridge.load(run)
    there = bridge.translate(files[:2], source="A", target="B", steps=16)
    assert np.abs(there.frames[-1].astype(int) - there.frames[0]).mean() > 2
    back = bridge.translate(torch.from_numpy(there.frames[-1]), source="B", target="A", steps=16, reverse=True)
    assert np.abs(back.frames[-1].astype(int) - there.frames[0]).mean() < 1
    assert (back.header.source, back.header.target) == ("B", "A")
    folder, _ = Bridge.load(run, ["translate.reverse=true", "translate.num=2"]).translate_split()
    assert folder.name == "A_to_B_path_reverse"


def test_level_and_source_image_conditions_translate(train, files):
    bridge = Bridge.load(train(condition={"target": "level", "source_image": True, "source_class": False}))
    there, back = (bridge.translate(files[:2], source=s, target=t) for s, t in ("AB", "BA"))
    assert not np.array_equal(there.frames[-1], back.frames[-1])


def test_what_was_trained_cannot_be_changed_afterwards(train):
    run = train()
    for override, message in (
        ("path.scale=0.9", r"path\.scale \(0\.5 there, 0\.9 here\)"),
        ("velocity.channels=16", r"velocity\.channels"),
        ("seed=4", "seed"),
        ("data.split.test=0.3", r"data\.split\.test"),
    ):
        with pytest.raises(UserError, match=f"was trained otherwise and cannot be used with {message}"):
            Bridge.load(run, [override])
    assert Bridge.load(run, ["translate.steps=3", "train.devices=1", "classifier.view=grey", "name=x"]).step == 2


def test_a_checkpoint_folder_is_a_run_too(train, files):
    run = train()
    newest = Bridge.load(run)
    single = Bridge.load(run / "checkpoints" / "step-00000002")
    np.testing.assert_array_equal(single.translate(files[:1]).frames, newest.translate(files[:1]).frames)
    (run / "checkpoints" / "step-00000002").rename(run / "best")
    assert Bridge.load(run / "best").step == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        Bridge.load(tmp_path)


def test_a_run_of_several_devices_loads_on_one(train, files):
    run = train()
    bridge = Bridge.load(run, ["train.devices=4", "train.strategy=ddp", "train.num_nodes=2"])
    assert bridge.fabric.world_size == 1
    assert bridge.translate(files[:1]).frames.shape[1] == 1


class Still(transport.base.Transport):
    """A method of the user's own: every frame is the source."""

    def __init__(self, *, copies: int = 2):
        self._copies = copies

    def require(self, flow, *, given):
        pass

    def levels(self, flow, meter):
        return tuple(k / self._copies for k in range(self._copies + 1))

    def carry(self, flow, x0, *, noise, levels, meter):
        return transport.base.Result(x0.expand(len(levels) + 1, *x0.shape), nfe=7, gradients=0)


def test_a_method_of_ones_own_is_one_class(train, files):
    name = f"{__name__}:Still"
    run = train()
    found = Bridge.load(run).translate(files[:2], method=name, copies=3)
    assert (found.levels, found.nfe) == ((0, 1 / 3, 2 / 3, 1), (7, 7))
    np.testing.assert_array_equal(found.frames[-1], found.frames[0])
    folder, _ = Bridge.load(run, [f"translate.method={name}", "translate.num=1"]).translate_split()
    assert folder.name == "A_to_B_still"
    cli.main(
        ["translate", str(run), f"translate.method={name}", "translate.num=1", "translate.copies=5", "--overwrite"]
    )
    assert load_trajectory(folder).frames.shape[0] == 6
    for key, hint in (("frame", "frames"), ("copy", "copies")):
        named = rf"translate\.{key}: unknown key; did you mean 'translate\.{hint}'.*valid here: .*copies"
        with pytest.raises(UserError, match=named):
            Bridge.load(run, [f"translate.method={name}", f"translate.{key}=3"])
    with pytest.raises(UserError, match=r"translate\.copies: .*found 'many'"):
        Bridge.load(run, [f"translate.method={name}", "translate.copies=many"])
    with pytest.raises(UserError, match=r"was not run\. If you trust it, pass --trust"):
        load_config(folder / "config.yaml")


def test_another_method_over_a_file_that_holds_the_keys_of_one(train, files):
    run, name = train(), f"{__name__}:Still"
    own = ["translate.levels=3", "translate.calibrate=distance", "translate.spacing=adaptive", "translate.depths=full"]
    for method, keys in (("progression", own), ("depth", own), (name, ["translate.copies=4"])):
        file = run / "config.yaml"
        file.write_text(load_config(file, [f"translate.method={method}", *keys]).to_yaml())
        assert (f"{keys[0].split('.')[1].replace('=', ': ')}\n") in file.read_text()
        found = Bridge.load(run, ["translate.method=path"]).translate(files[:1])
        assert (found.header.method, len(found.frames)) == ("path", 3)
    bridge = Bridge.load(run, trust=True)  # its own method goes on as it was, and another may take its place in a call
    assert [len(bridge.translate(files[:1], **o).frames) for o in ({}, {"method": "path"}, {"copies": 2})] == [5, 3, 3]
    with pytest.raises(UserError, match=r"translate\.copies: unknown key"):
        bridge.translate(files[:1], method="path", copies=2)


@pytest.mark.parametrize("labels", [("a/b", "../c"), ("/x", "y\n"), ("b" * 200, "m" * 200)])
def test_the_folder_of_any_labels_lies_in_the_runs_own(bridge, labels):
    settings = bridge._settings(None, None, {}).model_copy(update=dict(zip(("source", "target"), labels, strict=True)))
    folder = bridge.config.output / "trajectories" / bridge._name(settings)
    assert folder.resolve().parent == (bridge.config.output / "trajectories").resolve()
    assert len(folder.name.encode()) <= 255
    assert folder.name.endswith("_path")
    folder.mkdir(parents=True)


# A split of the run's own patches


def digest(folder: Path) -> dict[str, bytes]:
    """The files of a trajectory, less what it cost to make."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    cost = json.loads(files.pop("cost.json"))
    assert cost["seconds"] > 0
    assert cost["device"] == "cpu"
    return files


def test_frames_on_disk_are_those_of_translate(train):
    bridge = Bridge.load(train(), ["translate.num=5", "translate.batch_size=2"])
    folder, figures = bridge.translate_split()
    assert folder == bridge.config.output / "trajectories" / "A_to_B_path"
    assert (figures["sequences"], figures["made_now"]) == (5, 5)
    found = load_trajectory(folder)
    patches = bridge.patches()
    chosen = patches.sample("test", "A", num=5, seed=bridge.config.seed)
    expected = bridge.translate(patches.centre(chosen), ids=[patches.ids[i] for i in chosen], batch_size=2)
    assert found.source_ids == expected.source_ids
    assert found.header == expected.header
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_allclose(found.soft_labels, expected.soft_labels, atol=1e-6)
    assert found.nfe == expected.nfe
    assert found.gradients == expected.gradients == (0,) * 5


def test_a_split_is_extended_and_resumed(train, tmp_path):
    run, part, whole = train(), tmp_path / "part", tmp_path / "whole"

    def carry(num: int, output: Path) -> dict:
        return Bridge.load(run, [f"translate.num={num}", "translate.batch_size=4"]).translate_split(output=output)[1]

    assert carry(4, part)["made_now"] == 4
    before = {path: path.stat().st_mtime_ns for path in part.rglob("*.png")}
    figures = carry(8, part)
    assert (figures["sequences"], figures["made_now"]) == (8, 4)
    assert 0 < figures["seconds"] < 60
    assert 0 < figures["cpu_seconds"] < 60
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert carry(8, part)["made_now"] == 0
    assert carry(8, whole)["made_now"] == 8
    assert digest(part) == digest(whole)
    # A kill may leave the last sequence without its last rows.
    manifest = (part / "manifest.csv").read_text().splitlines()
    (part / "manifest.csv").write_text("\n".join(manifest[:-2]) + "\n")
    assert carry(8, part)["made_now"] == 1
    assert load_trajectory(part).source_ids == load_trajectory(whole).source_ids


def test_moved_patches_complete_a_translation_and_others_of_the_same_names_do_not(
    train, patch_folder, tmp_path, make_patches
):
    run, output = train(), tmp_path / "out"

    def carry(root: Path, num: int, **options) -> int:
        bridge = Bridge.load(run, [f"data.root={root}", f"translate.num={num}"])
        return bridge.translate_split(output=output, **options)[1]["made_now"]

    assert carry(patch_folder, 2) == 2
    assert carry(patch_folder.rename(tmp_path / "moved"), 4) == 2
    other = make_patches(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="holds sequences of other images, which have the same names"):
        carry(other, 6)
    assert len(load_trajectory(output).source_ids) == 4
    assert carry(other, 6, overwrite=True) == 6


@pytest.mark.parametrize("path", ["straight", "brownian", "smooth"])
def test_a_translation_along_any_path_is_completed(train, tmp_path, path):
    run = train(f"path={path}", "velocity.predict=velocity")
    for num in (2, 3):
        bridge = Bridge.load(run, [f"translate.num={num}"])
        assert bridge.translate_split(output=tmp_path / "out")[1]["sequences"] == num


def test_another_translation_is_overwritten_only_when_asked(train, tmp_path):
    run, output = train(), tmp_path / "out"
    Bridge.load(run, ["translate.num=3"]).translate_split(output=output)
    other = Bridge.load(run, ["translate.num=2", "translate.guidance_scale=2.0"])
    with pytest.raises(UserError, match=r"what differs: translate\.guidance_scale \(1\.0 there, 2\.0 here\)\. Choose"):
        other.translate_split(output=output)
    assert len(load_trajectory(output).source_ids) == 3
    other.translate_split(output=output, overwrite=True)
    assert len(load_trajectory(output).source_ids) == 2
    assert set(load_trajectory(output).nfe) == {16}


def test_a_folder_of_other_things_is_left_alone(train, tmp_path):
    (tmp_path / "out").mkdir()
    write_png(tmp_path / "out" / "holiday.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="is not empty and holds no trajectory"):
        Bridge.load(train()).translate_split(output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "holiday.png").exists()


def test_a_further_trained_run_is_another_translation(train, tmp_path):
    run = train()
    Bridge.load(run, ["translate.num=2"]).translate_split(output=tmp_path / "out")
    cli.main(["train", str(run), "train.steps=3"])
    with pytest.raises(UserError, match="holds another translation; what differs: settings or weights"):
        Bridge.load(run, ["translate.num=2"]).translate_split(output=tmp_path / "out")


def test_what_the_path_refuses_leaves_no_folder(train, tmp_path):
    bridge = Bridge.load(train(), ["translate.reverse=true"])
    with pytest.raises(UserError, match=r"translate\.reverse"):
        bridge.translate_split(output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_split_is_refused(tmp_path, make_patches, patch_folder, write_config):
    file = write_config(tmp_path, data={"split": {"val": 0.2, "test": 0.0}})
    cli.main(["train", str(file), "train.steps=1", "train.validate_pairs=8", *QUICK])
    with pytest.raises(UserError, match=r"translate\.split: no patch of class 'A' in the test split"):
        Bridge.load(tmp_path / "runs" / "tiny").translate_split()


def test_other_patches_are_normalised_to_the_stain_of_the_training(train, tmp_path, make_patches):
    """A run carries its reference stain: patches of another root are brought to it, not to one of their own."""
    other = make_patches(tmp_path / "other", seed=5)
    run = train("data.stain.mode=normalise")
    bridge = Bridge.load(run, [f"data.root={other}"])
    own = load_patches(bridge.config.data, seed=0)
    assert own.preprocessing.reference != bridge.preprocessing.reference
    assert bridge.patches().preprocessing == bridge.preprocessing
    assert (bridge.patches().pixels != own.pixels).any()


def test_a_run_that_was_moved_works_where_it_is(train, tmp_path):
    moved = train().rename(tmp_path / "moved")
    folder, _ = Bridge.load(moved, ["translate.num=1"]).translate_split()
    assert folder == moved / "trajectories" / "A_to_B_path"
    cli.main(["train", str(moved), "train.steps=3"])
    assert (moved / "checkpoints" / "step-00000003").is_dir()
    assert not (tmp_path / "runs" / "tiny").exists()


def test_patches_that_trained_never_pass_for_held_out_ones(train, patch_folder, tmp_path):
    """Files added after training may move others between made splits: translating and training on are refused."""
    run = train()
    splits = (run / "splits.csv").read_text()
    (run / "splits.csv").write_text(splits.replace(",test,", ",train,"))
    with pytest.raises(UserError, match="stand in another split than when it was trained"):
        Bridge.load(run).translate_split()
    (run / "splits.csv").write_text(splits)
    (patch_folder / "A" / "A000.png").rename(patch_folder / "A" / "renamed.png")
    with pytest.raises(SystemExit, match="was begun with other patches"):
        cli.main(["train", str(run), "train.steps=3"])
    assert (run / "splits.csv").read_text() == splits


def test_overwriting_keeps_a_translation_that_is_the_same(train):
    bridge = Bridge.load(train(), ["translate.num=2"])
    folder, _ = bridge.translate_split()
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert bridge.translate_split(overwrite=True)[1]["made_now"] == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == made


def test_a_run_may_have_a_number_for_a_name(train, tmp_path):
    run = train().rename(tmp_path / "2024")
    assert Bridge.load(run).config.output == run


def test_a_refused_training_leaves_the_runs_configuration_as_it_was(train, tmp_path, make_patches):
    run = train()
    before = (run / "config.yaml").read_text()
    other = make_patches(tmp_path / "other", num={"A": 30, "B": 30})
    with pytest.raises(SystemExit, match="was begun with other patches"):
        cli.main(["train", str(run), f"data.root={other}", "train.steps=3"])
    assert (run / "config.yaml").read_text() == before


def test_sequences_of_a_received_checkpoint_are_written_where_it_lies(train, tmp_path):
    run = train()
    (step,) = (run / "checkpoints").iterdir()
    alone = Path(shutil.copytree(step, tmp_path / "alone"))
    for folder in (step, alone):
        file = folder / "config.yaml"
        file.write_text(load_config(file, [f"output={tmp_path / 'elsewhere'}"]).to_yaml())
    assert Bridge.load(step, ["translate.num=1"]).translate_split()[0].parents[1] == run
    assert Bridge.load(alone, ["translate.num=1"]).translate_split()[0].parents[1] == alone
    cli.main(["data", "check", str(alone)])
    assert not (tmp_path / "elsewhere").exists()
