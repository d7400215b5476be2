"""Studies: made images are chosen as said, nothing leaks, figures agree with their definitions, jobs resume."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score, roc_auc_score

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier.calibration import expected_calibration_error
from cellflux_bridge.cli import main
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.images import read_rgb, write_png
from cellflux_bridge.study import results, summary
from cellflux_bridge.study import run as run_module
from cellflux_bridge.study.cell import CellTask, run_cell
from cellflux_bridge.study.leaks import require_no_leak, require_trained_on
from cellflux_bridge.study.plan import (
    Cell,
    Making,
    cell_digest,
    cell_folder,
    cells,
    feature_key,
    generator_config,
    sized,
    training_groups,
)
from cellflux_bridge.study.pool import Pool, candidates, choose
from cellflux_bridge.study.run import run_study
from cellflux_bridge.study.settings import ArmConfig, StudyConfig
from cellflux_bridge.training.loop import Stopped
from cellflux_bridge.trajectory import TrajectoryHeader, TrajectoryWriter
from tests.test_trajectory import sequences

CLASSES = ("A", "B")


@pytest.fixture
def study(tmp_path, make_patches):
    """`study(**keys)`: the configuration of a small study of 24 patches of either class, its file in `tmp_path`."""
    make_patches(tmp_path / "patches", low=16, high=16)

    def make(**keys) -> StudyConfig:
        data = {"root": str(tmp_path / "patches"), "image_size": 16, "cache_dir": str(tmp_path / "cache")}
        given = {
            "output": str(tmp_path / "study"),
            "data": {**data, "split": {"val": 0.25, "test": 0.25}},
            "arms": {"base": {}},
            "train": {"steps": 3, "batch_size": 4, "accelerator": "cpu"},
            "near_copies": "leave_out",
            **keys,
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(given))
        return load_config(tmp_path / "study.yaml", schema=StudyConfig).beside(tmp_path)

    return make


# Made images


def pool_on_a_line(positions, labels) -> tuple[Pool, np.ndarray, object]:
    """Images whose only feature is a position on a line; the centroids of the classes lie at 0 and 10."""
    patches = torch.tensor(positions, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)

    def look(batch):
        position = batch[:, 0, 0, 0].double().numpy()
        return position[:, None], np.stack([1 - position / 10, position / 10], axis=1)

    return Pool(patches, np.array(labels, np.float32)), np.array([[0.0], [10.0]]), look


def chosen(arm: dict, positions, labels, *, num_real: int, seed: int = 0) -> list[tuple[int, float]]:
    pool, centroids, look = pool_on_a_line(positions, labels)
    options = {"num_real": num_real, "classes": CLASSES, "centroids": centroids, "look": look}
    found = choose(pool, ArmConfig(**arm), **options, generator=np.random.default_rng(seed))
    return sorted(zip(found.patches[:, 0, 0, 0].tolist(), found.labels[:, 1].tolist(), strict=True))


A, B, HALF = (0.9, 0.1), (0.2, 0.8), (0.5, 0.5)


def test_centroids_take_the_nearest_images_of_their_own_side():
    positions, labels = [3, 1, 7, 2, 9, 8, 4, 6], [A, A, A, A, B, B, B, B]
    found = chosen({"images": "x", "select": "centroid"}, positions, labels, num_real=4)
    # 7 is labelled A but lies at B, 4 is labelled B but lies at A: neither can be taken.
    assert [position for position, _ in found] == [1, 2, 8, 9]


def test_confidence_takes_the_surest_images_and_an_even_label_is_of_its_nearest_centroid():
    positions, labels = [3, 1, 2, 9, 8, 0, 10], [A, A, A, B, B, HALF, HALF]
    found = chosen({"images": "x", "select": "confidence"}, positions, labels, num_real=4)
    assert [position for position, _ in found] == [0, 1, 9, 10]
    assert dict(found)[0] == dict(found)[10] == pytest.approx(0.5)


def test_random_selection_follows_its_seed_and_keeps_both_sides_equal():
    positions, labels = list(range(10)), [A] * 6 + [B] * 4
    arm = {"images": "x", "ratio": 1.5}
    first = chosen(arm, positions, labels, num_real=4)
    assert len(first) == 6
    assert sum(label < 0.5 for _, label in first) == 3
    assert first == chosen(arm, positions, labels, num_real=4)
    assert any(first != chosen(arm, positions, labels, num_real=4, seed=seed) for seed in range(1, 5))


def test_a_classifiers_labels_replace_nominal_ones_and_decide_the_side():
    found = chosen({"images": "x", "labels": "classifier"}, [2, 9], [B, A], num_real=2)
    assert found == [(2, pytest.approx(0.2)), (9, pytest.approx(0.9))]


def test_a_class_that_runs_short_says_how_many_are_missing():
    with pytest.raises(UserError, match=r"3 made images of class 'B'.*1 can be used \(of 2 made\): 2 are missing"):
        chosen({"images": "x", "select": "centroid", "ratio": 3}, [1, 2, 3, 9, 4], [A, A, A, B, B], num_real=2)


def test_candidates_are_the_frames_of_the_levels_that_an_arm_names(tmp_path):
    header = TrajectoryHeader("progression", "A", "B", CLASSES, (0.0, 0.25, 0.5, 1.0), "0@1")
    made = sequences("one", "two", header=header)
    writer = TrajectoryWriter(tmp_path / "t", header)
    writer.append(made, numbers=[0, 1])
    writer.finish()
    preprocessing = type("Preprocessing", (), {"image_size": 4})()
    shares = {}
    for levels in ("inner", "ends", "all"):
        arm = ArmConfig(images="x", levels=levels)
        found = candidates([tmp_path / "t"], arm, classes=CLASSES, preprocessing=preprocessing)
        shares[levels] = sorted(found.labels[:, 1].tolist())
    assert shares == {"inner": [0.25, 0.25, 0.5, 0.5], "ends": [1.0, 1.0], "all": [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]}
    inner = candidates([tmp_path / "t"], ArmConfig(images="x"), classes=CLASSES, preprocessing=preprocessing)
    assert np.array_equal(inner.patches[1].numpy(), made.frames[1, 1])
    with pytest.raises(UserError, match="classes A, B; this study has B, A"):
        candidates([tmp_path / "t"], ArmConfig(images="x"), classes=("B", "A"), preprocessing=preprocessing)
    preprocessing.image_size = 8
    with pytest.raises(UserError, match="frames of 3x4x4, the study has 3x8x8"):
        candidates([tmp_path / "t"], ArmConfig(images="x"), classes=CLASSES, preprocessing=preprocessing)


def test_a_folder_of_made_images_is_taken_as_it_is_or_scaled(tmp_path):
    preprocessing = Preprocessing(8, 16)
    rng, made = np.random.default_rng(0), tmp_path / "made"
    ready, large = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (8, 32))
    for label, rgb in (("A", ready), ("B", large)):
        (made / label).mkdir(parents=True)
        write_png(made / label / "0.png", rgb)
    found = candidates([made], ArmConfig(images="x"), classes=CLASSES, preprocessing=preprocessing)
    assert np.array_equal(found.patches[0].numpy().transpose(1, 2, 0), ready)
    assert np.array_equal(found.patches[1].numpy().transpose(1, 2, 0), preprocessing(large, name=""))
    assert found.labels.tolist() == [[1, 0], [0, 1]]
    (made / "B" / "0.png").unlink()
    with pytest.raises(UserError, match=r"made/B: holds no image"):
        candidates([made], ArmConfig(images="x"), classes=CLASSES, preprocessing=preprocessing)


def test_a_ratio_that_asks_for_no_image_is_refused():
    with pytest.raises(UserError, match=r"ratio=0.02: of 20 real images that is none a class; raise it above 0.05"):
        chosen({"images": "x", "ratio": 0.02}, [1, 9], [A, B], num_real=20)


# Figures


def example(num_classes: int = 2, *, num: int = 60, num_groups: int = 7, num_seeds: int = 3):
    rng = np.random.default_rng(num_classes)
    labels, groups = rng.integers(num_classes, size=num), rng.integers(num_groups, size=num)
    values = rng.dirichlet(np.ones(num_classes), size=(num_seeds, num))
    values[:, np.arange(num), labels] += 0.3
    return values / values.sum(-1, keepdims=True), labels, groups


@pytest.mark.parametrize("num_classes", [2, 3])
def test_figures_of_a_resample_are_those_of_its_patches(num_classes):
    values, labels, groups = example(num_classes)
    of, draws = results.sums(values, labels, groups, 7), results.draw(7, 3, seed=1)
    for row in (0, 5):
        counts = draws.groups[row].astype(int)
        drawn = np.concatenate([np.flatnonzero(groups == g) for g in np.repeat(range(7), counts)])
        for seed in range(3):
            found, truth = values[seed, drawn], labels[drawn]
            called = found.argmax(1)
            last = {"average": "binary"} if num_classes == 2 else {"average": "macro"}
            area = (
                roc_auc_score(truth, found[:, 1])
                if num_classes == 2
                else roc_auc_score(truth, found, multi_class="ovr")
            )
            expected = {
                "balanced accuracy": balanced_accuracy_score(truth, called),
                "macro F1": f1_score(truth, called, average="macro"),
                "sensitivity": recall_score(truth, called, **last),
                "AUC": area,
                "calibration error": expected_calibration_error(found, np.eye(num_classes)[truth], np.ones(len(truth))),
            }
            if num_classes == 2:
                expected["specificity"] = recall_score(truth, called, pos_label=0)
            for name, value in expected.items():
                assert results.FIGURES[name](of, draws)[row, seed] == pytest.approx(value), name


def test_three_classes_have_the_mean_specificity_of_one_against_the_rest():
    values, labels, groups = example(3)
    found = results.specificity(results.sums(values, labels, groups, 7), results.draw(7, 3, seed=1))[0, 0]
    called = values[0].argmax(1)
    assert found == pytest.approx(np.mean([recall_score(labels != c, called != c) for c in range(3)]))


def test_a_difference_is_paired_so_that_equal_arms_have_none_at_all():
    values, labels, groups = example()
    of, draws = results.sums(values, labels, groups, 7), results.draw(7, 3, seed=0)
    one = results.resampled(results.balanced_accuracy, of, draws)
    assert results.interval(one - one) == (0, 0, 0)
    assert results.p_value(one - one) == 1
    low, high = results.interval(one)[1:]
    assert low < one[0] < high
    assert results.p_value(np.concatenate([[0.1], np.full(1999, 0.1)])) == pytest.approx(0.001)


def test_many_groups_are_drawn_in_bundles_that_keep_each_whole():
    groups = np.repeat(np.arange(1000), 3)
    numbers, num = results.bundled(groups, seed=0)
    assert num == 300
    assert np.array_equal(np.unique(numbers), np.arange(300))
    assert all(len(set(numbers[groups == group])) == 1 for group in (0, 17, 999))
    assert np.bincount(numbers).max() <= 12
    few, num = results.bundled(np.array(["b", "a", "b"]), seed=0)
    assert num == 2
    assert few[0] == few[2] != few[1]


def test_holm_corrects_the_smallest_most_and_keeps_their_order():
    assert results.holm([0.04, 0.01, 0.03], num=3) == pytest.approx([0.06, 0.03, 0.06])
    assert results.holm([0.6, 0.7], num=2) == [1, 1]
    assert results.holm([0.01], num=5) == [0.05], "tests that are not done yet count, too"


# Plan


def test_smaller_sizes_are_part_of_larger_ones_and_held_out_patches_stay(study):
    config = study(sizes=[3, 6, "all"])
    few, more, every = (set(training_groups(config, size)) for size in config.sizes)
    assert few < more < every
    assert len(few) == 6
    whole = load_patches(config.data, seed=0)
    part = load_patches(sized(config, 3).data, seed=0)
    assert {part.ids[i] for i in part.indices("train")} == few
    assert np.array_equal(part.indices("test"), whole.indices("test"))
    with pytest.raises(UserError, match=r"sizes: 20 groups of every class, but class 'A' has 12"):
        training_groups(config, 20)


def test_a_group_of_two_classes_counts_for_both(study, make_patches, tmp_path):
    config = study()
    shutil.rmtree(tmp_path / "patches")
    for group in "abcdefgh":
        make_patches(tmp_path / "new" / group, num={"A": 1, "B": 1}, low=16, high=16, seed=ord(group))
        for label in CLASSES:
            (tmp_path / "patches" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "new" / group / label).rename(tmp_path / "patches" / label / group)
    assert len(training_groups(config, 2)) == 2


def test_a_generator_trains_on_the_studys_data_and_the_groups_of_its_size(study, tmp_path, write_config):
    elsewhere = {"data": {"root": "elsewhere", "image_size": 64}, "pairs": {"transitions": [["X", "Y"]]}}
    write_config(tmp_path, file="flow.yaml", **elsewhere, translate={"source": "X", "target": "Y"})
    flow = {"config": "flow.yaml", "set": ["train.steps=7"]}
    config = study(generators={"flow": flow, "one": {**flow, "directions": "forward"}}, sizes=[3], seed=5)
    found, one = (generator_config(config, Making(3, name)) for name in config.generators)
    assert (found.translate.source, found.translate.target, found.pairs.transitions) == ("A", "B", "all")
    assert one.pairs.transitions == [("A", "B")]
    assert found.data == sized(config, 3).data
    assert found.data.split.train_groups == training_groups(config, 3)
    assert (found.seed, found.train.steps, found.translate.split, found.translate.num) == (5, 7, "train", None)
    assert found.output == config.output / "sizes" / "3" / "flow"


def test_mistakes_in_a_study_name_what_is_there(study):
    for keys, message in (
        ({"arms": {"base": {}, "x": {"images": "stairs"}}, "generators": {"stair": {"folder": "f"}}}, "mean 'stair'"),
        ({"base": "bas"}, "base: no arm called 'bas'; did you mean 'base'"),
        ({"generators": {"x": {}}}, "expected config .* or folder"),
        ({"arms": {"base": {}, "x": {"augmentation": "cutmx"}}}, "did you mean 'cutmix'"),
        ({"primary": {"arms": ["base"], "against": ["base"], "size": "all", "backbone": "small"}}, "both sides"),
        ({"primary": {"arms": ["base"], "against": ["base"], "size": 9, "backbone": "small"}}, "no size called '9'"),
        ({"generators": {"x": {"config": "missing.yaml"}}}, r"generators.x.config=missing.yaml: no such file"),
        ({"generators": {"guide": {"folder": "f"}}}, "generators.guide: is the guide's own name"),
        ({"arms": {"base": {}, "Base": {}}}, "Base and base differ by letter case only"),
        ({"arms": {"base": {}, "x.": {}}}, "'x.' cannot be a name here"),
        ({"sizes": [3, 3]}, "sizes: 3 stands twice"),
    ):
        with pytest.raises(UserError, match=message):
            study(**keys)


# Leaks


def test_a_near_copy_of_a_held_out_patch_is_refused_or_left_out(study, tmp_path):
    config = study(near_copies="refuse")
    patches = load_patches(config.data, seed=0)
    held_out, train = patches.indices("test", "B")[0], patches.indices("train", "B")[0]
    mirrored = read_rgb(config.data.root / patches.ids[held_out])[:, ::-1]
    write_png(config.data.root / patches.ids[train], mirrored)
    name = patches.ids[train]
    with pytest.raises(UserError, match=rf"near copies of them in another split.*{name}"):
        require_no_leak(config)
    config, lines = require_no_leak(study(near_copies="leave_out"))
    kept = load_patches(config.data, seed=0)
    assert name not in {kept.ids[i] for i in kept.indices("train")}
    assert name not in training_groups(config, "all")
    assert any(name in line for line in lines)
    for split in ("val", "test"):
        assert np.array_equal(kept.indices(split), patches.indices(split)), "no patch changes its split"


def test_the_whole_group_of_a_near_copy_is_left_out(study, make_patches, tmp_path):
    config = study(near_copies="leave_out")
    shutil.rmtree(tmp_path / "patches")
    for split, group in (("train", "g"), ("train", "h"), ("val", "v"), ("test", "t")):
        make_patches(tmp_path / "new" / group, num={"A": 3, "B": 3}, low=16, high=16, seed=ord(group))
        for label in CLASSES:
            (tmp_path / "patches" / split / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "new" / group / label).rename(tmp_path / "patches" / split / label / group)
    shutil.copy(tmp_path / "patches/test/A/t/A001.png", tmp_path / "patches/train/A/g/A002.png")
    config, _ = require_no_leak(config)
    assert training_groups(config, "all") == ["h"]


def test_a_folder_that_was_made_with_held_out_patches_is_refused(study, tmp_path):
    config = study(generators={"made": {"folder": str(tmp_path / "made")}}, arms={"base": {}, "m": {"images": "made"}})
    patches = load_patches(config.data, seed=0)
    for label in CLASSES:
        (tmp_path / "made" / label).mkdir(parents=True)
        rgb = read_rgb(config.data.root / patches.ids[patches.indices("train", label)[0]])
        write_png(tmp_path / "made" / label / "0.png", rgb)
    assert "no near copy" in require_no_leak(config)[1][1]
    leaked = np.rot90(read_rgb(config.data.root / patches.ids[patches.indices("test", "B")[0]]))
    write_png(tmp_path / "made" / "B" / "leaked.png", np.ascontiguousarray(leaked))
    with pytest.raises(UserError, match=r"generators.made.folder.*leaked.png"):
        require_no_leak(config)


def test_a_generator_that_trained_on_other_groups_is_refused(study, tmp_path):
    config = study(sizes=[3])
    part, whole = (load_patches(of.data, seed=0) for of in (sized(config, 3), config))
    train = sorted(part.ids[i] for i in part.indices("train"))
    rows = ["path,label,split,group", *(f"{name},A,train," for name in train)]
    (tmp_path / "splits.csv").write_text("\n".join(rows) + "\n")
    require_trained_on(tmp_path, part)
    foreign = next(whole.ids[i] for i in whole.indices("test"))
    (tmp_path / "splits.csv").write_text("\n".join([*rows, f"{foreign},A,train,"]) + "\n")
    with pytest.raises(UserError, match=f"1 patches outside its size's groups: {foreign}"):
        require_trained_on(tmp_path, part)


# Cells


def test_arms_see_the_same_real_patches_and_made_ones_take_their_share(study):
    arms = {"base": {}, "made": {"images": "x", "ratio": 3.0}}
    config = study(arms=arms, generators={"x": {"folder": "f"}}, train={"steps": 3, "batch_size": 400})
    patches = load_patches(config.data, seed=0)
    made = Pool(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), np.tile(np.float32([0.3, 0.7]), (4, 1)))
    train = patches.indices("train")
    base = CellTask(config, patches, Cell("all", "small", "base", 0), train, None)
    other = CellTask(config, patches, Cell("all", "small", "made", 0), train, made)
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name])
    one, two = base.batch(1, rank=0), other.batch(1, rank=0)
    is_made = (two.x == -1).flatten(1).all(1)
    assert torch.equal(one.x[~is_made], two.x[~is_made])
    assert torch.allclose(two.y[is_made], torch.tensor([0.3, 0.7]))
    assert torch.equal(two.y[~is_made].sum(1), torch.ones(int((~is_made).sum())))
    assert is_made.float().mean().item() == pytest.approx(0.75, abs=0.08)
    again = CellTask(config, patches, Cell("all", "small", "base", 1), train, None).batch(1, rank=0)
    assert not torch.equal(one.x, again.x)


def test_a_frozen_backbone_trains_its_last_layer_on_features_of_augmented_patches(study, tmp_path):
    (tmp_path / "weights").mkdir()
    torch.manual_seed(0)
    known = timm.create_model("resnet10t").state_dict()
    save_file(known, tmp_path / "weights" / "model.safetensors")
    probe = {"name": "resnet10t", "frozen": True, "weights": str(tmp_path / "weights"), "size": 16}
    config = study(backbones={"probe": probe}, train={"steps": 3, "batch_size": 4})
    patches = load_patches(config.data, seed=0)
    task = CellTask(config, patches, Cell("all", "probe", "base", 0), patches.indices("train"), None)
    assert torch.equal(task.network.net.conv1[0].weight, known["conv1.0.weight"])
    task.fill_bank(torch.device("cpu"))
    batch = task.batch(0, rank=0)
    assert sum(p.numel() for p in task.model.parameters()) == 2 * batch.x.shape[1] + 2
    with torch.no_grad():
        expected = task.network.eval().features(task._drawn(1, 0).x)
    assert torch.allclose(task.batch(1, rank=0).x, expected, atol=1e-5)
    assert torch.equal(task.batch(3, rank=0).x, batch.x)
    first = feature_key(config, Cell("all", "probe", "base", 0))
    assert first == feature_key(config, Cell("all", "probe", "base", 1))
    other = study(backbones={"probe": {**probe, "size": 32}})
    assert first != feature_key(other, Cell("all", "probe", "base", 0)), "features of another network are others"


def test_a_cell_writes_its_probabilities_once_and_repeats_itself(study, tmp_path):
    config = study()
    cell = Cell("all", "small", "base", 0)
    run_cell(config, cell)
    folder = cell_folder(config, cell)
    result = json.loads((folder / "result.json").read_text())
    patches = load_patches(config.data, seed=0)
    assert (result["num_real"], result["num_made"], result["arm"]) == (len(patches.indices("train")), 0, "base")
    options = {"num": len(patches.indices("test")), "num_classes": 2}
    first = results.probabilities(config, cell, "test", **options)
    assert first.sum(1) == pytest.approx(1, abs=1e-5)
    assert not (folder / "training").exists()
    stamp = (folder / "result.json").stat().st_mtime_ns
    run_cell(config, cell)
    assert (folder / "result.json").stat().st_mtime_ns == stamp
    again = study(output=str(tmp_path / "again"))
    run_cell(again, cell)
    assert np.array_equal(first, results.probabilities(again, cell, "test", **options))
    with pytest.raises(UserError, match="of other patches"):
        results.probabilities(config, cell, "test", num=3, num_classes=2)


def test_a_result_of_other_settings_is_made_anew_and_one_elsewhere_is_not(study, tmp_path):
    cell = Cell("all", "small", "base", 0)
    config = study()
    digest = cell_digest(config, cell)
    same = [{"output": str(tmp_path / "x")}, {"seeds": 9}, {"sizes": [3, "all"]}, {"arms": {"base": {}, "more": {}}}]
    other = [{"seed": 1}, {"train": {"steps": 5}}, {"arms": {"base": {"augmentation": "mixup"}}}]
    assert {cell_digest(study(**keys), cell) for keys in same} == {digest}
    assert len({digest, *(cell_digest(study(**keys), cell) for keys in other)}) == 4
    run_cell(config, cell)
    assert results.result_of(config, cell)["steps"] == 3
    longer = study(train={"steps": 5, "batch_size": 4, "accelerator": "cpu"})
    assert results.result_of(longer, cell) is None
    run_cell(longer, cell)
    assert results.result_of(longer, cell)["steps"] == 5


class Maker:
    """Notes what it is asked for and makes nothing but a folder."""

    def __init__(self):
        self.asked = []

    def __call__(self, file, kind, directions):
        self.asked.append((file.name, kind, [tuple(pair) for pair in directions]))
        (file.with_name(file.name.removesuffix(".yaml")) / "part").mkdir(exist_ok=True)


def test_a_generator_is_made_anew_with_other_settings_and_gone_on_with_the_same(study, tmp_path, write_config):
    write_config(tmp_path, file="flow.yaml")
    flow, arms = {"config": "flow.yaml"}, {"base": {}, "x": {"images": "s0.1"}}
    maker = Maker()

    def run(**keys):
        config = study(generators={"s0.1": {**flow, **keys}}, arms=arms)
        maker.asked.clear()
        assert run_module._make_generator(config, maker, Making("all", "s0.1")) is None
        return config.output / "sizes" / "all" / "s0.1"

    folder = run()
    assert maker.asked == [("s0.1.yaml", "flow", [("A", "B"), ("B", "A")])]
    run()
    assert maker.asked == []
    (folder / "done.txt").unlink()
    (folder / "part" / "checkpoint").touch()
    run()
    assert (folder / "part" / "checkpoint").exists(), "a stopped one goes on"
    for keys in ({"directions": "forward"}, {"set": ["train.lr=1e-5"]}):
        (folder / "part" / "checkpoint").touch()
        run(**keys)
        assert maker.asked
        assert not (folder / "part" / "checkpoint").exists(), "what was begun otherwise is gone"


def test_damaged_results_are_named(study):
    config, cell = study(), Cell("all", "small", "base", 0)
    folder = cell_folder(config, cell)
    folder.mkdir(parents=True)
    for text in ("", "[" * 100_000, "{}", '{"digest": "x"}', '{"digest": "x", "seconds": "soon"}'):
        (folder / "result.json").write_text(text)
        with pytest.raises(UserError, match=r"result\.json: damaged.*remove its folder"):
            results.result_of(config, cell)
    np.savez(folder / "whole.npz", test=np.full((3, 2), 0.5, np.float32))
    whole = (folder / "whole.npz").read_bytes()
    texts, high = np.array([["a", "b"]] * 3), np.full((3, 2), 2, np.float32)
    for content in (b"", whole[:50], whole[:-30], texts, high):
        if isinstance(content, bytes):
            (folder / "probabilities.npz").write_bytes(content)
        else:
            np.savez(folder / "probabilities.npz", test=content)
        with pytest.raises(UserError, match=r"probabilities\.npz: (damaged|of other patches)"):
            results.probabilities(config, cell, "test", num=3, num_classes=2)


def stops(config, cell):
    raise Stopped(2, 1)


def test_a_stop_ends_the_study_and_is_no_failed_cell(study, monkeypatch):
    monkeypatch.setattr(run_module, "run_cell", stops)
    config = study(seeds=3)
    with pytest.raises(Stopped):
        run_study(config, fails_to_make, workers=1, slurm=None)
    assert not list(config.output.glob("cells/**/error.txt"))


def fails_to_make(file, kind, directions):
    if kind != "guide":
        raise UserError("no such luck")


def test_a_failed_job_is_recorded_the_others_go_on_and_only_it_is_done_again(study, tmp_path, write_config, capsys):
    write_config(tmp_path, file="flow.yaml")
    arms = {"base": {}, "stair": {"images": "flow"}}
    config = study(arms=arms, generators={"flow": {"config": "flow.yaml"}}, seeds=2)
    with pytest.raises(UserError, match=r"3 jobs failed; .*flow of size all: no such luck"):
        run_study(config, fails_to_make, workers=1, slurm=None)
    done = [cell_folder(config, cell) / "result.json" for cell in cells(config) if cell.arm == "base"]
    stamps = [path.stat().st_mtime_ns for path in done]
    error = cell_folder(config, Cell("all", "small", "stair", 1)) / "error.txt"
    assert "generator 'flow' is not made" in error.read_text()
    text = (config.output / "study.md").read_text()
    assert "| all | small | base |" in text
    assert "NOT SHOWN, because fewer than 2 seeds are there: all/small/stair (0)" in text
    with pytest.raises(UserError, match="3 jobs failed"):
        run_study(config, fails_to_make, workers=1, slurm=None)
    assert [path.stat().st_mtime_ns for path in done] == stamps


@pytest.mark.parametrize("how", [{"workers": 2, "slurm": None}, {"workers": 1, "slurm": {"cluster": "debug"}}])
def test_jobs_give_the_same_in_other_processes_and_as_an_array(study, tmp_path, how):
    if how["slurm"]:
        pytest.importorskip("submitit")
    config, alone = study(seeds=2), study(seeds=2, output=str(tmp_path / "alone"))
    written = run_study(config, fails_to_make, **how)
    assert config.output / "study.md" in written
    run_cell(alone, Cell("all", "small", "base", 1))
    options = {"num": len(load_patches(config.data, seed=0).indices("test")), "num_classes": 2}
    first, second = (
        results.probabilities(of, Cell("all", "small", "base", 1), "test", **options) for of in (config, alone)
    )
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_wrong_slurm_parameters_are_named(study):
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match=r"--slurm: .*partitoin"):
        run_study(study(), fails_to_make, workers=1, slurm={"cluster": "local", "partitoin": "gpu"})


def test_what_cannot_be_built_is_refused_before_anything_is_trained(study, tmp_path, write_config):
    guided = {"translate": {"method": "progression", "guidance": {"form": "score"}}, "condition": {"target": "level"}}
    write_config(tmp_path, file="guided.yaml", **guided)
    write_config(tmp_path, file="deep.yaml", velocity={"multipliers": [1, 2, 2, 2, 2, 2]})
    arms = {"base": {}, "x": {"images": "g"}}
    for keys, message in (
        ({"backbones": {"x": {"name": "resnet5O"}}}, "did you mean 'resnet"),
        ({"backbones": {"x": {"name": "resnet10t", "frozen": True}}}, "resnet10t: a frozen backbone needs weights"),
        ({"backbones": {"x": {"name": "small", "frozen": True}}}, "small classifier has no weights from elsewhere"),
        ({"backbones": {"x": {"name": "inception_v3"}}}, "inception_v3 cannot see patches of 16 px"),
        (
            {"generators": {"g": {"config": "guided.yaml"}}, "arms": arms},
            r"generators.g: .*form=score asks a guide",
        ),
        ({"generators": {"g": {"config": "deep.yaml"}}, "arms": arms}, "data.image_size=16: not divisible"),
        ({"data": {"root": str(tmp_path / "patches"), "channels": 4}}, "data.channels=4: a study is of RGB"),
    ):
        config = study(**keys)
        with pytest.raises(UserError, match=message):
            run_study(config, fails_to_make, workers=1, slurm=None)
        assert not config.output.exists()


def write_cell(config, cell: Cell, values: dict[str, np.ndarray]) -> None:
    folder = cell_folder(config, cell)
    folder.mkdir(parents=True)
    np.savez(folder / "probabilities.npz", **values)
    (folder / "result.json").write_text(json.dumps({"seconds": 1.0, "digest": cell_digest(config, cell)}))


def test_the_primary_test_chooses_by_validation_and_asks_the_test_split_once(study):
    primary = {"arms": ["one", "two"], "against": ["cut"], "size": "all", "backbone": "small"}
    config = study(arms={"base": {}, "one": {}, "two": {}, "cut": {}}, seeds=1, primary=primary)
    patches = load_patches(config.data, seed=0)
    right = {split: np.eye(2)[patches.labels[patches.indices(split)]].astype(np.float32) for split in ("val", "test")}
    wrong = {split: 1 - values for split, values in right.items()}
    # `one` is the best on validation patches and the worst on test patches: it must be chosen.
    for arm, val, test in (("base", wrong, wrong), ("one", right, wrong), ("two", wrong, right), ("cut", wrong, right)):
        write_cell(config, Cell("all", "small", arm, 0), {"val": val["val"], "test": test["test"]})
    rows, found = summary.summarise(config)
    assert (found.arm, found.against, found.difference) == ("one", "cut", (-1.0, -1.0, -1.0))
    of = {row.arm: row for row in rows}
    assert of["two"].difference == (1.0, 1.0, 1.0)
    assert of["two"].p_holm == pytest.approx(3 * of["two"].p)
    assert of["base"].difference is None
    assert of["two"].figures["calibration error"][0] == pytest.approx(0)
    assert np.isnan(of["two"].figures["calibration error"][1]), "resamples have more of it"
    assert of[summary.COLOUR].figures["balanced accuracy"][0] > 0.9, "the classes of these patches differ in colour"


def test_a_dry_run_prints_the_cells_and_trains_nothing(study, tmp_path, capsys):
    study(arms={"base": {}, "other": {}}, sizes=[3, 6], seeds=4)
    main(["study", str(tmp_path / "study.yaml"), "--dry-run"])
    printed = capsys.readouterr().out
    assert "16 cells (2 arms, 1 backbones, 2 sizes, 4 seeds) of 3 updates of 4 patches" in printed
    assert "size 3: 6 groups, 3 A, 3 B" in printed
    assert not (tmp_path / "study").exists()


def test_a_received_study_is_not_run(study, tmp_path):
    study(output=str(tmp_path))
    (tmp_path / "study.yaml").rename(tmp_path / "config.yaml")
    for where in (tmp_path, tmp_path / "config.yaml"):
        with pytest.raises(SystemExit, match="expected the YAML file that the study was begun with"):
            main(["study", str(where)])


def test_a_study_makes_its_images_trains_and_tells(study, tmp_path, write_config, capsys):
    """The whole of it on patches of 16 px: guide, flow in both directions, cells, tables, figures."""
    translate = {"method": "progression", "levels": 3, "steps": 2, "solver": "euler"}
    write_config(tmp_path, file="flow.yaml", condition={"target": "level"}, translate=translate, train={"steps": 2})
    study(
        generators={"flow": {"config": "flow.yaml"}},
        arms={"base": {}, "stair": {"images": "flow", "augmentation": "mixup"}},
        seeds=1,
        sizes=[6, "all"],
        guide=["classifier.train.steps=2", "classifier.train.batch_size=4", "classifier.train.accelerator=cpu"],
        primary={"arms": ["stair"], "against": ["base"], "size": 6, "backbone": "small"},
    )
    main(["study", str(tmp_path / "study.yaml"), "--workers", "1"])
    assert "**Primary test** (size 6, small" in capsys.readouterr().out
    text = (tmp_path / "study" / "study.md").read_text()
    assert text.count("| stair |") == 2
    for name in ("study.csv", "study.tex", "study.json", "figures/forest.png", "figures/curve.pdf"):
        assert (tmp_path / "study" / name).stat().st_size > 0
    assert len(list((tmp_path / "study" / "sizes" / "6" / "flow" / "made").iterdir())) == 2
    result = json.loads((tmp_path / "study" / "cells" / "6" / "small" / "stair" / "0" / "result.json").read_text())
    assert result["num_made"] == result["num_real"] == 12
    # A chapter of the report, which runs nothing that the file says.
    file = tmp_path / "study" / "study.json"
    file.write_text(file.read_text().replace('"name": "study"', '"name": "study <script>alert(1)</script>"'))
    main(["report", str(tmp_path / "study"), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "Study: study &lt;script&gt;" in page
    assert "<script>alert" not in page
    assert page.count('class="images-and-augmentation"') == 2
    assert "Primary test (size 6, small" in page
    assert page.count("data:image/png") == 1
    file.write_text(file.read_text().replace('"p_holm"', '"p_hol"'))
    with pytest.raises(SystemExit, match=r"study.json: rows.0.p_holm.*cellflux-bridge study STUDY.yaml"):
        main(["report", str(tmp_path / "study"), "--output", str(tmp_path / "page.html")])
