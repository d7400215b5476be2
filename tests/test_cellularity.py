"""Nuclei: found where they are known, measured by definition, refused where nothing can be said; curves by hand."""

import csv
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_nuclei import discs, lattice, stained
from PIL import Image
from skimage.draw import ellipse
from skimage.measure import regionprops

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.parallel import in_processes
from cellflux_bridge.cellularity import along, benchmark, counter_error, counting, curves, label_maps, validation
from cellflux_bridge.cellularity.along import along_trajectories
from cellflux_bridge.cellularity.export import write_results
from cellflux_bridge.cellularity.measurement import MIN_PIXELS, QUANTITIES, measure, measure_all
from cellflux_bridge.cellularity.nuclei import Parameters, require_bright_field, segment
from cellflux_bridge.cli import main
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.images import write_png
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, TrajectoryWriter, linear_soft_labels

HEADER = TrajectoryHeader("progression", "A", "B", ("A", "B"), (0.0, 0.5, 1.0), "none")


class Thresholded(torch.nn.Module):
    """Stands for InstanSeg: what is dark in the red channel, a label for each half of the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = torch.ones_like(x[:, :1])
        side[..., x.shape[-1] // 2 :] = 7
        return side * (x[:, :1] < 0.5)


@pytest.fixture
def instanseg(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(Thresholded()).save(str(tmp_path / "instanseg.pt"))
    return tmp_path / "instanseg.pt"


def test_grey_dark_and_inverted_images_are_refused():
    rgb = discs(lattice(24))[0]
    grey = np.repeat(rgb.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    dark = np.zeros_like(rgb)
    dark[20:40, 20:40, 2] = 200
    for image, word in ((grey, "grey"), (dark, "dark"), (255 - rgb, "inverted"), (rgb[..., 0], "shape")):
        with pytest.raises(UserError, match=word):
            segment(image)
    require_bright_field(np.full((8, 8, 3), 250, np.uint8))
    with pytest.raises(UserError, match="macenko"):
        Parameters(stains="blue")


# Measuring


def test_measures_are_their_definitions():
    labels = np.zeros((40, 60), np.int32)
    labels[ellipse(12, 15, 6, 12)] = 2
    labels[ellipse(28, 45, 8, 8)] = 7
    rgb = stained(np.where(labels > 0, 1.1, 0.0), eosin=0.2)
    found, median = measure_all(rgb, labels, mpp=0.5)
    areas = [int((labels == number).sum()) for number in (2, 7)]
    assert found.count == 2
    assert found.area_fraction == sum(areas) / labels.size
    assert found.mean_area == median == np.mean(areas)
    assert found.mean_area_um2 == np.mean(areas) / 4
    assert found.density_mm2 == pytest.approx(2 / (40 * 60 * 0.25e-6))
    assert found.darkness == pytest.approx(1.1, abs=0.02)
    assert found.eccentricity == pytest.approx(
        np.mean([region.eccentricity for region in regionprops(labels)]), abs=2e-3
    )


def test_density_needs_microns_and_counts_need_pixels():
    rgb, labels = discs(lattice(24))
    plain = measure(rgb, labels)
    assert np.isnan(plain.density_mm2)
    assert np.isnan(plain.mean_area_um2)
    small, tiny = discs(lattice(6), radius=1)
    assert measure_all(small, tiny)[1] < MIN_PIXELS
    refused = measure(small, tiny, mpp=0.5)
    assert np.isnan([refused.count, refused.mean_area, refused.eccentricity, refused.density_mm2]).all()
    assert refused.area_fraction == (tiny > 0).mean()
    assert np.isfinite(refused.darkness)
    empty = measure(rgb, np.zeros_like(labels), mpp=0.5)
    assert (empty.count, empty.area_fraction, empty.density_mm2) == (0, 0, 0)
    assert np.isnan(empty.mean_area)


# Validating


def test_matches_are_one_to_one_above_a_half():
    truth = np.zeros((10, 40), int)
    truth[:, :10], truth[:, 20:30] = 1, 5
    found = np.zeros_like(truth)
    found[:, :6], found[:, 6:10], found[:, 25:35] = 3, 4, 9  # 0.6 of the first; half of the second, over its border
    compared = validation.compare(truth, found)
    assert compared == (2, 3, 1, 0.6, 0.5, 0.5, False)
    scores = validation.score([compared, compared._replace(num_found=2, num_matched=2)])
    assert scores.f1 == 2 * 3 / (4 + 5)
    assert scores.panoptic_quality == pytest.approx(2 * 1.2 / (4 + 5))
    assert scores.count_error_median == 0.25


def test_label_maps_of_a_folder_by_group(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    rows = ["id,stain_group"]
    for number, step in enumerate((24, 32, 48)):
        rgb, labels = discs(lattice(step))
        write_png(tmp_path / "images" / f"i{number}.png", rgb)
        Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "labels" / f"i{number}.png")
        rows.append(f"i{number},{'odd' if number % 2 else 'even'}")
    (tmp_path / "index.csv").write_text("\n".join(rows) + "\n")
    main(["cellularity", "--label-maps", str(tmp_path), "--workers", "1"])
    shown = capsys.readouterr().out
    assert shown.startswith("all: n 3  num_nuclei 29  f1 1  f1_of_images 1  panoptic_quality 0.")
    assert "  count_error_median 0  " in shown
    assert "\neven: n 2" in shown
    assert "\nodd: n 1" in shown
    label_maps = ["cellularity", "--label-maps", str(tmp_path), "--workers", "1"]
    (tmp_path / "index.csv").write_text("image,stain_group\ni0,even\n")
    with pytest.raises(SystemExit, match=r"index\.csv: expected the columns id .* and stain_group; found image, "):
        main(label_maps)
    (tmp_path / "index.csv").unlink()
    (tmp_path / "labels" / "i2.png").write_bytes((tmp_path / "labels" / "i2.png").read_bytes()[:60])
    with pytest.raises(SystemExit, match=r"labels.i2\.png: truncated or not an image"):
        main(label_maps)
    write_png(tmp_path / "images" / "i2.png", np.full((32, 32, 3), 128, np.uint8))
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "labels" / "i2.png")
    with pytest.raises(SystemExit, match=r"images.i2\.png: a grey image"):
        main(label_maps)
    (tmp_path / "labels" / "i1.png").unlink()
    with pytest.raises(SystemExit, match=r"i1.png: no such label map \(1 of 3"):
        main(label_maps)


def of_palette(indices, colours) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(np.asarray(colours, np.uint8).tobytes())
    return image


_COLOURS = np.random.default_rng(0).permutation(255)[:, None].astype(np.uint8).repeat(3, 1) ^ (0, 85, 170)


@pytest.mark.parametrize(
    ("stored", "was_mask"),
    [
        (lambda labels: (labels > 0).astype(np.uint8), True),
        (lambda labels: (255 * (labels > 0)).astype(np.uint8), True),
        (lambda labels: Image.fromarray(labels > 0), True),
        (lambda labels: np.dstack([255 * (labels > 0).astype(np.uint8)] * 3), True),
        (lambda labels: (3000 * labels).astype(np.uint16), False),
        (lambda labels: np.where(labels[..., None] > 0, _COLOURS[labels], 0).astype(np.uint8), False),
        (lambda labels: np.dstack([_COLOURS[labels], 255 * (labels > 0)]).astype(np.uint8), False),
        (lambda labels: of_palette(labels, [(9, 9, 9), *[(200, 0, 0), (0, 200, 0)] * 20]), False),  # colours repeat
        (lambda labels: of_palette(40 - labels, [(n, 7, 7) for n in range(1, 41)] + [(0, 0, 0)]), False),
        (lambda labels: labels * (np.indices(labels.shape)[0] % 8 != 4), False),  # every nucleus has a gap
    ],
)
def test_every_way_to_store_label_maps_gives_the_same_nuclei(tmp_path, stored, was_mask):
    truth = discs(lattice(24))[1]
    made = stored(truth)
    made = made if isinstance(made, Image.Image) else Image.fromarray(np.asarray(made, made.dtype.type))
    path = tmp_path / ("m.tif" if made.mode == "I" else "m.png")
    made.save(path)
    labels, found_mask = label_maps.read_label_map(path, truth.shape)
    compared = validation.compare(truth, labels)
    assert (compared.num_true, compared.num_found, compared.num_matched) == (16, 16, 16)
    assert found_mask == was_mask


def test_label_maps_without_numbers_of_nuclei_are_refused(tmp_path):
    truth = discs(lattice(24))[1]

    def refused(values, message):
        np.save(tmp_path / "m.npy", values)
        with pytest.raises(UserError, match=rf"m\.npy: {message}"):
            label_maps.read_label_map(tmp_path / "m.npy", truth.shape)

    refused(np.where(truth > 0, 1 + truth % 2, 0), "2 numbers in 16 separate pieces are classes")
    refused(truth + 1, "holds no background")
    refused(truth - 1, "expected whole numbers")
    refused((truth > 0) * 0.5, "expected whole numbers")
    refused(truth[:50], r"a label map of \(50, 96\), its image has \(96, 96\)")
    refused(np.dstack([truth, truth]), "a label map of")
    refused(np.array([truth], object), "truncated or not an image")
    np.save(tmp_path / "m.npy", truth.astype(float))
    assert np.array_equal(label_maps.read_label_map(tmp_path / "m.npy", truth.shape)[0], truth)


def test_masks_are_named_and_label_maps_lie_as_their_images_do(tmp_path, capsys):
    for name, step in (("a/1", 24), ("b/1", 32)):
        rgb, labels = discs(lattice(step))
        for kind, image in (("images", rgb), ("labels", (255 * (labels > 0)).astype(np.uint8))):
            (tmp_path / kind / name).parent.mkdir(parents=True)
            Image.fromarray(image).save(tmp_path / kind / f"{name}.png")
    write_png(tmp_path / "images" / "._1.png", rgb)
    main(["cellularity", "--label-maps", str(tmp_path), "--workers", "1"])
    shown = capsys.readouterr().out
    assert shown.startswith("all: n 2  num_nuclei 25  f1 1 ")
    assert "2 label maps are masks without numbers" in shown


def test_a_group_without_nuclei_has_no_error_of_its_count():
    glass = validation.Compared(0, 0, 0, 0.0, 0.0, 0.0)
    scores = validation.score([glass, glass])
    assert (scores.f1, scores.f1_of_images) == (1, 1)
    assert np.isnan([scores.count_error_median, scores.count_error_mean]).all()
    assert validation.score([glass, glass._replace(num_found=2)]).f1_of_images == 0.5
    assert validation.score([glass, validation.Compared(4, 4, 4, 4.0, 0.1, 0.1)]).f1_of_images == 1


def test_annotated_cellularity(tmp_path, capsys):
    table = [("path", "cellularity")]
    for number, step in enumerate((48, 32, 24, 20)):
        rgb, labels = discs(lattice(step))
        write_png(tmp_path / f"{number}.png", rgb)
        table.append((f"{number}.png", (labels > 0).mean() + 0.1))
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    found = validation.agree(tmp_path / "t.csv", parameters=Parameters(), workers=1)
    assert found.pearson.value > 0.99
    assert found.spearman.value == pytest.approx(1)
    assert found.mean_absolute_error.value == pytest.approx(0.1, abs=0.04)
    main(["cellularity", "--annotated", str(tmp_path / "t.csv"), "--workers", "1"])
    assert "4 images" in capsys.readouterr().out
    (tmp_path / "t.csv").write_text("cellularity,path\n0.1,0.png\n0.2\n")
    with pytest.raises(SystemExit, match=r"t\.csv, line 3: no path"):
        main(["cellularity", "--annotated", str(tmp_path / "t.csv")])
    (tmp_path / "t.csv").write_text("path,cellularity\n0.png,70\n")
    with pytest.raises(SystemExit, match="line 2: cellularity '70': expected 0 to 1"):
        main(["cellularity", "--annotated", str(tmp_path / "t.csv")])


# Folders of images


def test_a_folder_becomes_a_table_whatever_the_number_of_processes(tmp_path):
    (tmp_path / "in").mkdir()
    for number, step in enumerate((24, 32, 48)):
        write_png(tmp_path / "in" / f"{number}.png", discs(lattice(step))[0])
    write_png(tmp_path / "in" / "tiny.png", discs(lattice(8), radius=2)[0])
    for hidden in (".ipynb_checkpoints/0.png", "@eaDir/0.png", "__MACOSX/0.png", "._0.png", ".hidden/a/0.png"):
        (tmp_path / "in" / hidden).parent.mkdir(parents=True, exist_ok=True)
        write_png(tmp_path / "in" / hidden, discs(lattice(24))[0])
    (tmp_path / "in" / "0.png").rename(tmp_path / "in" / "=0.png")
    tables = []
    for workers in ("1", "2"):
        output = tmp_path / f"{workers}.csv"
        main(["cellularity", "--images", str(tmp_path / "in"), "--output", str(output), "--workers", workers])
        tables.append(output.read_text())
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert [row["path"] for row in rows] == ["1.png", "2.png", "'=0.png", "tiny.png"]  # no formula
    assert [row["count"] for row in rows] == ["9", "4", "16", ""]
    assert float(rows[3]["area_fraction"]) > 0.05
    assert rows[0]["density_mm2"] == ""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_images_that_cannot_be_measured_have_a_row_with_the_reason(tmp_path, capsys, workers):
    folder, output = tmp_path / "in", tmp_path / "o.csv"
    real_folder(folder, (24, 32))
    write_png(folder / "grey.png", np.full((32, 32, 3), 128, np.uint8))
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    main(["cellularity", "--images", str(folder), "--output", str(output), "--workers", workers])
    rows = {row.pop("path"): row for row in csv.DictReader(output.read_text().splitlines())}
    assert [(path, row["count"]) for path, row in rows.items()] == [
        ("0.png", "16"),
        ("1.png", "9"),
        ("cut.png", ""),
        ("grey.png", ""),
    ]
    reasons = [row.pop("reason") for row in rows.values()]
    assert reasons[:2] == ["", ""]
    assert reasons[2].startswith("truncated or not a PNG, JPEG, TIFF or NPY image")
    assert reasons[3].startswith("a grey image")
    assert not any(rows["grey.png"].values())
    assert "2 images: could not be measured" in capsys.readouterr().out


def test_a_stopped_count_goes_on_where_it_was(tmp_path, monkeypatch):
    folder = Path(real_folder(tmp_path / "in", (24, 32, 48, 24)))
    asked, count = [], counting._count_file

    def stopping(file, **options):
        if file.stem == stop_at:
            raise KeyboardInterrupt
        asked.append(file.stem)
        return count(file, **options)

    monkeypatch.setattr(counting, "_count_file", stopping)

    def run(*, mpp: float | None = None) -> str:
        output = tmp_path / "o.csv"
        counting.write_counts(folder, output, mpp=mpp, parameters=Parameters(), workers=1)
        return output.read_text()

    stop_at = ""
    whole = run()
    asked.clear()
    stop_at = "2"
    with pytest.raises(KeyboardInterrupt):
        run()
    (kept,) = tmp_path.glob("*.tmp")
    kept.write_bytes(kept.read_bytes()[:-5])  # a kill may cut a line
    stop_at = "3"
    with pytest.raises(KeyboardInterrupt):
        run()
    stop_at = ""
    assert run() == whole
    assert asked == ["0", "1", "1", "2", "3"]
    # Rows of another setting, or made before a file changed, are no part of it.
    for mpp in (0.5, None):
        stop_at = "1"
        with pytest.raises(KeyboardInterrupt):
            run()
        if mpp is None:
            write_png(folder / "0.png", discs(lattice(48))[0])
        asked.clear()
        stop_at = ""
        run(mpp=mpp)
        assert asked == ["0", "1", "2", "3"]
        assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_without_any_image_to_measure_is_an_error(tmp_path):
    write_png(tmp_path / "grey.png", np.full((32, 32, 3), 128, np.uint8))
    with pytest.raises(SystemExit, match=r"none of 1 images can be measured .*grey\.png: a grey image"):
        main(["cellularity", "--images", str(tmp_path), "--output", str(tmp_path / "o.csv"), "--workers", "1"])
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="holds no images"):
        main(["cellularity", "--images", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="expected trajectories or one of"):
        main(["cellularity", str(tmp_path), "--images", str(tmp_path)])
    with pytest.raises(SystemExit, match="--output: --annotated prints"):
        main(["cellularity", "--annotated", "t.csv", "--output", "x.csv"])
    with pytest.raises(SystemExit, match="--real-source: goes with trajectories"):
        main(["cellularity", "--images", str(tmp_path), "--real-source", str(tmp_path)])
    for flag, value in (("--workers", "-1"), ("--mpp", "inf"), ("--mpp", "nan"), ("--mpp", "0")):
        with pytest.raises(SystemExit, match=f"error: {flag} {value}.*: expected"):
            main(["cellularity", "--images", str(tmp_path), f"{flag}={value}"])


def test_a_wrong_output_is_refused_before_anything_is_counted(tmp_path, monkeypatch):
    folder = write_trajectory(tmp_path / "t")
    monkeypatch.setattr("cellflux_bridge.cellularity.along.along_trajectories", None)
    with pytest.raises(SystemExit, match=r"--output .*c\.csv: expected a file name that ends in \.json"):
        main(["cellularity", str(folder), "--output", str(tmp_path / "c.csv")])


# Along trajectories


def write_trajectory(folder, *, steps=(48, 32, 24), num: int = 3, grey_at: int | None = None, mpp: float | None = None):
    """Sequences whose frames show 4, 9 and 16 discs by default."""
    frames = np.stack([np.stack([discs(lattice(step))[0].transpose(2, 0, 1)] * num) for step in steps])
    if grey_at is not None:
        frames[grey_at] = 128
    header = replace(HEADER, levels=tuple(np.linspace(0, 1, len(steps)).tolist()), mpp=mpp)
    ids = tuple(f"test/A/{n}.png" for n in range(num))
    trajectory = Trajectory(header, frames, linear_soft_labels(header, num), ids, (1,) * num, (0,) * num)
    writer = TrajectoryWriter(folder, header)
    writer.append(trajectory, numbers=range(num))
    writer.finish()
    return folder


def real_folder(folder, steps):
    folder.mkdir()
    for number, step in enumerate(steps):
        write_png(folder / f"{number}.png", discs(lattice(step))[0])
    return str(folder)


def test_curves_of_a_trajectory_beside_real_patches(tmp_path, capsys):
    folder = write_trajectory(tmp_path / "t")
    source, target = real_folder(tmp_path / "A", (48, 48)), real_folder(tmp_path / "B", (24, 24, 24))
    main(
        ["cellularity", str(folder), "--real-source", source, "--real-target", target, "--workers", "1", "--mpp", "0.5"]
    )
    content = json.loads((folder / "cellularity.json").read_text())
    assert (content["format"], content["mpp"]) == (3, 0.5)
    (of,) = content["trajectories"]
    assert (of["method"], of["source"], of["target"], of["n"], of["levels"]) == (
        "progression",
        "A",
        "B",
        3,
        [0, 0.5, 1],
    )
    curve = [p for p in of["curves"] if p["quantity"] == "count"]
    assert [(p["level"], p["n"], p["mean"]) for p in curve] == [(0.0, 3, 4), (0.5, 3, 9), (1.0, 3, 16)]
    half = 1.96 * of["counter_error"]["count"]  # all sources agree: what remains is the counter's own error
    assert half > 0
    for point in curve:
        ends = point["mean"] * (1 - half), point["mean"] * (1 + half)
        assert (point["low"], point["high"]) == pytest.approx(ends)
    assert content["scale"]["factor"] == 1.25  # 0.5 microns per pixel at the network's 0.4
    assert {p["quantity"] for p in of["curves"]} == set(QUANTITIES)
    rho = {row["quantity"]: row["value"] for row in of["spearman"]}
    assert rho["count"] == rho["area_fraction"] == pytest.approx(1)
    (check,) = [row for row in of["checks"] if row["quantity"] == "count"]
    assert check == {
        "quantity": "count",
        "end_minus_target": 0,
        "low": 0,
        "high": 0,
        "end": "reached",
        "n_inner": 1,
        "inner_between": 1,
        "n_scored": 0,
        "distance_to_real": None,
    }
    assert [row["count"] for row in of["per_source"]] == [[4, 9, 16]] * 3
    real = {(row["class"], row["quantity"]): (row["n"], row["mean"]) for row in content["real"]}
    assert real["A", "count"] == (2, 4)
    assert real["B", "count"] == (3, 16)
    rows = list(csv.DictReader((folder / "cellularity.csv").read_text().splitlines()))
    assert {row["what"] for row in rows} == {"curve", "spearman", "end_minus_target", "inner_between", "real"}
    assert [float(r["value"]) for r in rows if r["what"] == "curve" and r["quantity"] == "count"] == [4, 9, 16]
    ends = {r["quantity"]: r["end"] for r in rows if r["what"] == "end_minus_target"}
    assert ends["count"] == "reached"
    assert {r["end"] for r in rows if r["what"] != "end_minus_target"} == {""}
    assert "reached" in capsys.readouterr().out


def test_microns_are_those_of_the_trajectory(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "NUM_RESAMPLES", 20)
    one, other = (write_trajectory(tmp_path / str(mpp), mpp=mpp) for mpp in (0.5, 0.25))
    source, target = real_folder(tmp_path / "A", (48, 48)), real_folder(tmp_path / "B", (24, 24))
    real = ["--real-source", source, "--real-target", target, "--workers", "1"]

    def counted(*folders) -> dict:
        main(["cellularity", *map(str, folders), *real, "--output", str(tmp_path / "c.json")])
        return json.loads((tmp_path / "c.json").read_text())

    content = counted(one)
    density = [c["mean"] for c in content["trajectories"][0]["curves"] if c["quantity"] == "density_mm2"]
    assert content["mpp"] == 0.5
    assert density == pytest.approx([num / (96 * 0.5e-3) ** 2 for num in (4, 9, 16)])
    (real_density,) = [r["mean"] for r in content["real"] if (r["class"], r["quantity"]) == ("B", "density_mm2")]
    assert real_density == pytest.approx(density[2])
    with pytest.raises(SystemExit, match=r"0\.25: 0\.25 microns per pixel, but .*0\.5 has 0\.5; count them apart"):
        counted(one, other)
    assert counted(one, other, "--mpp", "1")["mpp"] == 1
    assert counted(one, write_trajectory(tmp_path / "unknown"))["mpp"] is None


def test_an_end_short_of_the_target_and_levels_outside_are_told(tmp_path):
    folder = write_trajectory(tmp_path / "t", steps=(48, 24, 32))
    source, target = real_folder(tmp_path / "A", (48, 48)), real_folder(tmp_path / "B", (32, 24, 24))
    output = tmp_path / "out" / "c.json"
    real = ["--real-source", source, "--real-target", target]
    main(["cellularity", str(folder), *real, "--workers", "1", "--output", str(output)])
    of = json.loads(output.read_text())["trajectories"][0]
    (check,) = [row for row in of["checks"] if row["quantity"] == "count"]
    assert check["end_minus_target"] == pytest.approx(9 - 41 / 3)
    assert check["inner_between"] == 0  # 16 lies above 13.7
    (rho,) = [row["value"] for row in of["spearman"] if row["quantity"] == "count"]
    assert rho == pytest.approx(0.5)


def scored_patches(steps, scores) -> Patches:
    """Test patches of known scores, A below one half."""
    pixels = np.stack([discs(lattice(step))[0] for step in steps])
    scores = np.asarray(scores, np.float32)
    num = len(pixels)
    return Patches(
        pixels=pixels,
        ids=tuple(f"real/{n}" for n in range(num)),
        labels=(scores > 0.5).astype(np.int64),
        splits=np.full(num, SPLITS.index("test")),
        groups=np.arange(num),
        group_names=tuple(str(n) for n in range(num)),
        scores=scores,
        classes=("A", "B"),
        preprocessing=Preprocessing(pixels.shape[1]),
        batches=np.full(num, -1),
        batch_names=(),
        doses=np.zeros(num, np.float32),
    )


def test_real_patches_are_counted_once_however_many_figures_they_enter(tmp_path, monkeypatch):
    folder, seen = write_trajectory(tmp_path / "t"), []

    def counted(stacks, **options):
        stacks = list(stacks)
        seen.append(sum(map(len, stacks)))
        return counting.count_arrays(stacks, **options)

    monkeypatch.setattr("cellflux_bridge.cellularity.along.count_arrays", counted)
    patches = scored_patches((48, 32, 24, 24), (0.02, np.nan, 0.55, 0.97))  # one of A has no score
    content = along_trajectories([folder], patches=patches, workers=1)
    assert seen == [4, 9]  # real patches, then the frames
    real = {row["class"]: (row["n"], row["mean"]) for row in content["real"] if row["quantity"] == "count"}
    assert real == {"A": (2, 6.5), "B": (2, 16)}
    by_level = {row["level"]: row["n"] for row in content["real_by_level"] if row["quantity"] == "count"}
    assert by_level == {0: 1, 0.5: 1, 1: 1}


def test_levels_are_held_against_real_patches_of_their_score(tmp_path):
    folder = write_trajectory(tmp_path / "t", steps=(48, 32, 24))  # 4, 9, 16 discs
    patches = scored_patches((48, 32, 24, 24), (0.02, 0.5, 0.55, 0.97))
    content = along_trajectories([folder], patches=patches, workers=1)
    real = {row["level"]: (row["n"], row["mean"]) for row in content["real_by_level"] if row["quantity"] == "count"}
    assert real == {0: (1, 4), 0.5: (2, 12.5), 1: (1, 16)}
    (check,) = [row for row in content["trajectories"][0]["checks"] if row["quantity"] == "count"]
    assert (check["n_scored"], check["distance_to_real"]) == (3, pytest.approx(3.5 / 3))
    written = write_results(content, tmp_path / "c.json")[1].read_text()
    assert "real_by_level,,,,count,0.5,2,12.5" in written
    assert "distance_to_real," in written
    without = along_trajectories([folder], patches=replace(patches, scores=patches.scores * np.nan), workers=1)
    assert without["real_by_level"] == []


@pytest.mark.parametrize("mpp", [None, 0.5, 0.25, 0.9])
@pytest.mark.parametrize("size", [96, 83])
def test_a_trained_network_may_find_the_nuclei(instanseg, mpp, size):
    rgb, truth = discs([(40, 20), (40, 70)], size=size)
    found = segment(rgb, mpp=mpp, parameters=Parameters(method="instanseg", instanseg=str(instanseg)))
    assert (found.dtype, found.shape) == (np.int32, (size, size))
    assert sorted(np.unique(found)) == [0, 1, 2]
    compared = validation.compare(truth, found)
    assert compared.num_matched == 2
    assert compared.area_found == pytest.approx(compared.area_true, rel=0.12)


def test_the_file_of_a_trained_network_goes_along_and_is_named_where_it_is_none(instanseg, tmp_path, capsys):
    images = real_folder(tmp_path / "images", (48, 48))
    output = ["--output", str(tmp_path / "n.csv"), "--workers", "1"]
    main(["cellularity", "--images", images, "--instanseg", str(instanseg), *output])
    rows = list(csv.DictReader((tmp_path / "n.csv").read_text().splitlines()))
    assert [float(row["count"]) for row in rows] == [2, 2]  # each half is one
    (tmp_path / "other.pt").write_bytes(b"no network")
    for file, message in (("other.pt", "cannot be loaded"), ("none.pt", "no such file")):
        with pytest.raises(SystemExit, match=rf"--instanseg .*{file}: {message}"):
            main(["cellularity", "--images", images, "--instanseg", str(tmp_path / file), *output])


def test_grey_frames_are_left_out_and_counted(tmp_path):
    folder = write_trajectory(tmp_path / "t", grey_at=1)
    main(["cellularity", str(folder), "--workers", "1"])
    of = json.loads((folder / "cellularity.json").read_text())["trajectories"][0]
    assert of["unmeasured"] == 3
    assert of["checks"] == []
    (middle,) = [p for p in of["curves"] if p["quantity"] == "count" and p["level"] == 0.5]
    assert (middle["n"], middle["mean"]) == (0, None)
    with pytest.raises(SystemExit, match="its sources: all 3 are grey"):
        main(["cellularity", str(write_trajectory(tmp_path / "u", grey_at=0)), "--workers", "1"])


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("of_real", [(4, 16), (0, 16), (4, 0), (0, 0)])
def test_levels_and_real_patches_without_nuclei_have_no_numbers_of_single_nuclei(empty, of_real, num):
    def counted(*counts: float) -> curves.Counted:
        rows = np.full((num, len(counts), 1 + len(QUANTITIES)), np.nan)
        for k, count in enumerate(counts):
            rows[:, k, 1:3] = count, count / 100  # count and area fraction
            rows[:, k, [0, 3]] = 100.0 if count else np.nan  # median and mean area
        return curves.Counted.of(list(rows), [str(n) for n in range(num)])

    numbers = np.array([4.0, 9.0, 16.0])
    numbers[list(empty)] = 0
    real = [counted(count) for count in of_real]
    levels = (0.0, 0.5, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = {row["quantity"]: row for row in curves.checks(counted(*numbers), levels, *real, None, seed=0)}
        curves.correlations(counted(*numbers), levels, seed=0)
        assert len(curves.means(counted(*numbers), levels, seed=0)) in (6, 9)
    assert rows["count"]["end_minus_target"] == numbers[-1] - of_real[1]
    assert ("mean_area" in rows) == (len(empty) < 3 and 0 not in of_real)
    if "mean_area" in rows:
        area = rows["mean_area"]
        assert np.isnan(area["end_minus_target"]) == (2 in empty)
        assert area["end"] == "undecided" or 2 not in empty
        assert area["n_inner"] == (1 not in empty)


def test_a_trajectory_without_nuclei_at_its_end_is_written(tmp_path, capsys):
    folder = write_trajectory(tmp_path / "t", steps=(48, 24, 192))
    source, target = real_folder(tmp_path / "A", (48, 48)), real_folder(tmp_path / "B", (24, 24))
    main(["cellularity", str(folder), "--real-source", source, "--real-target", target, "--workers", "1"])
    of = json.loads((folder / "cellularity.json").read_text())["trajectories"][0]
    checks = {row["quantity"]: row for row in of["checks"]}
    assert (checks["count"]["end_minus_target"], checks["count"]["end"]) == (-16, "missed")
    assert (checks["mean_area"]["end_minus_target"], checks["mean_area"]["end"]) == (None, "undecided")
    assert re.search("  mean_area .* undecided", capsys.readouterr().out)


def test_nuclei_of_frames_with_other_channels_are_refused_by_name(tmp_path, monkeypatch):
    folder = write_trajectory(tmp_path / "t")
    whole = along.iter_trajectory

    def two_channels(folder, **options):
        for batch in whole(folder, **options):
            yield replace(batch, frames=batch.frames[:, :, :2])

    monkeypatch.setattr(along, "iter_trajectory", two_channels)
    with pytest.raises(UserError, match=r"t: frames of: 2 channels; nuclei are counted in RGB images \(H&E\) only"):
        along_trajectories([folder], workers=1)


def test_sequences_that_lack_rows_are_counted(tmp_path, capsys):
    folder = write_trajectory(tmp_path / "t")
    lines = (folder / "manifest.csv").read_text().splitlines()
    del lines[2]
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    main(["cellularity", str(folder), "--workers", "1"])
    of = json.loads((folder / "cellularity.json").read_text())["trajectories"][0]
    assert (of["n"], of["incomplete"]) == (2, 1)
    assert "1 sequences lack rows in the manifest" in capsys.readouterr().out


def test_counts_of_small_nuclei_are_refused_for_all_levels():
    rows = [np.full((3, 1 + len(QUANTITIES)), 1.0) for _ in range(4)]
    for row in rows:
        row[:, 0] = (MIN_PIXELS + 5, MIN_PIXELS - 1, MIN_PIXELS - 1)
    counted = curves.Counted.of(rows, list("abcd"))
    shown = {row["quantity"] for row in curves.means(counted, (0.0, 0.5, 1.0), seed=0)}
    assert shown == {"area_fraction", "darkness"}


def test_the_counters_own_error_widens_an_interval_in_quadrature():
    table = np.full((40, 1, 1 + len(QUANTITIES)), np.nan)
    table[:, 0, 1 + QUANTITIES.index("darkness")] = np.tile([1.0, 3.0], 20)
    counted = curves.Counted.of(list(table), np.arange(40))
    (alone,) = curves.means(counted, (0.0,), seed=0)
    (wider,) = curves.means(counted, (0.0,), seed=0, errors={"darkness": 0.1})
    for end in ("low", "high"):
        own, both = (abs(row[end] - row["mean"]) for row in (alone, wider))
        assert both**2 == pytest.approx(own**2 + (1.96 * 0.1 * 2) ** 2)


def test_a_level_that_was_not_measured_has_no_interval():
    row = curves._widened({"mean": np.nan, "low": np.nan, "high": np.nan}, 0.1)
    assert np.isnan([row["mean"], row["low"], row["high"]]).all()


def test_frames_of_two_sizes_have_no_common_scale(tmp_path):
    large = write_trajectory(tmp_path / "a")
    header = replace(HEADER, levels=(0.0, 0.5, 1.0))
    frames = np.full((3, 1, 3, 48, 48), 230, np.uint8)
    writer = TrajectoryWriter(tmp_path / "b", header)
    writer.append(Trajectory(header, frames, linear_soft_labels(header, 1), ("x",), (1,), (0,)), numbers=range(1))
    writer.finish()
    with pytest.raises(UserError, match=r"b: frames of 48 x 48 px, but .*a has 96 x 96"):
        along_trajectories([large, tmp_path / "b"], workers=1)


def test_the_counters_error_is_that_of_the_nearest_size_and_of_the_built_in_network_alone():
    measured = json.loads(counter_error.FILE.read_text())
    diameter, error = measured["diameter"][1], measured["count"][1]
    found = counter_error.relative_errors(Parameters(), np.pi / 4 * diameter**2)
    assert found["count"] == found["density_mm2"] == pytest.approx(error)
    assert counter_error.relative_errors(Parameters(method="classical"), 50) == {}
    assert counter_error.relative_errors(Parameters(model="own.safetensors"), 50) == {}
    assert counter_error.relative_errors(Parameters(), np.nan) == {}


def test_intervals_are_drawn_over_groups():
    values = np.repeat([1.0, 2.0, 3.0, 4.0], 25)
    table = np.full((100, 1, 1 + len(QUANTITIES)), np.nan)
    table[:, 0, 1 + QUANTITIES.index("darkness")] = values
    alone, grouped = (
        curves.means(curves.Counted.of(list(table), groups), (0.0,), seed=0)[0]
        for groups in (np.arange(100), np.repeat(np.arange(4), 25))
    )
    assert alone["mean"] == grouped["mean"] == 2.5
    assert grouped["high"] - grouped["low"] > 3 * (alone["high"] - alone["low"])


def counted_areas(*means: float, num: int, seed: int) -> curves.Counted:
    """Sources whose area fraction, at as many levels, scatters by 0.1 about each mean."""
    rng, rows = np.random.default_rng(seed), np.full((num, len(means), 1 + len(QUANTITIES)), np.nan)
    rows[..., 0] = 2 * MIN_PIXELS
    rows[..., 1 + QUANTITIES.index("area_fraction")] = rng.normal(means, 0.1, (num, len(means)))
    return curves.Counted.of(list(rows), [f"{seed}/{n}" for n in range(num)])


def verdicts(end: float, *, num: int) -> list[str]:
    """Of 40 repetitions, where real source patches lie at 0.3 and real target patches at 0.45."""
    found = []
    for repeat in range(40):
        made = counted_areas(0.3, 0.35, end, num=num, seed=3 * repeat)
        real = (counted_areas(mean, num=60, seed=3 * repeat + k) for k, mean in ((1, 0.3), (2, 0.45)))
        (check,) = curves.checks(made, (0.0, 0.5, 1.0), *real, None, seed=repeat)
        assert (check["end"] == "missed") == (not check["low"] <= 0 <= check["high"])
        found.append(check["end"])
    return found


def test_only_an_end_that_is_told_from_the_source_is_reached(monkeypatch):
    monkeypatch.setattr(curves, "NUM_RESAMPLES", 200)
    nothing_done = verdicts(0.3, num=4)
    assert nothing_done.count("reached") <= 2
    assert nothing_done.count("undecided") > 2  # four sources are too few
    assert verdicts(0.45, num=40).count("reached") >= 34
    assert verdicts(0.3, num=40).count("missed") == 40


def test_a_verdict_rests_on_the_interval():
    gap = curves.Estimate(0.0, -1.0, 1.0)
    assert curves.verdict(gap, of_source=-2.0) == "reached"
    assert curves.verdict(gap, of_source=0.5) == "undecided"  # the classes do not differ enough
    assert curves.verdict(gap, of_source=np.nan) == "undecided"
    assert curves.verdict(curves.Estimate(2.0, 1.0, 3.0), of_source=2.0) == "missed"


def test_two_transitions_are_refused(tmp_path):
    first = write_trajectory(tmp_path / "a")
    second = write_trajectory(tmp_path / "b")
    header = json.loads((second / "trajectory.json").read_text())
    (second / "trajectory.json").write_text(json.dumps({**header, "source": "B", "target": "A"}))
    with pytest.raises(SystemExit, match="B -> A, but"):
        main(["cellularity", str(first), str(second), "--workers", "1"])


def test_images_are_read_as_they_are_counted():
    """NearestTraining stays flat: no more than a slab of images is held at a time."""
    given = []

    def stacks():
        for number in range(3 * counting._SLAB):
            given.append(number)
            yield np.full((1, 8, 8, 3), 250, np.uint8)

    counted = counting.count_arrays(stacks(), mpp=None, parameters=Parameters(), workers=2)
    next(counted)
    assert len(given) == counting._SLAB
    assert len(list(counted)) == 3 * counting._SLAB - 1


def num_threads(_) -> int:
    return torch.get_num_threads()


def test_each_of_several_processes_runs_torch_with_one_thread():
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(in_processes(num_threads, range(4), workers=2)) == [1] * 4
        assert list(in_processes(num_threads, range(2), workers=1)) == [3] * 2
    finally:
        torch.set_num_threads(own)


def test_the_benchmark_times_every_size_that_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "SIZES", ((32, 32, 2), (64, 64, 2), (256, 320, 1)))
    benchmark.main(["--largest", "64"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["32 x 32", "64 x 64"]
    assert all(float(row[1]) > 5 and float(row[2]) > 0 for row in rows)
