"""A resumed run is compared with every row and every weight that it began with."""

import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from small import build_model, build_tokenizer

from posttrain.trainers.core.fingerprint import of_rows, of_weights
from posttrain.types import Task

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "about": {"level": i % 3, "tags": ["a", None]}} for i in range(5000)]


@pytest.mark.parametrize("form", ["list", "tasks", "arrow"])
def test_whatever_row_changes_the_fingerprint_does(form):
    """Of 5,000 rows version 1 read every second one."""

    def made(rows):
        if form == "tasks":
            return [Task(number, row["prompt"], row) for number, row in enumerate(rows)]
        return datasets.Dataset.from_list(rows) if form == "arrow" else rows

    first = of_rows(made(ROWS))
    assert of_rows(made(ROWS)) == first
    for number in (0, 1, 2501, 4999):
        changed = [*ROWS[:number], {**ROWS[number], "answer": "0"}, *ROWS[number + 1 :]]
        assert of_rows(made(changed)).now != first.now
    assert of_rows(made([*ROWS[:7], ROWS[8], ROWS[7], *ROWS[9:]])).now != first.now  # their order counts


def test_the_same_rows_in_other_chunks_are_the_same():
    table = datasets.Dataset.from_list(ROWS)
    halves = datasets.concatenate_datasets([table.select(range(1234)), table.select(range(1234, 5000))])
    assert of_rows(halves).now == of_rows(table).now == of_rows(ROWS).now


def test_an_object_counts_by_what_it_says_and_not_by_where_it_lies():
    class Box:
        pass

    assert of_rows([{"x": Box()}]).now == of_rows([{"x": Box()}]).now
    assert of_rows([{"x": np.arange(3)}]).now != of_rows([{"x": np.arange(1, 4)}]).now
    assert of_rows([{1: "x", "1": "\ud800"}]).now != of_rows([{1: "y", "1": "\ud800"}]).now
    assert of_rows([{"text": "at 0x7f01"}]).now != of_rows([{"text": "at 0x7f02"}]).now


def test_a_set_counts_by_what_it_holds_and_not_by_the_order_that_a_process_gives_it():
    program = (
        "from posttrain.trainers.core.fingerprint import of_rows; print(of_rows([{'units': {'cm', 'm', 'km', 'mm'}, 'x': frozenset('abcdef')}]).now)"
    )
    outputs = [subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE) for seed in "12"]
    assert outputs[0].stdout == outputs[1].stdout != b""
    assert of_rows([{"x": {"cm", "m"}}]).now != of_rows([{"x": {"cm", "km"}}]).now


def test_whatever_weight_changes_the_fingerprint_does():
    model = build_model(build_tokenizer())
    first = of_weights(model)
    assert of_weights(build_model(build_tokenizer())) == first
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(torch.inf))  # its last value, by one bit
    assert of_weights(model).now != first.now
    assert of_weights(model).sampled == first.sampled  # 16 values of each did not see it
