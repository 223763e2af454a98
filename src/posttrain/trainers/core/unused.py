"""Settings of other libraries that have nothing to set here: what they ask for is so already, or is done in another
way.

They are accepted with one line that says what is done instead. Where somebody would get something else than was asked
for, a setting is refused (`BaseConfig.refused`).
"""

from __future__ import annotations

import logging
from typing import Any

from posttrain.errors import UserError, did_you_mean
from posttrain.secrets import is_secret

logger = logging.getLogger(__name__)

Table = dict[str, tuple[Any, str]]  # name -> (its usual value, which needs no line; what is done instead)

NO_PADDING = "streams have no padding"
EVERYWHERE: Table = {
    "dataset_num_proc": (None, "rows are tokenized in this process"),
    "pad_to_multiple_of": ("auto", NO_PADDING),
    "pad_token": (None, NO_PADDING),
    "group_by_length": (False, "nothing is padded, so that lengths need no grouping"),
    "save_safetensors": (True, "weights are always saved as safetensors"),
}
# Settings of earlier versions of transformers, and their names now. A warmup below 1 is a fraction of all steps.
RENAMED = {"warmup_ratio": "warmup_steps", "evaluation_strategy": "eval_strategy"}
_OWN_ENGINE = "the model that is trained also samples, with the engine 'local'"
_NO_MISMATCH = "one model samples and trains, so there is no mismatch to correct"
_BATCHES = "the local engine batches continuously, with a KV cache of its own"
ONLINE: Table = {
    "use_vllm": (False, _OWN_ENGINE),
    "vllm_mode": ("colocate", _OWN_ENGINE),
    "vllm_model_impl": ("vllm", _OWN_ENGINE),
    "vllm_enable_sleep_mode": (False, _OWN_ENGINE),
    "vllm_server_base_url": (None, _OWN_ENGINE),
    "vllm_server_host": ("0.0.0.0", _OWN_ENGINE),
    "vllm_server_port": (8000, _OWN_ENGINE),
    "vllm_server_timeout": (240.0, _OWN_ENGINE),
    "vllm_group_port": (51216, _OWN_ENGINE),
    "vllm_gpu_memory_utilization": (0.3, _OWN_ENGINE),
    "vllm_max_model_length": (None, _OWN_ENGINE),
    "vllm_max_model_len": (None, _OWN_ENGINE),
    "vllm_tensor_parallel_size": (1, _OWN_ENGINE),
    "vllm_device": ("auto", _OWN_ENGINE),
    "vllm_dtype": ("auto", _OWN_ENGINE),
    "vllm_enable_prefix_caching": (None, _OWN_ENGINE),
    "vllm_sampling_params": (None, "its top_p, top_k, min_p and stop are taken as settings of these names, and nothing else of it"),
    "vllm_importance_sampling_correction": (True, _NO_MISMATCH),
    "vllm_importance_sampling_mode": ("sequence_mask", _NO_MISMATCH),
    "vllm_importance_sampling_clip_max": (3.0, _NO_MISMATCH),
    "vllm_importance_sampling_clip_min": (None, _NO_MISMATCH),
    "vllm_importance_sampling_cap": (None, _NO_MISMATCH),
    "use_transformers_paged": (False, _BATCHES),
    "use_transformers_continuous_batching": (False, _BATCHES),
    "transformers_continuous_batching_config": (None, _BATCHES),
    "cache_implementation": (None, _BATCHES),
    "ds3_gather_for_generation": (True, "weights are whole in every process"),
    "cast_lm_head_to_fp32": (False, "log-probs are accumulated in float32 whatever the head's dtype is"),
    "log_multimodal": (True, "there are no images to log"),
}
_COUNTED = "max_tokens_per_micro_batch says how much goes through the model at once"
OFFLINE: Table = {
    "padding_free": (False, NO_PADDING),
    "padding_value": (None, NO_PADDING),
    "label_pad_token_id": (-100, NO_PADDING),
    "precompute_ref_batch_size": (None, _COUNTED),
}
# Fields of TrainingArguments that no trainer here reads: (values that need no line, what is done instead).
FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_liger_kernel": ((False,), "log-probs are fused already (posttrain.ops.linear_logprobs)"),
    "torch_compile": ((False,), "the attention layouts are not traceable, so nothing is compiled"),
    "train_sampling_strategy": (("random", "sequential"), "nothing is padded, so that lengths need no grouping"),  # sequential is refused
    "dataloader_drop_last": ((False,), "an update is a mean over what it holds, so a smaller last one is sound, and kept"),
    "bf16_full_eval": ((False,), "an evaluation has the precision of training"),
    "fp16_full_eval": ((False,), "an evaluation has the precision of training"),
    "torch_empty_cache_steps": ((None,), "max_tokens_per_micro_batch bounds the memory"),
    "enable_jit_checkpoint": ((False,), "SIGTERM finishes the step and saves it anyway"),
}
OFF = ("use_liger_kernel", "torch_compile", "bf16_full_eval", "fp16_full_eval")  # which transformers would act upon


def renamed(given: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The keywords with settings of earlier versions under their names now. Raises UserError where both say different
    things."""
    older = {name: given[name] for name in RENAMED.keys() & given.keys() if name not in known}
    kept = {name: value for name, value in given.items() if name not in older}
    for name, value in older.items():
        new = RENAMED[name]
        if value and kept.get(new) not in (None, 0, value):
            raise UserError(f"{name}={value!r} and {new}={kept[new]!r} are one setting with two values; leave {name} out")
        kept[new] = value or kept.get(new, value)
    return kept


def without_foreign(cls: Any, given: dict[str, Any], known: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords that are settings of the config `cls`, and those that are settings elsewhere and change nothing
    here.

    Raises UserError for what nobody knows, and for what is refused.
    """
    foreign = {name: value for name, value in given.items() if name not in known}
    for name, value in foreign.items():
        if name in cls.unused:
            continue
        if name not in cls.refused:
            raise UserError(f"{name} is not a setting of {cls.__name__}.{did_you_mean(name, known)}")
        harmless, why = cls.refused[name]
        if value != harmless:
            raise UserError(f"{name}: {why}")
    unused = {name: value for name, value in foreign.items() if name in cls.unused}
    say({name: value for name, value in unused.items() if value is not None and value != cls.unused[name][0]}, cls.unused)
    return {name: value for name, value in given.items() if name in known}, unused


def say_fields(args: Any) -> None:
    """A line for the fields of `args` that nothing here reads (older versions of transformers lack some); what
    transformers would do about them is switched off."""
    changed = {name: getattr(args, name) for name, (usual, _) in FIELDS.items() if getattr(args, name, usual[0]) not in usual}
    say(changed, FIELDS)
    for name in changed.keys() & set(OFF):
        setattr(args, name, False)


def say(changed: dict[str, Any], table: Any) -> None:
    """One line for all that have the same reason; a secret is named without its value."""
    by_reason: dict[str, list[str]] = {}
    for name, value in changed.items():
        by_reason.setdefault(table[name][1], []).append(name if is_secret(name, value) else f"{name}={value!r}")
    for why, named in by_reason.items():
        logger.warning("%s: nothing to set here, since %s", ", ".join(named), why)
