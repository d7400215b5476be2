"""Names and tables that go to the disk."""

import os

import pytest

from cellflux_bridge.base.files import csv_text, safe_name


@pytest.mark.parametrize("text", ["a", "lung_n", "ADH.2-x", "Präparat_7"])
def test_a_plain_name_stays_as_it_is(text):
    assert safe_name(text) == text


@pytest.mark.parametrize(
    "text", ["", "..", ".", "../x", "/abs", "a/b", "a\\b", "b" * 300, "ü" * 200, "a\0b", "\udcff", "x y"]
)
def test_any_text_becomes_one_component_of_bounded_length(tmp_path, text):
    name = safe_name(text, room=10)
    assert len(os.fsencode(name)) <= 245
    assert (tmp_path / name).parent == tmp_path
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    (tmp_path / name).touch()


def test_texts_that_are_changed_alike_keep_different_names():
    assert len({safe_name(text) for text in ("a/b", "a_b", "a\\b", "a b", "b" * 300, "b" * 301)}) == 6


def test_no_cell_starts_a_formula_and_numbers_stay_numbers():
    text = csv_text([["=1+1", "+x", "-y", "@z", "plain", -1.5, None]])
    assert text == "'=1+1,'+x,'-y,'@z,plain,-1.5,\r\n"
