"""`benchmark quality`: recipes side by side, by work and by how well their images are told from real ones."""

import pytest

from cellflux_bridge.base.files import csv_rows
from cellflux_bridge.cli import main


def benchmark(tmp_path, *args: str) -> None:
    main(["benchmark", "quality", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "found"), *args])


@pytest.fixture
def file(patch_folder, tmp_path, write_config):
    translate = {"method": "progression", "steps": 2, "noise_resampling": 1.0}
    return write_config(tmp_path, translate=translate, condition={"target": "level"})


def test_every_variant_is_trained_for_every_number_of_updates(file, tmp_path, capsys):
    variants = ("--variant", "plain: train.lr=1e-3", "--variant", "muon: train.optimiser=muon path.colour=0.5")
    benchmark(tmp_path, *variants, "--updates", "1", "2", "--sources", "10")
    rows = list(csv_rows(tmp_path / "found" / "quality.csv"))
    assert [(row["variant"], row["updates"]) for row in rows] == [
        ("plain", "1"), ("muon", "1"), ("plain", "2"), ("muon", "2"),
    ]  # fmt: skip
    work = [float(row["tflop"]) for row in rows]
    assert work[2] == pytest.approx(2 * work[0], rel=0.02)
    assert all(0 <= float(row[f"auc_{kind}"]) <= 1 for row in rows for kind in ("grey", "colour", "network", "nuclei"))
    assert all(float(row["swd_full"]) > 0 for row in rows)
    assert all(float(row["blurs_nuclei"]) >= 0 for row in rows)
    assert float(rows[2]["cpu_seconds"]) > float(rows[0]["cpu_seconds"])
    capsys.readouterr()
    benchmark(tmp_path, *variants, "--updates", "1", "2", "--sources", "10")  # what is there is used again
    assert capsys.readouterr().out.count("trained already") == 4
    again = list(csv_rows(tmp_path / "found" / "quality.csv"))
    assert [row["auc_grey"] for row in again] == [row["auc_grey"] for row in rows]


def test_the_work_of_a_refiner_counts(file, tmp_path):
    keys = "refiner.scale=0.2 refiner.train.steps="
    variants = [text for num in (2, 6) for text in ("--variant", f"{num}: {keys}{num}")]
    benchmark(tmp_path, "--variant", "none:", *variants, "--updates", "1", "--sources", "10")
    none, two, six = (float(row["tflop"]) for row in csv_rows(tmp_path / "found" / "quality.csv"))
    assert six - none == pytest.approx(3 * (two - none), rel=0.05)
    assert two > none


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--variant", "train.lr=1"], 'expected "name: key=value'),
        (["--variant", "a: train.lrr=1"], "train.lrr"),
        (["--variant", "a: translate.method=path"], "progression"),
        (["--sources", "3"], "at least 10"),
    ],
)
def test_a_mistake_is_named_before_anything_is_trained(file, tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        benchmark(tmp_path, *args)
    assert not (tmp_path / "found").exists()
