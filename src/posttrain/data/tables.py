"""Rows of tables: `datasets` of all kinds, data frames, Arrow tables.

An Arrow table gives every struct the keys of all others and pads with nulls. In columns that go to the chat template
those are taken out again, as the table's own features tell where they are. A column of the type Json() has no padding,
so its nulls stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from posttrain.errors import UserError

PADDED = ("prompt", "completion", "chosen", "rejected", "messages", "conversations", "tools", "chat_template_kwargs")


def rows_of_table(dataset: Any) -> Any:
    """A list of rows; of a stream (which has no length) one that can be iterated again. What is no table stays as it
    is."""
    module = type(dataset).__module__.partition(".")[0]
    if module == "datasets":
        features = dataset.features
        if hasattr(dataset, "__len__"):
            return list(unpadded(dataset, features))
        return dataset if features is None else Again(dataset, features)
    if module == "pandas":
        return [{key: _plain(value) for key, value in row.items()} for row in dataset.to_dict("records")]
    if module in ("polars", "pyarrow"):
        return dataset.to_dicts() if module == "polars" else list(read(dataset.to_pylist(), features_of(dataset.schema)))
    return dataset


class Again:
    """A stream of a `datasets` dataset without padding."""

    def __init__(self, dataset: Iterable[Mapping[str, Any]], features: Any) -> None:
        self.dataset, self.features = dataset, features

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return unpadded(self.dataset, self.features)


def unpadded(rows: Iterable[Mapping[str, Any]], features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows that `datasets` has decoded, without the padding of their structs."""
    columns = {name: features[name] for name in PADDED if name in features and _has_structs(features[name])}
    for row in rows:
        yield {name: _without_padding(value, columns[name]) if name in columns else value for name, value in row.items()}


def read(rows: Iterable[Mapping[str, Any]], features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows as they lie in an Arrow table or a Parquet file, as `datasets` reads them, without padding."""
    as_json = {name: feature for name, feature in features.items() if "Json(" in repr(feature)}
    return unpadded(({name: _decoded(value, as_json[name]) if name in as_json else value for name, value in row.items()} for row in rows), features)


def features_of(schema: Any) -> Any:
    """The features of an Arrow schema: those that `datasets` noted in it, else what its types say."""
    import datasets

    try:
        return datasets.Features.from_arrow_schema(schema)
    except ValueError as error:
        raise UserError(f"the columns are of a kind that datasets {datasets.__version__} does not know ({error}); update datasets") from error


def _inner(feature: Any) -> Any:
    """Of a feature of lists, the feature of their items; None for another."""
    if isinstance(feature, list):
        return feature[0]
    return feature.feature if type(feature).__name__ in ("List", "LargeList", "Sequence") else None


def _has_structs(feature: Any) -> bool:
    return isinstance(feature, Mapping) or (_inner(feature) is not None and _has_structs(_inner(feature)))


def _without_padding(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: _without_padding(inner, feature.get(name)) for name, inner in value.items() if inner is not None}
    inner = _inner(feature)
    return [_without_padding(item, inner) for item in value] if inner is not None and isinstance(value, list) else value


def _decoded(value: Any, feature: Any) -> Any:
    """`value` with the JSON text of Json() columns read."""
    if type(feature).__name__ == "Json":
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: _decoded(inner, feature.get(name)) for name, inner in value.items()}
    inner = _inner(feature)
    return [_decoded(item, inner) for item in value] if inner is not None and isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A cell of a data frame: arrays become lists, and NaN, which stands for nothing, None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
