"""Files are there whole or as they were."""

import pytest

from dro_jax.whole_files import whole_file, write_whole


def test_text_and_bytes_take_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    write_whole(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_what_is_not_finished_changes_nothing_and_is_written_over(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:  # noqa: PT012
        partial.write_text("a much longer half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with whole_file(path) as partial:
        assert partial.parent == path.parent
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]
