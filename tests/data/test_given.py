"""What scripts hand over as a dataset becomes rows, without an Arrow table's padding; what is none is a sentence."""

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from posttrain.data.given import rows_of
from posttrain.data.sources import load_rows, stream_rows
from posttrain.errors import UserError

ROWS = [{"text": "a"}, {"text": "b"}]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def tool(name, argument):
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def calling(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [call]}]


TOOLS = [{"messages": CHAT, "tools": [tool("one", "city")]}, {"messages": CHAT, "tools": [tool("two", "litres")]}]
CALLS = [{"messages": calling({"city": "Paris", "unit": None})}, {"messages": calling({"n": 1})}]


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        datasets.Dataset.from_list(ROWS),
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list([{"text": "c"}])),
        pandas.DataFrame(ROWS),
        pyarrow.Table.from_pylist(ROWS),
    ],
    ids=lambda given: type(given).__name__,
)
def test_every_kind_of_table_is_its_rows(given):
    assert list(rows_of(given)) == ROWS


def test_the_path_of_a_file_is_its_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert rows_of(str(tmp_path / "rows.jsonl")) == rows_of(tmp_path / "rows.jsonl") == ROWS


def test_a_data_frame_gives_lists_and_no_nan():
    frame = pandas.DataFrame({"prompt": [CHAT, CHAT], "level": [1.0, float("nan")]})
    assert rows_of(frame) == [{"prompt": CHAT, "level": 1.0}, {"prompt": CHAT, "level": None}]


def test_splits_without_train_and_mappings_of_columns_are_sentences():
    with pytest.raises(UserError, match=r"has the splits test, but no 'train'; give one of them: train_dataset=dataset\['test'\]"):
        rows_of(datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)))
    with pytest.raises(UserError, match="is a mapping with the keys text; give rows"):
        rows_of({"text": ["a", "b"]})


def test_the_padding_of_a_table_goes():
    table = datasets.Dataset.from_list(TOOLS)
    assert table[0] != TOOLS[0], "the table pads"
    assert list(rows_of(table)) == TOOLS
    assert list(rows_of(table.to_iterable_dataset())) == TOOLS
    assert list(rows_of(table.to_iterable_dataset())) == TOOLS


def test_nulls_of_a_json_column_stay():
    assert list(rows_of(datasets.Dataset.from_list(CALLS, on_mixed_types="use_json"))) == CALLS


def test_other_columns_keep_their_nulls():
    rows = [{"prompt": "a", "tests": {"input": "1", "output": None}}, {"prompt": "b", "tests": {"input": None, "output": "2"}}]
    assert list(rows_of(datasets.Dataset.from_list(rows))) == rows


@pytest.mark.parametrize("rows", [TOOLS, CALLS])
@pytest.mark.parametrize("mixed", ["use_json", None])
def test_parquet_is_read_as_datasets_reads_it(tmp_path, rows, mixed):
    path = str(tmp_path / "rows.parquet")
    table = datasets.Dataset.from_list(rows, **({"on_mixed_types": mixed} if mixed else {}))
    table.to_parquet(path)
    assert load_rows(path) == list(stream_rows(path)) == list(rows_of(table))
    if mixed:
        assert load_rows(path) == rows


def test_parquet_without_the_notes_of_datasets_has_no_padding_either(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TOOLS), tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet") == TOOLS


def test_half_a_character_in_a_file_is_named_with_its_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "a \\\\ud83d b"}\n{"text": "\\\\ud83d\\\\ude00"}\n'.replace("\\\\", "\\"))
    with pytest.raises(UserError, match=r"line 2: text holds half a character"):
        load_rows(tmp_path / "rows.jsonl")
