"""Rows that hold token ids already: `input_ids`, and which of them are trained, as `labels` or as masks. Nothing is
tokenized or appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.errors import UserError

IGNORED = -100  # the label of a token that is not trained
COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")


def is_tokenized(row: Any) -> bool:
    return isinstance(row, Mapping) and row.get("input_ids") is not None


def read_tokenized(row: Mapping[str, Any], *, completion_only: bool | None, assistant_only: bool) -> tuple[list[int], list[bool]]:
    """([S], [S]) ids and which of them are trained: all that have a label, and of those what every mask that applies
    lets through.

    completion_mask applies unless completion_only is False, assistant_masks always. Tokens with attention_mask 0 are
    padding and left out. Raises UserError for columns that do not belong together.
    """
    columns = {name: _listed(row[name], name) for name in COLUMNS if row.get(name) is not None}
    ids = columns.pop("input_ids")
    for name, values in columns.items():
        if len(values) != len(ids):
            raise UserError(f"its {name} has {len(values)} entries for {len(ids)} input_ids; give one for each token")
    if assistant_only and "assistant_masks" not in columns and "labels" not in columns:
        raise UserError("assistant_only_loss needs the column assistant_masks (or labels) where rows are tokenized already")
    if completion_only and "completion_mask" not in columns and "labels" not in columns:
        raise UserError("completion_only_loss needs the column completion_mask (or labels) where rows are tokenized already")
    trained = [True] * len(ids)
    if "labels" in columns:
        trained = [label != IGNORED for label in columns["labels"]]
        if any(keeps and label != id for keeps, label, id in zip(trained, columns["labels"], ids, strict=True)):
            raise UserError(f"its labels name other tokens than its input_ids; a label is the token itself, or {IGNORED} (they are shifted here)")
    masks = [columns[name] for name in _masks(completion_only) if name in columns]
    trained = [keeps and all(mask[place] for mask in masks) for place, keeps in enumerate(trained)]
    real = columns.get("attention_mask", [1] * len(ids))
    kept = [(id, keeps) for id, keeps, is_real in zip(ids, trained, real, strict=True) if is_real]
    return [id for id, _ in kept], [keeps for _, keeps in kept]


def _masks(completion_only: bool | None) -> Sequence[str]:
    return ("assistant_masks",) if completion_only is False else ("assistant_masks", "completion_mask")


def _listed(values: Any, name: str) -> list[int]:
    """Numbers of a list, an array or a tensor."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str) or any(isinstance(value, float | str | Sequence) for value in values):
        raise UserError(f"its {name} must be a list of whole numbers, not {values!r:.80}")
    return [int(value) for value in values]
