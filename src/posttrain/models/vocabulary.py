"""Token ids that a model has no embedding for. Looked for in the data and not by sizes: some models ship a tokenizer
with a token too many, unused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from posttrain.errors import UserError
from posttrain.models.head import base_model


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the embedding: ids from there on do not exist."""
    embedding: Any = base_model(model).get_input_embeddings()
    return int(embedding.weight.shape[0])


def check_ids(model: nn.Module, tokenizer: Any, encoded: Iterable[Sequence[int]]) -> None:
    """Raises UserError for the first row of `encoded` with a token that is beyond the model's embedding."""
    rows = vocabulary_of(model)
    for number, ids in enumerate(encoded):
        largest = max(ids, default=0)
        if largest >= rows:
            raise UserError(
                f"row {number} has the token {tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}, but the model's embedding ends at {rows - 1}: "
                "give the model's own tokenizer, or grow the model with model.resize_token_embeddings(len(tokenizer)) and train its embedding and head "
                "(with LoRA: modules_to_save)"
            )
