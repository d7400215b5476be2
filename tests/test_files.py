"""Names and tables that go to the disk."""

import os
import time

import numpy as np
import pytest

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import csv_rows, csv_text, mapped, safe_name
from cellflux_bridge.base.parallel import threaded


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


def test_a_table_is_read_as_it_was_written(tmp_path):
    header, row = ["a", "b", "c", "d"], ["=1", "'=1", "''-x", "it's, 'so'\n\"too\""]
    (tmp_path / "t.csv").write_text(csv_text([header, row]), newline="")
    assert list(csv_rows(tmp_path / "t.csv")) == [dict(zip(header, row, strict=True))]
    for rest in ("1,2,3", "1,2,3,4,5"):
        (tmp_path / "t.csv").write_text(f"a,b,c,d\n1,2,3,4\n{rest}\n")
        with pytest.raises(UserError, match=r"t\.csv, line 3: [35] cells, but the header has 4"):
            list(csv_rows(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_bytes(b"a,b\n\xff,1\n")
    with pytest.raises(UserError, match=r"t\.csv, line"):
        list(csv_rows(tmp_path / "t.csv"))


def test_one_thread_at_a_time_reads_the_header_of_an_array(tmp_path, monkeypatch):
    """Threads that parse headers at the same time fail on good files in some versions of Python."""
    inside, most = [], []
    parse = np.lib.format.open_memmap

    def slow(*args, **kwargs):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.01)  # the other threads would come in here
        inside.pop()
        return parse(*args, **kwargs)

    for number in range(8):
        np.save(tmp_path / f"{number}.npy", np.full((2, 3), number))
    monkeypatch.setattr("numpy.lib.format.open_memmap", slow)
    found = threaded(mapped, [tmp_path / f"{number}.npy" for number in range(8)], workers=8, desc="arrays")
    assert [int(array[1, 2]) for array in found] == list(range(8))
    assert max(most) == 1


def test_no_array_is_mapped_from_what_is_no_file_or_holds_objects(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match="object"):
        mapped(tmp_path / "objects.npy")
    with pytest.raises(OSError, match="no regular file"):
        mapped(tmp_path / "folder.npy")
