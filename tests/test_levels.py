"""Levels of training images: calibrated, out of fold, and the same whenever they are made."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import softmax

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.calibration import (
    area_under_curve,
    balanced_weights,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from cellflux_bridge.classifier.task import ClassifierTask
from cellflux_bridge.config import Config, load_config
from cellflux_bridge.data.balanced import BalancedPatches
from cellflux_bridge.data.patches import Patches, load_patches
from cellflux_bridge.data.soft_labels import from_scores
from cellflux_bridge.flow import levels
from cellflux_bridge.flow.levels import assign_folds, between_ends, class_ends, read_levels, target_levels
from cellflux_bridge.images import encode
from cellflux_bridge.training.loop import make_fabric

# Calibration


@pytest.mark.parametrize("wrong", [0.4, 3.0])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_known_miscalibration_is_found_exactly(wrong, num_classes):
    logits = np.random.default_rng(0).normal(0, 2, (500, num_classes))
    truth, weights = softmax(logits, axis=1), np.ones(500)
    # Against the very probabilities the cross-entropy is smallest at the factor that was laid on.
    assert fit_temperature(wrong * logits, truth, weights, prior=0) == pytest.approx(wrong, rel=1e-4)


def test_drawn_labels_find_it_too_and_the_calibration_error_falls():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (20_000, 2))
    labels = (rng.random(20_000) < softmax(logits, axis=1)[:, 1]).astype(int)
    targets, weights = np.eye(2)[labels], np.ones(20_000)
    temperature = fit_temperature(2.5 * logits, targets, weights)
    assert temperature == pytest.approx(2.5, rel=0.05)
    before = expected_calibration_error(softmax(2.5 * logits, axis=1), targets, weights)
    after = expected_calibration_error(softmax(2.5 * logits / temperature, axis=1), targets, weights)
    assert before > 0.08
    assert after < 0.01


def test_perfect_separation_is_no_certainty():
    logits = np.array([[4.0, -4.0], [-4.0, 4.0]]).repeat(10, 0)
    targets = np.eye(2).repeat(10, 0)
    temperature = fit_temperature(logits, targets, np.ones(20))
    # Platt (1999): of 10 patches a class the probability is 11 / 12.
    assert softmax(logits[0] / temperature)[0] == pytest.approx(11 / 12, rel=1e-4)


def test_weights_make_classes_count_alike():
    labels = np.array([0, 0, 0, 1])
    weights = balanced_weights(labels)
    np.testing.assert_allclose(weights, [2 / 3, 2 / 3, 2 / 3, 2])
    logits, targets = np.array([[1.0, 0], [1, 0], [1, 0], [3, 0]]), np.eye(2)[labels]
    expected = (np.log1p(np.exp(-1)) + np.log1p(np.exp(3))) / 2
    assert negative_log_likelihood(logits, targets, weights) == pytest.approx(expected)


def test_calibration_error_and_area_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
    targets, weights = np.eye(2)[[0, 1, 1, 1]], np.ones(4)
    # Confidence .9 with accuracy .5, confidence .8 with accuracy 1, half of the rows each.
    assert expected_calibration_error(p, targets, weights) == pytest.approx((0.4 + 0.2) / 2)
    assert expected_calibration_error(p, p, weights) == pytest.approx(0)  # soft labels that are met
    assert area_under_curve(p, np.array([0, 1, 1, 1])) == pytest.approx((3 - 0.5) / 3)
    three = np.eye(3)[[0, 1, 2]] * 0.5 + np.array([0.1, 0.2, 0.2])
    assert area_under_curve(three, np.array([0, 1, 2])) == 1
    assert np.isnan(area_under_curve(p, np.zeros(4, int)))


# Soft labels


def test_scores_lie_between_neighbouring_classes():
    np.testing.assert_allclose(from_scores(np.array([0, 0.25, 1]), 2), [[1, 0], [0.75, 0.25], [0, 1]])
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.4, 0.6]]
    np.testing.assert_allclose(from_scores(np.array([0, 0.25, 0.5, 0.8]), 3), expected, atol=1e-6)
    assert np.isnan(from_scores(np.array([np.nan]), 2)).all()


@pytest.fixture(scope="module")
def write_slides(make_patches, write_config):
    """`write_slides(folder, *overrides, scores=..., per_slide=4) -> (config, patches)`: 24 patches a class, four to a
    slide, a manifest with groups and scores, a classifier that trains in no time."""

    def make(folder: Path, *overrides: str, scores=None, per_slide: int = 4):
        root = folder / "patches"
        if not root.exists():
            make_patches(root)
        files = sorted(root.glob("*/*.png"))
        with open(root / "manifest.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "split", "group", "score"])
            for i, path in enumerate(files):
                label, number = path.parent.name, int(path.stem[1:])
                split = "val" if number >= 20 else "test" if number >= 16 else "train"
                score = (0.1 if label == "A" else 0.8) if scores is None else scores[i]
                group = f"{split} {label}{number // per_slide}"
                writer.writerow([path.relative_to(root).as_posix(), label, split, group, score])
        section = {"train": {"steps": 15, "batch_size": 8, "lr": 3e-3, "warmup_steps": 0, "ema_decay": 0.5}}
        file = write_config(folder, classifier=section, condition={"target": "level", "level": "crossfit"})
        config = load_config(file, ["data.classes=[A, B]", "classifier.train.accelerator=cpu", *overrides])
        return config, load_patches(config.data, seed=config.seed)

    return make


@pytest.fixture
def slides(tmp_path, write_slides):
    """`write_slides` in the test's own folder."""
    return partial(write_slides, tmp_path)


def made(config, patches, folder: Path) -> np.ndarray:
    return target_levels(config, patches, folder=folder, fabric=make_fabric(config.classifier.train))


def test_levels_by_class_and_by_score(slides, tmp_path):
    config, patches = slides("condition.level=class")
    np.testing.assert_array_equal(made(config, patches, tmp_path / "run"), np.eye(2)[patches.labels])
    config, patches = slides("condition.level=score")
    found = made(config, patches, tmp_path / "run")
    np.testing.assert_allclose(found[:, 1], np.where(patches.labels == 0, 0.1, 0.8), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1)
    assert not (tmp_path / "run").exists()


def test_a_missing_score_is_named_where_it_is_needed(slides, tmp_path):
    scores = [0.5] * 48
    scores[3] = ""  # A003, which trains
    config, patches = slides("condition.level=score", scores=scores)
    with pytest.raises(UserError, match=r"condition\.level=score: 1 patches have no score: A/A003\.png; give every"):
        made(config, patches, tmp_path / "run")
    with pytest.raises(UserError, match=r"classifier\.labels=score: 1 patches have no score: A/A003\.png"):
        ClassifierTask(slides("classifier.labels=score", scores=scores)[0], patches)
    scores[3], scores[17] = 0.5, ""  # A017, which tests
    config, patches = slides("condition.level=score", scores=scores)
    assert np.isnan(made(config, patches, tmp_path / "run")[17]).all()
    patches.scores[17], patches.scores[5] = 0.5, 1.5
    with pytest.raises(UserError, match=r"1 patches have a score outside \[0, 1\]: A/A005\.png"):
        made(config, patches, tmp_path / "run")


def test_folds_hold_out_whole_groups_and_every_training_patch_once(slides):
    _, patches = slides()
    folds = assign_folds(patches, num_folds=3, seed=0)
    train = patches.indices("train")
    assert set(folds[train]) == {0, 1, 2}
    assert (np.delete(folds, train) == -1).all()
    for group in np.unique(patches.groups[train]):
        assert len(set(folds[train][patches.groups[train] == group])) == 1
    assert np.array_equal(folds, assign_folds(patches, num_folds=3, seed=0))
    assert any(not np.array_equal(folds, assign_folds(patches, num_folds=3, seed=seed)) for seed in (1, 2, 3))


class Crossfitted(NamedTuple):
    """A cross-fitting, which patches each of its classifiers trained on, and which it scored."""

    config: Config
    patches: Patches
    folder: Path
    levels: np.ndarray
    drawn: list[set[int]]
    scored: list[set[int]]


@pytest.fixture(scope="module")
def crossfitted(write_slides, tmp_path_factory) -> Crossfitted:
    folder = tmp_path_factory.mktemp("crossfitted")
    config, patches = write_slides(folder)
    draw, patch_logits = BalancedPatches.draw, inference.patch_logits
    drawn: dict[BalancedPatches, set[int]] = {}
    scored = []

    def spy_draw(self, num, **options):
        found = draw(self, num, **options)
        drawn.setdefault(self, set()).update(found[-1])
        return found

    def spy_logits(model, patches, indices, **options):
        if options.get("chunk"):  # not the validations of training
            scored.append(set(indices.tolist()))
        return patch_logits(model, patches, indices, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BalancedPatches, "draw", spy_draw)
        patch.setattr(inference, "patch_logits", spy_logits)
        found = made(config, patches, folder / "run")
    return Crossfitted(config, patches, folder / "run", found, list(drawn.values()), scored)


def test_no_classifier_scores_a_group_that_it_trained_on(crossfitted):
    _, patches, _, found, drawn, scored = crossfitted
    others = {*patches.indices("val").tolist(), *patches.indices("test").tolist()}
    assert [part == others for part in scored] == [False, True] * 3
    for seen, held_out in zip(drawn, scored[::2], strict=True):
        assert len(seen) > 12
        assert not {patches.groups[i] for i in seen} & {patches.groups[i] for i in held_out | others}
    assert set.union(*scored[::2]) == set(patches.indices("train").tolist())
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_a_quarter_of_a_class_lies_beyond_its_end():
    p = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.0, 1.0])
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    ends = class_ends(np.stack([1 - p, p], axis=1), labels)
    np.testing.assert_allclose(ends, [[0.8, 0.2], [0.2, 0.8]])
    thirds = np.array([[0.5, 0.3, 0.2], [0.7, 0.1, 0.2], [0.9, 0.08, 0.02]])  # others: .16 and .14 on average
    found = class_ends(np.concatenate([thirds, np.eye(3)]), np.array([0, 0, 0, 0, 1, 2]))[0]
    rest = thirds[:, 1:].sum(0)
    np.testing.assert_allclose(found, [0.925, *(0.075 * rest / rest.sum())])


def test_levels_of_two_classes_are_the_share_of_the_way_between_their_ends():
    ends = np.array([[0.9, 0.1], [0.3, 0.7]])
    p = np.array([0.1, 0.7, 0.4, 0.25, 0.02, 0.95])
    found = between_ends(np.stack([1 - p, p], axis=1), ends)
    np.testing.assert_allclose(found[:, 1], [0, 1, 0.5, 0.25, 0, 1], atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1)


def test_mixtures_of_three_classes_are_found_again():
    ends = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
    mixtures = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    np.testing.assert_allclose(between_ends(mixtures @ ends, ends), mixtures, atol=1e-12)
    beyond = between_ends(np.array([[0.05, 0.95, 0.0]]), ends)  # further out than what stands for the second class
    assert beyond.min() >= 0
    np.testing.assert_allclose(beyond.sum(1), 1)


@pytest.mark.parametrize("second", [0.59, 0.41, 0.2])
def test_ends_that_lie_near_each_other_have_no_way_between_them(second):
    assert between_ends(np.full((1, 2), 0.5), np.array([[0.6, 0.4], [1 - second, second]])) is None


def test_levels_tell_the_classes_apart_and_of_held_out_patches_come_from_the_mean_of_the_folds(crossfitted):
    _, patches, run, found, *_ = crossfitted
    train, others = patches.indices("train"), np.concatenate([patches.indices("val"), patches.indices("test")])
    assert (found[train].argmax(1) == patches.labels[train]).mean() > 0.9
    report = json.loads((run / "levels.json").read_text())
    assert report["out_of_fold"]["auc"] > 0.9
    assert report["out_of_fold"]["n"] == 32
    assert all(sum(report["histogram"][label][f"level_{label}"]) == 16 for label in "AB")
    assert 0 < report["cpu_minutes"] < 1
    expected = []
    for name in report["checkpoints"]:
        model = inference.load(run / name, "cpu")
        logits = inference.patch_logits(model, patches, others, device="cpu", flips=True)
        expected.append(softmax(logits / report["out_of_fold"]["temperature"], axis=1))
    rows = {row["path"]: row for row in csv.DictReader(open(run / "levels.csv", newline=""))}
    assert list(rows[patches.ids[0]]) == ["path", "label", "fold", "p_A", "p_B", "level_A", "level_B"]
    assert [row["fold"] for row in rows.values()].count("") == len(others) == len(rows) - 32
    p = np.array([[float(rows[patches.ids[i]][f"p_{label}"]) for label in "AB"] for i in (*train, *others)])
    np.testing.assert_allclose(p[32:], np.mean(expected, axis=0), atol=1e-5)
    ends = class_ends(p[:32], patches.labels[train])
    np.testing.assert_allclose(found[np.r_[train, others]], between_ends(p, ends), atol=1e-4)


def test_a_table_of_an_earlier_version_keeps_its_levels(crossfitted, tmp_path):
    _, patches, run, *_ = crossfitted
    rows = list(csv.DictReader(open(run / "levels.csv", newline="")))
    with (tmp_path / "levels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0])[:5], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    number = {patch_id: i for i, patch_id in enumerate(patches.ids)}
    found = read_levels(tmp_path / "levels.csv", patches)
    for row in rows:
        assert found[number[row["path"]], 1] == pytest.approx(float(row["p_B"]), abs=1e-6)


def test_levels_of_classifiers_that_saw_nothing_are_bare_probabilities_with_a_warning(slides, tmp_path, capsys):
    config, patches = slides("classifier.train.steps=1", "classifier.train.lr=1.0e-9", "classifier.folds=2")
    found = made(config, patches, tmp_path / "run")
    assert "WARNING: these classifiers say nearly the same of all classes" in capsys.readouterr().out
    rows = {row["path"]: row for row in csv.DictReader(open(tmp_path / "run" / "levels.csv", newline=""))}
    assert all(row["level_B"] == row["p_B"] for row in rows.values())
    assert np.ptp(found[patches.indices("train"), 1]) < 0.2


def test_logits_over_flips_are_means_over_the_four_sides(crossfitted):
    _, patches, run, *_ = crossfitted
    model, chosen = inference.load(next((run / "crossfit").glob("*/checkpoints/*")), "cpu"), patches.indices("val")
    x = encode(patches.centre(chosen))
    with torch.no_grad():
        expected = sum(model(side) for side in (x, x.flip(3), x.flip(2), x.rot90(2, (2, 3)))) / 4
    found = inference.patch_logits(model, patches, chosen, device="cpu", flips=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_levels_are_the_same_made_again_resumed_or_read(slides, tmp_path, monkeypatch, capsys):
    steps = ("classifier.train.steps=3", "classifier.folds=2", "classifier.train.checkpoint_every=1")
    config, patches = slides(*steps)
    whole = made(config, patches, tmp_path / "whole")
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "levels of B in tenths, of A: [" in printed
    run, batch = tmp_path / "parts", ClassifierTask.batch

    def crashing(self, index, *, rank):
        if "crossfit 1 of 2" in self._stream and index == 2:
            raise RuntimeError("power cut")
        return batch(self, index, rank=rank)

    with monkeypatch.context() as inner:
        inner.setattr(ClassifierTask, "batch", crashing)
        with pytest.raises(RuntimeError, match="power cut"):
            made(config, patches, run)
    assert not (run / "levels.csv").exists()
    np.testing.assert_array_equal(made(config, patches, run), whole)
    assert "fold-0: trained already" in capsys.readouterr().out
    assert (run / "levels.csv").read_text() == (tmp_path / "whole" / "levels.csv").read_text()
    monkeypatch.setattr(levels, "fit", None)  # what is there is read, and nothing trained
    np.testing.assert_array_equal(made(config, patches, run), whole)


def test_levels_of_another_run_or_damaged_ones_are_refused(crossfitted, write_slides, tmp_path):
    _, patches, run, *_ = crossfitted
    folder = run.parent
    other, _ = write_slides(folder, "classifier.train.lr=0.5")
    with pytest.raises(UserError, match=r"crossfit: holds another run; they differ in classifier\.train\.lr"):
        made(other, patches, run)
    flow_only, _ = write_slides(folder, "velocity.channels=16", "path=straight", "classifier.role=guide")
    made(flow_only, patches, run)
    lines, table = (run / "levels.csv").read_text().splitlines(), tmp_path / "levels.csv"
    table.write_text("\n".join(lines[:1] + lines[2:]))
    with pytest.raises(UserError, match=r"levels\.csv: lacks patches"):
        read_levels(table, patches)
    table.write_text("\n".join([*lines, "A/other.png,A,0,0.5,0.5"]))
    with pytest.raises(UserError, match=r"levels\.csv: damaged, or of other patches"):
        read_levels(table, patches)


@pytest.mark.parametrize(
    ("folds", "per_slide", "message"),
    [
        (9, 4, r"classifier\.folds=9: the training split has 8 groups .*at most 8"),
        (2, 16, r"classifier\.folds=2: .*2 groups .*\('A' in 1, 'B' in 1\)"),
    ],
)
def test_too_few_groups_are_refused_with_their_numbers(slides, tmp_path, folds, per_slide, message):
    config, patches = slides(f"classifier.folds={folds}", per_slide=per_slide)
    with pytest.raises(UserError, match=message):
        made(config, patches, tmp_path / "run")
    assert not (tmp_path / "run").exists()
