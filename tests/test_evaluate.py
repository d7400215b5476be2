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
from cellflux_bridge.base.files import csv_rows
from cellflux_bridge.base.statistics import half_splits
from cellflux_bridge.classifier import inference
from cellflux_bridge.cli import main
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.images import write_png
from cellflux_bridge.images.stain import fit_reference
from cellflux_bridge.metrics import progression, reference_set, two_sample
from cellflux_bridge.metrics.bands import KINDS, statistics
from cellflux_bridge.metrics.comparisons import add_cycle, match_cycle
from cellflux_bridge.metrics.cost import read_cost
from cellflux_bridge.metrics.evaluate import evaluate
from cellflux_bridge.metrics.fidelity import frechet_distance, kid, neighbourhoods
from cellflux_bridge.metrics.loading import NamedExtractor, load_networks
from cellflux_bridge.metrics.reference_set import ReferenceSet
from cellflux_bridge.metrics.results import as_json, markdown, write_results
from cellflux_bridge.metrics.sliced_wasserstein import swd
from cellflux_bridge.metrics.structure import haematoxylin_ms_ssim, recolour, tissue_figures
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

    def config(self, overrides):
        return load_config(self._write_config(self.root), ["data.classes=[A, B]", *overrides])

    def _load(self, overrides):
        config = self.config(overrides)
        return load_patches(config.data, seed=config.seed)

    def classifier(self, name: str, *overrides: str, seed: int, spoil: bool = False) -> Path:
        config = self.config(overrides)
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

    def extractor(self, name: str) -> Path:
        """A folder for local-dir: with a small model of timm."""
        torch.manual_seed(0)
        model, folder = timm.create_model("test_resnet", num_classes=5), self.root / name
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        settings = {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7], "input_size": [3, 32, 32], "num_classes": 5}
        settings |= {"first_conv": "conv1", "classifier": "fc"}
        content = {"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": settings}
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    def images(self, split: str, label: str) -> tuple[list[str], np.ndarray]:
        indices = self.patches.indices(split, label)
        return [self.patches.ids[i] for i in indices], self.patches.centre(indices).numpy()

    def trajectory(self, name: str, *, method: str = "path", num: int = 8, noise: float = 0.0, **options) -> Path:
        """Blends of test patches of A into those of B, with noise, in a folder that was not there before."""
        given = {"levels": (0.0, 0.25, 0.5, 0.75, 1.0), "classes": ("B", "A"), "split": "test", **options}
        header = TrajectoryHeader(method, "A", "B", given["classes"], given["levels"], "x")
        (ids, a), (_, b) = (self.images(given["split"], label) for label in "AB")
        a, b = a[:num].astype(float), b[:num].astype(float)
        frames = np.stack([(1 - s) * a + s * b + (draw().normal(0, noise, a.shape) if s else 0) for s in header.levels])
        return self.write(name, header, np.clip(np.rint(frames), 0, 255).astype(np.uint8), tuple(ids[:num]))

    def write(self, name: str, header: TrajectoryHeader, frames: np.ndarray, ids: tuple[str, ...]) -> Path:
        num = len(ids)
        writer = TrajectoryWriter(self.root / name, header)
        made = Trajectory(header, frames, linear_soft_labels(header, num), ids, (30,) * num, (6,) * num)
        writer.append(made, numbers=range(num))
        writer.finish()
        return self.root / name

    def back(self, name: str, forward: Path, first: int, last: int) -> Path:
        """Two frames from B to A: the numbers `first` and `last` of all sequences of `forward` but two."""
        of = load_trajectory(forward)
        header = replace(of.header, source="B", target="A", levels=(0.0, 1.0))
        return self.write(name, header, of.frames[[first, last], 2:], of.source_ids[2:])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, make_patches, write_config) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"), make_patches, write_config)


@pytest.fixture(scope="module")
def judged(tiny):
    """Networks as keyword arguments of `evaluate`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_set, "NUM_RESAMPLES", 60)
        yield {
            "judges": [tiny.classifier("rgb", seed=1), tiny.classifier("grey", "classifier.view=grey", seed=2)],
            "features": tiny.classifier("extractor", seed=3),
            "num_levels": 4,
            "device": CPU,
        }


@pytest.fixture(scope="module")
def path(tiny) -> Path:
    folder = tiny.trajectory("path")
    (folder / "cost.json").write_text(json.dumps({"sequences": 8, "seconds": 3.0, "cpu_seconds": 4.0}))
    return folder


@pytest.fixture(scope="module")
def plain(judged, path):
    """An evaluation of one method, without scores."""
    return evaluate([path], **judged)


@pytest.fixture(scope="module")
def full(tiny, judged):
    """An evaluation of three methods with scores, a named extractor, an unguided trajectory and a way back."""
    guided = tiny.trajectory("guided", method="progression", noise=20)
    for place, sequence in enumerate(sorted((guided / "frames").iterdir())[:3]):  # copies of training patches
        write_png(sequence / "004.png", tiny.images("train", "B")[1][place].transpose(1, 2, 0))
    (guided / "cost.json").write_text(json.dumps({"sequences": 8, "device": "cuda: Some GPU", "seconds": 2.0}))
    fine = tiny.trajectory("fine", levels=tuple(np.linspace(0, 1, 9).tolist()))
    of_val = tiny.trajectory("val", method="depth", split="val", num=5)
    lines = (of_val / "manifest.csv").read_text().splitlines()
    kept = [line for number, line in enumerate(lines) if number != 4]  # of the first sequence
    kept[-1] = kept[-1].rpartition(",")[0]  # of the last one
    (of_val / "manifest.csv").write_text("\n".join(kept) + "\n")
    networks = {**judged, "features": f"local-dir:{tiny.extractor('weights')}"}
    return evaluate(
        [guided, fine, of_val],
        unguided=[tiny.trajectory("unguided", method="progression", noise=25, num=3)],
        cycle=tiny.back("stayed", guided, 4, 4),
        scores=tiny.classifier("severity", "classifier.labels=score", seed=4),
        **networks,
    )


@pytest.fixture
def reference(plain) -> ReferenceSet:
    return ReferenceSet(plain.reference.networks, levels=(), seed=0, max_real=10)


def found(evaluation, method: str, quantity: str, level: float | None = None, by: str = ""):
    values = evaluation if isinstance(evaluation, list) else evaluation.reference.rows
    (value,) = [
        v for v in values if (v.method, v.quantity, v.level) == (method, quantity, level) and v.extractor.endswith(by)
    ]
    return value


def method_of(evaluation, name: str):
    return next(of for of in (*evaluation.methods, *evaluation.baselines) if of.name == name)


def extractor_of(evaluation):
    return evaluation.reference.extractor


def features_by(network):
    return lambda patches: inference.features(network.model, torch.from_numpy(patches), device=CPU)


def test_every_figure_of_a_method_is_what_its_parts_say(tiny, plain, path):
    own = {network.name.split("/")[-1]: network for network in plain.reference.networks}
    assert list(own) == ["rgb", "grey", "extractor"]
    (of,) = plain.methods
    a, b = tiny.images("test", "A")[1], tiny.images("test", "B")[1]

    model = inference.load(own["rgb"].checkpoint, CPU)
    middle = np.rint((a[:8].astype(float) + b[:8]) / 2).astype(np.uint8)
    p = inference.predict(model, torch.from_numpy(middle), device=CPU)[:, 1]
    value = found(plain, "path", "probability", 0.5, "rgb")
    assert value.value == pytest.approx(p.mean(), abs=1e-5)
    assert value.low < value.value < value.high
    assert (value.n, value.trajectory) == (8, str(path))
    assert found(plain, "path", "flip_rate", 0.5, "rgb").value == (p > 0.5).mean()
    outputs = of.outputs[own["rgb"].name]
    assert found(plain, "path", "calibration_mean", None, "rgb").value == pytest.approx(
        progression.calibration_of_means(outputs.value, np.array([0.25, 0.5, 0.75, 1])), rel=1e-6
    )

    real = inference.features(model, torch.from_numpy(np.concatenate([a, b])), device=CPU)
    groups = [f"{label}{n // 2}" for label in "AB" for n in range(12)]
    expected = kid(outputs.features[:, 2], real, groups=groups[:8], real_groups=groups).value
    value = found(plain, "path", "kid_pooled", 0.5, "rgb")
    assert value.value == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (value.n, value.n_real) == (8, 24)
    floor = found(plain, "real pooled", "kid_floor", None, "rgb")
    over = [found(plain, "path", "kid_pooled_over_floor", s, "rgb").value for s in (0.25, 0.5, 0.75, 1.0)]
    assert over[1] == pytest.approx(expected - floor.value, abs=1e-9)
    assert found(plain, "path", "kid_pooled_over_floor", None, "rgb").value == max(over)

    extract = features_by(own["extractor"])
    features = of.outputs[own["extractor"].name].features
    for level, frames, patches in ((0.25, 1, a), (0.5, 2, np.concatenate([a, b])), (0.75, 3, b)):
        value = found(plain, "path", "frechet_own", level, "extractor")
        assert value.value == pytest.approx(frechet_distance(features[:, frames], extract(patches)), rel=1e-3)
        assert value.n_real == len(patches)
    assert found(plain, "path", "frechet_target", 1.0).value == pytest.approx(
        frechet_distance(features[:, 4], extract(b)), rel=1e-3
    )
    others = cdist(features[:, 2], extract(a))
    others[np.arange(8)[:, None] // 2 == np.arange(12) // 2] = np.nan
    ratio = progression.distance_to_source(features)[:, 2].mean() / np.nanmean(others, axis=1).mean()
    assert found(plain, "path", "preservation", 0.5, "extractor").value == pytest.approx(ratio, rel=1e-3)

    bands, groups = statistics(np.concatenate([b[:8], b]))[:, KINDS["grey"]], [f"test{n // 2}A" for n in range(8)]
    is_made, groups = np.arange(20) < 8, np.array(groups + [f"test{n // 2}B" for n in range(12)])
    scores = two_sample.logistic_scores(bands, is_made, groups)
    value = found(plain, "path", "two_sample_grey_target", 1.0)
    assert value.value == pytest.approx(two_sample.auc(scores, is_made))
    assert (value.n, value.n_real, value.extractor) == (8, 12, "")
    assert found(plain, "path", "two_sample_grey_own", 0.5).n_real == 24
    assert found(plain, "path", "swd_full_target", 1.0).value == pytest.approx(swd(b[:8], b)["full"], rel=0.1)
    assert next(
        v for v in plain.reference.rows if v[1:3] == ("path", "step_unevenness") and not v.extractor
    ).value == pytest.approx(1, abs=0.05)  # blends

    assert found(plain, "path", "contrast", 0.5).value == pytest.approx(tissue_figures(middle)[:, 1].mean())
    assert found(plain, "real target", "fine_outlines").value == pytest.approx(tissue_figures(b)[:, 2].mean())
    costs = [found(plain, "path", quantity).value for quantity in ("nfe", "gradients", "seconds", "cpu_seconds")]
    assert costs == [30, 6, 0.375, 0.5]
    assert as_json(plain)["methods"][0]["device"] == "cpu"


def test_what_the_extractor_sees_is_a_two_sample_test_too(full):
    extractor, of = extractor_of(full), method_of(full, "path")
    made, real = of.outputs[extractor.name].features[:, -1], full.reference.target_features
    groups = np.concatenate([extractor.groups_of_sources(of.source_ids), full.reference.target_pixels[1]])
    is_made = np.arange(len(groups)) < len(made)
    scores = two_sample.logistic_scores(np.concatenate([made, real]), is_made, groups, strength=0.01)
    value = found(full, "path", "two_sample_features_target", 1.0, extractor.name)
    assert value.value == pytest.approx(two_sample.auc(scores, is_made))
    assert found(full, "real target with blur of 1 px", "two_sample_features_target", None, extractor.name) is not None
    assert found(full, "real target", "two_sample_features_floor", None, extractor.name).n_real == 6


def test_time_on_a_gpu_is_time_by_the_clock_alone(tiny, full):
    assert read_cost(tiny.root / "guided") == ("cuda: Some GPU", 0.25, None)
    assert found(full, "progression", "seconds").value == 0.25
    assert not [value for value in full.reference.rows if value.quantity == "cpu_seconds"]
    methods = {of["name"]: of["device"] for of in as_json(full)["methods"]}
    assert methods == {"progression": "cuda: Some GPU", **dict.fromkeys(list(methods)[1:])}
    (row,) = (line for line in markdown(full).splitlines() if line.startswith("| seconds"))
    assert row.split(" | ")[:3] == ["| seconds", "0.25 (cuda: Some GPU)", ""]


def test_copying_the_source_is_level_zero_at_every_level(plain):
    copy = "copy the source"
    for quantity, by in (("probability", "rgb"), ("flip_rate", "grey"), ("kid_pooled", "extractor"), ("contrast", "")):
        source = found(plain, "path", quantity, 0.0, by).value
        for level in (0.0, 0.25, 1.0):
            assert found(plain, copy, quantity, level, by).value == pytest.approx(source, rel=1e-9)
    assert found(plain, copy, "preservation", 1.0, "rgb").value == 0
    assert found(plain, copy, "monotone_share", None, "rgb").value == 1
    assert np.isnan(found(plain, copy, "path_over_straight", None, "rgb").value)


def test_the_nearest_real_target_is_one_of_the_validation_split(tiny, plain):
    features = method_of(plain, "nearest real target").outputs[extractor_of(plain).name].features
    extract = features_by(extractor_of(plain))
    sources, candidates = extract(tiny.images("test", "A")[1][:8]), extract(tiny.images("val", "B")[1])
    expected = candidates[cdist(sources, candidates).argmin(1)]
    for level in (1, 4):
        np.testing.assert_allclose(features[:, level], expected, atol=1e-4)
    np.testing.assert_allclose(features[:, 0], sources, atol=1e-4)


def test_severity_is_judged_by_scores_and_frames_are_compared_to_their_own(tiny, full):
    of, network = method_of(full, "path"), full.reference.networks[-1]
    severity = of.outputs[network.name].value
    errors = [np.abs(severity[:, k] - k / 4).mean() for k in range(1, 5)]
    assert found(full, "path", "severity_error", 0.5).value == pytest.approx(errors[1], rel=1e-6)
    assert found(full, "path", "severity_error").value == pytest.approx(np.mean(errors), rel=1e-6)

    (a, b), score = (tiny.images("test", label)[1] for label in "AB"), (np.arange(24) + 0.5) / 24
    model = inference.load(network.checkpoint, CPU)
    real = inference.predict(model, torch.from_numpy(np.concatenate([a, b])), device=CPU)[:, 1]
    value = found(full, "real scored", "severity_error")
    assert (value.value, value.n) == (pytest.approx(np.abs(real - score).mean(), abs=1e-5), 24)

    near = np.abs(score - 0.25) <= 0.075
    value = found(full, "path", "frechet_own", 0.25)
    assert value.n_real == near.sum() == 4
    features = features_by(extractor_of(full))(np.concatenate([a, b])[near])
    own = of.outputs[extractor_of(full).name].features[:, 1]
    assert value.value == pytest.approx(frechet_distance(own, features), rel=1e-3)


def test_severity_turns_with_the_direction(tiny, full):
    run = tiny.root / "severity"
    there, back = (
        load_networks([("scores", run)], source=source, target=target, device=CPU)[0] for source, target in ("AB", "BA")
    )
    patches = tiny.images("test", "B")[1]
    values = [network.outputs(patches, where="here") for network in (there, back)]
    np.testing.assert_allclose(values[0].value + values[1].value, 1, atol=1e-6)
    assert (values[0].is_target != values[1].is_target).all()


def test_guidance_is_a_ratio_on_common_sources(tiny, full):
    assert full.unguided == {"progression": "progression, unguided"}
    value = found(full, "progression", "guidance_frechet_ratio", 0.75)
    extractor, near = extractor_of(full), np.abs((np.arange(24) + 0.5) / 24 - 0.75) <= 0.075
    real = features_by(extractor)(np.concatenate([tiny.images("test", label)[1] for label in "AB"])[near])
    pair = (method_of(full, name) for name in ("progression", "progression, unguided"))
    expected = [frechet_distance(of.outputs[extractor.name].features[:3, 3], real) for of in pair]
    assert value.value == pytest.approx(expected[0] / expected[1], rel=1e-3)
    assert value.n == 3
    levels = [found(full, "progression", "guidance_frechet_ratio", s).value for s in (0.25, 0.5, 0.75, 1.0)]
    assert found(full, "progression", "guidance_frechet_ratio").value == pytest.approx(np.mean(levels))
    rows = [row for row in full.differences if row["second"] == "progression, unguided"]
    assert {row["n"] for row in rows} == {3}
    assert {row["quantity"] for row in rows} >= {"flip_rate", "calibration_image", "monotone_share", "preservation"}
    assert {row["second"] for row in full.differences} == {"path", "progression, unguided"}  # depth has other sources


def test_results_are_json_csv_and_a_table(tiny, full):
    output = tiny.root / "figures" / "found.json"
    files, _ = write_results(full, output)
    table = markdown(full)
    assert files == [output.with_suffix(suffix) for suffix in (".json", ".csv", ".frames.csv", ".md")]
    content = json.loads(output.read_text())
    assert content["format"] == 1
    methods = ["progression", "path", "depth", "progression, unguided"]
    baselines = ["copy the source", "stain transfer", "nearest real target"]
    assert [m["name"] for m in content["methods"]] == [*methods, *baselines]
    assert len({n["digest"] for n in content["networks"]}) == 4
    assert [n["use"] for n in content["networks"]] == ["judge", "judge", "features", "scores"]
    rows = list(csv_rows(output.with_suffix(".csv")))
    assert len(rows) == len(content["values"]) > 300
    columns = ["trajectory", "method", "quantity", "level", "extractor", "n", "n_real", "split", "value", "low", "high"]
    assert list(rows[0]) == columns
    for row, value in zip(rows, content["values"], strict=True):
        assert row["n"] == str(value["n"])
        assert row["value"] == ("" if value["value"] is None else str(value["value"]))
    judge, fine = content["networks"][0]["name"], str(tiny.root / "fine")
    frames = csv_rows(output.with_suffix(".frames.csv"))
    middle = [f for f in frames if (f["trajectory"], f["judge"], f["level"]) == (fine, judge, "0.5")]
    assert len({frame["source_id"] for frame in middle}) == 8
    mean = found(full, "path", "probability", 0.5, judge).value
    assert np.mean([float(frame["probability"]) for frame in middle]) == pytest.approx(mean, abs=1e-4)
    assert output.with_suffix(".md").read_text().startswith(table)
    assert f"| called the target class (flip rate) at 1, {judge} | " in table
    assert f"| (KID to all real, worst level, {judge}: blind) | " in table  # its weights are random
    assert content["networks"][0]["blind_for"] == ["blur of 1 px", "blends of two patches"]
    assert set(content["spectra"]) == {*methods, *baselines, "real target"}
    assert {len(of) for of in content["spectra"].values()} == {8}
    (warning,) = [text for text in content["warnings"] if judge in text and "blind" in text]
    assert "blur of 1 px and for blends of two patches" in warning
    assert "\n| blur of 1 px | " in table
    assert (
        "progression (n = 8) | path (n = 8) | depth (n = 3) | progression, unguided (n = 3) | copy the source (n = 8)"
        " | stain transfer (n = 8) | nearest real target (n = 8) | real A (n = 12)" in table
    )
    assert not list(output.parent.glob("*.tmp"))


def test_ids_that_look_like_formulas_come_back_as_they_were(plain, tmp_path):
    (of,) = plain.methods
    ids = ("=1+1", "'=1+1", "-3.png", "'quoted'", 'a,"b', "plain", "@x", "+y")
    write_results(plain._replace(methods=[replace(of, source_ids=ids)]), tmp_path / "m.json")
    assert '\n"=' not in (text := (tmp_path / "m.frames.csv").read_text())
    assert ",=1+1" not in text
    assert list(dict.fromkeys(row["source_id"] for row in csv_rows(tmp_path / "m.frames.csv"))) == list(ids)


def test_every_number_of_the_table_stands_in_its_row_and_column(plain):
    rows = {cells[0]: cells[1:] for line in markdown(plain).splitlines() if len(cells := line[2:-2].split(" | ")) > 5}
    extractor, columns = extractor_of(plain).name, [name.partition(" (n")[0] for name in rows[""]]
    assert columns == ["path", "copy the source", "stain transfer", "nearest real target", "real A", "real B"]
    kids = [found(plain, "path", "kid_own", level).value for level in (0.25, 0.5, 0.75, 1.0)]
    assert rows[f"(KID to real of the same level, mean over levels, {extractor}: blind)"][0] == (
        f"{np.mean(kids):.3g} (against 12 to 24)".replace("-", "\N{MINUS SIGN}")
    )
    inner = max((found(plain, "path", "preservation", s, extractor) for s in (0.25, 0.5, 0.75)), key=lambda v: v.value)
    cell = f"{inner.value:.3g} [{inner.low:.3g}, {inner.high:.3g}] at {inner.level:g}"
    assert rows[f"(distance to own source, worst below level 1, {extractor}: blind)"][0] == cell
    target = found(plain, "real target", "contrast")
    assert rows["contrast at 1"][5] == f"{target.value:.3g} [{target.low:.3g}, {target.high:.3g}]"
    assert rows["network forwards"] == ["30", "", "", "", "", ""]


def test_the_command_writes_its_files_beside_the_frames_and_refuses_a_wrong_output(tiny, judged, capsys, monkeypatch):
    path = tiny.trajectory("with_config", num=4)
    (path / "config.yaml").write_text(tiny.config([]).to_yaml())  # as translate leaves it
    networks = ["--judge", str(judged["judges"][0]), "--features", str(judged["features"]), "--levels", "4"]
    main(["evaluate", str(path), *networks, "seed=0"])
    content = json.loads((path / "metrics.json").read_text())
    assert [Path(network["checkpoint"]).parents[1].name for network in content["networks"]] == ["rgb", "extractor"]
    printed = capsys.readouterr().out.partition("wrote:")[0].strip()
    assert printed.startswith("level 0 = A, level 1 = B, 4 levels\n\npath, 4 sequences: ")
    assert len(printed.splitlines()) < 25
    assert "told from real by grey bands (AUC)" in printed
    monkeypatch.setattr("cellflux_bridge.metrics.evaluate.evaluate", None)
    for wrong in ("metrics.csv", "rgb"):
        with pytest.raises(SystemExit, match=r"--output .*: expected a file name that ends in \.json"):
            main(["evaluate", str(path), *networks, "--output", str(tiny.root / wrong)])


def test_levels_of_a_finer_trajectory_are_the_nearest_frames(plain, full):
    for level in (0.25, 0.5, 1.0):
        values = [found(of, "path", "probability", level, "rgb").value for of in (plain, full)]
        assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_floors_stand_beside_the_figures_of_every_level(tiny, plain):
    (a, b), groups = (tiny.images("test", label)[1] for label in "AB"), np.arange(12) // 2
    extract = features_by(extractor_of(plain))
    for level, patches, of in ((0.25, a, groups), (0.5, np.concatenate([a, b]), np.arange(24) // 2), (1.0, b, groups)):
        half, features = len(patches) // 2, extract(patches)
        halves = [
            frechet_distance(features[first], features[second])
            for first, second in half_splits(of, num=20, generator=draw(1))
        ]
        floor = found(plain, "real own", "frechet_floor", level, "extractor")
        assert (floor.n, floor.n_real, floor.split) == (half, half, "test")
        assert min(halves) / 2 < floor.low <= floor.value <= floor.high < 2 * max(halves)
        for kind in ("kid", "frechet", "precision", "recall", "density", "coverage"):
            floor = found(plain, "real own", f"{kind}_floor", level, "extractor")
            assert floor.n_real == found(plain, "path", f"{kind}_own", level, "extractor").n_real / 2
    # The own patches of levels above one half are the target's, and those of one half are all.
    for kind in ("kid", "frechet"):
        target, own = (
            found(plain, *of) for of in (("real target", f"{kind}_floor"), ("real own", f"{kind}_floor", 1.0))
        )
        assert target[4:] == own[4:]
    pooled = found(plain, "real pooled", "frechet_floor", None, "extractor")
    assert pooled[4:] == found(plain, "real own", "frechet_floor", 0.5)[4:]
    table = markdown(plain)
    assert "floors of halves of real B patches (6 against 6)" in table
    assert "each level's own, mean over levels" in table


def test_at_most_so_many_real_patches_are_compared_to(full, reference, judged, path):
    network, everyone = full.reference.networks[0], full.reference.networks[0].real_patches()
    drawn = [network.real_patches(num=5, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0].numbers, drawn[1].numbers)
    assert set(drawn[0].numbers) != set(drawn[2].numbers)
    for some in drawn:
        assert set(some.numbers) <= set(everyone.numbers)
        assert some.is_target.tolist() == [False] * 5 + [True] * 5
        assert some.groups.tolist() == [network.groups_of_sources([network.patches.ids[i]])[0] for i in some.numbers]
    np.testing.assert_array_equal(network.real_patches(num=12, seed=3).numbers, everyone.numbers)
    assert len(full.reference.networks[-1].real_patches(num=7).numbers) == 7
    assert len(reference.pooled.features) == 20
    assert [found(reference.rows, f"real {of}", "contrast").n for of in ("source", "target")] == [10, 10]
    assert as_json(full)["max_real"] == 10_000
    with pytest.raises(UserError, match=r"--max-real 0: expected how many"):
        evaluate([path], max_real=0, **judged)


def test_all_frames_are_compared_to_both_classes(tiny, plain):
    features = plain.methods[0].outputs[extractor_of(plain).name].features[:, 1:]
    real = features_by(extractor_of(plain))(np.concatenate([tiny.images("test", k)[1] for k in "AB"]))
    value = found(plain, "path", "frechet_pooled")
    assert (value.n, value.n_real) == (32, 24)
    assert value.value == pytest.approx(frechet_distance(features.reshape(32, -1), real), rel=1e-3)
    groups = np.array([f"{label}{n // 2}" for label in "AB" for n in range(12)])
    near = neighbourhoods(features.reshape(32, -1), real, groups=np.repeat(groups[:8], 4), real_groups=groups)
    for figure, each in near._asdict().items():
        assert found(plain, "path", f"{figure}_pooled").value == pytest.approx(each.mean())
        assert found(plain, "real pooled", f"{figure}_floor").n == 12


def test_the_split_stands_beside_every_value(full):
    splits = {(v.method, v.split) for v in full.reference.rows if v.method in ("path", "depth", "real target")}
    assert splits == {("path", "test"), ("depth", "val"), ("real target", "test")}
    methods = {method["name"]: method["split"] for method in as_json(full)["methods"]}
    assert (methods["path"], methods["depth"]) == ("test", "val")
    assert full.reference.networks[0].split_of(["elsewhere/0.png"]) == ""


# Memorisation, structure, stain


def test_training_patches_among_the_frames_are_found(tiny, full):
    extract = features_by(extractor_of(full))
    training = np.concatenate([extract(tiny.images("train", label)[1]) for label in "AB"])
    real = cdist(np.concatenate([extract(tiny.images("test", label)[1]) for label in "AB"]), training)
    by_class = [real.min(1)[(real.argmin(1) >= 6) == kind] for kind in (False, True)]  # 6 of A, then 6 of B
    by_class = [each if len(each) else real.min(1) for each in by_class]
    frames = method_of(full, "progression").outputs[extractor_of(full).name].features[:, 4]
    distances, kinds = (take(cdist(frames, training), axis=1) for take in (np.min, np.argmin))
    held_out = [by_class[int(kind)] for kind in kinds >= 6]
    value = found(full, "progression", "nearest_training_ratio", 1.0)
    assert value.value == pytest.approx(
        np.median([d / np.median(h) for d, h in zip(distances, held_out, strict=True)]), rel=1e-2
    )
    assert (value.n, value.n_real) == (8, min(map(len, by_class)))
    expected = np.mean([(d < h).mean() for d, h in zip(distances, held_out, strict=True)])
    assert found(full, "progression", "nearest_training_closer", 1.0).value == pytest.approx(expected, abs=1e-6)
    copies = [copy for copy in full.near_copies if (copy["method"], copy["level"]) == ("progression", 1.0)]
    assert found(full, "progression", "near_copy_share", 1.0).value == len(copies) / 8 >= 3 / 8
    exact = {copy["source_id"]: copy for copy in copies if copy["distance"] < 1e-3}
    sources = tiny.images("test", "A")[0]
    assert [exact[sources[n]]["training_id"] for n in range(3)] == tiny.images("train", "B")[0][:3]
    assert exact[sources[0]]["held_out"] == pytest.approx(by_class[1].min(), rel=1e-2)
    # Real patches that were held out are no copies, whatever their class.
    assert found(full, "copy the source", "near_copy_share").value == 0
    assert not any("repeat a training patch" in warning for warning in full.warnings)


def test_a_test_patch_that_is_a_training_patch_hides_no_copy(tmp_path, make_patches, write_config):
    tiny = Tiny(tmp_path, make_patches, write_config)
    shutil.copy(tiny.root / "patches/train/B/B001.png", tiny.root / "patches/test/B/B011.png")
    ids, patches = tiny.images("train", "B")
    runs = [("judge", tiny.classifier("rgb", seed=1)), ("features", tiny.classifier("extractor", seed=3))]
    networks = load_networks(runs, source="A", target="B", device=CPU)
    training = ReferenceSet(networks, levels=(), seed=0, max_real=None).training
    assert training.num_repeated == 1
    found = training.nearest_to(features_by(networks[1])(patches)[:, None])
    assert found.is_near_copy().all()
    assert [training.ids[number] for number in found.numbers[0]] == ids


def test_a_mere_recolouring_is_explained_by_the_stain(tiny, plain):
    assert found(plain, "stain transfer", "stain_share", 1.0, "rgb").value == pytest.approx(1)
    assert np.isnan(found(plain, "copy the source", "stain_share", 1.0, "rgb").value)
    assert 0 < found(plain, "path", "stain_share", 1.0, "rgb").value < 1
    targets = tiny.images("train", "B")[1]
    sources = tiny.images("test", "A")[1][:8]
    recoloured = recolour(sources, fit_reference("reinhard", list(targets.transpose(0, 2, 3, 1))))
    np.testing.assert_array_equal(method_of(plain, "stain transfer").arrays["last"], recoloured)
    expected = haematoxylin_ms_ssim(np.stack([sources, recoloured], axis=1))[:, 1].mean()
    assert found(plain, "stain transfer", "ms_ssim", 0.5).value == pytest.approx(expected, rel=1e-5)
    assert found(plain, "copy the source", "ms_ssim", 1.0).value == pytest.approx(1, abs=1e-5)
    assert found(plain, "copy the source", "layer_distance", 1.0).value == pytest.approx(0, abs=1e-9)
    apart = found(plain, "real source", "layer_distance", None)
    assert 0 < apart.n <= 12
    assert apart.value > 0


# The feature pass


def test_a_stopped_evaluation_goes_on_from_its_cache(tiny, judged, path, plain, monkeypatch):
    cache, asked, complete = tiny.root / "cache_of_features", [], False
    real = inference.features

    def counted(model, batch, **options):
        asked.append(len(batch))
        if len(asked) == 4 and not complete:
            raise KeyboardInterrupt
        return real(model, batch, **options)

    monkeypatch.setattr(inference, "features", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate([path], cache=cache, **judged)
    complete = True
    assert len(list(cache.glob("*.npz"))) >= 3
    second = evaluate([path], cache=cache, **judged)
    (damaged := sorted(cache.glob("*.npz"))[0]).write_bytes(b"not an archive")
    asked.clear()
    third = evaluate([path], cache=cache, **judged)
    assert len(asked) <= 1  # of the damaged file alone
    assert zipfile.is_zipfile(damaged)
    assert not list(cache.glob("*.tmp"))
    assert (
        repr(second.reference.rows) == repr(third.reference.rows) == repr(plain.reference.rows)
    )  # and no figure changes from run to run

    another = [("judge", tiny.classifier("another", seed=9))]
    other = load_networks(another, source="A", target="B", device=CPU, cache=cache)
    asked.clear()
    other[0].outputs(load_trajectory(path).frames[0], where="here")
    assert asked == [8]  # other weights are asked anew


def test_an_extractor_by_name_prepares_images_itself(tiny, full, judged):
    folder, network = tiny.root / "weights", extractor_of(full)
    name = f"local-dir:{folder}"
    assert (network.name, network.view, str(network.checkpoint)) == (name, "ResNet at 32 px", name)
    model = timm.create_model("test_resnet", num_classes=0)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("fc.")})
    b = torch.from_numpy(tiny.images("test", "B")[1]).float() / 255
    larger = torch.nn.functional.interpolate(b, (32, 32), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.2, 0.3, 0.4], [0.5, 0.6, 0.7]))
    with torch.no_grad():
        expected = model.eval()((larger - mean) / std).numpy()
    frames = method_of(full, "path").outputs[name].features[:, 4]
    assert found(full, "path", "frechet_target", 1.0).value == pytest.approx(
        frechet_distance(frames, expected), rel=2e-2
    )
    assert not [v for v in full.reference.rows if v.extractor == name and v.quantity in ("probability", "flip_rate")]
    assert found(full, "path", "layer_distance", 1.0, name).value > 0
    assert as_json(full)["memorisation"]["patches"].startswith(str(judged["judges"][0]))


def test_an_extractor_that_cannot_be_loaded_is_an_error(tiny):
    file = tiny.extractor("other_weights") / "model.safetensors"
    assert NamedExtractor(f"timm:test_resnet@{file}").size > 0
    with pytest.raises(UserError, match=r"none\.safetensors: no such file; expected weights of test_resnet"):
        NamedExtractor(f"timm:test_resnet@{tiny.root}/none.safetensors")
    broken = tiny.extractor("broken")
    (broken / "model.safetensors").write_bytes(file.read_bytes()[:100])
    cut = f"timm:test_resnet@{broken}/model.safetensors"
    for name in ("timm:no_such_model", f"local-dir:{tiny.root}/none", f"local-dir:{broken}", cut):
        with pytest.raises(UserError, match=r"--features .*: cannot be loaded \(.+\); expected timm:NAME"):
            NamedExtractor(name)


# There and back


def test_the_way_back_is_matched_by_its_pixels(tiny, full, plain, path, reference):
    add_cycle(*match_cycle(plain.methods, tiny.back("returned", path, 4, 0), plain.reference.networks), reference)
    value = found(reference.rows, "path", "cycle_preservation", None, "rgb")
    assert (value.n, value.value) == (6, pytest.approx(0, abs=1e-5))
    assert found(reference.rows, "path", "cycle_ms_ssim").value == pytest.approx(1, abs=1e-5)
    for name, first, wrong in (
        ("from_elsewhere", 1, r"none of its first frames is a last frame of path"),
        ("path", None, r"A -> B; expected the way back of A -> B"),
    ):
        folder = tiny.root / name if first is None else tiny.back(name, path, first, 0)
        with pytest.raises(UserError, match=rf"--cycle .*{wrong}"):
            match_cycle(plain.methods, folder, plain.reference.networks)

    network, of = full.reference.networks[0], method_of(full, "progression")  # whose way back stays where it is
    sources, ends = (of.outputs[network.name].features[2:, number] for number in (0, 4))
    real, groups = features_by(network)(tiny.images("test", "A")[1]), np.arange(12) // 2
    others = progression.distance_to_others(sources[:, None], real, groups=groups[2:8], other_groups=groups)
    expected = np.linalg.norm(ends - sources, axis=1).mean() / others.mean()
    value = found(full, "progression", "cycle_preservation", None, "rgb").value
    assert value == pytest.approx(expected, rel=1e-3)


# A user's own frames


def test_frames_of_few_sources_have_what_can_be_computed(full):
    name = "progression, unguided"
    assert np.isfinite(found(full, name, "precision_target", 1.0).value)
    assert np.isfinite(found(full, name, "kid_target", 1.0).value)
    assert np.isnan(found(full, name, "recall_target", 1.0).value)
    assert any(w.startswith("Not known: ") and f"recall of real target ({name}) at level 1" in w for w in full.warnings)


def test_sequences_that_lack_rows_are_left_out_with_a_warning(tiny, full):
    assert found(full, "depth", "contrast", 1.0).n == 3
    folder = tiny.root / "val"
    assert any(w.startswith(f"2 sequences of {folder} lack rows in manifest.csv") for w in full.warnings)


def test_damaged_frames_are_an_error(tiny, judged):
    path = tiny.trajectory("damaged")
    frame = sorted(path.rglob("002.png"))[1]
    frame.unlink()
    with pytest.raises(UserError, match=r"002\.png: no such file"):
        evaluate([path], **judged)
    write_png(frame, np.zeros((8, 20, 3), np.uint8))
    with pytest.raises(UserError, match=r"002\.png: 20 x 8 pixels, 3 channels, unlike the others"):
        evaluate([path], **judged)
    manifest = path / "manifest.csv"
    text = manifest.read_text()
    manifest.write_text(text.replace("source_id", "source", 1))
    with pytest.raises(UserError, match=r"manifest\.csv, line 1: expected the columns"):
        evaluate([path], **judged)


# What is refused


def test_a_guide_is_refused_wherever_it_is_named(tiny, judged, path):
    guide = tiny.classifier("guide", "classifier.role=guide", seed=5)
    for wrong in ({"judges": [guide]}, {"features": guide}, {"scores": guide}):
        with pytest.raises(UserError, match=r"guide/.*is a guide .*classifier\.role=judge"):
            evaluate([path], **{**judged, **wrong})


def test_unfit_runs_are_refused_before_a_missing_flag(tiny, judged, path):
    guide, judge = tiny.classifier("guide", "classifier.role=guide", seed=5), str(judged["judges"][0])
    with pytest.raises(SystemExit, match=r"guide/.*is a guide"):
        main(["evaluate", str(path), "--judge", judge, "--judge", str(guide)])
    with pytest.raises(SystemExit, match="nowhere: holds no checkpoint"):
        main(["evaluate", str(path), "--judge", "nowhere"])
    with pytest.raises(SystemExit, match=r"nowhere: no trajectory\.json here"):
        main(["evaluate", "nowhere", "--judge", judge])


def test_a_network_named_twice_is_refused(judged, path, tmp_path):
    with pytest.raises(UserError, match=r"rgb: is named twice"):
        evaluate([path], **{**judged, "features": judged["judges"][0]})
    copied = shutil.copytree(judged["judges"][0], tmp_path / "copied")
    with pytest.raises(UserError, match=r"copied: has the very weights of another network here"):
        evaluate([path], **{**judged, "features": copied})
    with pytest.raises(UserError, match=r"a trajectory is named twice"):
        evaluate([path, path], **judged)


def test_scores_must_come_from_scores(tiny, judged, path):
    with pytest.raises(UserError, match=r"--scores .*classifier.labels=score from A to B; found labels=class"):
        evaluate([path], scores=tiny.classifier("third", seed=6), **judged)


def test_sequences_that_a_network_cannot_judge_are_refused(tiny, judged, make_patches):
    header = TrajectoryHeader("path", "A", "C", ("A", "C"), (0.0, 1.0), "x")
    TrajectoryWriter(tiny.root / "unknown", header)
    with pytest.raises(UserError, match=r"does not know the class 'C' .*trained on A, B"):
        evaluate([tiny.root / "unknown"], **judged)
    of_b = replace(header, target="B", classes=("A", "B"), levels=(0.0, 0.2, 0.4, 0.8, 1.0))
    TrajectoryWriter(tiny.root / "empty", of_b)
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
        evaluate([tiny.trajectory("trained_on", split="train", num=6)], **judged)


def test_classify_refuses_what_evaluate_refuses(tiny, judged, capsys):
    rgb = str(judged["judges"][0])
    trained_on = str(tiny.trajectory("also_trained_on", split="train", num=6))
    with pytest.raises(SystemExit, match=r"rgb: trained on sources of .*trained_on: train/A/A000\.png"):
        main(["classify", trained_on, "--classifier", rgb])
    path = tiny.trajectory("to_classify")
    main(["classify", str(path), "--classifier", rgb])
    assert "fraction called B of 8 sequences" in capsys.readouterr().out
    shutil.copytree(tiny.root / "patches", tiny.root / "elsewhere")
    (path / "config.yaml").write_text(tiny.config([f"data.root={tiny.root / 'elsewhere'}"]).to_yaml())
    with pytest.raises(SystemExit, match=r"was made from data\.root=.*elsewhere, but .*rgb would compare"):
        main(["classify", str(path), "--classifier", rgb])


def test_sources_with_other_pixels_than_a_judge_knows_are_refused(tiny, judged):
    path = tiny.trajectory("black")
    for file in path.rglob("000.png"):
        write_png(file, np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r"not the patches that .*data\.crop"):
        evaluate([path], **judged)


def test_a_judge_that_has_diverged_is_refused(tiny, judged, path):
    spoilt = tiny.classifier("spoilt", seed=7, spoil=True)
    with pytest.raises(UserError, match=r"spoilt.*model.safetensors: net.stem.weight hold NaN"):
        evaluate([path], **{**judged, "features": spoilt})


def test_an_unguided_trajectory_must_be_of_the_same_method_and_sources(tiny, judged, path):
    with pytest.raises(UserError, match=r"--unguided .*: its method depth is none of path"):
        evaluate([path], unguided=[tiny.trajectory("depth", method="depth")], **judged)
    unguided = tiny.trajectory("of_others", split="val", num=5)
    with pytest.raises(UserError, match=r"--unguided .*of_others: none of its sources is one of .*path"):
        evaluate([path], unguided=[unguided], **judged)


def test_damaged_costs_and_missing_networks_are_errors(tiny, judged):
    path = tiny.trajectory("costs")
    (path / "cost.json").write_text("{}")
    with pytest.raises(UserError, match=r"cost\.json: expected sequences"):
        read_cost(path)
    for arguments in (["evaluate", str(path)], ["evaluate", str(path), "--judge", str(judged["judges"][0])]):
        with pytest.raises(SystemExit, match=r"error: --(judge|features)( and --features)?: not given"):
            main(arguments)
