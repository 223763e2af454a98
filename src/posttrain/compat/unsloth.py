"""Unsloth's names, for its notebooks: `FastLanguageModel` on top of `load_policy`'s parts, the local engine and the
export.

Nothing is patched: a model is transformers', and carries the methods that notebooks call on it (`fast_generate`,
`save_lora`, ...).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import UserError, did_you_mean

Unused = dict[str, tuple[tuple[Any, ...], str]]

METHODS = ("fast_generate", "load_lora", "save_lora", "save_pretrained_merged", "save_pretrained_gguf")
_ONE_MODEL = "the model that is trained also samples, and its cache is freed after each rollout"
_AUTOMATIC = "gradient_checkpointing='auto' of a trainer's settings turns it on where the job does not fit without it"
# Arguments that have nothing to set here: name -> (values that need no line, what is done instead).
_LOADING: Unused = {
    "fast_inference": ((False,), _ONE_MODEL),
    "gpu_memory_utilization": ((None,), _ONE_MODEL),
    "max_lora_rank": ((None,), _ONE_MODEL),
    "float8_kv_cache": ((False,), _ONE_MODEL),
    "unsloth_vllm_standby": ((False,), _ONE_MODEL),
    "use_gradient_checkpointing": ((True, False, None), _AUTOMATIC),
    "token": ((None,), "the token of `hf auth login`, or HF_TOKEN, is used"),
    "device_map": ((None, "sequential", "auto"), "a trainer puts the model where it trains"),
    "attn_implementation": ((None,), "attention is posttrain's own"),
    "disable_log_stats": ((True, False), _ONE_MODEL),
}
_ADAPTERS: Unused = {
    "use_gradient_checkpointing": ((True, False, None), _AUTOMATIC),
    "loftq_config": ((None, {}), "adapters begin as PEFT's LoraConfig says"),
    "max_seq_length": ((None, 2048), "the length is a setting of the trainer: max_length, or max_completion_length"),
    "finetune_language_layers": ((True,), "target_modules says which layers are adapted"),
    "finetune_attention_modules": ((True,), "target_modules says which layers are adapted"),
    "finetune_mlp_modules": ((True,), "target_modules says which layers are adapted"),
    "finetune_vision_layers": ((False,), "only text models are trained"),
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class SamplingParams:
    """vLLM's settings of sampling, as notebooks write them; also for `GRPOConfig(vllm_sampling_params=...)`."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    max_tokens: int = 16
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    include_stop_str_in_output: bool = False  # does nothing: a stop token is no part of the text, a stop string always is

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop


@dataclass(frozen=True)
class FastOutput:
    """One completion, as vLLM's: its text, its tokens, and why it ended."""

    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class FastAnswer:
    """All completions of one prompt: `answer.outputs[0].text`."""

    prompt: Any
    outputs: list[FastOutput] = field(default_factory=list)


@dataclass(frozen=True)
class LoraRequest:
    """Saved adapters to generate with."""

    path: str


class FastLanguageModel:
    """`model, tokenizer = FastLanguageModel.from_pretrained(...)`, then `get_peft_model`; trainers take the two."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        random_state: int = 3407,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> tuple[Any, Any]:
        """The model, or the adapters on theirs, and the tokenizer. dtype: None: float32 where all weights are trained,
        else the checkpoint's."""
        from posttrain.models.adapter_files import base_of, is_adapter
        from posttrain.models.load import load_tokenizer
        from posttrain.models.merge import load_trainable
        from posttrain.models.precision import beside_adapters, default_autocast
        from posttrain.models.quantise import in_4bit

        _check_others(others, _LOADING)
        if load_in_8bit or (load_in_4bit and full_finetuning):
            raise UserError("load_in_8bit is not built; use load_in_4bit" if load_in_8bit else "4-bit weights cannot be trained: load_in_4bit=False")
        base = base_of(model_name) if is_adapter(model_name) else model_name
        packed = in_4bit(base, has_adapters=True) if load_in_4bit else {}
        given = dtype if dtype is not None else "float32" if full_finetuning else beside_adapters(model_name, default_autocast())
        model = load_trainable(model_name, dtype=given, trust_remote_code=trust_remote_code, seed=random_state, **packed)
        return _with_methods(model, load_tokenizer(model_name, trust_remote_code=trust_remote_code), max_seq_length), _tokenizer_of(model)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str = LINEARS,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: list[str] | None = None,
        **others: Any,
    ) -> Any:
        """The model inside a PeftModel with new adapters."""
        from peft import LoraConfig

        from posttrain.models.adapters import add_lora

        _check_others(others, _ADAPTERS)
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        lora = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=targets,
            bias=bias,  # type: ignore[arg-type]
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            task_type="CAUSAL_LM",
        )
        return _with_methods(add_lora(model, lora, seed=random_state), _tokenizer_of(model), model.max_seq_length)

    @staticmethod
    def for_inference(model: Any) -> Any:
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: Any = True) -> Any:
        return model.train()


FastModel = FastLanguageModel


class FastMethods:
    """What notebooks call on a model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def fast_generate(self, prompts: Any, sampling_params: Any = None, lora_request: LoraRequest | None = None, **_: Any) -> list[FastAnswer]:
        """Completions of one prompt or several, as text with the template in it or as messages. Without a lora_request
        the adapters are off."""
        from posttrain.policy import Policy

        params = SamplingParams() if sampling_params is None else sampling_params
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        with _adapters(self.model, lora_request):
            groups = Policy(self.model, self.tokenizer).sample(
                listed,
                n=params.n,
                seed=params.seed,
                max_new_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=max(params.top_k or 0, 0),
                min_p=params.min_p or None,
                stop_strings=tuple(params.stop or ()),
                stop_token_ids=tuple(params.stop_token_ids or ()),
            )
        return [
            FastAnswer(group.task.prompt, [FastOutput(one.text, list(one.token_ids), one.stop.value) for one in group.completions])
            for group in groups
        ]

    def save_lora(self, path: str) -> None:
        """The adapters, and the tokenizer beside them."""
        if not _has_adapters(self.model):
            raise UserError("the model has no adapters to save; make them with FastLanguageModel.get_peft_model")
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def load_lora(self, path: str, **_: Any) -> LoraRequest:
        """Adapters for `fast_generate`; they are read there."""
        if not (Path(path) / "adapter_config.json").is_file():
            raise UserError(f"there are no adapters in {path}; save them with model.save_lora")
        return LoraRequest(path)

    def save_pretrained_merged(self, path: str, tokenizer: Any = None, save_method: str = "merged_16bit", **_: Any) -> None:
        """merged_16bit: all weights with the adapters folded in. lora: the adapters alone."""
        from posttrain.export import export_model
        from posttrain.models.load import is_quantised

        if save_method == "lora":
            self.save_lora(path)
            return
        if save_method not in ("merged_16bit", "merged_16bit_forced"):
            raise UserError(f"save_method={save_method!r} is not built; use 'merged_16bit' or 'lora'")
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            (tokenizer or self.tokenizer).save_pretrained(folder)
            export_model(folder, path, load_in_4bit=is_quantised(self.model))

    def save_pretrained_gguf(self, path: str, *_: Any, **__: Any) -> None:
        """Not built."""
        raise UserError(f"GGUF files are not written here: model.save_pretrained_merged({path!r}, tokenizer), and convert that with llama.cpp")


def is_bfloat16_supported() -> bool:
    from posttrain.models.precision import default_autocast

    return default_autocast() is not None


def PatchFastRL(*_: Any, **__: Any) -> None:
    """Does nothing: nothing is patched."""


def _with_methods(model: Any, tokenizer: Any, max_seq_length: int) -> Any:
    methods = FastMethods(model, tokenizer)
    for name in METHODS:
        setattr(model, name, getattr(methods, name))
    model.max_seq_length = max_seq_length
    return model


def _tokenizer_of(model: Any) -> Any:
    if not hasattr(model, "fast_generate"):
        raise UserError("the model was not loaded with FastLanguageModel.from_pretrained, so its tokenizer is not known")
    return model.fast_generate.__self__.tokenizer


def _has_adapters(model: Any) -> bool:
    return hasattr(model, "peft_config")


@contextlib.contextmanager
def _adapters(model: Any, request: LoraRequest | None) -> Iterator[None]:
    """With the weights of the request in the model's adapters, or with these off. They are what they were
    afterwards."""
    if not _has_adapters(model):
        if request is not None:
            raise UserError("the model has no adapters to hold those of lora_request; make them with FastLanguageModel.get_peft_model")
        yield
        return
    if request is None:
        with model.disable_adapter():
            yield
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    before = {name: weight.detach().clone() for name, weight in get_peft_model_state_dict(model).items()}
    try:
        set_peft_model_state_dict(model, load_peft_weights(request.path))
        yield
    except RuntimeError as error:  # PEFT's: other shapes
        raise UserError(f"the adapters in {request.path} do not fit the model's: {' '.join(str(error).split())[:200]}") from error
    finally:
        set_peft_model_state_dict(model, before)


def _check_others(given: dict[str, Any], known: Unused) -> None:
    """A line for arguments that have nothing to set here. Raises UserError for those that nobody knows."""
    from posttrain.trainers.core.unused import say

    for name in given:
        if name not in known:
            raise UserError(f"{name} is not known here; what Unsloth has and posttrain does is in docs/migration.md.{did_you_mean(name, known)}")
    say({name: value for name, value in given.items() if value not in known[name][0]}, known)
