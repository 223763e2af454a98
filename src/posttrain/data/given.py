"""What scripts hand over as a dataset -> rows: lists, tables, the path of a file, a DatasetDict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.data.sources import load_rows
from posttrain.data.tables import rows_of_table
from posttrain.errors import UserError


def rows_of(dataset: Any, name: str = "train_dataset") -> Any:
    """A list of rows; a stream (which has no length) as one that can be iterated anew. None stays None.

    Of a DatasetDict its split `train`. Raises UserError for a mapping that is none, and for whatever `load_rows`
    refuses.
    """
    if isinstance(dataset, str | Path):
        return load_rows(dataset)
    if not isinstance(dataset, Mapping):
        return rows_of_table(dataset)
    splits = ", ".join(map(str, dataset))
    if type(dataset).__module__.partition(".")[0] != "datasets":
        raise UserError(f"{name} is a mapping with the keys {splits}; give rows: a list of mappings, one a row")
    if "train" not in dataset:
        raise UserError(f"{name} has the splits {splits}, but no 'train'; give one of them: {name}=dataset['{next(iter(dataset), 'train')}']")
    return rows_of(dataset["train"], name)


def named(eval_dataset: Any) -> dict[str, Any]:
    """Evaluation data by name: several where a mapping of datasets is given, a DatasetDict included."""
    if eval_dataset is None:
        return {}
    parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    return {name: rows_of(part, "eval_dataset") for name, part in parts.items()}
