"""Translations of trained flows by each method: what a Bridge writes, asks its guides, and refuses."""

import json
import shutil
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cellflux_bridge import Bridge, checkpoint, cli, images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier import inference
from cellflux_bridge.condition.base import ConditionSpec, Names
from cellflux_bridge.condition.level import Level
from cellflux_bridge.condition.source_image import SourceImage
from cellflux_bridge.config import load_config
from cellflux_bridge.trajectory import load_trajectory, read_header
from cellflux_bridge.transport import depth, progression
from cellflux_bridge.transport.base import carry_rows, source_noise

NAMES = Names(("A", "B"))
LEVEL = {"target": "level", "source_image": True, "source_class": False}
TRAIN = ("train.steps=3", "train.validate_pairs=8", "train.lr=0.02")
TWO_LEVELS = ("translate.method=progression", "translate.levels=2")
STEPS = ("translate.steps=2", "translate.num=4", "translate.batch_size=3")
QUICK = {"steps": 12, "batch_size": 16, "lr": 3e-3, "warmup_steps": 0, "ema_decay": 0.5, "validate_pairs": 8}
GUIDE = {"train": {**QUICK, "accelerator": "cpu"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_patches, write_config):
    """`runs("name", "key=value", ..., classes="AB", section={...})`: a tiny trained run, once a name."""
    made = {}

    def run(name: str, *overrides: str, classes: str = "AB", guides=(), **sections) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            make_patches(root / "patches", num=dict.fromkeys(classes, 24))
            settings = {"data": {"split": {"val": 0.2, "test": 0.3}}, "classifier": GUIDE, "condition": LEVEL}
            file = write_config(root, **{**settings, **sections})
            cli.main(["train", str(file), *TRAIN, *overrides])
            made[name] = root / "runs" / "tiny"
            for sees in guides:
                cli.main(["train-classifier", str(made[name]), "classifier.role=guide", f"classifier.sees={sees}"])
        return made[name]

    return run


@pytest.fixture
def flow(runs) -> Path:
    """A progression flow with a guide of images and one of states."""
    return runs("flow", guides=("image", "state"))


@pytest.fixture
def from_noise(runs) -> Path:
    """A flow from Gaussian noise, conditioned on levels, with a guide of its states."""
    condition = {"target": "level", "source_class": False}
    return runs("from_noise", path={"name": "gaussian_source"}, condition=condition, guides=("state",))


@pytest.fixture
def three(runs) -> Path:
    return runs("three", classes="ABC")


def load(run: Path, *overrides: str) -> Bridge:
    return Bridge.load(run, [*STEPS, *overrides])


def patches_of(bridge: Bridge, label: str = "A", num: int = 4) -> tuple[torch.Tensor, list[str]]:
    patches = bridge.patches()
    chosen = patches.sample("test", label, num=num, seed=bridge.config.seed)
    return patches.centre(chosen), [patches.ids[i] for i in chosen]


def nearly_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to one grey level, which rounding of float32 noise can turn."""
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


class Call(NamedTuple):
    """Rows that were carried together: start, clean sources, label of the condition, label that the guide follows."""

    start: torch.Tensor
    x0: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor | None

    def levels(self, sources: int) -> torch.Tensor:
        """The conditions (K,) of levels, which all `sources` share, of class B."""
        return self.labels.view(-1, sources, 2)[:, 0, 1]


@pytest.fixture
def asked(monkeypatch) -> list[Call]:
    """What methods asked of the flow, call by call."""
    calls = []

    def noting(flow, start, x0, *labels, **options):
        rows = [None if of is None else of.expand(*start.shape[:2], -1).flatten(0, 1) for of in labels]
        calls.append(Call(start.flatten(0, 1), x0.repeat(len(start), 1, 1, 1), *rows))
        return carry_rows(flow, start, x0, *labels, **options)

    for module in (progression, depth):
        monkeypatch.setattr(module, "carry_rows", noting)
    return calls


# Progression


def test_a_progression_from_end_to_end(flow):
    bridge = load(flow, "translate.method=progression", "translate.levels=5")
    x, ids = patches_of(bridge)
    found = bridge.translate(x, ids=ids)
    assert found.header.method == "progression"
    assert found.levels == (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert found.frames.shape == (6, 4, 3, 16, 16)
    np.testing.assert_array_equal(found.frames[0], x)
    np.testing.assert_allclose(found.soft_labels[:, 2], [[1 - s, s] for s in found.levels], atol=1e-6)
    assert found.nfe == (5 * 2 * 2,) * 4
    assert found.gradients == (0,) * 4
    assert all((a != b).any() for a, b in pairwise(found.frames))
    alone = bridge.translate(x[2:3], ids=ids[2:3])
    assert nearly_equal(alone.frames, found.frames[:, 2:3])
    one = bridge.translate(x, ids=ids, levels=[0.6, 1.0])
    assert nearly_equal(one.frames[1:], found.frames[[3, 5]])


def test_both_directions_and_their_conditions(painter, asked):
    """The frames are those of the conditions: of darkness c^2, c the share of class B."""
    x, ids = patches_of(painter)
    there, back = (painter.translate(x, ids=ids, source=a, target=b, levels=[0.3, 1.0]) for a, b in ("AB", "BA"))
    labels = torch.tensor([[[0.7, 0.3], [0.0, 1.0]], [[0.3, 0.7], [1.0, 0.0]]])
    for expected, call in zip(labels, (asked[0], asked[2]), strict=True):  # two batches each
        for found in (call.labels, call.targets):
            torch.testing.assert_close(found, expected.repeat_interleave(3, 0))
    np.testing.assert_allclose(back.soft_labels[1:, 0], labels[1], atol=1e-6)
    assert (back.header.source, back.header.target) == ("B", "A")
    for found, conditions in ((there, [0.3, 1.0]), (back, [0.7, 0.0])):
        dark = 1 - found.frames[1:].mean((2, 3, 4)) / 255
        np.testing.assert_allclose(dark, np.tile(np.square(conditions)[:, None], 4), atol=0.005)


def test_three_classes_are_mixed_two_at_a_time(three, asked):
    bridge = load(three, "translate.method=progression", "translate.levels=[0.25, 1.0]")
    x, ids = patches_of(bridge, num=2)
    for source, target in ("AC", "CB", "BA"):
        found = bridge.translate(x, ids=ids, source=source, target=target)
        expected = torch.zeros(2, 3)
        expected[:, "ABC".index(source)], expected[:, "ABC".index(target)] = (
            torch.tensor([0.75, 0.0]),
            torch.tensor([0.25, 1.0]),
        )
        torch.testing.assert_close(asked[-1].labels, expected.repeat_interleave(2, 0))
        np.testing.assert_allclose(found.soft_labels[1:, 0], expected, atol=1e-6)
    with pytest.raises(
        UserError, match=r"translate\.source: not named; give --source and --target, each one of A, B, C"
    ):
        bridge.translate(x, ids=ids)


@pytest.mark.parametrize(
    ("form", "name", "weight"),
    [("endpoint", "guide_rgb", 0.5), ("bridge", "guide_rgb_state", 99.0), ("sharpen", "guide_rgb_state", 99.0)],
)
def test_guidance_moves_frames_and_its_gradients_are_counted(flow, form, name, weight):
    bridge = load(flow, "translate.method=progression", "translate.levels=3")
    x, ids = patches_of(bridge)
    plain = bridge.translate(x, ids=ids, guidance_scale=0.0 if form == "bridge" else 1.0)  # bridge: no condition
    off = bridge.translate(x, ids=ids, guidance={"form": form, "weight": 0.0})
    np.testing.assert_array_equal(off.frames, plain.frames)
    found = bridge.translate(x, ids=ids, guidance={"form": form, "weight": weight})
    assert not nearly_equal(found.frames, plain.frames)
    # At t = 0, the first of the four times, the endpoint form is off.
    each = 3 if form == "endpoint" else 4
    assert (found.nfe, found.gradients) == (plain.nfe, (3 * each,) * 4)
    twice = bridge.translate(x, ids=ids, guidance={"form": form, "weight": weight, "guides": 2 * [str(flow / name)]})
    assert nearly_equal(twice.frames, found.frames)
    assert twice.gradients == (2 * 3 * each,) * 4


def test_a_guide_makes_frames_more_like_its_target(flow):
    bridge = load(flow, "translate.method=progression", "translate.levels=[1.0]", "translate.steps=8")
    x, ids = patches_of(bridge)
    guide = bridge._guides.load(bridge.config.translate.guidance, sees="image")[0]

    def reached(weight: float) -> float:
        found = bridge.translate(x, ids=ids, guidance={"form": "endpoint", "weight": weight})
        return guide.log_probabilities(torch.from_numpy(found.frames[-1]) / 127.5 - 1)[:, 1].exp().mean().item()

    assert reached(0.0) < reached(0.5)


def digest(folder: Path) -> dict[str, bytes]:
    """The files of a trajectory, less what it cost to make."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert json.loads(files.pop("cost.json"))["sequences"] > 0
    return files


@pytest.mark.parametrize(
    "overrides",
    [
        (*TWO_LEVELS, "translate.guidance.form=endpoint", "translate.calibrate=probability"),
        (*TWO_LEVELS, "translate.guidance.form=bridge"),
        ("translate.method=path", "translate.guidance.form=endpoint", "translate.frames=3"),
    ],
    ids=lambda overrides: "-".join(text.split("=")[1] for text in overrides if "levels" not in text),
)
def test_a_translation_stopped_between_batches_is_completed_to_the_same(flow, tmp_path, monkeypatch, overrides):
    options = (*overrides, "translate.num=7")
    whole, figures = load(flow, *options).translate_split(output=tmp_path / "whole", source="A", target="B")
    assert figures["made_now"] == 7
    part, bridge = tmp_path / "part", load(flow, *options)
    translate, batches = bridge._translate_batch, []

    def stopping(*args):
        batches.append(len(args[0]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return translate(*args)

    monkeypatch.setattr(bridge, "_translate_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        bridge.translate_split(output=part)
    assert batches == [3, 3, 1]
    assert len(load_trajectory(part).source_ids) == 6  # the batch that ran is lost, no more
    assert load(flow, *options).translate_split(output=part)[1]["made_now"] == 1
    assert digest(part) == digest(whole)


def test_a_translation_stands_in_a_folder_of_its_method(flow):
    for method, num in (("path", "frames=3"), ("progression", "levels=2")):
        folder, _ = load(flow, f"translate.method={method}", "translate.num=1", f"translate.{num}").translate_split()
        assert folder == flow / "trajectories" / f"A_to_B_{method}"


def test_a_translation_knows_its_microns_per_pixel(flow, tmp_path):
    """Those of the manifest at the network's scale: here a file's shorter side is scaled to the network's 16 px."""
    root = shutil.copytree(load_config(flow / "config.yaml").data.root, tmp_path / "patches")
    rows = ["path,label,mpp"]
    for file in sorted(root.glob("*/*.png")):
        rows.append(f"{file.relative_to(root).as_posix()},{file.parent.name},{8 / min(images.read_size(file))}")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    bridge = load(flow, *TWO_LEVELS, f"data.root={root}")
    assert read_header(bridge.translate_split(output=tmp_path / "t")[0]).mpp == pytest.approx(0.5)
    assert bridge.translate_split(output=tmp_path / "t")[1]["made_now"] == 0
    bridge = load(flow, *TWO_LEVELS)
    assert read_header(bridge.translate_split(output=tmp_path / "u")[0]).mpp is None


# Depth


def test_a_depth_sequence_from_end_to_end(from_noise, asked, tmp_path):
    bridge = load(from_noise, "translate.method=depth", "translate.levels=4")
    x, ids = patches_of(bridge)
    found = bridge.translate(x, ids=ids)
    assert (found.header.method, found.levels) == ("depth", (0, 0.25, 0.5, 0.75, 1))
    np.testing.assert_array_equal(found.frames[0], x)
    np.testing.assert_allclose(found.soft_labels[:, 0, 1], found.levels)
    assert found.nfe == ((4 + 4 * 2) * 2,) * 4  # a step back to each depth, two forward from each
    assert nearly_equal(bridge.translate(x[3:], ids=ids[3:]).frames, found.frames[:, 3:])
    assert asked[0].labels.tolist() == [[1, 0]] * 3
    assert asked[0].targets is None
    np.testing.assert_allclose(found.depths, np.tile([[0], [0.25], [0.5], [0.75], [1]], 4))
    folder, _ = bridge.translate_split(output=tmp_path / "out")
    assert load_trajectory(folder).depths.tolist() == found.depths.tolist()


@pytest.mark.parametrize(
    ("options", "depths", "conditions"),
    [
        ({}, [0.5, 1.0], [1.0, 1.0]),
        ({"depths": "full", "conditions": "rising"}, [1.0, 1.0], [0.5, 1.0]),
        ({"depths": [0.3, 0.6], "conditions": [0.2, 0.7]}, [0.3, 0.6], [0.2, 0.7]),
        ({"depths": "rising", "conditions": "rising"}, [0.5, 1.0], [0.5, 1.0]),
        ({"depths": [0.3, 0.6], "conditions": [1, 1]}, [0.3, 0.6], [1.0, 1.0]),
        ({"depths": [0.6, 0.6], "conditions": [0.2, 0.7]}, [0.6, 0.6], [0.2, 0.7]),
    ],
)
def test_the_two_dials_of_a_depth_sequence(from_noise, asked, options, depths, conditions):
    bridge = load(from_noise, "translate.method=depth", "translate.levels=2")
    x, ids = patches_of(bridge, num=2)
    found = bridge.translate(x, ids=ids, source="B", target="A", **options)
    np.testing.assert_allclose(found.depths[1:], np.tile(np.array(depths)[:, None], 2), rtol=1e-6)
    *back, forward = asked
    assert len(back) == len(set(depths))
    assert all(call.labels.tolist() == [[0, 1]] * 2 and call.targets is None for call in back)
    torch.testing.assert_close(forward.labels[::2, 0], torch.tensor(conditions))
    assert torch.equal(forward.targets, forward.labels)


def test_a_depth_sequence_is_guided_by_its_states_forward_only(from_noise):
    bridge = load(from_noise, "translate.method=depth", "translate.levels=2")
    x, ids = patches_of(bridge, num=3)
    plain = bridge.translate(x, ids=ids, guidance={"form": "none"})
    found = bridge.translate(x, ids=ids, guidance={"form": "score", "weight": 99.0})
    assert not nearly_equal(found.frames, plain.frames)
    assert found.nfe == plain.nfe == ((2 + 2 * 2) * 2,) * 3
    assert found.gradients == (2 * 2 * 2,) * 3


# Levels that a guide chooses


def darkness(x):
    """0 for a white image in [-1, 1] and 1 for a black one, (B,)."""
    return (1 - x.mean((1, 2, 3))) / 2


class Dark(nn.Module):
    """A guide whose p(B) is the square of darkness, and whose feature is darkness itself."""

    def log_probabilities(self, x):
        p = darkness(x).square().clamp(1e-6, 1 - 1e-6)
        return torch.stack([1 - p, p], dim=1).log()

    def features(self, x):
        return darkness(x)[:, None]


class Fake(nn.Module):
    """A network without weights; `spec` is that of the network whose place it takes."""

    spec = ConditionSpec((Level(NAMES, 3), SourceImage(NAMES, 3)))


class Painter(Fake):
    """A flow whose end is an even image of darkness c^2, whatever the source."""

    def forward(self, t, x, cond):
        end = 1 - 2 * cond.level[:, 1].view(-1, 1, 1, 1) ** 2
        return (end - x) / (1 - t).view(-1, 1, 1, 1)


class Still(Fake):
    """A flow that goes nowhere."""

    def forward(self, t, x, cond):
        return torch.zeros_like(x)


@pytest.fixture
def painter(flow, monkeypatch) -> Bridge:
    bridge = load(flow, "translate.method=progression", "translate.solver=euler", "translate.steps=4")
    shutil.rmtree(flow / "calibration", ignore_errors=True)  # of another test's painter, whose weights are as these
    bridge._network = Painter()
    monkeypatch.setattr(bridge._guides, "load", lambda guidance, *, sees: [Dark()])
    return bridge


def reached(bridge: Bridge, **options) -> tuple[np.ndarray, np.ndarray]:
    """Levels of a progression and the darkness of its frames, the source's aside."""
    x, ids = patches_of(bridge)
    found = bridge.translate(x, ids=ids, **options)
    return np.array(found.levels[1:]), 1 - found.frames[1:].mean((1, 2, 3, 4)) / 255


EVEN = np.arange(1, 6) / 5


def test_calibrated_levels_are_what_the_guide_sees(painter):
    """By probability the guide's mean p(B) is the level; by distance the level is the share of the way in features."""
    levels, plain = reached(painter, levels=10)
    np.testing.assert_allclose(plain, levels**2, atol=0.01)
    levels, found = reached(painter, levels=10, calibrate="probability")
    np.testing.assert_allclose(found**2, levels, atol=0.015)
    levels, found = reached(painter, levels=10, calibrate="distance")
    np.testing.assert_allclose(found[1:], levels[1:], atol=0.015)
    assert found[0] == pytest.approx(0.1, abs=0.03)  # between the measured levels the map is a straight line


def test_what_calibration_needs_is_measured_once(painter, monkeypatch):
    asked_for, predict = [], inference.predict
    monkeypatch.setattr(inference, "predict", lambda *args, **options: asked_for.append(1) or predict(*args, **options))
    reached(painter, levels=2, calibrate="probability", batch_size=1)
    assert len(asked_for) == 11


def test_the_target_label_stays_the_level_when_calibrated(painter, asked):
    reached(painter, levels=[0.25, 1.0], calibrate="distance")
    measured, first, second = asked  # measured once, then two batches
    torch.testing.assert_close(measured.levels(len(measured.x0) // 11), torch.linspace(0, 1, 11))
    torch.testing.assert_close(first.targets[::3, 1], torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(first.levels(3), torch.tensor([0.5, 1.0]), rtol=0, atol=0.02)
    assert torch.equal(first.levels(3), second.levels(1))


@pytest.mark.parametrize(
    ("calibrate", "expected"), [("none", np.sqrt(EVEN)), ("probability", EVEN**2), ("distance", EVEN)]
)
def test_adaptive_levels_are_equally_far_apart_for_the_guide(painter, calibrate, expected):
    """The frames are those of the conditions, so the levels are those to which calibration gives these conditions."""
    levels, found = reached(painter, levels=5, spacing="adaptive", calibrate=calibrate)
    np.testing.assert_allclose(found, EVEN, atol=0.03)
    np.testing.assert_allclose(levels, expected, atol=0.03)


def test_a_network_that_goes_nowhere_has_no_adaptive_levels(painter):
    painter._network = Still()
    with pytest.raises(UserError, match=r"translate\.spacing=adaptive: the guide sees no 5 levels apart"):
        reached(painter, levels=5, spacing="adaptive")


def test_level_calibration_is_held_out_and_unguided(painter, asked):
    reached(painter, levels=2, calibrate="probability", guidance={"form": "endpoint", "weight": 0.3})
    val = painter.patches().indices("val", "A")
    assert len(asked[0].x0) == 11 * len(val)
    assert asked[0].targets is None
    assert asked[1].targets is not None


def test_the_level_decides_how_much_of_the_start_noise_is_new(painter, asked):
    """Whatever its condition: where a guide sees no change, conditions lie far apart, and frames would jump."""
    painter._network = Still()  # which can be carried back, too
    reached(painter, levels=[0.25, 1.0], calibrate="distance", noise_resampling=0.6)
    x, ids = patches_of(painter)
    x0 = images.encode(x[:3])
    random = painter.path.start(x0, source_noise(x0.shape[1:], ids[:3], seed=painter.config.seed))
    inversion, measuring, measured, first, *_ = asked
    assert len(measured.x0) == 11 * len(measuring.x0)
    assert torch.equal(inversion.start, x0)
    assert not torch.isclose(first.levels(3)[0], torch.tensor(0.25)).any()
    turn = torch.pi / 2 * 0.6 * torch.tensor([0.25, 1.0]).view(2, 1, 1, 1, 1)  # a flow that goes nowhere inverts to x0
    torch.testing.assert_close(first.start.view(2, *x0.shape), x0 + turn.sin() * (random - x0))
    asked.clear()
    reached(painter, levels=[0.25, 1.0], calibrate="distance", noise_resampling=0.2)  # measured anew
    assert len(asked) == 6
    with pytest.raises(UserError, match=r"translate\.noise_resampling"):
        reached(painter, noise_resampling=1.5)


class FromSource(Fake):
    """A flow whose end is an even image of darkness c^p, where p rises with the darkness of the source."""

    def forward(self, t, x, cond):
        power = 1 + 2 * darkness(cond.source_image)
        end = 1 - 2 * cond.level[:, 1] ** power
        return (end.view(-1, 1, 1, 1) - x) / (1 - t).view(-1, 1, 1, 1)


@pytest.mark.parametrize("calibrate", ["probability", "distance"])
def test_each_source_is_calibrated_by_a_progression_of_its_own(painter, asked, calibrate):
    painter._network = FromSource()
    x = torch.stack([torch.full((3, 16, 16), value, dtype=torch.uint8) for value in (250, 20)])
    options = {"levels": 5, "calibrate": calibrate, "ids": ["pale", "dark"]}
    found = painter.translate(x, calibrate_each=True, **options)
    coarse, fine = asked
    assert (len(coarse.start), len(fine.start)) == (7 * 2, 5 * 2)
    assert coarse.targets is None
    assert found.nfe == (7 * 2 + 5 * 4,) * 2  # coarse steps, steps
    black = 1 - found.frames[1:].mean((2, 3, 4)) / 255  # (5, 2)
    first = 1 - x.float().mean((1, 2, 3)).numpy() / 255
    if calibrate == "probability":
        np.testing.assert_allclose(black**2, np.tile(EVEN[:, None], 2), atol=0.06)
    else:
        way = np.abs(black - first) / np.abs(black[-1] - first)
        np.testing.assert_allclose(way[:, 0], EVEN, atol=0.06)
    together = painter.translate(x, **options)
    black = 1 - together.frames[1:].mean((2, 3, 4)) / 255
    assert np.abs(black[:, 0] - black[:, 1]).max() > 0.1


def test_guides_that_disagree_are_left_alone_at_their_pooled_opinion(painter, monkeypatch):
    """One leans to A as much as the other to B: where the target label lies between, nothing is steered."""

    class Leaning(nn.Module):
        def __init__(self, *p):
            super().__init__()
            self.p = torch.tensor(p)

        def log_probabilities(self, x):
            return (self.p.log() + x.mean((1, 2, 3))[:, None] * torch.tensor([0.0, 1.0])).log_softmax(1)

    x, t = torch.zeros(1, 3, 16, 16), torch.tensor([0.5])
    _, flow, _ = painter._use(painter._settings("A", "B", {"guidance": {"form": "endpoint"}}))
    cond = flow.condition(x, torch.tensor([[0.5, 0.5]]), torch.zeros(1, dtype=torch.long))
    plain = flow.plain(t, x, cond).velocity
    p = painter.path.endpoint(x, plain, t, x).mean().sigmoid()  # what a guide without a leaning says of the endpoint
    target, both = torch.tensor([[1 - p, p]]), [Leaning(0.1, 0.9), Leaning(0.9, 0.1)]
    for guides, moves in ((both, False), (both[:1], True)):
        monkeypatch.setattr(painter._guides, "load", lambda guidance, *, sees, guides=guides: guides)
        step = flow.field(target)(t, x, cond).velocity - plain
        assert (step.abs().max().item() > 1e-3) == moves


def test_real_guides_calibrate(flow, asked):
    bridge = load(flow, "translate.method=progression", "translate.levels=4", "translate.calibrate=probability")
    x, ids = patches_of(bridge)
    found = bridge.translate(x, ids=ids)
    assert found.levels == (0, 0.25, 0.5, 0.75, 1)
    conditions = asked[-1].levels(1)
    assert (conditions.diff() >= 0).all()
    assert conditions[0] >= 0
    assert conditions[-1] == 1


def test_without_validation_patches_nothing_is_calibrated(painter, monkeypatch):
    patches = painter.patches()
    monkeypatch.setattr(type(patches), "sample", lambda self, split, *args, **options: np.arange(split == "test"))
    with pytest.raises(UserError, match=r"no validation patch of class 'A' to measure on"):
        painter.translate(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), calibrate="probability")


# What is refused


@pytest.mark.parametrize(
    ("key", "values"),
    [
        *product(
            ["levels", "depths", "conditions"],
            [[0.0, 1.0], [0.5, 0.2], [0.5, 1.2], [-0.1, 1.0], [], [float("nan")], [0.0, 0.0], [0.9, 0.9, 0.5]],
        ),
        ("levels", [0.5, 0.5, 1.0]),
    ],
)
def test_levels_outside_their_range_or_order_are_named(flow, key, values):
    with pytest.raises(UserError, match=rf"translate\.{key}"):
        load(flow).translate(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), **{key: values})
    with pytest.raises(UserError, match=rf"translate\.{key}"):
        load(flow, f"translate.{key}={json.dumps(values).replace('NaN', '.nan')}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "depth"}, r"translate\.method=depth: path NoisedSource starts from source images"),
        (
            {"method": "progression", "reverse": True},
            r"translate\.reverse: has no part in translate\.method=progression.*set method=path",
        ),
        ({"method": "progression", "spacing": "adaptive", "levels": [0.5, 1.0]}, "chooses the levels itself"),
        ({"method": "progression", "calibrate_each": True}, "calibrate_each=true: set translate.calibrate=probability"),
        (
            {"method": "progression", "calibrate": "distance", "calibrate_each": True, "spacing": "adaptive"},
            "adaptive levels are those of validation patches",
        ),
        ({"method": "progression", "levels": 0}, r"translate\.levels(?s:.*)arguments of transport 'progression'"),
        ({"method": "stair"}, r"translate\.method: .*'stair'"),
        ({"method": "progression", "calibrate": "p"}, r"translate\.calibrate: .*'p'"),
        ({"guidance": {"form": "score"}}, r"translate\.guidance\.form=score: needs path.name=gaussian_source"),
        ({"guidance": {"form": "bridge"}, "guidance_scale": 2.0}, r"translate\.guidance_scale=2 has no part"),
        (
            {"method": "progression", "guidance": {"form": "bridge"}, "calibrate": "distance"},
            r"form=bridge: calls the network without a condition.*set translate\.calibrate=none",
        ),
        ({"guidance": {"form": "scroe"}}, r"translate\.guidance\.form: .*'scroe'"),
        ({"guidance": {"wieght": 1}}, r"translate\.guidance\.wieght: unknown key; did you mean"),
        ({"guidance": {"form": "endpoint", "weight": -1}}, r"translate\.guidance\.weight"),
        ({"guidance": {"form": "endpoint", "start": 0}}, r"translate\.guidance\.start"),
        ({"source": "A", "target": "A"}, "is the source, too"),
    ],
)
def test_what_a_flow_cannot_do_is_refused(flow, options, message, tmp_path):
    bridge = load(flow)
    with pytest.raises(UserError, match=message):
        bridge.translate(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), **options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.png", r"a\.png: no such file"),
        ([object()], r"images\[0\]: expected a file, a PIL image or an RGB uint8 array .*found object"),
        ([np.zeros((16, 16))], r"images\[0\]: expected RGB uint8 \(H, W, 3\), found float64"),
        ([], "images: none given"),
    ],
)
def test_what_is_no_image_is_refused(flow, images, message):
    with pytest.raises(UserError, match=message):
        load(flow).translate(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "progression"}, "translate.method=progression: path GaussianSource starts from noise"),
        ({"method": "path"}, "starts from noise"),
        ({"method": "depth", "spacing": "adaptive"}, "translate.spacing: has no part in translate.method=depth"),
        ({"method": "depth", "levels": 3, "depths": [0.5, 1.0]}, "translate.depths: 2 values for 3 levels"),
        ({"method": "depth", "levels": 3, "conditions": [0.5, 1.0]}, "translate.conditions: 2 values for 3 levels"),
        ({"method": "depth", "frames": 3}, "translate.frames: has no part in translate.method=depth"),
        ({"method": "depth", "calibrate": "distance"}, "leave it out, or set method=progression"),
        ({"method": "depth", "guidance": {"form": "bridge"}}, "translate.guidance.form=bridge: needs noise on every"),
    ],
)
def test_what_a_flow_from_noise_cannot_do_is_refused(from_noise, options, message):
    with pytest.raises(UserError, match=message):
        load(from_noise).translate(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), **options)


UNREAD = [
    ("path", "levels", 5, "reads .*frames.*; leave it out, or set method=depth or progression"),
    ("path", "calibrate", "probability", "reads .*frames.*; leave it out, or set method=progression"),
    ("path", "spacing", "adaptive", "reads .*frames"),
    ("path", "noise_resampling", 0, "reads .*frames"),
    ("path", "noise_resampling", 0.0, "reads .*frames"),
    ("path", "depths", "full", "reads .*frames"),
    ("progression", "frames", 5, "reads steps, solver, levels, spacing, calibrate, calibrate_each, noise_resampling"),
    ("progression", "depths", [0.5, 1.0], "reads .*levels"),
    ("progression", "conditions", "rising", "reads .*levels"),
]


@pytest.mark.parametrize(("method", "key", "value", "message"), UNREAD)
def test_a_setting_of_this_use_that_the_method_does_not_read_is_refused(flow, tmp_path, method, key, value, message):
    named = rf"translate\.{key}: has no part in translate\.method={method}, which {message}"
    patches = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(UserError, match=named):
        load(flow).translate(patches, method=method, **{key: value})
    bridge = load(flow, f"translate.method={method}", f"translate.{key}={json.dumps(value)}")
    with pytest.raises(UserError, match=named):
        bridge.translate_split(output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("weight", 3.0), ("start", 0.1), ("guides", ["elsewhere"])])
def test_a_setting_of_guidance_without_guidance_is_refused(flow, tmp_path, key, value):
    named = rf"translate\.guidance\.{key}: has no part in translate\.guidance\.form=none.*form=endpoint"
    patches = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(UserError, match=named):
        load(flow).translate(patches, guidance={key: value})
    with pytest.raises(UserError, match=named):
        load(flow, f"translate.guidance.{key}={value}").translate_split(output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_asks_for_nothing_or_is_read_is_no_mistake(flow):
    """Turning off what a run's file turns on; and guides that only measure."""
    bridge = load(flow)
    off = {"noise_resampling": None, "calibrate": "none", "calibrate_each": False, "spacing": "uniform"}
    assert bridge._settings("A", "B", {"method": "path", **off, "guidance": {"guides": []}}).method == "path"
    measuring = {"method": "progression", "calibrate": "distance", "guidance": {"guides": [flow / "guide_rgb"]}}
    assert bridge._settings("A", "B", measuring).guidance.form == "none"


def test_settings_of_the_run_or_of_other_uses_may_go_unread(flow, tmp_path):
    """A run's file holds every key, and a loaded bridge has defaults for many calls: they say nothing of one call."""
    run = shutil.copytree(flow, tmp_path / "run", ignore=shutil.ignore_patterns("trajectories"))
    config = load_config(run / "config.yaml", ["translate.frames=3", "translate.calibrate=distance"])
    (run / "config.yaml").write_text(config.to_yaml())
    bridge = load(run, "translate.levels=2", "translate.depths=full")
    x, ids = patches_of(bridge, num=1)
    for method in ("path", "progression"):
        assert bridge.translate(x, ids=ids, method=method).header.method == method
    folder, _ = load(run, "translate.method=path", "translate.num=1", "translate.reverse=false").translate_split()
    assert load_trajectory(folder).frames.shape[0] == 3


def test_the_depth_method_does_not_take_the_adaptive_spacing_of_the_run_for_its_own(from_noise):
    bridge, x = load(from_noise, "translate.spacing=adaptive"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert bridge.translate(x, method="depth", levels=2).levels == (0, 0.5, 1)


def test_self_pairs_of_a_network_of_classes_are_refused(tmp_path, make_patches, write_config):
    make_patches(tmp_path / "patches")
    file = write_config(tmp_path, pairs={"self_pairs": 0.5}, data={"split": {"val": 0.2, "test": 0.2}})
    with pytest.raises(SystemExit, match=r"pairs\.self_pairs=0\.5: is of levels .*set pairs\.self_pairs=0"):
        cli.main(["train", str(file)])
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()


def test_a_refused_method_leaves_no_folder(flow, tmp_path):
    with pytest.raises(UserError, match=r"translate\.method=depth"):
        load(flow, "translate.method=depth").translate_split(output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_of_classes_has_no_levels_between(runs):
    """Its depth sequence has one dial, the depth."""
    run = runs("classes", path={"name": "gaussian_source"}, condition={"target": "class", "source_class": False})
    bridge = load(run, "translate.levels=2")
    x, ids = patches_of(bridge, num=2)
    assert bridge.translate(x, ids=ids, method="depth").frames.shape[0] == 3
    with pytest.raises(UserError, match=r"translate\.conditions: the network knows classes only"):
        bridge.translate(x, ids=ids, method="depth", conditions="rising")
    run = runs("classes_from_data", condition={"target": "class"})
    with pytest.raises(UserError, match=r"translate\.method=progression: the network knows classes only"):
        load(run).translate(x, ids=ids, method="progression")


def test_a_way_back_that_was_never_learned_is_refused(runs):
    one_way = {"transitions": [["A", "B"]]}
    condition = {"target": "class", "source_class": False}
    run = runs("one_way_by_class", path={"name": "gaussian_source"}, condition=condition, pairs=one_way)
    with pytest.raises(UserError, match=r"condition of the way back is the source's class, which was never a target"):
        load(run, "translate.levels=2", "translate.method=depth").translate(
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
        )


def test_exact_guidance_of_a_network_without_a_trained_null_is_refused(flow):
    bridge = load(flow)
    condition = bridge.config.condition.model_copy(update={"dropout": 0.0})
    bridge.config = bridge.config.model_copy(update={"condition": condition})
    with pytest.raises(UserError, match=r"form=bridge: .*condition\.dropout=0"):
        bridge._settings("A", "B", {"guidance": {"form": "bridge"}})
    assert bridge._settings("A", "B", {"guidance": {"form": "sharpen"}}).guidance.form == "sharpen"


def test_other_guides_do_not_complete_a_translation(flow):
    bridge = load(flow, "translate.method=progression", "translate.guidance.form=endpoint")
    settings = bridge._settings("A", "B", {})
    names = bridge._guides.names(settings.guidance, measure=False)
    assert names
    assert all(name in bridge._header(settings).config_hash for name in names)
    assert (
        bridge._guides.names(bridge._settings("A", "B", {"guidance": {"form": "none"}}).guidance, measure=False) == []
    )


def test_a_guide_or_network_trained_again_does_not_complete_a_translation(flow, tmp_path):
    """Of the same name, step and settings: what a translation holds was made with other weights."""
    run = shutil.copytree(flow, tmp_path / "run", ignore=shutil.ignore_patterns("trajectories", "guide_rgb_state"))
    command = ["translate", str(run), *STEPS, *TWO_LEVELS, "translate.guidance.form=endpoint"]
    cli.main(command)
    (trajectory,) = (run / "trajectories").iterdir()
    first = load_trajectory(trajectory)
    shutil.rmtree(run / "guide_rgb")
    cli.main(["train-classifier", str(run), "classifier.role=guide", "classifier.seed=5"])
    with pytest.raises(SystemExit, match=r"what differs: settings or weights\. Perhaps a network or guide was trained"):
        cli.main(command)
    cli.main([*command, "--overwrite"])
    second = load_trajectory(trajectory)
    assert not np.array_equal(second.frames, first.frames)
    cli.main(command)
    file = checkpoint.latest(run) / checkpoint.WEIGHTS
    save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(SystemExit, match="holds another translation"):
        cli.main(command)
    assert np.array_equal(load_trajectory(trajectory).frames, second.frames)


def test_options_of_guidance_are_added_to_those_of_the_run(flow):
    bridge = load(flow, "translate.method=progression", "translate.guidance.form=endpoint")
    found = bridge._settings("A", "B", {"guidance": {"weight": 0.3}}).guidance
    assert (found.form, found.weight) == ("endpoint", 0.3)


def test_a_pair_that_was_never_seen_is_refused(runs):
    """By level a flow goes from every named source to every level, and from no other."""
    run = runs("one_way", "pairs.transitions=[[A, B], [A, C]]", classes="ABC")
    bridge = load(run, "translate.method=progression", "translate.levels=1")
    x, ids = patches_of(bridge, num=1)
    for target in "BC":
        assert bridge.translate(x, ids=ids, source="A", target=target).header.target == target
    with pytest.raises(UserError, match="the network never saw B -> C; it was trained on A -> B, A -> C"):
        bridge.translate(x, ids=ids, source="B", target="C")


# Guides that do not fit


@pytest.fixture
def refused(flow):
    def refuse(message: str, *, form: str = "endpoint", run: Path = flow, guides=(), method="progression", **options):
        guidance = {"form": form, "guides": [str(guide) for guide in guides]}
        with pytest.raises(UserError, match=message):
            load(run).translate(
                torch.zeros(1, 3, 16, 16, dtype=torch.uint8), source="A", target="B", method=method,
                guidance=guidance, **options,
            )  # fmt: skip

    return refuse


@pytest.mark.parametrize("form", ["endpoint", "bridge"])
def test_a_flow_without_a_guide_says_how_to_make_one(three, refused, form):
    sees = "image" if form == "endpoint" else "state"
    refused(rf"no trained guide here.*train-classifier .* classifier\.role=guide classifier\.sees={sees}", form=form,
            run=three)  # fmt: skip
    refused("no trained guide here", form="none", run=three, calibrate="probability")
    refused("no trained guide here", form="none", run=three, spacing="adaptive")


def test_an_untrained_guide_is_refused(refused, tmp_path):
    refused("holds no checkpoint", guides=[tmp_path])


@pytest.fixture
def altered(flow, tmp_path):
    """`altered("guide_rgb", "key=value", ...)`: a guide of the flow that was trained with other settings."""

    def alter(name: str, *overrides: str) -> Path:
        folder = Path(shutil.copytree(flow / name, tmp_path / f"other_{name}", dirs_exist_ok=True))
        config = checkpoint.latest(folder) / checkpoint.CONFIG
        config.write_text(load_config(config, overrides).to_yaml())
        return folder

    return alter


def test_a_judge_is_no_guide(altered, refused):
    judge = altered("guide_rgb", "classifier.role=judge")
    refused("other_guide_rgb: is a judge; a guide must be another network", guides=[judge])


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("guide_rgb", "data.classes=[A, B, C]", r"data\.classes is \['A', 'B', 'C'\] there, \['A', 'B'\] here"),
        ("guide_rgb", "data.classes=[B, A]", r"data\.classes is \['B', 'A'\] there"),
        ("guide_rgb", "data.image_size=24", "data.image_size is 24 there, 16 here"),
        ("guide_rgb", "data.crop=12", "data.crop is 12 there, None here"),
        ("guide_rgb_state", "data.image_size=24", "data.image_size is 24 there, 16 here"),
        ("guide_rgb_state", "path.scale=0.9", r"path is .*0\.9.* there, .*0\.5.* here"),
        ("guide_rgb_state", "condition.source_image=false", "condition.source_image is False there, True here"),
    ],
)
def test_a_guide_of_another_setting_is_refused(altered, refused, name, override, message):
    form = "bridge" if name.endswith("state") else "endpoint"
    refused(f"a guide that does not fit this flow: {message}", form=form, guides=[altered(name, override)])


def test_what_a_guide_of_images_does_not_see_does_not_matter(altered, flow):
    guide = altered("guide_rgb", "path.scale=0.9", "condition.dropout=0.5")
    bridge = load(flow, "translate.method=progression", "translate.levels=1")
    x, ids = patches_of(bridge, num=1)
    bridge.translate(x, ids=ids, guidance={"form": "endpoint", "guides": [str(guide)]})


def test_guides_of_images_and_of_states_do_not_stand_in_for_each_other(flow, refused):
    refused(r"classifier\.sees is image there, state here", form="bridge", guides=[flow / "guide_rgb"])
    refused(r"classifier\.sees is state there, image here", form="endpoint", guides=[flow / "guide_rgb_state"])


def test_a_guide_that_was_used_for_images_is_still_none_for_states(flow):
    bridge = load(flow, "translate.method=progression", "translate.levels=1")
    x, ids = patches_of(bridge, num=1)
    guides = [str(flow / "guide_rgb")]
    bridge.translate(x, ids=ids, guidance={"form": "endpoint", "guides": guides})
    with pytest.raises(UserError, match=r"classifier\.sees is image there, state here"):
        bridge.translate(x, ids=ids, guidance={"form": "bridge", "guides": guides})


def test_a_guide_of_a_moved_run_is_found(flow, tmp_path):
    shutil.copytree(flow, tmp_path / "moved", ignore=shutil.ignore_patterns("trajectories"))
    options = ("translate.method=progression", "translate.guidance.form=endpoint", "translate.levels=2")
    bridge = load(tmp_path / "moved", *options, "translate.num=1")
    folder, _ = bridge.translate_split()
    assert folder.parents[1] == tmp_path / "moved"
    assert load_trajectory(folder).gradients == (2 * 3,)
