"""Mixtures: how often each source's rows come, and that the choice is always the same."""

import json
from collections import Counter

import pytest

from posttrain.data.formats import validate_rows
from posttrain.data.mixture import load_data
from posttrain.errors import UserError


@pytest.fixture
def files(tmp_path):
    for name, size in (("a", 40), ("b", 10)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name}{i}"}) for i in range(size)))
    return {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl")}


def test_weights_are_times_that_rows_are_taken(files):
    rows = load_data([{"path": files["a"], "weight": 0.25}, {"path": files["b"], "weight": 2.5}])
    counts = Counter(row["text"] for row in rows)
    assert sum(counts[f"a{i}"] for i in range(40)) == 10
    assert sum(counts[f"b{i}"] for i in range(10)) == 25
    assert {counts[f"b{i}"] for i in range(10)} == {2, 3}


def test_rows_that_are_taken_again_have_ids_of_their_own(tmp_path):
    source = tmp_path / "c.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": "!", "id": i}) for i in range(4)))
    rows = load_data([{"path": str(source), "weight": 2.5}])
    assert [row["id"] for row in rows[:8]] == [0, 1, 2, 3, "0#2", "1#2", "2#2", "3#2"]
    validate_rows(rows)


def test_a_mixture_is_always_the_same_and_another_with_another_seed(files):
    mixture = [{"path": files["a"], "weight": 0.5}, files["b"]]
    assert load_data(mixture) == load_data(mixture) != load_data(mixture, seed=1)


def test_a_streamed_mixture_has_every_row_once_and_begins_by_the_weights(files):
    stream = load_data([{"path": files["a"], "weight": 1}, {"path": files["b"], "weight": 9}], streaming=True)
    texts = [row["text"] for row in stream]
    assert sorted(texts) == sorted([f"a{i}" for i in range(40)] + [f"b{i}" for i in range(10)])
    assert sum(text.startswith("b") for text in texts[:10]) >= 7
    assert [row["text"] for row in stream] == texts


def test_columns_are_renamed(files):
    assert load_data([{"path": files["b"], "rename": {"text": "prompt"}}])[0] == {"prompt": "b0"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"path": "x.jsonl", "wieght": 1}, "Did you mean 'weight'"),
        ({"weight": 1}, "a source of a mixture is a path, or"),
        ({"path": "x.jsonl", "weight": 0}, "a weight is a number above 0"),
        ({"path": "x.jsonl", "weight": True}, "a weight is a number above 0"),
        (5, "a source of a mixture is a path, or"),
    ],
)
def test_what_is_no_source_is_explained(source, sentence):
    with pytest.raises(UserError, match=sentence):
        load_data([source])


def test_a_column_that_is_not_there_cannot_be_renamed(files):
    with pytest.raises(UserError, match=r"has no column 'txt' to rename; it has: text\. Did you mean 'text'"):
        load_data([{"path": files["b"], "rename": {"txt": "prompt"}}])


def test_an_empty_mixture_is_refused():
    with pytest.raises(UserError, match="the mixture has no sources"):
        load_data([])
