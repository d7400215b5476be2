"""All figures of trajectories, on small made sequences: what evaluate computes, and what it refuses."""

import csv
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cdist

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.statistics import half_splits
from cellflux_bridge.classifier import inference
from cellflux_bridge.cli import main
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.images import write_png
from cellflux_bridge.images.stain import fit_reference
from cellflux_bridge.metrics import progression
from cellflux_bridge.metrics import reference_set as panel
from cellflux_bridge.metrics.cost import read_cost
from cellflux_bridge.metrics.evaluate import evaluate
from cellflux_bridge.metrics.extractor import NamedExtractor
from cellflux_bridge.metrics.fidelity import frechet_distance, kid
from cellflux_bridge.metrics.manifold import neighbourhoods
from cellflux_bridge.metrics.networks import load_networks
from cellflux_bridge.metrics.results import as_json
from cellflux_bridge.metrics.structure import haematoxylin_ms_ssim, recolour
from cellflux_bridge.metrics.table import markdown
from cellflux_bridge.metrics.tissue import tissue_figures
from cellflux_bridge.trajectory import (
    Trajectory,
    TrajectoryHeader,
    TrajectoryWriter,
    linear_soft_labels,
    load_trajectory,
)

CPU = torch.device("cpu")


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class Tiny:
    """A folder with patches of two classes, classifiers with random weights, and made trajectories."""

    def __init__(self, root: Path, make_patches, write_config):
        self.root, self._write_config = root, write_config
        rows = []
        for split, num, seed in (("train", 6, 1), ("val", 5, 2), ("test", 12, 3)):
            make_patches(root / "patches" / split, num={"A": num, "B": num}, low=16, high=16, seed=seed)
            for label in "AB":
                for n in range(num):
                    score = (n + 0.5) / (2 * num) + (0.5 if label == "B" else 0)
                    rows.append([f"{split}/{label}/{label}{n:03d}.png", label, split, f"{split}{n // 2}{label}", score])
        with open(root / "patches" / "manifest.csv", "w", newline="") as file:
            csv.writer(file).writerows([["path", "label", "split", "group", "score"], *rows])
        self.patches = self._load([])

    def _config(self, overrides):
        return load_config(self._write_config(self.root), ["data.classes=[A, B]", *overrides])

    def _load(self, overrides):
        config = self._config(overrides)
        return load_patches(config.data, seed=config.seed)

    def classifier(self, name: str, *overrides: str, seed: int, spoil: bool = False) -> Path:
        config = self._config(overrides)
        torch.manual_seed(seed)
        model = inference.build_classifier(config)
        if spoil:
            next(model.parameters()).data[:] = float("nan")
        return checkpoint.save(
            self.root / name,
            step=1,
            weights=model.state_dict(),
            state={},
            config=config,
            preprocessing=self._load(overrides).preprocessing,
            keep=1,
        ).parent.parent

    def images(self, split: str, label: str) -> tuple[list[str], np.ndarray]:
        indices = self.patches.indices(split, label)
        return [self.patches.ids[i] for i in indices], self.patches.centre(indices).numpy()

    def trajectory(self, name: str, *, method: str = "path", num: int = 8, noise: float = 0.0, **options) -> Path:
        """Blends of test patches of A into those of B, with noise."""
        given = {"levels": (0.0, 0.25, 0.5, 0.75, 1.0), "classes": ("B", "A"), "split": "test", **options}
        header = TrajectoryHeader(method, "A", "B", given["classes"], given["levels"], "x")
        (ids, a), (_, b) = (self.images(given["split"], label) for label in "AB")
        a, b = a[:num].astype(float), b[:num].astype(float)
        frames = np.stack([(1 - s) * a + s * b + (draw().normal(0, noise, a.shape) if s else 0) for s in header.levels])
        frames = np.clip(np.rint(frames), 0, 255).astype(np.uint8)
        labels = linear_soft_labels(header, num)
        writer = TrajectoryWriter(self.root / name, header)
        made = Trajectory(header, frames, labels, tuple(ids[:num]), (30,) * num, (6,) * num)
        writer.append(made, numbers=range(num))
        writer.finish()
        return self.root / name


@pytest.fixture
def tiny(tmp_path, make_patches, write_config) -> Tiny:
    return Tiny(tmp_path, make_patches, write_config)


@pytest.fixture
def judged(tiny, monkeypatch):
    """Networks as keyword arguments of `evaluate`."""
    monkeypatch.setattr(panel, "NUM_RESAMPLES", 100)
    return {
        "judges": [tiny.classifier("rgb", seed=1), tiny.classifier("grey", "classifier.view=grey", seed=2)],
        "features": tiny.classifier("extractor", seed=3),
        "num_levels": 4,
        "device": CPU,
    }


def found(evaluation, method: str, quantity: str, level: float | None = None, by: str = ""):
    (value,) = [
        v
        for v in evaluation.values
        if (v.method, v.quantity, v.level) == (method, quantity, level) and v.extractor.endswith(by)
    ]
    return value


def test_every_figure_of_a_method_is_what_its_parts_say(tiny, judged):
    path = tiny.trajectory("path")
    (path / "cost.json").write_text(json.dumps({"sequences": 8, "seconds": 3.0, "cpu_seconds": 4.0}))
    evaluation = evaluate([path], **judged)
    own = {network.name.split("/")[-1]: network for network in evaluation.networks}
    assert set(own) == {"rgb", "grey", "extractor"}
    (of,) = evaluation.methods
    a, b = tiny.images("test", "A")[1], tiny.images("test", "B")[1]

    model = inference.load(own["rgb"].checkpoint, CPU)
    middle = np.rint((a[:8].astype(float) + b[:8]) / 2).astype(np.uint8)
    p = inference.predict(model, torch.from_numpy(middle), device=CPU)[:, 1]
    value = found(evaluation, "path", "probability", 0.5, "rgb")
    assert value.value == pytest.approx(p.mean(), abs=1e-5)
    assert value.low < value.value < value.high
    assert (value.n, value.trajectory) == (8, str(path))
    assert found(evaluation, "path", "flip_rate", 0.5, "rgb").value == (p > 0.5).mean()
    seen = of.seen[own["rgb"].name]
    assert found(evaluation, "path", "calibration_mean", None, "rgb").value == pytest.approx(
        progression.calibration_of_means(seen.value, np.array([0.25, 0.5, 0.75, 1])), rel=1e-6
    )

    real = inference.features(model, torch.from_numpy(np.concatenate([a, b])), device=CPU)
    groups = [f"{label}{n // 2}" for label in "AB" for n in range(12)]
    expected = kid(seen.features[:, 2], real, groups=groups[:8], real_groups=groups).value
    value = found(evaluation, "path", "kid_pooled", 0.5, "rgb")
    assert value.value == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (value.n, value.n_real) == (8, 24)
    floor = found(evaluation, "real pooled", "kid_floor", None, "rgb")
    over = [found(evaluation, "path", "kid_pooled_over_floor", s, "rgb").value for s in (0.25, 0.5, 0.75, 1.0)]
    assert over[1] == pytest.approx(expected - floor.value, abs=1e-9)
    assert found(evaluation, "path", "kid_pooled_over_floor", None, "rgb").value == max(over)

    extract = partial_features(own["extractor"])
    features = of.seen[own["extractor"].name].features
    for level, frames, patches in ((0.25, 1, a), (0.5, 2, np.concatenate([a, b])), (0.75, 3, b)):
        value = found(evaluation, "path", "frechet_own", level, "extractor")
        assert value.value == pytest.approx(frechet_distance(features[:, frames], extract(patches)), rel=1e-3)
        assert value.n_real == len(patches)
    assert found(evaluation, "path", "frechet_target", 1.0).value == pytest.approx(
        frechet_distance(features[:, 4], extract(b)), rel=1e-3
    )
    others = cdist(features[:, 2], extract(a))
    others[np.arange(8)[:, None] // 2 == np.arange(12) // 2] = np.nan
    ratio = progression.distance_to_source(features)[:, 2].mean() / np.nanmean(others, axis=1).mean()
    assert found(evaluation, "path", "preservation", 0.5, "extractor").value == pytest.approx(ratio, rel=1e-3)

    assert found(evaluation, "path", "contrast", 0.5).value == pytest.approx(tissue_figures(middle)[:, 1].mean())
    assert found(evaluation, "real target", "fine_detail").value == pytest.approx(tissue_figures(b)[:, 2].mean())
    costs = [found(evaluation, "path", quantity).value for quantity in ("nfe", "gradients", "seconds", "cpu_seconds")]
    assert costs == [30, 6, 0.375, 0.5]
    assert as_json(evaluation)["methods"][0]["device"] == "cpu"


def partial_features(network):
    return lambda patches: inference.features(network.model, torch.from_numpy(patches), device=CPU)


def test_what_a_gpu_took_is_told_by_the_clock_alone(tiny, judged):
    path = tiny.trajectory("path")
    cost = {"sequences": 8, "device": "cuda: Some GPU", "seconds": 2.0}
    (path / "cost.json").write_text(json.dumps(cost))
    assert read_cost(path) == ("cuda: Some GPU", 0.25, None)
    evaluation = evaluate([path], **judged)
    assert found(evaluation, "path", "seconds").value == 0.25
    assert not [value for value in evaluation.values if value.quantity == "cpu_seconds"]
    methods = {of["name"]: of["device"] for of in as_json(evaluation)["methods"]}
    assert methods == {"path": "cuda: Some GPU", **dict.fromkeys(list(methods)[1:])}
    (row,) = (line for line in markdown(evaluation).splitlines() if "seconds a sequence" in line)
    assert row.split(" | ")[:3] == ["| seconds a sequence", "0.25 (cuda: Some GPU)", ""]


def test_copying_the_source_is_level_zero_at_every_level(tiny, judged):
    evaluation = evaluate([tiny.trajectory("path")], **judged)
    copy = "copy the source"
    for quantity, by in (("probability", "rgb"), ("flip_rate", "grey"), ("kid_pooled", "extractor"), ("contrast", "")):
        source = found(evaluation, "path", quantity, 0.0, by).value
        for level in (0.0, 0.25, 1.0):
            assert found(evaluation, copy, quantity, level, by).value == pytest.approx(source, rel=1e-9)
    assert found(evaluation, copy, "preservation", 1.0, "rgb").value == 0
    assert found(evaluation, copy, "monotone_share", None, "rgb").value == 1
    assert np.isnan(found(evaluation, copy, "path_over_straight", None, "rgb").value)


def test_the_nearest_real_target_is_one_of_the_validation_split(tiny, judged):
    evaluation = evaluate([tiny.trajectory("path")], **judged)
    nearest = next(of for of in evaluation.baselines if of.name == "nearest real target")
    network = evaluation.networks[-1]
    extract = partial_features(network)
    sources, candidates = extract(tiny.images("test", "A")[1][:8]), extract(tiny.images("val", "B")[1])
    expected = candidates[cdist(sources, candidates).argmin(1)]
    for level in (1, 4):
        np.testing.assert_allclose(nearest.seen[network.name].features[:, level], expected, atol=1e-4)
    np.testing.assert_allclose(nearest.seen[network.name].features[:, 0], sources, atol=1e-4)


def test_severity_is_judged_by_scores_and_frames_are_compared_to_their_own(tiny, judged):
    scores = tiny.classifier("severity", "classifier.labels=score", seed=4)
    evaluation = evaluate([tiny.trajectory("path")], scores=scores, **judged)
    (of,) = evaluation.methods
    severity = of.seen[evaluation.networks[-1].name].value
    errors = [np.abs(severity[:, k] - k / 4).mean() for k in range(1, 5)]
    assert found(evaluation, "path", "severity_error", 0.5).value == pytest.approx(errors[1], rel=1e-6)
    assert found(evaluation, "path", "severity_error").value == pytest.approx(np.mean(errors), rel=1e-6)

    (a, b), score = (tiny.images("test", label)[1] for label in "AB"), (np.arange(24) + 0.5) / 24
    model = inference.load(evaluation.networks[-1].checkpoint, CPU)
    real = inference.predict(model, torch.from_numpy(np.concatenate([a, b])), device=CPU)[:, 1]
    value = found(evaluation, "real scored", "severity_error")
    assert (value.value, value.n) == (pytest.approx(np.abs(real - score).mean(), abs=1e-5), 24)

    near = np.abs(score - 0.25) <= 0.075
    features = partial_features(evaluation.networks[2])(np.concatenate([a, b])[near])
    value = found(evaluation, "path", "frechet_own", 0.25)
    assert value.n_real == near.sum() == 4
    own = of.seen[evaluation.networks[2].name].features[:, 1]
    assert value.value == pytest.approx(frechet_distance(own, features), rel=1e-3)


def test_severity_turns_with_the_direction(tiny):
    run = tiny.classifier("severity", "classifier.labels=score", seed=4)
    there, back = (
        load_networks([("scores", run)], source=source, target=target, device=CPU)[0] for source, target in ("AB", "BA")
    )
    patches = tiny.images("test", "B")[1]
    values = [network.look(patches, origin="here") for network in (there, back)]
    np.testing.assert_allclose(values[0].value + values[1].value, 1, atol=1e-6)
    assert (values[0].is_target != values[1].is_target).all()
    numbers = there.real_patches().numbers
    np.testing.assert_allclose(there.scores(numbers), tiny.patches.scores[numbers])
    np.testing.assert_allclose(back.scores(numbers), 1 - tiny.patches.scores[numbers])


def test_guidance_is_told_by_ratios_on_the_sources_of_both(tiny, judged):
    guided = tiny.trajectory("guided", method="progression")
    unguided = tiny.trajectory("plain", method="progression", noise=25, num=6)
    evaluation = evaluate([guided, tiny.trajectory("path", noise=5)], unguided=[unguided], **judged)
    assert evaluation.unguided == {"progression": "progression, unguided"}
    value = found(evaluation, "progression", "guidance_frechet_ratio", 0.75)
    extractor = evaluation.networks[-1].name
    reference = partial_features(evaluation.networks[-1])(tiny.images("test", "B")[1])
    with_, without = (next(of for of in evaluation.methods if of.name == n) for n in evaluation.unguided.popitem())
    expected = [frechet_distance(of.seen[extractor].features[:6, 3], reference) for of in (with_, without)]
    assert value.value == pytest.approx(expected[0] / expected[1], rel=1e-3)
    assert value.n == 6
    levels = [found(evaluation, "progression", "guidance_frechet_ratio", s).value for s in (0.25, 0.5, 0.75, 1.0)]
    assert found(evaluation, "progression", "guidance_frechet_ratio").value == pytest.approx(np.mean(levels))
    rows = [row for row in evaluation.differences if row.second == "progression, unguided"]
    assert {row.n for row in rows} == {6}
    assert {row.quantity for row in rows} >= {"flip_rate", "calibration_image", "monotone_share", "preservation"}


def test_the_command_writes_json_csv_and_a_table(tiny, judged, capsys):
    first, second = tiny.trajectory("path"), tiny.trajectory("other", method="depth", noise=3, num=6)
    rgb, grey = map(str, judged["judges"])
    output = tiny.root / "figures" / "found.json"
    networks = ["--judge", rgb, "--judge", grey, "--features", str(judged["features"])]
    main(["evaluate", str(first), str(second), *networks, "--levels", "4", "--output", str(output), "seed=0"])
    printed = capsys.readouterr().out
    content = json.loads(output.read_text())
    assert content["format"] == 1
    baselines = ["copy the source", "stain transfer", "nearest real target"]
    assert [m["name"] for m in content["methods"]] == ["path", "depth", *baselines]
    assert len({n["digest"] for n in content["networks"]}) == 3
    assert [n["use"] for n in content["networks"]] == ["judge", "judge", "features"]
    assert {row["n"] for row in content["differences"]} == {6}
    with open(output.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["values"]) > 300
    columns = ["trajectory", "method", "quantity", "level", "extractor", "n", "n_real", "split", "value", "low", "high"]
    assert list(rows[0]) == columns
    for row, value in zip(rows, content["values"], strict=True):
        assert row["n"] == str(value["n"])
        assert row["value"] == ("" if value["value"] is None else str(value["value"]))
    with open(output.with_suffix(".frames.csv"), newline="") as file:
        frames = list(csv.DictReader(file))
    judge = content["networks"][0]["name"]
    middle = [f for f in frames if (f["trajectory"], f["judge"], f["level"]) == (str(first), judge, "0.5")]
    assert len({frame["source_id"] for frame in middle}) == 8
    told = [v for v in content["values"] if (v["quantity"], v["level"]) == ("probability", 0.5)]
    (mean,) = (v["value"] for v in told if (v["method"], v["extractor"]) == ("path", judge))
    assert np.mean([float(frame["probability"]) for frame in middle]) == pytest.approx(mean, abs=1e-4)
    table = output.with_suffix(".md").read_text()
    assert table.startswith(printed.partition("wrote:")[0].strip())
    assert "| flip rate at 1, " in table
    assert (
        "path (n = 8) | depth (n = 6) | copy the source (n = 8) | stain transfer (n = 8) | nearest real target (n = 8)"
        " | real A (n = 12)" in table
    )
    assert not list(output.parent.glob("*.tmp"))


def test_runs_are_named_by_text_and_a_wrong_output_is_refused_before_the_work(tiny, judged, monkeypatch):
    path = tiny.trajectory("path")
    (path / "config.yaml").write_text(tiny._config([]).to_yaml())  # as translate leaves it
    networks = ["--judge", str(judged["judges"][0]), "--features", str(judged["features"]), "--levels", "4"]
    main(["evaluate", str(path), *networks])
    content = json.loads((path / "metrics.json").read_text())
    assert [Path(network["checkpoint"]).parents[1].name for network in content["networks"]] == ["rgb", "extractor"]
    monkeypatch.setattr("cellflux_bridge.metrics.evaluate.evaluate", None)
    for wrong in ("metrics.csv", "rgb"):
        with pytest.raises(SystemExit, match=r"--output .*: expected a file name that ends in \.json"):
            main(["evaluate", str(path), *networks, "--output", str(tiny.root / wrong)])


def test_figures_do_not_change_from_one_evaluation_to_the_next(tiny, judged):
    path = tiny.trajectory("path")
    first, second = (evaluate([path], **judged).values for _ in range(2))
    assert repr(first) == repr(second)


def test_levels_of_a_finer_trajectory_are_the_nearest_frames(tiny, judged):
    fine = tiny.trajectory("fine", levels=tuple(np.linspace(0, 1, 9).tolist()))
    coarse = tiny.trajectory("coarse", method="depth")
    evaluation = evaluate([fine, coarse], **judged)
    for level in (0.25, 0.5, 1.0):
        values = [found(evaluation, name, "probability", level, "rgb").value for name in ("path", "depth")]
        assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_floors_stand_beside_the_figures_of_every_level(tiny, judged):
    evaluation = evaluate([tiny.trajectory("path")], **judged)
    (a, b), groups = (tiny.images("test", label)[1] for label in "AB"), np.arange(12) // 2
    extract = partial_features(evaluation.networks[-1])
    for level, patches, of in ((0.25, a, groups), (0.5, np.concatenate([a, b]), np.arange(24) // 2), (1.0, b, groups)):
        half = len(patches) // 2
        halves = [
            frechet_distance(extract(patches[first]), extract(patches[second]))
            for first, second in half_splits(of, num=20, generator=draw(1))
        ]
        floor = found(evaluation, "real own", "frechet_floor", level, "extractor")
        assert (floor.n, floor.n_real, floor.split) == (half, half, "test")
        assert min(halves) / 2 < floor.low <= floor.value <= floor.high < 2 * max(halves)
        for kind in ("kid", "frechet", "precision", "recall", "density", "coverage"):
            floor = found(evaluation, "real own", f"{kind}_floor", level, "extractor")
            assert floor.n_real == found(evaluation, "path", f"{kind}_own", level, "extractor").n_real / 2
    # The own patches of levels above one half are the target's, and those of one half are all.
    for kind in ("kid", "frechet"):
        target, own = (
            found(evaluation, *of) for of in (("real target", f"{kind}_floor"), ("real own", f"{kind}_floor", 1.0))
        )
        assert target[4:] == own[4:]
    pooled = found(evaluation, "real pooled", "frechet_floor", None, "extractor")
    assert pooled[4:] == found(evaluation, "real own", "frechet_floor", 0.5)[4:]
    table = markdown(evaluation)
    assert "floors of halves of real B patches (6 against 6)" in table
    assert "each level's own, mean over levels" in table


def test_at_most_so_many_real_patches_are_compared_to(tiny, judged):
    (network,) = load_networks([("judge", judged["judges"][0])], source="A", target="B", device=CPU)
    everyone, drawn = network.real_patches(), [network.real_patches(num=5, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0].numbers, drawn[1].numbers)
    assert set(drawn[0].numbers) != set(drawn[2].numbers)
    for some in drawn:
        assert set(some.numbers) <= set(everyone.numbers)
        assert some.is_target.tolist() == [False] * 5 + [True] * 5
        np.testing.assert_array_equal(some.groups, network.groups_of(some.numbers))
    np.testing.assert_array_equal(network.real_patches(num=12, seed=3).numbers, everyone.numbers)

    path, scores = tiny.trajectory("path"), tiny.classifier("severity", "classifier.labels=score", seed=4)
    evaluation = evaluate([path], scores=scores, max_real=10, **judged)
    assert as_json(evaluation)["max_real"] == 10
    assert found(evaluation, "path", "kid_pooled", 0.5, "extractor").n_real == 20
    assert found(evaluation, "path", "recall_target", 1.0, "extractor").n_real == 10
    assert [found(evaluation, name, "contrast").n for name in ("real source", "real target")] == [10, 10]
    assert found(evaluation, "real scored", "severity_error").n == 10
    assert "real A (n = 10)" in markdown(evaluation)
    with pytest.raises(UserError, match=r"--max-real 0: expected how many"):
        evaluate([path], max_real=0, **judged)


def test_all_frames_are_compared_to_both_classes(tiny, judged):
    evaluation = evaluate([tiny.trajectory("path")], **judged)
    features = evaluation.methods[0].seen[evaluation.networks[-1].name].features[:, 1:]
    real = partial_features(evaluation.networks[-1])(np.concatenate([tiny.images("test", k)[1] for k in "AB"]))
    value = found(evaluation, "path", "frechet_pooled")
    assert (value.n, value.n_real) == (32, 24)
    assert value.value == pytest.approx(frechet_distance(features.reshape(32, -1), real), rel=1e-3)
    groups = np.array([f"{label}{n // 2}" for label in "AB" for n in range(12)])
    near = neighbourhoods(features.reshape(32, -1), real, groups=np.repeat(groups[:8], 4), real_groups=groups)
    for figure, each in near._asdict().items():
        assert found(evaluation, "path", f"{figure}_pooled").value == pytest.approx(each.mean())
        assert found(evaluation, "real pooled", f"{figure}_floor").n == 12


def test_the_split_stands_beside_every_value(tiny, judged):
    evaluation = evaluate(
        [tiny.trajectory("path"), tiny.trajectory("depth", method="depth", split="val", num=5)], **judged
    )
    splits = {(v.method, v.split) for v in evaluation.values if v.method in ("path", "depth", "real target")}
    assert splits == {("path", "test"), ("depth", "val"), ("real target", "test")}
    methods = {method["name"]: method["split"] for method in as_json(evaluation)["methods"]}
    assert (methods["path"], methods["depth"]) == ("test", "val")
    assert evaluation.networks[0].split_of(["elsewhere/0.png"]) == ""


# Memorisation, structure, stain


def test_training_patches_among_the_frames_are_found(tiny, judged):
    path = tiny.trajectory("path", noise=20)
    trained = tiny.images("train", "B")
    for place, sequence in enumerate(sorted((path / "frames").iterdir())[:3]):
        write_png(sequence / "004.png", trained[1][place].transpose(1, 2, 0))
    evaluation = evaluate([path], **judged)
    extract = partial_features(evaluation.networks[-1])
    training = np.concatenate([extract(tiny.images("train", label)[1]) for label in "AB"])
    real = cdist(np.concatenate([extract(tiny.images("test", label)[1]) for label in "AB"]), training)
    by_class = [real.min(1)[(real.argmin(1) >= 6) == kind] for kind in (False, True)]  # 6 of A, then 6 of B
    frames = evaluation.methods[0].seen[evaluation.networks[-1].name].features[:, 4]
    distances, kinds = (take(cdist(frames, training), axis=1) for take in (np.min, np.argmin))
    held_out = [by_class[int(kind)] for kind in kinds >= 6]
    value = found(evaluation, "path", "nearest_training_ratio", 1.0)
    assert value.value == pytest.approx(
        np.median([d / np.median(h) for d, h in zip(distances, held_out, strict=True)]), rel=1e-2
    )
    assert (value.n, value.n_real) == (8, min(map(len, by_class)))
    expected = np.mean([(d < h).mean() for d, h in zip(distances, held_out, strict=True)])
    assert found(evaluation, "path", "nearest_training_closer", 1.0).value == pytest.approx(expected, abs=1e-6)
    copies = [copy for copy in evaluation.near_copies if copy.level == 1.0]
    assert found(evaluation, "path", "near_copy_share", 1.0).value == len(copies) / 8 >= 3 / 8
    exact = {copy.source_id: copy for copy in copies if copy.distance < 1e-3}
    sources = tiny.images("test", "A")[0]
    assert [exact[sources[n]].training_id for n in range(3)] == trained[0][:3]
    assert exact[sources[0]].held_out == pytest.approx(by_class[1].min(), rel=1e-2)
    # Real patches that were held out are no copies, whatever their class.
    assert found(evaluation, "copy the source", "near_copy_share").value == 0
    assert not any("repeat a training patch" in warning for warning in evaluation.warnings)


def test_a_test_patch_that_is_a_training_patch_hides_no_copy(tiny, judged):
    path = tiny.trajectory("path", noise=20)
    (sequence,) = list((path / "frames").iterdir())[:1]
    write_png(sequence / "004.png", tiny.images("train", "B")[1][0].transpose(1, 2, 0))
    shutil.copy(tiny.root / "patches/train/B/B001.png", tiny.root / "patches/test/B/B011.png")
    evaluation = evaluate([path], **judged)
    assert any(warning.startswith("1 real test patches repeat a training patch") for warning in evaluation.warnings)
    assert min(copy.distance for copy in evaluation.near_copies) < 1e-3
    assert evaluation.near_copies[0].training_id == tiny.images("train", "B")[0][0]


def test_a_mere_recolouring_is_explained_by_the_stain(tiny, judged):
    path = tiny.trajectory("path")
    evaluation = evaluate([path], **judged)
    assert found(evaluation, "stain transfer", "stain_share", 1.0, "rgb").value == pytest.approx(1)
    assert np.isnan(found(evaluation, "copy the source", "stain_share", 1.0, "rgb").value)
    assert 0 < found(evaluation, "path", "stain_share", 1.0, "rgb").value < 1
    targets = tiny.images("train", "B")[1]
    sources = tiny.images("test", "A")[1][:8]
    reference = fit_reference("reinhard", list(targets.transpose(0, 2, 3, 1)))
    recoloured = recolour(sources, reference)
    transferred = next(of for of in evaluation.baselines if of.name == "stain transfer")
    np.testing.assert_array_equal(transferred.last, recoloured)
    expected = haematoxylin_ms_ssim(np.stack([sources, recoloured], axis=1))[:, 1].mean()
    assert found(evaluation, "stain transfer", "ms_ssim", 0.5).value == pytest.approx(expected, rel=1e-5)
    assert found(evaluation, "copy the source", "ms_ssim", 1.0).value == pytest.approx(1, abs=1e-5)
    assert found(evaluation, "copy the source", "layer_distance", 1.0).value == pytest.approx(0, abs=1e-9)
    apart = found(evaluation, "real source", "layer_distance", None)
    assert 0 < apart.n <= 12
    assert apart.value > 0


# The feature pass


def test_a_stopped_evaluation_goes_on_from_its_cache(tiny, judged, monkeypatch):
    path, cache = tiny.trajectory("path"), tiny.root / "cache_of_features"
    looked = []
    real = inference.features

    def counted(model, batch, **options):
        looked.append(len(batch))
        if len(looked) == 4 and not cache_done:
            raise KeyboardInterrupt
        return real(model, batch, **options)

    monkeypatch.setattr(inference, "features", counted)
    cache_done = False
    with pytest.raises(KeyboardInterrupt):
        evaluate([path], cache=cache, **judged)
    cache_done, kept = True, len(list(cache.glob("*.npz")))
    assert kept >= 3
    looked.clear()
    second = evaluate([path], cache=cache, **judged)
    assert looked
    (damaged := sorted(cache.glob("*.npz"))[0]).write_bytes(b"not an archive")
    looked.clear()
    third = evaluate([path], cache=cache, **judged)
    assert len(looked) <= 1  # of the damaged file alone
    assert zipfile.is_zipfile(damaged)
    assert not list(cache.glob("*.tmp"))
    assert repr(second.values) == repr(third.values) == repr(evaluate([path], **judged).values)
    looked.clear()
    other = {**judged, "features": tiny.classifier("another", seed=9)}
    evaluate([path], cache=cache, **other)
    assert looked  # other weights are asked anew


def save_timm(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=5)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    settings = {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7], "input_size": [3, 32, 32], "num_classes": 5}
    settings |= {"first_conv": "conv1", "classifier": "fc"}
    content = {"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_an_extractor_by_name_prepares_images_itself(tiny, judged):
    folder, path = save_timm(tiny.root / "extractor_weights"), tiny.trajectory("path")
    name = f"local-dir:{folder}"
    evaluation = evaluate([path], **{**judged, "features": name})
    network = evaluation.networks[-1]
    assert (network.name, network.view, str(network.checkpoint)) == (name, "ResNet at 32 px", name)
    model = timm.create_model("test_resnet", num_classes=0)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("fc.")})
    b = torch.from_numpy(tiny.images("test", "B")[1]).float() / 255
    larger = torch.nn.functional.interpolate(b, (32, 32), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.2, 0.3, 0.4], [0.5, 0.6, 0.7]))
    with torch.no_grad():
        expected = model.eval()((larger - mean) / std).numpy()
    frames = evaluation.methods[0].seen[name].features[:, 4]
    assert found(evaluation, "path", "frechet_target", 1.0).value == pytest.approx(
        frechet_distance(frames, expected), rel=2e-2
    )
    assert not [v for v in evaluation.values if v.extractor == name and v.quantity in ("probability", "flip_rate")]
    assert found(evaluation, "path", "layer_distance", 1.0, name).value > 0
    markdown(evaluation)
    content = as_json(evaluation)
    assert content["memorisation"]["patches"].startswith(str(judged["judges"][0]))


def test_an_extractor_that_cannot_be_loaded_is_told(tiny, judged):
    file = save_timm(tiny.root / "weights") / "model.safetensors"
    assert NamedExtractor(f"timm:test_resnet@{file}").size > 0
    with pytest.raises(UserError, match=r"none\.safetensors: no such file; expected weights of test_resnet"):
        NamedExtractor(f"timm:test_resnet@{tiny.root}/none.safetensors")
    broken = save_timm(tiny.root / "broken")
    (broken / "model.safetensors").write_bytes(file.read_bytes()[:100])
    cut = f"timm:test_resnet@{broken}/model.safetensors"
    for name in ("timm:no_such_model", f"local-dir:{tiny.root}/none", f"local-dir:{broken}", cut):
        with pytest.raises(UserError, match=r"--features .*: cannot be loaded \(.+\); expected timm:NAME"):
            NamedExtractor(name)


# There and back


def test_the_way_back_is_matched_by_its_pixels(tiny, judged):
    path = tiny.trajectory("path")
    forward = load_trajectory(path)
    header = replace(forward.header, source="B", target="A", levels=(0.0, 1.0))

    def back(name: str, first: np.ndarray, last: np.ndarray) -> Path:
        frames = np.stack([first, last])
        writer = TrajectoryWriter(tiny.root / name, header)
        made = Trajectory(header, frames, linear_soft_labels(header, 6), forward.source_ids[:6], (1,) * 6, (0,) * 6)
        writer.append(made, numbers=range(6))
        writer.finish()
        return tiny.root / name

    returned = back("returned", forward.frames[-1, 2:], forward.frames[0, 2:])
    evaluation = evaluate([path], cycle=returned, **judged)
    value = found(evaluation, "path", "cycle_preservation", None, "rgb")
    assert (value.n, value.value) == (6, pytest.approx(0, abs=1e-5))
    assert found(evaluation, "path", "cycle_ms_ssim").value == pytest.approx(1, abs=1e-5)
    stayed = back("stayed", forward.frames[-1, 2:], forward.frames[-1, 2:])
    evaluation = evaluate([path], cycle=stayed, **judged)
    network, (of,) = evaluation.networks[0], evaluation.methods
    sources, ends = (of.seen[network.name].features[2:, number] for number in (0, 4))
    patches = tiny.images("test", "A")[1]
    real, groups = partial_features(network)(patches), np.arange(12) // 2
    others = progression.distance_to_others(sources[:, None], real, groups=groups[2:8], other_groups=groups)
    expected = np.linalg.norm(ends - sources, axis=1).mean() / others.mean()
    value = found(evaluation, "path", "cycle_preservation", None, "rgb").value
    assert value == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match=r"--cycle .*none of its first frames is a last frame of path"):
        evaluate([path], cycle=back("elsewhere", forward.frames[1, 2:], forward.frames[0, 2:]), **judged)
    with pytest.raises(UserError, match=r"--cycle .*A -> B; expected the way back of A -> B"):
        evaluate([path], cycle=path, **judged)


# A user's own frames


def test_frames_of_ones_own_with_few_sources_have_what_can_be_computed(tiny, judged):
    evaluation = evaluate([tiny.trajectory("path", num=3)], **judged)
    assert np.isfinite(found(evaluation, "path", "precision_own", 1.0).value)
    assert np.isfinite(found(evaluation, "path", "kid_own", 1.0).value)
    assert np.isnan(found(evaluation, "path", "recall_own", 1.0).value)
    assert any(
        w.startswith("recall_own of path at level 0.25, 0.5, 0.75, 1 is undefined: 3") for w in evaluation.warnings
    )


def test_sequences_that_lack_rows_are_told(tiny, judged):
    path = tiny.trajectory("path")
    lines = (path / "manifest.csv").read_text().splitlines()
    kept = [line for number, line in enumerate(lines) if number != 4]  # of the first sequence
    kept[-1] = kept[-1].rpartition(",")[0]  # of the last one
    (path / "manifest.csv").write_text("\n".join(kept) + "\n")
    evaluation = evaluate([path], **judged)
    assert found(evaluation, "path", "contrast", 1.0).n == 6
    assert any(w.startswith(f"2 sequences of {path} lack rows in manifest.csv") for w in evaluation.warnings)


def test_damaged_frames_of_ones_own_are_told(tiny, judged):
    path = tiny.trajectory("path")
    frame = sorted(path.rglob("002.png"))[1]
    frame.unlink()
    with pytest.raises(UserError, match=r"002\.png: no such file"):
        evaluate([path], **judged)
    write_png(frame, np.zeros((8, 20, 3), np.uint8))
    with pytest.raises(UserError, match=r"002\.png: 20 x 8 pixels, unlike the others"):
        evaluate([path], **judged)
    manifest = path / "manifest.csv"
    text = manifest.read_text()
    manifest.write_text(text.replace("source_id", "source", 1))
    with pytest.raises(UserError, match=r"manifest\.csv: "):
        evaluate([path], **judged)


# What is refused


def test_a_guide_is_refused_wherever_it_is_named(tiny, judged):
    path, guide = tiny.trajectory("path"), tiny.classifier("guide", "classifier.role=guide", seed=5)
    for wrong in ({"judges": [guide]}, {"features": guide}, {"scores": guide}):
        with pytest.raises(UserError, match=r"guide/.*is a guide .*classifier\.role=judge"):
            evaluate([path], **{**judged, **wrong})


def test_a_network_named_twice_is_refused(tiny, judged, tmp_path):
    path = tiny.trajectory("path")
    with pytest.raises(UserError, match=r"rgb: is named twice"):
        evaluate([path], **{**judged, "features": judged["judges"][0]})
    copied = shutil.copytree(judged["judges"][0], tmp_path / "copied")
    with pytest.raises(UserError, match=r"rgb: has the very weights of another network here"):
        evaluate([path], **{**judged, "features": copied})
    with pytest.raises(UserError, match=r"a trajectory is named twice"):
        evaluate([path, path], **judged)


def test_scores_must_come_from_scores(tiny, judged):
    with pytest.raises(UserError, match=r"--scores .*classifier.labels=score from A to B; found labels=class"):
        evaluate([tiny.trajectory("path")], scores=tiny.classifier("third", seed=6), **judged)


def test_sequences_that_a_network_cannot_judge_are_refused(tiny, judged, make_patches):
    header = TrajectoryHeader("path", "A", "C", ("A", "C"), (0.0, 1.0), "x")
    TrajectoryWriter(tiny.root / "unknown", header)
    with pytest.raises(UserError, match=r"does not know the class 'C' .*trained on A, B"):
        evaluate([tiny.root / "unknown"], **judged)
    TrajectoryWriter(tiny.root / "empty", replace(header, target="B", levels=(0.0, 0.2, 0.4, 0.8, 1.0)))
    with pytest.raises(UserError, match=r"empty: no whole sequence"):
        evaluate([tiny.root / "empty"], **judged)
    with pytest.raises(UserError, match=r"A -> B, but .*unknown is A -> C"):
        evaluate([tiny.root / "unknown", tiny.root / "empty"], **judged)
    for file in (tiny.trajectory("large") / "frames").rglob("*.png"):
        write_png(file, np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(UserError, match=r"20 x 20 px, .* trained on 16 px"):
        evaluate([tiny.root / "large"], **judged)


def test_sources_that_a_judge_trained_on_are_refused(tiny, judged):
    with pytest.raises(UserError, match=r"trained on sources of .*train/A/A000\.png"):
        evaluate([tiny.trajectory("seen", split="train", num=6)], **judged)


def test_classify_refuses_what_evaluate_refuses(tiny, capsys):
    rgb = str(tiny.classifier("rgb", seed=1))
    seen = str(tiny.trajectory("seen", split="train", num=6))
    with pytest.raises(SystemExit, match=r"rgb: trained on sources of .*seen: train/A/A000\.png"):
        main(["classify", seen, "--classifier", rgb])
    path = tiny.trajectory("path")
    main(["classify", str(path), "--classifier", rgb])
    assert "fraction called B of 8 sequences" in capsys.readouterr().out
    shutil.copytree(tiny.root / "patches", tiny.root / "elsewhere")
    (path / "config.yaml").write_text(tiny._config([f"data.root={tiny.root / 'elsewhere'}"]).to_yaml())
    with pytest.raises(SystemExit, match=r"was made from data\.root=.*elsewhere, but .*rgb would compare"):
        main(["classify", str(path), "--classifier", rgb])


def test_sources_that_a_judge_sees_otherwise_are_refused(tiny, judged):
    path = tiny.trajectory("path")
    for file in path.rglob("000.png"):
        write_png(file, np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r"not the patches that .*data\.crop"):
        evaluate([path], **judged)


def test_a_judge_that_has_diverged_is_refused(tiny, judged):
    spoilt = tiny.classifier("spoilt", seed=7, spoil=True)
    with pytest.raises(UserError, match=r"spoilt, looking at .*not finite numbers"):
        evaluate([tiny.trajectory("path")], **{**judged, "features": spoilt})


def test_an_unguided_rival_must_be_of_the_same_method_and_sources(tiny, judged):
    path = tiny.trajectory("path")
    with pytest.raises(UserError, match=r"--unguided .*: its method depth is none of path"):
        evaluate([path], unguided=[tiny.trajectory("depth", method="depth")], **judged)


def test_damaged_costs_and_missing_networks_are_told(tiny, judged, capsys):
    path = tiny.trajectory("path")
    (path / "cost.json").write_text("{}")
    with pytest.raises(UserError, match=r"cost\.json: expected sequences"):
        evaluate([path], **judged)
    for arguments in (["evaluate", str(path)], ["evaluate", str(path), "--judge", str(judged["judges"][0])]):
        with pytest.raises(SystemExit, match=r"error: --(judge|features): none given"):
            main(arguments)
