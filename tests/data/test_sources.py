"""Reading rows, and saying what is wrong with those that cannot be read."""

import json

import pytest

from posttrain.data.sources import column_names, load_rows, stream_rows
from posttrain.errors import UserError

ROWS = [{"question": "2+2?", "answer": "4"}, {"question": 'ä\u2028ö,"quoted"', "answer": "x\ny"}]


def write(path, text):
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


def test_jsonl_json_csv_and_parquet_give_the_same_rows(tmp_path):
    import csv

    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
    write(tmp_path / "b.json", json.dumps(ROWS))
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet"):
        assert load_rows(tmp_path / name) == ROWS


def test_a_stream_gives_the_same_rows_again_and_again(tmp_path):
    import datasets

    write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.jsonl", "saved"):
        stream = stream_rows(tmp_path / name)
        assert list(stream) == list(stream) == ROWS
        assert [row["n"] for row in stream.map(lambda row, number: {**row, "n": number})] == [0, 1]


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path):
    rows = iter(stream_rows(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n')))
    assert next(rows) == {"a": 1}
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        next(rows)


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    assert load_rows(write(tmp_path / "a.csv", "\ufeffquestion\nx\n")) == [{"question": "x"}]
    assert load_rows(write(tmp_path / "a.jsonl", '\ufeff{"question": "x"}\n')) == [{"question": "x"}]


def test_a_directory_that_datasets_saved_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    rows = load_rows(tmp_path / "saved")
    assert list(rows) == ROWS
    assert column_names(rows) == ["question", "answer"]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match=r"several splits.*train"):
        load_rows(tmp_path / "splits")
    assert list(load_rows(tmp_path / "splits" / "train")) == ROWS


def test_columns_are_those_that_any_row_has():
    assert column_names([{"a": 1}, {"b": 1, "a": 2}]) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', "line 2 is a list"),
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8"),
        ("a.jsonl", "[" * 100_000, "nested too deeply|not valid JSON"),
        ("a.json", '{"a": 1}', "must hold a list"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "line 2 is not valid JSON"),
        ("a.json", '[{"a": 1}, "x"]', "row 1 is text"),
        ("a.csv", "a,b\n1,2\n1\n", "line 3: 1 fields where the header names 2"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: 3 fields where the header names 2"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.parquet", "not parquet", "not a readable Parquet file"),
        ("a.txt", "hello", r"cannot tell the format from '\.txt'"),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        load_rows(write(tmp_path / name, content))


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(UserError, match=r"trian\.jsonl does not exist\. Did you mean 'train\.jsonl'"):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        load_rows("./nowhere/at/all.jsonl")


def test_a_directory_without_data_lists_what_it_has(tmp_path):
    write(tmp_path / "rows.jsonl", "{}")
    with pytest.raises(UserError, match=r"rows\.jsonl"):
        load_rows(tmp_path)


def test_a_hub_name_is_split_into_name_config_and_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, streaming: asked.append((name, config, split)) or ROWS)
    for source in ("openai/gsm8k", "openai/gsm8k:main", "openai/gsm8k:main:test"):
        assert load_rows(source) == ROWS
    assert asked == [("openai/gsm8k", None, "train"), ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"ConnectionError: no route.*JSONL"):
        load_rows("openai/gsm8k:main")
