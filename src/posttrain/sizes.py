"""Sizes that kernels, caches and trainers work with, and that the memory plan counts with. No torch here, so that a
plan needs none."""

from __future__ import annotations

# ops/linear_logprobs: a tile of logits
LOGIT_ROWS = {"cpu": 1024, "mps": 2048, "cuda": 4096}  # at most
LOGIT_ELEMENTS = {"cpu": 2**20, "mps": 2**22, "cuda": 2**24}  # 4 MiB on a CPU, which stay in its caches (benchmarks/linear_logprobs.py)
WHOLE_ROWS = 512  # of a tile that holds the whole vocabulary, at least: with fewer the weight's gradient would pass through memory more often

# ops/prefix_plain, ops/offload
ATTENTION_ROWS = 256  # queries of a chunk under an explicit mask
OFFLOAD_SMALLEST = 2**21  # bytes; a copy of less saves nothing worth the call

# rollout/local
PREFILL_TOKENS = 4096  # of prompts that are computed in one forward
CACHE_TOKENS = 64  # the smallest capacity of the cache; it doubles
DECODE_SCORES = 2**26  # float32 scores of one tile of queries, 256 MiB, where no fused kernel takes them

# trainers
MICRO_BATCH_TOKENS = 4096  # of one forward and backward, unless the settings say otherwise
AUTO_TILE_ROWS = 2048  # tile_rows="auto"

# NF4 with double quantisation (Dettmers et al. 2023): 64 weights share a scale of one byte, 256 scales share one of
# four
NF4_BLOCK, NF4_SCALES = 64, 256
NF4_TABLES = 4 * (16 + 256 + 1)  # the 16 levels, the 256 levels of the scales, the scales' mean


def nf4_bytes(weights: int) -> int:
    """A linear layer in NF4: half a byte a weight, the scales, and the tables to read them."""
    blocks = -(-weights // NF4_BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // NF4_SCALES) + NF4_TABLES
