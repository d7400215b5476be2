"""Phantom cells: what a picture, its truth and its effect promise each other, and what the data set's tables say."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from scipy import ndimage
from scipy.optimize import nnls
from scipy.special import logit

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import csv_rows
from cellflux_bridge.data.layout.phantom_cells import CONTROL
from cellflux_bridge.data.layout.phantom_cells import PhantomCells as Layout
from cellflux_bridge.data.phantom.cells import Batch, Effect, Measurement, make_cells, measure
from cellflux_bridge.data.phantom.compounds import MOAS, draw_compounds, effect_of_logs, response

SETTINGS = {"size": 32, "num_train": 2, "num_val": 1, "num_test": 2, "num_batches": 2, "num_controls_per_batch": 2}


CONTROL_EFFECT, PLAIN = Effect(), Batch()


@cache
def measured(effect: Effect = CONTROL_EFFECT, batch: Batch = PLAIN, count: int = 24) -> np.ndarray:
    """Measurements (count, 4) of images of 48 px."""
    return np.array([measure(make_cells(effect, batch, size=48, seed=seed).image) for seed in range(count)])


# One image


def test_a_seed_repeats_itself_and_differs_from_the_next():
    first, again, other = (make_cells(Effect(), Batch(), size=48, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.nuclei, again.nuclei)
    assert first.truth == again.truth
    assert not np.array_equal(first.image, other.image)


def test_no_global_random_state_is_read_or_moved():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = make_cells(Effect(), Batch(), size=32, seed=1).image
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    np.random.seed(4)  # noqa: NPY002
    np.testing.assert_array_equal(make_cells(Effect(), Batch(), size=32, seed=1).image, first)


@pytest.mark.parametrize("size", [32, 51, 96])
def test_the_main_nucleus_is_labelled_lies_in_its_cell_and_is_bright(size):
    for seed in range(3):
        cells = make_cells(Effect(), Batch(), size=size, seed=seed)
        assert cells.image.shape == (size, size, 3)
        assert cells.image.dtype == np.uint8
        assert cells.nuclei.shape == (size, size)
        main = cells.nuclei == 1
        assert np.count_nonzero(main) == pytest.approx(cells.truth.nuclear_area, rel=0.1)
        assert cells.truth.cell_area > 1.3 * cells.truth.nuclear_area
        assert np.abs(np.argwhere(main).mean(axis=0) - (size - 1) / 2).max() < 0.25 * size
        assert cells.image[..., 0][cells.nuclei > 0].mean() > 3 * cells.image[..., 0][cells.nuclei == 0].mean()
        ring = ndimage.binary_dilation(main, iterations=3) & (cells.nuclei == 0)
        assert cells.image[..., 2][main].mean() < cells.image[..., 2][ring].mean()  # microtubules lie around it


def test_an_image_tells_its_truth():
    effects = np.random.default_rng(0).uniform(-1, 1, (80, 5)) * [0.25, 0.45, 0.5, 2.2, 0.6]
    cells = [make_cells(effect_of_logs(logs), Batch(), size=48, seed=seed) for seed, logs in enumerate(effects)]
    truth, found = np.array([one.truth for one in cells]), np.array([measure(one.image) for one in cells])
    correlation = [np.corrcoef(truth[:, n], found[:, n])[0, 1] for n in range(4)]
    assert np.all(np.array(correlation) > [0.97, 0.97, 0.7, 0.65]), correlation
    assert np.median(found / truth, axis=0)[:3] == pytest.approx([1.03, 0.91, 1.0], abs=0.06)


@pytest.mark.parametrize(("moved", "low", "high"), [(0, 0.8, 1.25), (1, 0.65, 1.5), (2, 0.65, 1.5), (3, 0.15, 0.85)])
def test_a_parameter_moves_its_own_measurement_and_hardly_the_others(moved, low, high):
    below, above = (measured(Effect()._replace(**{Effect._fields[moved]: value})) for value in (low, high))
    control, spread = measured(), measured().std(axis=0)
    assert below[:, moved].mean() < control[:, moved].mean() < above[:, moved].mean()
    shift = (above - below).mean(axis=0) / spread
    assert shift[moved] > 1.5
    assert np.delete(np.abs(shift), moved).max() < 0.2 * shift[moved], shift


def test_single_cells_of_control_and_treated_overlap():
    weak, control = measured(Effect(nuclear_size=1.15))[:, 0], measured()[:, 0]
    assert weak.min() < np.median(control) < np.median(weak) < control.max()


def test_more_neighbours_come_with_a_count_and_those_there_stay():
    fields = [make_cells(Effect(count=count), Batch(), size=96, seed=2) for count in (0.3, 1.0, 1.6)]
    numbers = [len(np.unique(field.nuclei)) - 1 for field in fields]
    assert 1 <= numbers[0] < numbers[1] < numbers[2]
    nuclei = [field.nuclei > 0 for field in fields]
    assert np.all(nuclei[0] <= nuclei[1])
    assert np.all(nuclei[1] <= nuclei[2])


def test_a_batch_changes_the_look_and_not_the_cells():
    bright = Batch(illumination=0.4, gain=(1.3, 0.8, 1.2), blur=0.9, background=20)
    plain, other = (make_cells(Effect(), batch, size=48, seed=1) for batch in (Batch(), bright))
    assert plain.truth == other.truth
    np.testing.assert_array_equal(plain.nuclei, other.nuclei)
    assert measured(batch=bright)[:, 0] == pytest.approx(measured()[:, 0], rel=0.15)
    ratio = measured(batch=bright)[:, 1].mean() / measured()[:, 1].mean()
    assert ratio == pytest.approx(1.3, abs=0.1)
    background = np.percentile(other.image, 5, axis=(0, 1)) - np.percentile(plain.image, 5, axis=(0, 1))
    assert background == pytest.approx(12, abs=4)


def test_each_part_of_the_microscope_does_what_it_says():
    def mean(**batch) -> np.ndarray:
        batch = {"background": 0.0, **batch}
        return np.mean([make_cells(Effect(), Batch(**batch), size=48, seed=s).image for s in range(12)], axis=0)

    plain = mean()
    assert mean(gain=(0.5, 1, 1)).mean((0, 1)) / plain.mean((0, 1)) == pytest.approx([0.5, 1, 1], abs=0.04)
    lit = mean(illumination=0.8).mean((0, 2)) / plain.mean((0, 2))
    assert np.polyfit(np.linspace(-0.5, 0.5, 48), lit, 1) == pytest.approx([0.8, 1], abs=0.1)
    contrast = [np.abs(np.diff(one, axis=0)).mean() for one in (mean(blur=0.3), plain, mean(blur=1.2))]
    assert 0.85 * contrast[0] > contrast[1] > 1.2 * contrast[2]


def test_an_image_without_cells_measures_nothing():
    assert np.isnan(measure(np.zeros((48, 48, 3), np.uint8))).all()


@pytest.mark.parametrize(
    ("effect", "size", "named"),
    [
        (Effect(), 31, "size 31"),
        (Effect(count=0.0), 48, "count=0.0"),
        (Effect(actin_texture=1.0), 48, "actin_texture=1.0"),
    ],
)
def test_a_value_out_of_range_is_named(effect, size, named):
    with pytest.raises(UserError, match=named):
        make_cells(effect, Batch(), size=size, seed=0)


# Compounds


def logs_of(effect: Effect) -> np.ndarray:
    return np.array([logit(v) if name == "actin_texture" else np.log(v) for name, v in effect._asdict().items()])


def test_an_effect_is_linear_in_the_embedding_and_in_the_response():
    compounds = draw_compounds(8, 3, seed=5)
    assert compounds.effect(0, 0.0) == Effect()
    logs = np.array([logs_of(compounds.effect(number, 1.0)) for number in range(11)])
    for unseen in (8, 9, 10):  # the seen ones' weights in its embedding are theirs in its effect
        weights, _ = nnls(compounds.embeddings[:8].T, compounds.embeddings[unseen])
        assert logs[unseen] == pytest.approx(weights @ logs[:8], abs=1e-5)
    assert logs_of(compounds.effect(3, 0.4)) == pytest.approx(0.4 * logs[3])
    assert np.linalg.matrix_rank(logs[:8], tol=0.05) >= len(MOAS)


def test_an_unseen_compound_lies_between_seen_ones():
    compounds = draw_compounds(8, 6, seed=5)
    seen, unseen = compounds.embeddings[:8], compounds.embeddings[8:]
    assert np.linalg.norm(compounds.embeddings, axis=1) == pytest.approx(1, abs=1e-5)
    assert (seen @ seen.T)[~np.eye(8, dtype=bool)].max() < 0.999
    for vector, moa in zip(unseen, compounds.moas[8:], strict=True):
        weights, residual = nnls(seen.T, vector)
        assert residual < 1e-5
        parents = np.flatnonzero(weights > 1e-3)
        assert len({compounds.moas[parent] for parent in parents}) == len(parents) == 2
        assert (seen @ vector).max() < 0.92  # no copy of a seen one
        assert moa == compounds.moas[(seen @ vector).argmax()]


def test_compounds_of_one_mode_of_action_point_alike():
    compounds = draw_compounds(8, 0, seed=5)
    assert Counter(compounds.moas) == dict.fromkeys(MOAS, 2)
    likeness = compounds.embeddings @ compounds.embeddings.T
    same = np.equal.outer(compounds.moas, compounds.moas) & ~np.eye(8, dtype=bool)
    assert likeness[same].min() > 0.5 > likeness[~same & ~np.eye(8, dtype=bool)].max()


def test_the_response_rises_with_the_dose():
    assert [response(dose, largest=9.0) for dose in (0, 1, 9)] == pytest.approx([0, 0.5, 0.9])


# The data set


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells") / "phantom"
    Layout(folder, **SETTINGS).records()
    return folder


def rows(root, name: str) -> list[dict[str, str]]:
    return list(csv_rows(root / f"{name}.csv"))


def test_every_split_and_batch_has_controls_and_every_batch_all_compounds(root):
    records = Layout(root, **SETTINGS).records()
    counts = Counter((record.split, record.batch) for record in records if record.label == CONTROL)
    assert counts == {(split, batch): 2 for split in ("train", "val", "test") for batch in ("batch1", "batch2")}
    names = [f"cmpd{number:02d}" for number in range(1, 12)]
    for split, known in (("train", names[:8]), ("val", names[:8]), ("test", names)):
        patches = [record for record in records if record.split == split and record.label != CONTROL]
        assert {record.label for record in patches} == set(known)
        if split != "val":
            wells = {(record.label, record.batch, record.dose) for record in patches}
            assert len(wells) == len(known) * 2 * 3
    assert {record.dose for record in records if record.label == CONTROL} == {None}
    assert {record.dose for record in records if record.label != CONTROL} == {0.1, 1.0, 10.0}
    splits = {record.group: record.split for record in records}
    assert all(splits[record.group] == record.split for record in records)


def test_the_tables_agree_with_each_other_and_with_the_images(root):
    manifest, truth = rows(root, "manifest"), rows(root, "truth")
    assert [row["path"] for row in manifest] == [row["path"] for row in truth]
    compounds = draw_compounds(8, 3, seed=0)
    table = {row.pop("name"): np.array([float(v) for v in row.values()]) for row in rows(root, "embeddings")}
    assert list(table) == compounds.names == [row["name"] for row in rows(root, "moa")]
    assert [row["moa"] for row in rows(root, "moa")] == compounds.moas
    microscopes = {}
    for row, known in zip(manifest, truth, strict=True):
        numbers = {name: float(value) for name, value in known.items() if name != "path"}
        effect, true = (
            kind(*(numbers[f"{prefix}_{name}"] for name in kind._fields))
            for kind, prefix in ((Effect, "effect"), (Measurement, "true"))
        )
        share = response(float(row["dose"]), largest=10) if row["dose"] else 0.0
        embedding = table.get(row["label"], np.zeros(16))
        assert logs_of(effect) == pytest.approx(share * compounds.effect_map @ embedding, abs=1e-4)
        microscope = [value for name, value in numbers.items() if name.startswith("batch_")]
        assert microscopes.setdefault(row["batch"], microscope) == microscope
        gain_dna = numbers["batch_gain_dna"]
        image = np.load(root / row["path"])
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        expected = true.nuclear_intensity * gain_dna
        assert measure(image).nuclear_intensity == pytest.approx(expected, rel=0.5), row
    assert len(set(map(tuple, microscopes.values()))) == 2


def test_a_higher_dose_does_more(root):
    manifest, truth = rows(root, "manifest"), rows(root, "truth")
    sizes = {
        (row["label"], row["dose"]): abs(np.log(float(known["effect_cell_area"])))
        for row, known in zip(manifest, truth, strict=True)
    }
    for name in {row["label"] for row in manifest} - {CONTROL}:
        assert 0 < sizes[name, "0.1"] < sizes[name, "1"] < sizes[name, "10"]


def test_the_same_settings_make_the_same_bytes_and_another_seed_others(root, tmp_path):
    small = {**SETTINGS, "num_unseen": 0, "num_val": 0, "doses": [1.0]}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        Layout(tmp_path / name, **small, seed=seed).records()
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    same = [(tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files]
    differ = [(tmp_path / "one" / file).read_bytes() != (tmp_path / "other" / file).read_bytes() for file in files]
    assert all(same)
    assert [file.name for file, differs in zip(files, differ, strict=True) if not differs] == [
        "manifest.csv",
        "moa.csv",
    ]
    controls = [[row["true_nuclear_area"] for row in rows(tmp_path / n, "truth")[:4]] for n in ("one", "other")]
    assert controls[0] != controls[1]  # other cells, and not just another microscope


def test_cells_of_other_settings_or_wrong_ones_are_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"phantom: holds phantoms made with other settings .*\"train\": 2"):
        Layout(root, **{**SETTINGS, "num_train": 3}).records()
    with pytest.raises(UserError, match=r"num_train=2 and num_test=2 leave batches .* num_batches=3"):
        Layout(tmp_path, **{**SETTINGS, "num_batches": 3})
    with pytest.raises(UserError, match=r"doses=\[1.0, 1.0\]"):
        Layout(tmp_path, **SETTINGS, doses=[1.0, 1.0])
