"""Made treated cells beside real ones: figures with closed-form answers, and the whole way on small made cells."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellflux_bridge import cli
from cellflux_bridge.api import Bridge
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import load_config
from cellflux_bridge.metrics import perturbation as protocol
from cellflux_bridge.metrics.fidelity import frechet_distance, kid
from cellflux_bridge.metrics.perturbation import Cells, Protocol
from cellflux_bridge.trajectory import load_trajectory
from cellflux_bridge.translation.inputs import Sources
from cellflux_bridge.translation.perturbation import make_swapped, match_controls, training_cells

CLASSES = ("DMSO", "cmpd1", "cmpd2", "cmpd3")


def features(rng, labels, shift=1.0):
    """Three features; the first is the label's."""
    return np.column_stack([shift * labels, np.zeros((len(labels), 2))]) + rng.normal(0, 0.3, (len(labels), 3))


def cells(labels, *, batches=None, doses=None, images=None, origins=None, **of) -> Cells:
    num = len(labels)
    images = np.zeros((num, 1, 16, 16), np.uint8) if images is None else images
    batches = np.arange(num) % 2 if batches is None else batches
    doses = np.ones(num, np.float32) if doses is None else doses
    origins = np.random.default_rng().permutation(10**6)[:num] if origins is None else origins
    return Cells(images, np.asarray(labels), batches, doses, origins, of)


# Figures


def test_pooled_and_mean_distances_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 2, 3], [40, 30, 4])
    real, made = features(rng, labels), features(rng, labels, shift=1.5)
    found = protocol.distances(cells(labels, f=made), cells(labels, f=real), "f", seed=0)
    enough = [labels == 1, labels == 2]  # 4 cells are too few
    assert found["FIDo"][0].value == pytest.approx(frechet_distance(made, real))
    assert found["KIDo"][0].value == pytest.approx(kid(made, real).value)
    assert found["FIDc"][0].value == pytest.approx(np.mean([frechet_distance(made[c], real[c]) for c in enough]))
    assert found["KIDc"][0].value == pytest.approx(np.mean([kid(made[c], real[c]).value for c in enough]))
    assert [found[name][1] for name in ("FIDo", "KIDo", "FIDc", "KIDc")] == [74, 74, 2, 2]


def test_pooled_distance_does_not_see_perturbations_that_change_places_and_the_mean_does():
    rng = np.random.default_rng(1)
    labels = np.repeat([1, 2], 200)
    real, made = features(rng, labels, shift=3), features(rng, labels, shift=3)
    exchanged = protocol.distances(cells(3 - labels, f=made), cells(labels, f=real), "f", seed=0)
    assert exchanged["FIDo"][0].value < 0.1
    assert exchanged["FIDc"][0].value > 8  # the means are 3 apart


def test_a_profile_is_in_spreads_of_the_reference():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 200, (50, 2, 16, 16), dtype=np.uint8)
    profile = protocol.Profile(reference)
    found = profile(reference)
    assert found.shape == (50, 34)
    assert np.abs(found).max() <= 5
    assert abs(np.median(found)) < 0.2
    brighter = reference.copy()
    brighter[:, 1] += 50
    moved = profile(brighter) - found
    levels = np.arange(34) < 10  # five quantiles of two channels come first
    assert (moved[:, levels].reshape(-1, 2, 5)[:, 1] > 0).all()
    assert np.abs(moved[:, levels].reshape(-1, 2, 5)[:, 0]).max() == 0
    assert np.abs(moved[:, ~levels]).max() < 1e-3  # what is added everywhere changes no octave


def test_effects_are_ratios_to_the_controls_of_the_own_batch():
    controls = cells([0] * 12)
    of_controls = np.where((np.arange(12) % 2)[:, None] == 0, [[10.0, 2, 1]], [[40.0, 8, 4]])  # batches differ
    treated = cells(
        np.repeat([1, 2], 10), doses=np.tile([1.0, 5.0], 10).astype(np.float32), batches=np.arange(20) // 2 % 2
    )
    base = np.where(treated.batches[:, None] == 0, [[10.0, 2, 1]], [[40.0, 8, 4]])
    factor = np.where(treated.labels == 1, 2.0, 0.5) * treated.doses
    found = protocol.effects(base * factor[:, None], treated, of_controls, controls)
    expected = {(1, "1"): np.log(2), (1, "5"): np.log(10), (2, "1"): np.log(0.5), (2, "5"): np.log(2.5)}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], [value] * 3, atol=1e-12)


def test_area_and_intensity_are_medians_and_the_number_of_nuclei_is_a_mean():
    controls, treated = cells([0] * 6), cells([1] * 10, batches=np.zeros(10, int))
    values = np.tile([[1.0, 1, 1]], (10, 1))
    values[:4] = [30, 50, 6]
    found = protocol.effects(values, treated, np.ones((6, 3)), controls)
    np.testing.assert_allclose(found[1, "1"], [0, 0, np.log(3)], atol=1e-12)


def test_a_nucleus_that_is_not_found_counts_for_nothing_but_the_number():
    controls, treated = cells([0] * 6), cells([1] * 8, batches=np.zeros(8, int))
    values = np.full((8, 3), 3.0)
    values[:3] = [np.nan, np.nan, 0]
    found = protocol.effects(values, treated, np.ones((6, 3)), controls)
    np.testing.assert_allclose(found[1, "1"], [np.log(3), np.log(3), np.log(15 / 8)])
    values[3] = [np.nan, np.nan, 0]
    assert not protocol.effects(values, treated, np.ones((6, 3)), controls), "four nuclei are too few"


def test_correlation_has_an_interval_and_needs_three_conditions():
    x = np.linspace(-1, 1, 12)
    found = protocol.correlation(2 * x + 1, x, seed=0)
    assert found == pytest.approx((1, 1, 1))
    assert np.isnan(protocol.correlation(x[:2], x[:2], seed=0).value)


def test_what_is_told_of_cells_and_of_whom():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 9, (180, 1, 16, 16), dtype=np.uint8)
    labels = np.tile([1, 2, 3], 60)
    train = labels < 3
    found = features(rng, labels, shift=4)
    found[:, 1] += 3 * (np.arange(180) % 2)  # the batch shows in the second feature
    all_cells = cells(labels, images=images, f=found)
    blind = cells(labels, images=images, f=rng.normal(0, 1, (180, 3)))
    compared = Protocol(
        train=all_cells.at(train),
        test=all_cells,
        controls=cells([0] * 6, images=images[:6], f=found[:6]),
        unseen=[3],
        moa={1: "x", 2: "y", 3: "y"},
        dna=0,
        seed=0,
    )
    rows = {(r.method, r.perturbations, r.figure): r for r in compared.rows({"same": all_cells, "blind": blind})}
    assert rows["same", "seen", "perturbation told"].estimate.value > 0.95
    assert rows["same", "seen", "batch told"].estimate.value > 0.95
    assert rows["same", "unseen", "mode of action told"].estimate.value > 0.95
    assert rows["same", "unseen", "mode of action told"].num == 60
    assert rows["real test cells", "seen", "batch told"].estimate == rows["same", "seen", "batch told"].estimate
    assert ("real test cells", "seen", "FIDo") not in rows
    assert rows["same", "seen", "FIDo"].estimate.value == pytest.approx(0, abs=1e-9)
    assert ("same", "unseen", "perturbation told") not in rows, "no regression knows it"
    assert rows["blind", "seen", "perturbation told"].estimate.value < 0.7
    assert rows["blind", "seen", "batch told"].estimate.value < 0.7


def test_cells_of_one_origin_are_no_pair_of_a_kernel():
    rng = np.random.default_rng(0)
    real, of_controls = features(rng, np.zeros(60)), features(rng, np.zeros(6))
    copies = np.repeat(of_controls, 10, axis=0)  # each control stands for ten cells
    labels = np.ones(60, int)
    far = protocol.distances(cells(labels, f=copies), cells(labels, f=real), "f", seed=0)["KIDo"][0]
    near = protocol.distances(
        cells(labels, f=copies, origins=np.repeat(range(6), 10)), cells(labels, f=real), "f", seed=0
    )
    whole = protocol.distances(cells(labels[:6], f=of_controls), cells(labels, f=real), "f", seed=0)
    assert near["KIDo"][0].value == pytest.approx(whole["KIDo"][0].value)
    assert near["KIDo"][0].value < far.value


def test_controls_are_halved_batch_by_batch():
    one, other = protocol.halves(cells([0] * 11, batches=np.arange(11) % 3))
    assert not set(one.origins) & set(other.origins)
    assert len(one.origins) + len(other.origins) == 11
    for batch in range(3):
        assert abs((one.batches == batch).sum() - (other.batches == batch).sum()) <= 1


def test_methods_are_compared_at_as_many_cells_of_each_perturbation():
    rng, labels = np.random.default_rng(0), np.repeat([1, 2], 20)
    whole = cells(labels, f=features(rng, labels))
    few = whole.at(np.flatnonzero((labels == 2) | (np.arange(40) < 8)))
    options = {"train": whole, "test": whole, "controls": cells([0] * 4, f=whole.features["f"][:4])}
    rows = Protocol(**options, unseen=[], moa={}, dna=0, seed=0).rows({"whole": whole, "few": few})
    counts = {row.method: row.num for row in rows if row.figure == "FIDo"}
    assert counts == {"whole": 28, "few": 28}
    narrow = [row.estimate for row in rows if row.figure == "FIDc"]
    assert all(np.isnan(found.low) for found in narrow), "two perturbations give no interval"


def test_a_condition_that_is_ignored_moves_nothing():
    rng = np.random.default_rng(0)
    sources, change = rng.integers(50, 100, (2, 9, 3, 4, 4))
    made = (sources + change).astype(np.uint8)
    rows = protocol.swap_rows("m", made, made, sources.astype(np.uint8), seed=0)
    assert [row.estimate.value for row in rows] == pytest.approx([0, 1])
    opposite = protocol.swap_rows("m", sources + 10, sources - 10, sources, seed=0)
    assert [row.estimate.value for row in opposite] == pytest.approx([20, -1])


# The whole way


@pytest.fixture(scope="module")
def plates(tmp_path_factory):
    """root/manifest.csv of 16 px cells of two channels in two plates: compounds brighten channel 1 by their vector."""
    root, rng = tmp_path_factory.mktemp("plates") / "patches", np.random.default_rng(0)
    rows = []
    for split, num in (("train", 12), ("val", 6), ("test", 8)):
        for number, label in enumerate(CLASSES):
            for n in range(num if label != "cmpd3" or split == "test" else 0):
                plate, dose = n % 2, (1.0, 10.0)[n // 2 % 2]
                pixels = rng.integers(0, 40, (16, 16, 2), dtype=np.uint8)
                pixels[5:11, 5:11, 0] += 120
                pixels[..., 1] += np.uint8(20 * number * (1 + np.log10(dose)) * (number > 0))
                pixels += np.uint8(30 * plate)
                file = root / split / f"{label}_{n}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, pixels)
                shown = "" if label == "DMSO" else dose
                rows.append([f"{split}/{file.name}", label, split, f"plate{plate}", shown])
    with open(root / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split", "batch", "dose"], *rows])
    (root / "vectors.csv").write_text("name,a,b\n" + "".join(f"cmpd{k},{k},{4 - k}\n" for k in (1, 2, 3)))
    (root / "moa.csv").write_text("name,moa\ncmpd1,weak\ncmpd2,strong\ncmpd3,strong\n")
    return root


@pytest.fixture(scope="module")
def train(plates, write_config):
    def make(name: str, **sections):
        parts = [
            {"name": "embedding", "table": str(plates / "vectors.csv"), "dimension": 2, "without": ["DMSO"]},
            {"name": "dose"},
            {"name": "batch"},
        ]
        folder = plates.parent
        whole = {
            "output": str(folder / "runs" / name),
            "data": {"channels": 2, "layout": "manifest", "flips": False, "split": {"unseen": ["cmpd3"]}},
            "pairs": {"transitions": [["DMSO", "*"]], "match_batch": True},
            "condition": {"target": "none", "source_class": False, "parts": parts},
            "train": {"steps": 12, "batch_size": 16, "validate_pairs": 16, "lr": 0.003},
            "translate": {"method": "path", "steps": 2, "frames": 3, "solver": "euler", "num": 2},
        }
        cli.main(["train", str(write_config(folder, file=f"{name}.yaml", **{**whole, **sections}))])
        return folder / "runs" / name

    return make


@pytest.fixture(scope="module")
def run(train):
    return train("bridge")


def test_cells_are_made_compared_and_written(run, plates, capsys):
    moa = ["--moa", str(plates / "moa.csv")]
    cli.main(["perturbations", str(run), *moa, "--num", "6"])
    text, folder = capsys.readouterr().out, run / "perturbations"
    assert "unseen: no training saw cmpd3." in text
    assert "| bridge |" in text
    record = json.loads((folder / "perturbations.json").read_text())
    figures = {(r["method"], r["perturbations"], r["figure"], r["by"]) for r in record["rows"]}
    for method in ("bridge", "controls, untreated"):
        for name in ("FIDo", "FIDc", "KIDo", "KIDc", "mode of action told", "batch told"):
            assert {(method, group, name, "profile") for group in ("seen", "unseen")} <= figures
    assert ("bridge", "all", "condition swapped, cosine", "pixels") in figures
    made = np.load(folder / "made" / "bridge" / "made.npy")
    assert made.shape == (18, 2, 16, 16)
    rows = list(csv.DictReader(open(folder / "made" / "bridge" / "cells.csv")))
    assert len(rows) == 18
    assert all(row["control"].startswith("test/DMSO") for row in rows)
    place = {row["path"]: row["batch"] for row in csv.DictReader(open(plates / "manifest.csv"))}
    assert all(place[row["control"]] == row["batch"] == place[row["real"]] for row in rows)
    assert sorted(path.stem for path in (folder / "cells").iterdir()) == ["cmpd1", "cmpd2", "cmpd3"]
    # A second call makes nothing again, and one that was stopped goes on.
    stamp = folder / "made" / "bridge" / "made_with.json"
    kept = json.loads(stamp.read_text())
    assert kept["done"] == 18
    damaged = np.lib.format.open_memmap(folder / "made" / "bridge" / "made.npy", mode="r+")
    damaged[:] = 0
    damaged.flush()
    stamp.write_text(json.dumps({**kept, "done": 6}))
    cli.main(["perturbations", str(run), *moa, "--num", "6"])
    again = np.load(folder / "made" / "bridge" / "made.npy")
    labels = np.array([row["perturbation"] for row in rows])
    assert not again[labels == "cmpd1"].any()
    assert np.array_equal(again[labels != "cmpd1"], made[labels != "cmpd1"])
    with pytest.raises(SystemExit, match="holds cells that were made otherwise"):
        cli.main(["perturbations", str(run), "--num", "5"])
    for done in (19, -1, float("inf"), [], None):
        stamp.write_text(json.dumps({**kept, "done": done}))
        with pytest.raises(SystemExit, match=r"damaged .* remove it, and its cells are made again"):
            cli.main(["perturbations", str(run), *moa, "--num", "6"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dna", "2"], "--dna 2: the cells have channels 0 to 1"),
        (["--moa", "{root}/vectors.csv"], "expected columns name and moa, found name, a, b"),
        (["--features", "{run}"], "no classifier|is a flow|of another architecture|cannot"),
        (["--beside", "{run}"], "two runs are called 'bridge'"),
    ],
)
def test_mistakes_are_told_before_cells_are_made(run, plates, tmp_path, arguments, message):
    arguments = [text.format(root=plates, run=run) for text in arguments]
    with pytest.raises((SystemExit, UserError), match=message):
        cli.main(["perturbations", str(run), "--output", str(tmp_path), *arguments])
    assert not (tmp_path / "made").exists()


def test_benchmark_quality_asks_how_well_made_cells_are_told_from_real_ones(run, plates, tmp_path, capsys):
    config, out = str(plates.parent / "bridge.yaml"), tmp_path / "found"
    generate = "path.name=gaussian_source translate.method=generate"
    variants = ("--variant", "controls:", "--variant", f"noise: {generate}")
    cli.main(["benchmark", "quality", config, *variants, "--updates", "1", "--sources", "10", "--output", str(out)])
    rows = list(csv.DictReader(open(out / "quality.csv")))
    assert [row["variant"] for row in rows] == ["controls", "noise"]
    assert all(float(row["auc_colour"]) > 0.9 for row in rows), "one update makes no cells"
    made = list(csv.DictReader(open(out / "controls-1-0" / "treated-10" / "cells.csv")))
    assert {row["perturbation"] for row in made} == {"cmpd1", "cmpd2", "cmpd3"}
    assert len(made) == 12


def test_two_stages_begin_with_the_weights_of_the_first(train, run, plates):
    transitions = [["DMSO", "*"], ["DMSO", "DMSO"]]
    pairs = {"transitions": transitions, "match_batch": True}
    generate = {"method": "generate", "steps": 2, "solver": "euler", "num": 2}
    first = train("noise", path={"name": "gaussian_source"}, pairs=pairs, translate=generate)
    stage = {"steps": 1, "batch_size": 16, "validate_pairs": 16, "lr": 1e-12, "ema_decay": 0.0}
    second = Bridge.load(train("stage2", train={**stage, "init_from": str(first)}))
    noise = Bridge.load(first)
    for name, tensor in noise._network.state_dict().items():
        torch.testing.assert_close(second._network.state_dict()[name], tensor, atol=1e-6, rtol=0)
    vectors = plates / "other.csv"
    vectors.write_text("name,a,b\ncmpd1,9,0\ncmpd2,0,9\ncmpd3,9,9\n")
    parts = [
        {"name": "embedding", "table": str(vectors), "dimension": 2, "without": ["DMSO"]},
        {"name": "dose"},
        {"name": "batch"},
    ]
    condition = {"target": "none", "source_class": False, "parts": parts}
    own = Bridge.load(train("vectors", condition=condition, train={**stage, "init_from": str(first)}))
    found = own._network.condition.embedding.vectors
    assert found[1, 1] == found[2, 0] == 0, "the table is this run's own"
    data = {"channels": 2, "layout": "manifest", "split": {"unseen": ["cmpd2", "cmpd3"]}}
    leaking = {**stage, "batch_size": 8, "init_from": str(first)}
    with pytest.raises(SystemExit, match="was trained on cmpd2, which no training here may see"):
        train("leak", data=data, train=leaking)
    with pytest.raises(SystemExit, match=r"init_from: .* with data.classes=DMSO, cmpd1, .*, here they are cmpd2"):
        train(
            "other",
            data={"channels": 2, "layout": "manifest", "classes": ["cmpd2", "cmpd1", "cmpd3", "DMSO"],
                  "split": {"unseen": ["cmpd3"]}},
            train={**stage, "init_from": str(first)},
        )  # fmt: skip
    # A flow from noise carries a cell back as the control that it is, and makes it again at rising doses.
    seen, inner = [], noise._network.forward
    noise._network.forward = lambda t, x, cond: seen.append(cond) or inner(t, x, cond)
    how = {"method": "depth", "depths": "full", "conditions": "rising", "levels": 2, "steps": 1, "solver": "euler"}
    one = np.load(plates / "test" / "DMSO_0.npy")
    assert noise.translate(one, source="DMSO", target="cmpd2", dose=(1, 100), **how).frames.shape == (3, 1, 2, 16, 16)
    back, forth = seen
    assert not back.present["embedding"].any()
    assert not back.present["dose"].any()
    torch.testing.assert_close(forth.dose[:, 0], torch.tensor([0.0, 2.0]))
    assert forth.embedding.argmax(1).tolist() == [2, 2]


def test_the_way_back_to_control_is_a_transition_like_any_other(train, plates):
    back = Bridge.load(train("back", pairs={"transitions": [["*", "DMSO"]], "match_batch": True}))
    one = np.load(plates / "test" / "cmpd2_0.npy")
    assert back.translate(one, source="cmpd2", target="DMSO").frames.shape == (3, 1, 2, 16, 16)
    with pytest.raises(UserError, match="never saw DMSO -> cmpd2"):
        back.translate(one, source="DMSO", target="cmpd2")
    with pytest.raises(SystemExit, match="transitions start from cmpd1, cmpd2, cmpd3; name the controls' class"):
        cli.main(["perturbations", str(back.config.output)])


def test_a_stair_goes_along_doses_or_toward_a_compound_and_an_unseen_one_can_be_asked_for(run, plates, tmp_path):
    bridge = Bridge.load(run)
    seen = []
    inner = bridge._network.forward
    bridge._network.forward = lambda t, x, cond: seen.append(cond) or inner(t, x, cond)
    one = np.load(plates / "test" / "DMSO_0.npy")
    how = {"method": "progression", "levels": 2, "steps": 1, "solver": "euler", "noise_resampling": None}
    assert bridge.translate(one, target="cmpd3", source="DMSO", dose=(0.1, 10), **how).frames.shape == (3, 1, 2, 16, 16)
    torch.testing.assert_close(seen[-1].dose[:, 0], torch.tensor([-1.0, 1.0]))  # log10 of the first and the last
    assert seen[-1].embedding.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]], "of the whole compound at any dose"
    assert not seen[-1].present["batch"].any(), "of a foreign picture no plate is known"
    bridge.translate(one, target="cmpd1", source="DMSO", dose=10, **how)
    assert seen[-1].embedding.tolist() == [[0.5, 0.5, 0, 0], [0, 1, 0, 0]]
    assert seen[-1].dose[:, 0].tolist() == [1, 1]
    bridge.translate(one, target="cmpd1", source="DMSO", **how)
    assert not seen[-1].present["dose"].any()
    cli.main(["translate", str(run), "--source", "DMSO", "--target", "cmpd2", "translate.dose=10"])
    folder = next((run / "trajectories").iterdir())
    assert load_trajectory(folder).frames.shape == (3, 2, 2, 16, 16)


def test_cells_of_several_perturbations_are_made_together_as_they_are_alone(run):
    bridge = Bridge.load(run, ["translate.batch_size=5"])
    patches = bridge.patches()
    controls = np.tile(patches.indices("test", "DMSO")[:4], 3)
    numbers = [bridge.classes.index(label) for label in ("cmpd3", "cmpd1", "cmpd2")]
    columns = {
        "batches": patches.batches[controls],
        "doses": np.linspace(1, 10, 12, dtype=np.float32),
        "targets": np.repeat(numbers, 4),
    }
    whole = Sources([str(n) for n in range(12)], lambda rows: patches.centre(controls[np.asarray(rows)]), **columns)
    sizes, together = [], np.empty((12, 2, 16, 16), np.int64)
    for part, frames in bridge.last_frames(whole, source="DMSO"):
        sizes.append(len(part))
        together[part] = frames
    assert sizes == [5, 5, 2]
    for n in range(12):
        one = {name: column[[n]] for name, column in columns.items()}
        alone = Sources([str(n)], lambda rows, n=n: patches.centre(controls[[n]]), **one)
        [(_, frames)] = bridge.last_frames(alone, source="DMSO")
        assert np.abs(frames[0].astype(int) - together[n]).max() <= 1
    same = [np.abs(together[n] - together[n + 4]).max() for n in range(8)]
    assert min(same) > 1, "another perturbation gives another cell"


def test_cells_are_swapped_with_those_of_another_condition_only(run, plates):
    bridge = Bridge.load(run)
    patches, calls = bridge.patches(), []
    how = {"split": "test", "num": None, "pairs": bridge.config.pairs, "seed": 0}
    matched = match_controls(patches, "DMSO", ["cmpd1", "cmpd3"], **how)
    inner = bridge.last_frames

    def noted(sources, **ends):
        labels = [bridge.classes[target] for target in sources.targets]
        calls.extend(zip(sources.ids, labels, sources.doses.tolist(), strict=True))
        return inner(sources, **ends)

    bridge.last_frames = noted
    rows, made = make_swapped(bridge, patches, matched, np.arange(len(matched.treated)))
    assert len(rows) == len(made) == len(calls) == 16
    for name, label, dose in calls:
        number = patches.ids.index(name)
        assert (patches.classes[patches.labels[number]], patches.doses[number]) != (label, dose)
    alike = np.flatnonzero((patches.labels[matched.treated] == 1) & (patches.doses[matched.treated] == 1))
    assert len(make_swapped(bridge, patches, matched, alike)[0]) == 0


def test_treated_cells_without_a_control_of_their_plate_are_refused_or_left_out(run):
    bridge = Bridge.load(run)
    patches = bridge.patches()
    lost = replace(patches, batches=np.where(np.arange(len(patches.batches)) % 3 == 0, -1, patches.batches))
    how = {"split": "test", "num": None, "seed": 0}
    with pytest.raises(UserError, match=r"have no control in their batch: not known; set pairs.batch_without_source"):
        match_controls(lost, "DMSO", ["cmpd1"], pairs=bridge.config.pairs, **how)
    lenient = bridge.config.pairs.model_copy(update={"batch_without_source": "leave_out"})
    found = match_controls(lost, "DMSO", ["cmpd1", "cmpd2"], pairs=lenient, **how)
    assert found.left_out == 16 - len(found.treated) > 0
    assert np.array_equal(lost.batches[found.treated], lost.batches[found.control])
    assert (lost.batches[found.treated] >= 0).all()
    with pytest.raises(UserError, match="no training cell has a perturbation that is evaluated here"):
        training_cells(patches, match_controls(patches, "DMSO", ["cmpd3"], pairs=lenient, **how).treated, seed=0)
    anyone = bridge.config.pairs.model_copy(update={"match_batch": False})
    assert len(match_controls(lost, "DMSO", ["cmpd1"], pairs=anyone, **how).treated) == 8


def test_a_network_of_names_is_not_asked_for_unseen_ones_and_a_batch_it_never_saw_is_nothing(train, plates, capsys):
    run = train("names", condition={"target": "class", "source_class": False, "parts": ["batch"]})
    cli.main(["perturbations", str(run), "--num", "6"])
    assert "left out, because a network here cannot make them: cmpd3." in capsys.readouterr().out
    module = Bridge.load(run)._network.condition.batch
    assert module.trained.all()
    module.trained[1] = False
    assert not module(torch.tensor([0, 1]))[1].any()
    assert module(torch.tensor([0, 1]))[0].any()


def test_what_a_network_was_never_told_is_refused(train, run, plates):
    plain = Bridge.load(train("plain", condition={"target": "class", "source_class": False}))
    one = np.load(plates / "test" / "DMSO_0.npy")
    with pytest.raises(UserError, match=r"no training saw 'cmpd3' \(data.split.unseen\).*part `embedding`"):
        plain.translate(one, source="DMSO", target="cmpd3")
    with pytest.raises(UserError, match=r"translate.dose=3.0: this network is not conditioned on a dose"):
        plain.translate(one, source="DMSO", target="cmpd1", dose=3)
    with pytest.raises(UserError, match=r"never saw cmpd1 -> cmpd2"):
        plain.translate(one, source="cmpd1", target="cmpd2")
    with pytest.raises(UserError, match="spacing=adaptive: are measured on validation patches"):
        Bridge.load(run).translate(one, source="DMSO", target="cmpd1", method="progression", calibrate="distance")


# Screens as they are published, by the configurations that ship

CONFIGS = Path(__file__).parents[1] / "configs"
KEYS = {"bbbc021": "Week{b}_2{b}_{n}", "rxrx1": "U2OS-0{b}_1_C05_s1_{n}", "cpg0000": "BR{b}_r01c01_f1_{n}"}
FILES = {
    "bbbc021": "Week{b}/2{b}/{n}.npy",
    "rxrx1": "0{b}_1/C05/s1_{n}.npy",
    "cpg0000": "BR{b}/r01c01_f1/r01c01_f1_{n}.npy",
}
INDEX = {
    "bbbc021": "metadata/bbbc021_df_all.csv",
    "rxrx1": "metadata/rxrx1_df.csv",
    "cpg0000": "metadata/metadata_large.csv",
}
COLUMNS = {
    "bbbc021": ("STATE", ("0", "1"), "CPD_NAME", "BATCH"),
    "rxrx1": ("ANNOT", ("negative_control", "treated"), "CPD_NAME", "BATCH"),
    "cpg0000": ("STATE", ("control", "trt"), "BROAD_SAMPLE", "PLATE"),
}
SMALL = [
    *("data.image_size=16", "train.steps=2", "train.batch_size=8", "train.accumulate=1", "train.validate_pairs=8"),
    *("train.precision=32-true", "train.accelerator=cpu", "train.sample_every=0", "translate.steps=1"),
    "velocity={name: unet, channels: 8, multipliers: [1, 2], blocks: 1, attention: []}",
]


@pytest.mark.parametrize(("name", "channels"), [("bbbc021", 3), ("rxrx1", 6), ("cpg0000", 5)])
def test_a_published_screen_trains_and_is_evaluated(tmp_path, name, channels, capsys):
    root, rng, rows = tmp_path / name, np.random.default_rng(0), []
    state, (control, treated), perturbation, batch = COLUMNS[name]
    for n in range(64):
        at = {"b": n % 2 + 1, "n": n}
        label = ("", "taxol", "docetaxel")[n // 2 % 3]
        split = "test" if n % 4 > 1 else "train"
        file = root / FILES[name].format(**at)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, rng.integers(0, 255, (16, 16, channels), dtype=np.uint8))
        row = {"SAMPLE_KEY": KEYS[name].format(**at), "SPLIT": split, state: treated if label else control}
        rows.append({**row, perturbation: label or "EMPTY", batch: at["b"], "DOSE": 0.3 if label else 0})
    config = load_config(CONFIGS / f"{name}.yaml")
    index = root / INDEX[name]
    index.parent.mkdir(parents=True)
    with open(index, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    part = config.condition.parts[0]
    vectors = rng.normal(size=(2, part["dimension"])).round(3).tolist()
    lines = [[label, *vector] for label, vector in zip(("taxol", "docetaxel"), vectors, strict=True)]
    with open(root / part["table"], "w", newline="") as file:
        csv.writer(file).writerows([["", *range(part["dimension"])], *lines])
    run = tmp_path / "run"
    unseen = "[docetaxel]" if name == "bbbc021" else "[]"
    given = [
        f"data.root={root}",
        f"output={run}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"data.split.unseen={unseen}",
        "data.split.val=0.2",
    ]
    cli.main(["train", str(CONFIGS / f"{name}.yaml"), *given, *SMALL])
    cli.main(["perturbations", str(run), "translate.steps=1"])
    text = capsys.readouterr().out
    assert "## seen perturbations, by profile" in text
    assert ("## unseen perturbations, by profile" in text) == (name == "bbbc021")
    assert np.load(run / "perturbations" / "made" / "run" / "made.npy").shape[1:] == (channels, 16, 16)
    cli.main(["report", str(run)])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Perturbations: run" in page
    assert "cells under taxol" in page
