"""The report's chapter of cells under perturbations: it says what the rows say, and nothing outside is read."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from test_report import report, write_run

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli import main
from cellflux_bridge.images import write_png
from cellflux_bridge.metrics.perturbation import Row
from cellflux_bridge.metrics.perturbation_files import CONTROLS, NOTES, REAL, picture_of, write
from cellflux_bridge.report import page as pages

SPACE = "\N{NO-BREAK SPACE}"
# Value, low and high of real training cells, untreated controls and made cells.
SEEN = {
    "perturbation told": ((0.36, 0.3, 0.4), (0.14, 0.1, 0.2), (0.31, 0.25, 0.35)),
    "batch told": ((0.62, 0.6, 0.64), (0.6, 0.5, 0.7), (0.58, 0.5, 0.6)),
    "KIDc": ((0.005, 0.0, 0.01), (0.105, 0.09, 0.12), (0.03, 0.02, 0.04)),
}
NOTHING = (float("nan"),) * 3


def rows_of(seen=SEEN, *, method="made", cosine=0.5):
    who = (REAL, CONTROLS, method)
    rows = [Row(m, "seen", f, "profile", e, 96) for f, each in seen.items() for m, e in zip(who, each, strict=True)]
    # Of other features, and without a value: neither is what the words speak of.
    rows += [Row(method, "seen", "KIDc", "other", (9.0, 8.0, 10.0), 8), Row(method, "seen", "e", "m", NOTHING, 0)]
    rows += [Row(method, "unseen", "mode of action told", "profile", (0.2, 0.1, 0.3), 36)]
    rows += [Row(CONTROLS, "unseen", "mode of action told", "profile", (0.25, 0.2, 0.3), 36)]
    swapped = {"grey levels": 5.89, "cosine": cosine}
    return rows + [Row(method, "all", f"condition swapped, {n}", "pixels", (v, v, v), 64) for n, v in swapped.items()]


def write_cells(run, rows=None, *, drawn=("one", "two", "three"), name="made", side=40):
    """What `perturbations` writes; each picture is of one grey."""
    folder = run / "perturbations"
    (folder / "cells").mkdir(parents=True)
    for number, label in enumerate(drawn):
        write_png(picture_of(folder, label), np.full((side, 2 * side, 3), 20 * (number + 1), np.uint8))
    write(rows or rows_of(), NOTES, folder, name=name, drawn=drawn)
    return run


def page_of(*runs, output):
    return report(*runs, output=output / "page.html")


def words_of(page):
    return re.findall(r"<p>([^<]*)</p>", re.search(r'<div class="primary">.*?</div>', page, re.S)[0])


def test_words_and_tables_are_those_of_the_rows_in_a_run_without_metrics(tmp_path):
    run = write_cells(tmp_path / "run")
    main(["report", str(run)])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert words_of(page) == [
        f"Seen perturbations. The perturbation of made cells is told in 31{SPACE}% (real training cells 36{SPACE}%, "
        f"untreated controls 14{SPACE}%): it is shown. Their batch is told in 58{SPACE}% (real training cells "
        f"62{SPACE}%, untreated controls 60{SPACE}%): it is kept. KIDc x100 is 3 (real training cells 0.5, untreated "
        "controls 10.5): made cells are nearer to real treated cells than untreated controls are, "
        f"75{SPACE}% of the way to real training cells.",
        f"Unseen perturbations. The mode of action of made cells is told in 20{SPACE}% (untreated controls "
        f"25{SPACE}%): it is not shown.",
        "Asked for another perturbation, made cells differ by 5.9 grey levels, and the cosine of both changes is 0.5 "
        "(1: alike): the condition is used.",
    ]
    titles = ["Seen perturbations, by profile", "Seen perturbations, by other", "Unseen perturbations, by profile"]
    assert re.findall(r"<h3>(.*?)</h3>", page) == [*titles, "All perturbations, by pixels"]  # none without a value
    assert "<caption>n = 96</caption>" in page
    (line,) = re.findall(r'<tr><th scope="row">made</th>(?:(?!</tr>).)*batch told.*?</tr>', page, re.S)
    assert re.findall(r'data-of="(.*?)"', line) == ["perturbation told", "batch told", "KIDc x100"]
    assert re.findall(r'class="v"[^>]*>(.*?)<', line) == ["0.31", "0.58", "3"]
    assert "2 \N{EN DASH} 4" in line
    assert page.count("data:image/png") == 3
    assert "no training" not in page
    assert "ignores its condition" not in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"perturbation told": ((0.9, 0.8, 1), (0.1, 0, 0.2), (0.3, 0.25, 0.4))}, "it is shown in part."),
        ({"perturbation told": ((0.9, 0.8, 1), (0.1, 0, 0.2), (0.3, 0.15, 0.4))}, "this may be chance."),
        ({"mode of action told": ((0.9, 0.8, 1), (0.1, 0, 0.2), (0.05, 0, 0.1))}, "it is not shown."),
        ({"batch told": ((0.62, 0.6, 0.64), (0.6, 0.5, 0.7), (0.56, 0.5, 0.6))}, "it is not kept."),
        ({"KIDc": ((0.01, 0, 0.02), (0.1, 0, 0.2), (0.2, 0.1, 0.3))}, "no nearer to real treated cells"),
        ({"KIDc": ((0.1, 0, 0.2), (0.1, 0, 0.2), (0.05, 0, 0.3))}, "untreated controls are; this may be chance."),
        ({"KIDc": (NOTHING, NOTHING, (0.05, 0, 0.3))}, "KIDc x100 is 5."),
    ],
)
def test_words_claim_no_more_than_the_rows(tmp_path, change, words):
    page = page_of(write_cells(tmp_path / "run", rows_of(change)), output=tmp_path)
    assert words in words_of(page)[0]


def test_a_run_with_metrics_shows_both_chapters(tmp_path):
    run = write_cells(write_run(tmp_path / "run"))
    page = page_of(run, output=tmp_path)
    assert page.count('<section class="chapter') == 2
    assert '<h2 class="chapter-title">Perturbations: made</h2>' in page
    assert 'href="#t0"' in page
    assert 'class="viewer"' in page


def test_the_folder_of_the_command_itself_is_read(tmp_path):
    run = write_cells(tmp_path / "run")
    assert words_of(page_of(run / "perturbations", output=tmp_path))


@pytest.mark.parametrize("is_cell", [True, False])
def test_a_network_that_ignores_its_condition_is_named_where_validation_says_so(tmp_path, is_cell):
    run = write_cells(tmp_path / "run") if is_cell else write_run(tmp_path / "run")

    def shown(*lines):
        (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        return "ignores its condition" in page_of(run, output=tmp_path)

    def validated(gain, error):
        return json.dumps({"step": 1, "val/condition_gain": gain, "val/condition_gain_error": error})

    assert shown(validated(0.1, 0.01), validated(0.01, 0.008)), "the last one counts"
    assert not shown(validated(0.01, 0.008), validated(0.1, 0.01))
    assert not shown('{"step": 1, "loss": 2}')
    for damage in ("[1]", '{"val/condition_gain": "x", "val/condition_gain_error": "y"}', '{"val/condition_gain": -1}'):
        assert not shown(damage)


def test_a_condition_that_hardly_moves_cells_is_told_in_words(tmp_path):
    page = page_of(write_cells(tmp_path / "run", rows_of(cosine=0.999)), output=tmp_path)
    assert "the condition is hardly used" in words_of(page)[-1]


def test_text_of_the_user_is_escaped(tmp_path):
    bad = "</script><script>alert(1)</script>\"' onload=alert(2) x='"
    run = write_cells(
        tmp_path / "run", rows_of(method=bad), drawn=[bad, "../../x", "\ud800", "\N{LATIN SMALL LETTER E WITH ACUTE}"]
    )
    file = run / "perturbations" / "perturbations.json"
    record = json.loads(file.read_text())
    record["rows"] += [{**record["rows"][0], "figure": bad, "by": bad}]
    file.write_text(json.dumps({**record, "name": bad, "notes": [bad]}))
    page, found = page_of(run, output=tmp_path), []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    assert [tag for tag, _ in found].count("script") == 1
    assert not [name for _, attributes in found for name in attributes if name.startswith("on")]
    assert next(attributes["alt"] for tag, attributes in found if tag == "img") == f"cells under {bad}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=9), "format 9, this version reads 1"),
        (lambda c: c["rows"][0].pop("num"), r"rows\.0\.num: Field required"),
        (lambda c: c["rows"][0].update(perturbations="some"), r"rows\.0\.perturbations"),
        (lambda c: c["rows"][0].update(estimate=[1, 2]), r"rows\.0\.estimate"),
        (lambda c: c["rows"].extend(c["rows"] * 200), "at most 2000"),
        (lambda c: c["rows"].extend({**c["rows"][0], "figure": str(k)} for k in range(99)), "names of a figure, 50 at"),
        (lambda c: c.update(drawn=["x"] * 999), "at most 48"),
    ],
)
def test_damaged_files_name_the_command_that_makes_them_again(tmp_path, change, message):
    file = write_cells(tmp_path / "run") / "perturbations" / "perturbations.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"perturbations\.json: .*{message}.*cellflux-bridge perturbations RUN"):
        page_of(tmp_path / "run", output=tmp_path)


def test_nothing_outside_the_folder_is_read(tmp_path):
    run, other = write_cells(tmp_path / "run"), write_cells(tmp_path / "other")
    picture = picture_of(run / "perturbations", "two")
    picture.unlink()
    picture.symlink_to(picture_of(other / "perturbations", "one"))
    page = page_of(run, output=tmp_path)
    assert page.count("data:image/png") == 2
    assert "1 pictures of cells are not shown" in page
    shutil.rmtree(run / "perturbations")
    (run / "perturbations").symlink_to(other / "perturbations")
    with pytest.raises(UserError, match=r"holds no metrics\.json.*cellflux-bridge perturbations"):
        page_of(run, output=tmp_path)


def test_pictures_keep_within_the_page(tmp_path, monkeypatch):
    run = write_cells(tmp_path / "run", drawn=[f"c{k}" for k in range(9)], side=100)
    draw = np.random.default_rng(0)
    for file in (run / "perturbations" / "cells").iterdir():
        write_png(file, draw.integers(0, 256, (100, 200, 3), dtype=np.uint8))
    monkeypatch.setattr(pages, "_MOST_SEEN", 120_000)
    page = page_of(run, output=tmp_path)
    num = page.count("data:image/webp")
    assert 0 < num < 9
    assert f"{9 - num} pictures of cells are not shown" in page
    assert len(page) < 200_000
    monkeypatch.setattr(pages, "_MOST_SEEN", 1000)
    assert 'class="picker"' not in page_of(run, output=tmp_path)


def test_pictures_are_chosen_by_hand_and_by_key_and_the_first_shows_without_a_script(browser, tmp_path):
    page_of(write_cells(tmp_path / "run"), output=tmp_path)
    address = (tmp_path / "page.html").as_uri()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(address)
    assert [one.is_visible() for one in plain.locator(".picker img").all()] == [True, False, False]
    assert not plain.locator(".picker select").is_visible()
    tab, wrong = browser.new_context(viewport={"width": 390, "height": 800}).new_page(), []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(address)

    def shown():
        (one,) = [one for one in tab.locator(".picker img").all() if one.is_visible()]
        return one.get_attribute("alt")

    assert shown() == "cells under one"
    tab.select_option(".picker select", "2")
    assert shown() == "cells under three"
    tab.click(".picker .previous")
    assert shown() == "cells under two"
    tab.locator(".picker").scroll_into_view_if_needed()
    for key, name in (("n", "three"), ("n", "three"), ("p", "two"), ("p", "one"), ("p", "one")):
        tab.keyboard.press(key)
        assert shown() == f"cells under {name}"
    tab.focus(".picker select")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    assert shown() == "cells under two"
    # On a phone every figure stands under its name, and nothing lies beyond the edge.
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for cell in tab.locator(".treated td").all():
        if cell.is_visible():
            box = cell.bounding_box()
            assert 0 <= box["x"]
            assert box["x"] + box["width"] <= 390
    labels = tab.locator(".treated td").evaluate_all("all => all.map(td => getComputedStyle(td, '::before').content)")
    assert '"KIDc x100"' in labels
    assert not wrong
