"""Files are written whole or not at all."""

import pytest

from posttrain.io import write_whole


def test_an_older_file_stays_when_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "recipe.yaml"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new" * 100_000 + "\ud83d")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for text in ("old", "new"):
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "target").read_text() == text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "target"]
