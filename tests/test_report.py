"""The report: one file that asks for nothing outside itself, says what not to believe, and moves under the hand."""

import base64
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity.along import FORMAT
from cellflux_bridge.cli import main
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.images import to_rgb
from cellflux_bridge.metrics.words import NUCLEI, interval, number
from cellflux_bridge.report import gallery as sequences
from cellflux_bridge.report.charts import Band, Chart, Point, Series, plot
from cellflux_bridge.report.page import write_report
from cellflux_bridge.report.runs import load_chapters
from cellflux_bridge.report.tables import baseline_styles, curves, damage_tables, level_tables, main_table, spectrum
from cellflux_bridge.report.warnings import warnings_of
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, TrajectoryWriter, linear_soft_labels

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
JUDGES = ("judges/rgb", "judges/grey")


def write_trajectory(folder, *, method="progression", num=6, size=16, levels=LEVELS, source="A", target="B", ids=None):
    """Frames of one grey each, darker by the level; sources differ by their first pixel. A square is the nucleus."""
    header = TrajectoryHeader(method, source, target, (source, target), tuple(levels), f"hash-{method}")
    grey = np.linspace(220, 100, len(levels)).astype(np.uint8)
    frames = np.broadcast_to(grey[:, None, None, None, None], (len(levels), num, 3, size, size)).copy()
    side = 2 + np.arange(len(levels))
    for k in range(len(levels)):
        frames[k, :, :, 3 : 3 + side[k], 4 : 4 + side[k]] = 30
    frames[:, :, :, 0, 0] = np.arange(num)[None, :, None]
    ids = tuple(ids or (f"test/{source}/{i:03d}.png" for i in range(num)))
    labels = linear_soft_labels(header, num)
    made = Trajectory(header, frames, labels, ids, (12,) * num, (3,) * num)
    TrajectoryWriter(folder, header).append(made, numbers=range(num))
    return made


def segment(rgb):
    """The dark square of a made frame."""
    return (rgb[..., 0] == 30).astype(np.int32)


def value(method, quantity, level, extractor, number, *, n=6, n_real=None, spread=0.05):
    low, high = (None, None) if spread is None else (number - spread, number + spread)
    row = {"trajectory": "", "method": method, "quantity": quantity, "level": level, "extractor": extractor}
    return {**row, "n": n, "n_real": n_real, "value": number, "low": low, "high": high}


BASELINES = ("copy the source", "stain transfer", "nearest real target")


def metrics_of(folders, *, source="A", target="B", flips=(0.9, 0.9), checkpoint="runs/judges", size=16):
    """What evaluate would write about trajectories: {name: folder}."""
    inner = LEVELS[1:]
    values = [value("real pooled", "kid_floor", None, "features/rgb", 0.001)]
    values += [value("real target", f"{kind}_floor", None, "features/rgb", 0.002) for kind in ("kid", "frechet")]
    for judge in JUDGES:
        values += [
            value("real target", "probability", None, judge, 0.95),
            value("real target", "flip_rate", None, judge, 1),
        ]
        values += [
            value("real source", "probability", None, judge, 0.05),
            value("real source", "flip_rate", None, judge, 0),
        ]
    values += [value("real own", "kid_floor", level, "features/rgb", 0.004) for level in inner]
    for name in (*folders, *BASELINES):
        for judge, flip in zip(JUDGES, flips, strict=True):
            values += [value(name, "probability", level, judge, level) for level in LEVELS]
            values += [value(name, "flip_rate", level, judge, flip * level) for level in inner]
            values.append(value(name, "calibration_mean", None, judge, 0.0123))
        for kind in ("kid_own", "kid_pooled"):
            values += [value(name, kind, level, "features/rgb", 0.1 * level, n_real=40) for level in inner]
        values.append(value(name, "frechet_target", 1.0, "features/rgb", 3.21, n_real=40, spread=None))
    networks = [
        {"name": j, "use": "judge", "view": j[7:], "checkpoint": f"{checkpoint}/{j}", "image_size": size}
        for j in JUDGES
    ]
    networks.append({**networks[0], "name": "features/rgb", "use": "features", "checkpoint": f"{checkpoint}/f"})
    records = [
        {
            "name": name,
            "trajectory": None if folder is None else str(folder),
            "method": None if folder is None else "progression",
            "config_hash": None if folder is None else "hash-progression",
            "n": 6,
            "levels": list(inner),
            "frame_levels": list(inner),
            "unguided": None,
        }
        for name, folder in {**folders, **dict.fromkeys(BASELINES)}.items()
    ]
    difference = {"first": "one", "second": "two", "quantity": "flip_rate", "extractor": JUDGES[0], "n": 6}
    return {
        "format": 1,
        "source": source,
        "target": target,
        "num_levels": 4,
        "seed": 0,
        "networks": networks,
        "methods": records,
        "values": values,
        "warnings": ["Frechet distances rest on as few as 6 images."],
        "differences": [{**difference, "difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.04, "num_groups": 6}],
    }


def test_blind_networks_known_damage_and_the_spectrum_are_shown(tmp_path):
    folder = tmp_path / "run" / "trajectories" / "one"
    write_trajectory(folder)
    content = metrics_of({"one": folder})
    content["networks"][2]["blind_for"] = ["blends of two patches"]
    content["spectra"] = {"one": [3.0, 2.0, 1.0], "real target": [3.5, 2.5, 1.5]}
    damaged = [
        ("damage_response", "features/rgb", 1.25),
        ("damage_response", JUDGES[0], 9.5),
        ("swd_full_target", "", 77),
    ]
    content["values"] += [value("real target with blends of two patches", q, None, by, v) for q, by, v in damaged]
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(content))
    (chapter,) = load_chapters([tmp_path / "run"])
    blind = {row.by for section in main_table(chapter) for row in section.rows if row.is_blind}
    assert blind == {"features/rgb"}
    (table,) = damage_tables(chapter)
    assert table.columns[:2] == ("response to damage, features/rgb", f"response to damage, {JUDGES[0]}")
    assert [(name, [c.text for c in cells]) for name, cells in table.rows] == [
        ("blends of two patches", ["1.25", "9.5", "77"])
    ]
    chart = spectrum(chapter)
    assert [(s.name, [(p.level, p.value) for p in s.points]) for s in chart.series] == [
        ("one", [(1 / 3, 3.0), (2 / 3, 2.0), (1.0, 1.0)]),
        ("real B", [(1 / 3, 3.5), (2 / 3, 2.5), (1.0, 1.5)]),
    ]
    page, figures = write_report([tmp_path / "run"], tmp_path / "out" / "page.html")
    text = page.read_text()
    assert 'class="chart still"' in text
    assert 'class="blind"' in text
    assert "spectrum.csv" in {file.name for file in figures}


def cellularity_of(folders, *, end=0.16):
    curve = [{"quantity": "area_fraction", "level": s, "n": 6, "mean": 0.05 + (end - 0.05) * s} for s in LEVELS]
    curve = [{**row, "low": row["mean"] - 0.01, "high": row["mean"] + 0.01} for row in curve]
    real = [{"class": c, "quantity": "area_fraction", "n": 40, "mean": m} for c, m in (("A", 0.05), ("B", 0.16))]
    entry = {"method": "progression", "source": "A", "target": "B", "config_hash": "hash-progression", "n": 6}
    rank = [{"quantity": "area_fraction", "n": 6, "value": 0.93, "low": 0.9, "high": 0.96}]
    entry |= {"levels": list(LEVELS), "curves": curve, "spearman": rank}
    entry["per_source"] = [{"source_id": "test/A/000.png", "area_fraction": [0.01, 0.02, 0.03, 0.04, 0.05]}]
    real = [{**row, "low": row["mean"] - 0.01, "high": row["mean"] + 0.01} for row in real]
    scored = [{"quantity": "area_fraction", "level": s, "n": 9, "mean": m} for s, m in ((0.0, 0.05), (0.5, 0.1))]
    scored = [{**row, "low": row["mean"] - 0.01, "high": row["mean"] + 0.01} for row in scored]
    entries = [{**entry, "trajectory": str(folder)} for folder in folders]
    content = {"format": FORMAT, "parameters": {}, "mpp": None, "trajectories": entries, "real": real}
    return {**content, "real_by_level": scored}


def write_run(folder, *, names=("one",), cellularity=True, trajectory=None, **figures):
    """A run folder that was translated, evaluated and, with `cellularity`, counted."""
    folders = {}
    for name in names:
        folders[name] = folder / "trajectories" / re.sub(r"\W", "_", name)
        write_trajectory(folders[name], **(trajectory or {}))
    (folder / "metrics.json").write_text(json.dumps(metrics_of(folders, **figures)))
    rows = [["trajectory", "source_id", "judge", "level", "probability"]]
    for where in folders.values():
        rows += [[where, f"test/A/{i:03d}.png", JUDGES[0], s, s * 0.8] for i in range(6) for s in LEVELS]
    with open(folder / "metrics.frames.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    if cellularity:
        (folder / "cellularity.json").write_text(json.dumps(cellularity_of(folders.values())))
    return folder


def report(*runs, output, segment=segment):
    """The text of a page. Its figures are empty files, because drawing them takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: path.write_bytes(b""))
        page, _ = write_report(runs, output, segment=segment)
    return page.read_text(encoding="utf-8")


def viewer_data(page):
    return json.loads(re.search(r'<script type="application/json" class="data">(.*?)</script>', page, re.S)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first", names=("one", "two"))


@pytest.fixture(scope="module")
def page(run):
    return report(run, output=run / "report.html")


def test_the_page_names_nothing_outside_itself(page):
    # The one address in it names the language of SVG to createElementNS; nothing is fetched from it.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    fetched = re.findall(r"""(?:src|href)=["']([^"']*)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert all(address.startswith(("data:", "#")) for address in fetched)
    assert "default-src 'none'" in page
    assert page.count("For research only.") == 2


def test_sprites_hold_the_very_frames_of_every_method(run, page):
    data = viewer_data(page)
    made = write_trajectory(run.parent / "same")
    assert [method["name"] for method in data["methods"]] == ["one", "two"]
    assert [source["label"] for source in data["sources"]] == list(made.source_ids)
    sprite = data["sources"][4]["shown"]["1"]["sprite"]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(sprite.split(",")[1]))))
    np.testing.assert_array_equal(pixels, np.concatenate(list(made.sequence(4)), axis=1))


def test_what_is_known_of_every_frame_goes_along(page):
    curves, second = (source["shown"]["0"]["curves"] for source in viewer_data(page)["sources"][:2])
    assert curves["area_fraction"] == [0.01, 0.02, 0.03, 0.04, 0.05]  # as cellularity.json has it
    squares = (2 + np.arange(5)) ** 2
    assert second["area_fraction"] == pytest.approx(squares / 256, abs=1e-4)  # which left this source out
    assert curves["p:judges/rgb"] == pytest.approx(0.8 * np.array(LEVELS))
    assert "count" not in curves  # cellularity.json counts none: the nuclei may be too small


def test_every_figure_stands_with_interval_and_floor(page):
    chapter_rows = re.findall(r"<tr>.*?</tr>", page, re.S)
    (kid,) = (row for row in chapter_rows if "KID to all real" in row and "floor" in row)
    assert ">0.1<" in kid
    assert "at 1<" in kid
    assert interval(0.05, 0.15) in kid
    assert ">0.001<" in kid
    assert '<span class="n">n = 6, against 40 real</span>' in kid
    (own,) = (row for row in chapter_rows if "KID to real of the same level" in row and "<td" in row)
    assert "floor at 1" in own  # that of the level itself
    (frechet,) = (row for row in chapter_rows if "Fréchet distance to real target" in row)
    assert ">3.21<" in frechet


def test_the_time_of_a_sequence_stands_with_its_device(tmp_path):
    run = write_run(tmp_path / "run", names=("one", "two"), cellularity=False)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["values"].append(value("one", "seconds", None, "", 0.25, spread=None))
    metrics["methods"][0]["device"] = "cuda: Some GPU"
    (run / "metrics.json").write_text(json.dumps(metrics))
    cost = {"sequences": 8, "seconds": 2.0}
    (run / "trajectories" / "one" / "cost.json").write_text(json.dumps({**cost, "device": "cuda: Some GPU"}))
    (run / "trajectories" / "two" / "cost.json").write_text(json.dumps({**cost, "cpu_seconds": 4.0}))
    (chapter,) = load_chapters([run])
    (row,) = next(section for section in main_table(chapter) if section.title == "What does it cost?").rows
    assert (row.cells[0].text, row.cells[0].remark) == ("0.25", "cuda: Some GPU")
    page = report(run, output=tmp_path / "report.html")
    assert "0.25 s on cuda: Some GPU<" in page
    assert "0.25 s on cpu (0.5 s of CPU time)<" in page


def test_text_of_the_user_is_escaped_everywhere(tmp_path):
    bad = "</script><img src=x onerror=alert(1)>\"' onload=alert(2) x='\n, --><svg onload=alert(3)>"
    ids = [f"{bad}{i}.png" for i in range(6)]
    source = {"source": f"A&<i>{bad}", "target": f"B{bad}"}
    run = write_run(tmp_path / "<b>run", names=(bad,), **source, trajectory={**source, "ids": ids})
    page = report(run, output=tmp_path / "report.html")
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    assert {tag for tag, _ in found}.isdisjoint({"img", "i"})
    assert not [attribute for _, attributes in found for attribute in attributes if attribute.startswith("on")]
    assert [tag for tag, _ in found].count("script") == 2
    assert "<b>run" not in page
    assert viewer_data(page)["sources"][0]["label"] == ids[0]
    assert viewer_data(page)["target"] == source["target"]
    (series,) = {attributes["data-series"] for _, attributes in found if attributes.get("data-style") == "m0"}
    assert series == bad


def test_a_run_from_somebody_else_runs_no_code_and_shows_no_other_file(tmp_path, monkeypatch):
    run, outside = write_run(tmp_path / "run"), tmp_path / "outside"
    outside.write_text("velocity: secret")
    folder = run / "trajectories" / "one"
    for name in ("interpolation.mp4", "config.yaml"):
        (folder / name).symlink_to(outside)
    (run / "splits.csv").symlink_to(outside)
    (tmp_path / "config.yaml").write_text("data: {root: x}\nvelocity: {name: 'no_such_module:Class'}\n")
    metrics, cellularity = (json.loads((run / name).read_text()) for name in ("metrics.json", "cellularity.json"))
    metrics["networks"].append({**metrics["networks"][0], "use": "scores", "checkpoint": str(tmp_path)})
    metrics["methods"].append({**metrics["methods"][0], "name": "etc", "trajectory": "../../../etc"})
    cellularity["parameters"] = {"method": "instanseg", "instanseg": str(outside)}
    for name, content in (("metrics.json", metrics), ("cellularity.json", cellularity)):
        (run / name).write_text(json.dumps(content))
    loaded = []
    monkeypatch.setattr("cellflux_bridge.cellularity.instanseg._load", loaded.append)
    page = report(run, output=tmp_path / "report.html", segment=None)
    assert loaded == []
    assert "secret" not in page
    assert base64.b64encode(outside.read_bytes()).decode() not in page
    assert "etc: its sequences (../../../etc) are not here" in page
    assert "so it was not run" in page  # the module that the checkpoint's configuration names
    assert "nuclei are not outlined, because a network counted them" in page

    (folder / "config.yaml").unlink()
    (folder / "config.yaml").write_text((tmp_path / "config.yaml").read_text())
    assert "one: its configuration is not shown. " in report(run, output=tmp_path / "report.html")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["networks"][0].update(image_size=10**9), "less than or equal to 8192"),
        (lambda c: c["methods"][0].update(trajectory="a\0b"), "match pattern"),
        (lambda c: c["values"][0].update(level=7), "less than or equal to 1"),
        (lambda c: c["values"][0].update(value="much"), "valid number"),
        (lambda c: c["methods"][0]["frame_levels"].pop(), r"\d frame_levels for \d levels"),
    ],
)
def test_numbers_and_paths_out_of_range_are_refused(run, tmp_path, change, message):
    metrics = json.loads((run / "metrics.json").read_text())
    change(metrics)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=rf"metrics\.json: .*{message}"):
        load_chapters([tmp_path])


def test_counts_that_lack_a_level_are_refused(run, tmp_path):
    for name in ("metrics.json", "cellularity.json"):
        shutil.copy(run / name, tmp_path)
    counted = json.loads((run / "cellularity.json").read_text())
    counted["trajectories"][0]["per_source"][0]["area_fraction"].pop()
    (tmp_path / "cellularity.json").write_text(json.dumps(counted))
    with pytest.raises(UserError, match=r"cellularity\.json: .*numbers of .* for \d levels"):
        load_chapters([tmp_path])


def test_frames_of_any_channels_are_shown_in_colour(tmp_path, monkeypatch):
    run, whole = write_run(tmp_path / "run"), sequences.load_trajectory

    def of_two_channels(folder, **options):
        made = whole(folder, **options)
        return replace(made, frames=made.frames[:, :, :2])

    monkeypatch.setattr(sequences, "load_trajectory", of_two_channels)
    sprite = viewer_data(report(run, output=tmp_path / "report.html"))["sources"][1]["shown"]["0"]["sprite"]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(sprite.split(",")[1]))))
    made = write_trajectory(tmp_path / "same").sequence(1)
    np.testing.assert_array_equal(pixels, np.concatenate(list(to_rgb(made[..., :2])), axis=1))


def test_warnings_are_given_where_they_are_due_and_only_there(run, tmp_path):
    def shown(folder):
        (chapter,) = load_chapters([folder])
        return "\n".join(warnings_of(chapter, None))

    sound = shown(run)
    assert "as few as 6 images" in sound
    for reason in ("recolouring", "misses levels", "Not known: the floor", "not counted", "made again"):
        assert reason not in sound
    tinted = shown(write_run(tmp_path / "tinted", flips=(0.95, 0.3), cellularity=False))
    assert "may partly be a mere recolouring" in tinted
    assert "95%" in tinted
    assert f"cellflux-bridge cellularity {tmp_path / 'tinted'}" in tinted

    metrics = json.loads((run / "metrics.json").read_text())
    for row in metrics["values"]:
        if row["quantity"] == "probability" and row["level"] == 0.25 and row["method"] == "one":
            row |= {"value": 0.7, "low": 0.65, "high": 0.75}
    metrics["values"] = [row for row in metrics["values"] if row["quantity"] != "kid_floor"]
    metrics["warnings"] = ["Frechet distances of 6 images.", "Look at the near copies."]
    metrics["methods"][0]["frame_levels"][1] = 0.61
    metrics["methods"][1]["config_hash"] = "earlier"
    changed = shutil.copytree(run, tmp_path / "changed")
    (changed / "metrics.json").write_text(json.dumps(metrics))
    counted = cellularity_of([run / "trajectories" / "one"], end=0.08)
    counted["trajectories"][0]["config_hash"] = "earlier"
    (changed / "cellularity.json").write_text(json.dumps(counted))
    found = shown(changed)
    assert "two: its nuclei were not counted" in found
    assert re.search("one: the sequences in .* made again after their nuclei were counted", found)
    assert "0.70 at level 0.25" in found
    assert "no frame was made at level 0.5 (shown by 0.61)" in found
    assert "Not known: the floor (real patches against real patches) of KID" in found.splitlines()[-1]
    assert "Look at the near copies." in found  # what evaluate warned of
    assert "two: the sequences in" in found
    assert "differs from real B: one 0.08 (" in found


def test_names_of_bands_that_lie_together_stand_as_one():
    bands = [Band("real A", 0.53), Band("real B", 0.54), Band("floor", 0.1)]
    names = plot(Chart("p:judge", "p", (), tuple(bands), diagonal=True)).band_names()
    assert [name for name, _, _ in names] == ["real B, real A", "floor"]


def test_distances_to_a_levels_own_patches_stand_beside_that_levels_floor(run):
    (chapter,) = load_chapters([run])
    rows = [row for section in main_table(chapter) for row in section.rows]
    (own,) = [row for row in rows if row.label.startswith("KID to real of the same level")]
    assert [(cell.text, cell.remark) for cell in own.real] == [("0.004", "floor at 1")]
    (chart,) = [chart for _, chart in curves(chapter) if chart.key.startswith("kid_own")]
    (floor,) = [series for series in chart.series if series.name == "real vs real"]
    assert [(point.level, point.value) for point in floor.points] == [(s, 0.004) for s in LEVELS[1:]]
    assert chart.bands == ()


def test_a_run_without_metrics_names_the_command(tmp_path):
    write_trajectory(tmp_path / "bare" / "trajectories" / "t")
    with pytest.raises(SystemExit, match=r"cellflux-bridge evaluate .*--output .*bare.metrics\.json"):
        main(["report", str(tmp_path / "bare")])


def test_damaged_and_foreign_files_are_named(run, tmp_path):
    changed = shutil.copytree(run, tmp_path / "changed")
    (changed / "metrics.json").write_text('{"format": 1, "values": []}')
    with pytest.raises(UserError, match=r"metrics\.json: source: Field required \(and .*cellflux-bridge evaluate"):
        load_chapters([changed])
    (changed / "metrics.json").write_text('{"format": 1, ')
    with pytest.raises(UserError, match=r"metrics\.json: cannot be read.*cellflux-bridge evaluate"):
        load_chapters([changed])
    with pytest.raises(UserError, match="twice"):
        load_chapters([run, run])
    with pytest.raises(UserError, match=r"ends in \.html"):
        write_report([run], tmp_path / "report.pdf")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("metrics.json", lambda c: c.pop("source"), "source: Field required.*cellflux-bridge evaluate"),
        ("metrics.json", lambda c: c["values"][3].pop("n"), r"values\.3\.n: Field required.*cellflux-bridge evaluate"),
        ("cellularity.json", lambda c: c.update(format=9), "format 9, .*cellflux-bridge cellularity"),
        (
            "cellularity.json",
            lambda c: c["parameters"].update(sharp=1),
            r"parameters\.sharp: Unexpected.*cellflux-bridge cellularity",
        ),
    ],
)
def test_files_of_other_versions_name_the_command_that_makes_them_anew(run, tmp_path, file, change, message):
    changed = shutil.copytree(run, tmp_path / "changed")
    content = json.loads((changed / file).read_text())
    change(content)
    (changed / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{re.escape(file)}: .*{message}"):
        load_chapters([changed])


def test_a_cut_table_of_frames_names_the_command_that_makes_it_anew(run, tmp_path):
    changed = shutil.copytree(run, tmp_path / "changed")
    table = changed / "metrics.frames.csv"
    table.write_text(table.read_text().rpartition(",")[0])
    with pytest.raises(UserError, match=r"metrics\.frames\.csv: damaged.*cellflux-bridge evaluate"):
        report(changed, output=tmp_path / "report.html")


def test_frames_of_another_size_than_the_judged_ones_are_refused(run, tmp_path):
    changed = shutil.copytree(run, tmp_path / "changed")
    content = json.loads((changed / "metrics.json").read_text())
    for network in content["networks"]:
        network["image_size"] = 32
    (changed / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"frames of 16 x 16 px, but .* judged frames of 32 px"):
        report(changed, output=tmp_path / "report.html")


def test_nuclei_are_outlined_as_they_were_counted(tmp_path, monkeypatch):
    run, asked = write_run(tmp_path / "run"), []

    def counted(rgb, *, mpp, parameters, scale):
        asked.append((mpp, parameters.stains, scale.factor))
        return segment(rgb)

    monkeypatch.setattr("cellflux_bridge.report.page.segment_nuclei", counted)
    content = json.loads((run / "cellularity.json").read_text())
    scale = {"factor": 1.5, "diameter": None, "agreement": 1.0}
    changed = {"mpp": 0.5, "scale": scale, "parameters": {"method": "classical", "stains": "macenko"}}
    (run / "cellularity.json").write_text(json.dumps({**content, **changed}))
    report(run, output=tmp_path / "report.html", segment=None)
    assert set(asked) == {(0.5, "macenko", 1.5)}


def test_a_lower_end_of_zero_is_an_interval(run, tmp_path):
    changed = shutil.copytree(run, tmp_path / "changed")
    content = json.loads((changed / "metrics.json").read_text())
    for row in content["values"]:
        if row["quantity"] == "probability" and row["level"] == 0.25 and row["method"] == "one":
            row |= {"value": 0.45, "low": 0.0, "high": 0.8}
    (changed / "metrics.json").write_text(json.dumps(content))
    (chapter,) = load_chapters([changed])
    assert not any("misses levels" in text for text in warnings_of(chapter, None))


def test_every_kind_of_baseline_has_dashes_of_its_own(run):
    (chapter,) = load_chapters([run])
    styles = baseline_styles(chapter)
    assert len(set(styles.values())) == len(BASELINES)
    css = (resources.files("cellflux_bridge.report") / "template" / "page.css").read_text()
    assert len({re.search(rf"\.{style} {{[^}}]*--d: ([^;]*);", css)[1] for style in styles.values()}) == len(BASELINES)


def test_nuclei_stand_among_the_numbers_by_level(run):
    (chapter,) = load_chapters([run])
    table = list(level_tables(chapter))[-1]
    assert table.title == NUCLEI["area_fraction"]
    rows = dict(table.rows)
    assert rows["one"][-1] == ("0.16", interval(0.15, 0.17), "", "n = 6")
    real = rows["real patches whose score is the level"]
    assert [at for at, cell in zip(table.levels, real, strict=True) if cell is not None] == [0.0, 0.5]


def test_the_strip_shows_frames_of_the_level_above_them(tmp_path):
    run = write_run(tmp_path / "run", names=("one", "two"))
    shutil.rmtree(run / "trajectories" / "two")
    write_trajectory(run / "trajectories" / "two", levels=(0.0, 0.1, 0.2, 0.5, 0.6, 0.75, 0.9, 1.0))
    report(run, output=tmp_path / "report.html")
    with open(tmp_path / "figures" / "strip.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["level"]) for row in rows if row["row"] == "1"] == [0.0, 0.2, 0.5, 0.75, 1.0]


def test_two_runs_share_rows_only_where_the_networks_are_the_same(run, tmp_path):
    second = write_run(tmp_path / "second", names=("one",))
    (chapter,) = load_chapters([run, second])
    assert [method.name for method in chapter.methods] == ["first: one", "first: two", "second: one"]
    assert len(chapter.baselines) == len(BASELINES)  # the same figures are told once
    assert "first: Frechet distances rest" in "".join(warnings_of(chapter, None))  # whose warning it is
    rows = [row for section in main_table(chapter) if section.title != "Nuclei, counted" for row in section.rows]
    assert all(all(row.cells) for row in rows)
    page = report(run, second, output=tmp_path / "both.html")
    shown = viewer_data(page)["sources"]
    assert len(shown) == 6  # the same sources, side by side
    assert all(set(source["shown"]) == {"0", "1", "2"} for source in shown)

    strange = write_run(tmp_path / "strange", checkpoint="runs/others")
    (chapter,) = load_chapters([run, strange])
    for section in main_table(chapter)[:-1]:  # the last are nuclei, which baselines do not have
        for row in section.rows:
            filled = [c is not None for c in row.cells]
            assert filled in (
                [True] * 2 + [False] + [True] * 3 + [False] * 3,
                [False] * 2 + [True] + [False] * 3 + [True] * 3,
            )
    named = {row.by for section in main_table(chapter) for row in section.rows}
    assert named >= {"judges/rgb of first", "judges/rgb of strange"}
    assert any("different networks" in text for text in warnings_of(chapter, None))


def test_runs_of_two_transitions_are_two_chapters(run, tmp_path):
    other = write_run(tmp_path / "other", source="C", target="D", trajectory={"source": "C", "target": "D"})
    page = report(run, other, output=tmp_path / "report.html")
    assert page.count('class="viewer"') == 2
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"strip_1.png", "strip_2.png", "kid_1.pdf"}


def test_a_run_that_lost_its_sequences_still_reports_its_figures(run, tmp_path):
    (tmp_path / "bare").mkdir()
    metrics = json.loads((run / "metrics.json").read_text())
    for record in metrics["methods"]:
        record["trajectory"] = record["trajectory"] and "nowhere/" + record["name"]
    (tmp_path / "bare" / "metrics.json").write_text(json.dumps(metrics))
    page = report(tmp_path / "bare", output=tmp_path / "report.html")
    assert "only figures are shown, no images" in page
    assert "KID to real of the same level" in page


def write_noise(folder, *, size, num=6, config=None):
    """A run whose frames no codec makes small."""
    header = TrajectoryHeader("path", "A", "B", ("A", "B"), (0.0, 1.0), "hash-progression")
    frames = np.random.default_rng(0).integers(0, 255, (2, num, 3, size, size), dtype=np.uint8)
    labels, ids = linear_soft_labels(header, num), tuple(f"{i}.png" for i in range(num))
    where = folder / "trajectories" / "one"
    made = Trajectory(header, frames, labels, ids, (0,) * num, (0,) * num)
    TrajectoryWriter(where, header).append(made, numbers=range(num))
    if config is not None:
        (where / "config.yaml").write_text(config.to_yaml())
    (folder / "metrics.json").write_text(json.dumps(metrics_of({"one": where}, size=size)))
    return folder


def test_however_large_the_frames_of_all_chapters_the_page_stays_small(
    tmp_path, monkeypatch, make_patches, write_config
):
    make_patches(tmp_path / "patches", num={"A": 6, "B": 6}, low=256, high=256)
    config = load_config(write_config(tmp_path, data={"split": {"test": 0.5}, "image_size": 256}))
    load_patches(config.data, seed=config.seed)
    runs = [write_noise(tmp_path / "large", size=256, config=config), write_noise(tmp_path / "other", size=128)]
    seen, stills = 400_000, 150_000
    for name, most in {"_MOST": 800_000, "_MOST_SEEN": seen, "_MOST_OF_STILLS": stills}.items():
        monkeypatch.setattr(f"cellflux_bridge.report.page.{name}", most)
    monkeypatch.setattr("cellflux_bridge.report.page.write_figures", lambda *_, **__: [])
    page = report(*runs, output=tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size <= 800_000
    large, other = map(json.loads, re.findall(r'class="data">(.*?)</script>', page, re.S))
    assert (large["size"], other["size"]) == (256, 128)  # frames of two sizes stand in no row together
    assert "A → B, 256 px</h2>" in page
    assert "reduced to 64 px" in page
    sprites = [each["sprite"] for of in (large, other) for row in of["sources"] for each in row["shown"].values()]
    real = [each["sprite"] for each in large["real"].values()]
    assert len(sprites) >= 2
    assert len(real) == 2
    assert all(sprite.startswith("data:image/webp") for sprite in real)
    assert sum(map(len, real)) <= stills // 2
    assert sum(map(len, sprites + real)) <= seen
    monkeypatch.setattr("cellflux_bridge.report.page._MOST", 100_000)
    with pytest.raises(UserError, match=r"0\.1 at most; report fewer runs"):
        report(runs[1], output=tmp_path / "report.html")


def test_figures_come_with_their_numbers(run, tmp_path):
    _, figures = write_report([run], tmp_path / "report.html", segment=segment)
    names = {path.name for path in figures}
    assert names == {f"{stem}.{form}" for stem in ("strip", "cellularity", "kid") for form in ("png", "pdf", "csv")}
    by_name = {path.name: path for path in figures}
    assert by_name["kid.pdf"].read_bytes().startswith(b"%PDF")
    with Image.open(by_name["strip.png"]) as image:
        assert image.width == pytest.approx(183 / 25.4 * 300, abs=3)  # a page's width at 300 dots an inch
    with open(by_name["kid.csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["panel"].startswith("KID to real of the same level")]
    one = {float(row["level"]): float(row["value"]) for row in own if row["curve"] == "one"}
    assert one == pytest.approx({level: 0.1 * level for level in LEVELS[1:]})
    assert any(row["curve"] == "real vs real" and float(row["value"]) == 0.001 for row in rows)
    with open(by_name["strip.csv"], newline="") as file:
        strip = list(csv.DictReader(file))
    assert {row["method"] for row in strip} == {"one", "two"}
    assert all(float(row["p:judges/rgb"]) == pytest.approx(0.8 * float(row["level"])) for row in strip)


def test_outlines_follow_the_borders_of_every_nucleus():
    labels = np.zeros((12, 12), np.int32)
    labels[2:5, 3:8] = 1
    labels[5:9, 3:8] = 2  # touches the first
    paths = re.findall(r"M(-?\d+) (-?\d+)l([^z]*)z", sequences.outline(labels))
    assert len(paths) == 2
    boxes = []
    for x, y, steps in paths:
        moves = np.array(steps.split(), int).reshape(-1, 2)
        points = np.array([int(x), int(y)]) + np.concatenate([[[0, 0]], moves.cumsum(0)])
        boxes.append((points.min(0).tolist(), points.max(0).tolist()))
    assert boxes[0] == ([30, 20], [80, 50])
    assert boxes[1] == ([30, 50], [80, 90])


def test_long_sequences_are_shown_by_some_frames_with_both_ends(tmp_path):
    levels = np.linspace(0, 1, 101).tolist()
    run = write_run(tmp_path / "long", trajectory={"levels": levels, "num": 2})
    page = report(run, output=tmp_path / "report.html")
    shown = viewer_data(page)["methods"][0]["levels"]
    assert len(shown) == sequences.MAX_FRAMES
    assert (shown[0], shown[-1]) == (0.0, 1.0)


def test_a_far_baseline_does_not_flatten_what_is_compared():
    near = Series("method", "m0", (Point(0, 0.01), Point(1, 0.03, 0.02, 0.04)))
    far = Series("copy", "b0", (Point(0, 0.01), Point(1, 1.7)))
    scale = plot(Chart("k", "KID", (near, far), (Band("real", 0.002),)))
    assert scale.leaves
    assert scale.low == 0
    assert 0.04 <= scale.high < 0.05
    assert scale.ticks == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
    assert not plot(Chart("k", "KID", (near,), (Band("real", 0.002),))).leaves


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (0.0, "0"),
        (0.12345, "0.123"),
        (-0.5, "\u22120.5"),
        (2.1e-5, "2.1e\u22125"),
        (12345.6, "12,346"),
        (None, "undefined"),
    ],
)
def test_numbers_are_short(given, text):
    assert number(given) == text


@pytest.fixture
def tab(browser, run, page):
    """The page in a browser without network; fails where it logs an error or asks for anything but itself."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    tab, wrong = context.new_page(), []
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((run / "report.html").as_uri())
    yield tab
    assert not wrong
    assert {url for url in asked if not url.startswith("data:")} == {(run / "report.html").as_uri()}
    context.close()


def shown_frame(tab):
    return int(tab.get_attribute(".current svg", "data-frame"))


def marker_of(tab, key, style="m0"):
    """Where a chart's marker stands, (x, y)."""
    moved = tab.get_attribute(f'.viewer .chart[data-key="{key}"] .now .{style}', "transform")
    return tuple(map(float, re.search(r"translate\((\S+) (\S+)\)", moved).groups()))


def test_the_slider_moves_picture_markers_and_outlines(tab):
    area, p = "0/own/area_fraction", "0/own/p:judges/rgb"
    assert shown_frame(tab) == 2  # opens half-way
    before = marker_of(tab, area), marker_of(tab, p), tab.get_attribute(".current .ring", "d")
    tab.locator(".level").fill("4")
    assert shown_frame(tab) == 4
    assert "level 1.00" in tab.inner_text(".readout")
    assert "p(B) by judges/rgb 0.80" in tab.inner_text(".readout")
    after = marker_of(tab, area), marker_of(tab, p), tab.get_attribute(".current .ring", "d")
    assert after[0][0] > before[0][0]  # to the right
    assert after[0][1] < before[0][1]  # more nuclei
    assert after[1][1] < before[1][1]
    assert after[2] != before[2]
    cursors = {line.get_attribute("x1") for line in tab.locator(".chapter .cursor").all()}
    assert cursors == {"350"}
    assert tab.get_attribute(".level", "aria-valuetext") == "level 1.00 of 1"


def test_the_strip_scrolls_to_the_chosen_level_on_a_phone(tab):
    tab.set_viewport_size({"width": 390, "height": 800})
    for level in ("4", "0", "4"):
        tab.locator(".level").fill(level)
        box = tab.locator(".ladder th.here").bounding_box()
        assert 0 <= box["x"]
        assert box["x"] + box["width"] <= 390


def test_the_picture_shows_the_pixels_of_its_frame(tab):
    tab.locator(".outlines").uncheck()
    seen = {}
    for k in (0, 3):
        tab.locator(".level").fill(str(k))
        shot = np.array(Image.open(io.BytesIO(tab.locator(".current svg").screenshot())).convert("RGB"))
        seen[k] = shot[-20, -20].tolist()  # the background, far from the square
    greys = np.linspace(220, 100, 5).astype(np.uint8)
    assert seen == {0: [greys[0]] * 3, 3: [greys[3]] * 3}


def test_keys_alone_are_enough(tab):
    tab.keyboard.press("ArrowRight")
    assert shown_frame(tab) == 3
    tab.keyboard.press("Home")
    assert shown_frame(tab) == 0
    tab.keyboard.press("ArrowLeft")
    assert shown_frame(tab) == 0
    tab.keyboard.press("n")
    assert tab.input_value(".source") == "1"
    tab.keyboard.press("p")
    assert tab.input_value(".source") == "0"
    tab.keyboard.press("m")
    assert "two" in tab.inner_text(".caption")
    tab.keyboard.press("o")
    assert not tab.locator(".current .nuclei").is_visible()
    tab.focus(".level")
    tab.keyboard.press("End")
    assert shown_frame(tab) == 4
    tab.keyboard.press("ArrowLeft")
    assert shown_frame(tab) == 3
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_sources_and_methods_are_chosen_and_stand_side_by_side(tab):
    tab.select_option(".source", "5")
    assert "005.png" in tab.get_attribute(".current svg", "aria-label")
    tab.locator(".methods input").nth(1).check()
    assert tab.get_attribute(".current svg", "aria-label").startswith("two")
    rows = tab.locator(".ladder tbody tr")
    assert rows.locator("th").all_inner_texts() == ["one", "two"]
    rows.nth(0).locator("button").nth(1).click()
    assert shown_frame(tab) == 1
    for clicked in (None, ".next", ".outlines"):  # a click takes no key away
        if clicked is not None:
            tab.click(clicked)
        before = shown_frame(tab)
        tab.keyboard.press("ArrowRight")
        assert shown_frame(tab) == before + 1
    tab.locator(".methods input").nth(1).focus()
    tab.keyboard.press("ArrowLeft")  # moves to the other method, as in every group of radio buttons
    assert shown_frame(tab) == 4
    assert "one" in tab.inner_text(".caption")
    tab.keyboard.press("m")
    tab.locator(".level").fill("1")
    assert tab.locator(".ladder td.here").count() == 2


def test_of_methods_that_share_a_style_only_the_chosen_one_shows_its_mean(browser, tmp_path):
    names = [f"method {slot}" for slot in range(7)]
    report(write_run(tmp_path / "run", names=names, trajectory={"num": 2}), output=tmp_path / "report.html")
    context = browser.new_context(offline=True)
    tab = context.new_page()
    tab.goto((tmp_path / "report.html").as_uri())
    for slot in (0, 6):
        tab.locator(".methods input").nth(slot).check()
        shown = tab.locator('.viewer .chart[data-key$="area_fraction"] .series:not(.away)')
        assert [one.get_attribute("data-series") for one in shown.all()] == [names[slot]]
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_light_and_dark_and_no_width_makes_it_scroll_sideways(tab, scheme):
    tab.emulate_media(color_scheme=scheme)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 384) == (scheme == "light")
    for width in (1280, 760, 360):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_real_patches_and_near_copies_are_pictured_from_the_cache(tmp_path, make_patches, write_config):
    make_patches(tmp_path / "patches")
    config = load_config(write_config(tmp_path, data={"split": {"test": 0.5}}))
    run = write_run(tmp_path / "run")
    folder = run / "trajectories" / "one"
    (folder / "config.yaml").write_text(config.to_yaml())
    page = report(run, output=tmp_path / "report.html")
    assert "Real patches are not shown beside the made ones: " in page
    assert "data check" in page  # fills the cache
    patches = load_patches(config.data, seed=config.seed)
    training = patches.ids[patches.indices("train", "B")[0]]
    metrics = json.loads((run / "metrics.json").read_text())
    copy = {"method": "one", "trajectory": str(folder), "source_id": "test/A/002.png", "level": 0.75}
    copies = [{**copy, "training_id": training, "distance": 0.1, "held_out": 0.2}]
    metrics["memorisation"] = {"patches": str(folder), "near_copies": copies}
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = report(run, output=tmp_path / "report.html")
    real = viewer_data(page)["real"]
    assert set(real) == {"0", "4"}  # the two ends: nothing says which patches lie between
    test_target = patches.centre(patches.indices("test", "B")).permute(0, 2, 3, 1).numpy()
    sprite = np.array(Image.open(io.BytesIO(base64.b64decode(real["4"]["sprite"].split(",")[1]))))
    for tile in np.split(sprite, real["4"]["num"], axis=1):
        assert (tile == test_target).all((1, 2, 3)).any()
    (pair,) = re.findall(r'<img src="data:image/png;base64,([^"]*)"', page)
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(pair))))
    made = write_trajectory(tmp_path / "same")
    np.testing.assert_array_equal(pixels[:, :16], made.sequence(2)[3])
    copied = patches.centre([patches.ids.index(training)])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels[:, 16:], copied)
    copies[0]["source_id"] = "test/A/of another translation.png"
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = report(run, output=tmp_path / "report.html")
    assert "1 of the worst near-copies that evaluate listed are not pictured" in page


def test_methods_with_other_levels_keep_their_place_on_the_way(browser, tmp_path):
    run = write_run(tmp_path / "run", names=("one", "two"))
    shutil.rmtree(run / "trajectories" / "two")
    write_trajectory(run / "trajectories" / "two", levels=np.linspace(0, 1, 9).tolist())
    report(run, output=tmp_path / "report.html")
    context = browser.new_context(offline=True)
    tab = context.new_page()
    tab.goto((tmp_path / "report.html").as_uri())
    tab.locator(".level").fill("3")
    tab.keyboard.press("m")
    assert shown_frame(tab) == 6  # level 0.75 of nine
    tab.locator(".level").fill("7")
    tab.keyboard.press("m")
    assert shown_frame(tab) == 3  # the nearest of five, of two the earlier
    context.close()
