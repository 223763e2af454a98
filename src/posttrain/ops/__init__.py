"""Tensor operations without model, tokenizer or config."""

# Eager: a lazy name would be hidden by the submodule of the same name. `import posttrain` does not come here.
from posttrain.ops.linear_logprobs import LogProbs, linear_logprobs

__all__ = ["LogProbs", "linear_logprobs"]
