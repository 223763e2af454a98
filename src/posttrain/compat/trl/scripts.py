"""TRL's training scripts in one function: flat settings on the command line or in a YAML file, instead of a recipe with
sections.

`posttrain grpo --model_name_or_path ... --dataset_name ...` and `posttrain grpo --config flat.yaml` come here. The
model is left in output_dir.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.compat.trl.arguments import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_dataset, get_peft_config, get_quantization_config
from posttrain.compat.trl.parser import TrlParser
from posttrain.errors import UserError
from posttrain.methods import METHODS, TRL_NAMES

OVERLONG = {"reward": "get_soft_overlong_punishment", "max_completion_len": 1280, "soft_punish_cache": 256}  # what TRL's scripts mean by the name


@dataclass
class RewardScriptArguments(ScriptArguments):
    """The rewards of online methods."""

    reward_model_name_or_path: str | None = None
    reward_funcs: list[str] | None = None


def train(method: str, words: Sequence[str]) -> Any:
    """Train as `trl METHOD WORDS` does. Returns the trainer. Raises UserError for what cannot work."""
    found = METHODS[TRL_NAMES.get(method, method)]
    script_type = RewardScriptArguments if found.is_online else ScriptArguments
    parser = TrlParser((script_type, found.config_class(), ModelConfig, DatasetMixtureConfig), prog=f"posttrain {method}")
    script, args, model, mixture = parser.parse_args_and_config(words)
    if model.model_name_or_path is None:
        raise UserError("which model? give --model_name_or_path, or in the file model_name_or_path: ...")
    rows = _rows(script, mixture)
    args.model_init_kwargs = _loading(model) | (args.model_init_kwargs or {}) or None
    more: dict[str, Any] = {"reward_funcs": _rewards(script)} if found.is_online else {}
    if (packed := get_quantization_config(model)) is not None:
        more["quantization_config"] = packed
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    made = found.trainer_class()(
        model.model_name_or_path,
        args=args,
        train_dataset=_split(rows, script.dataset_train_split),
        eval_dataset=_split(rows, script.dataset_test_split) if evaluates else None,
        peft_config=get_peft_config(model),
        **more,
    )
    made.train(resume_from_checkpoint=args.resume_from_checkpoint)
    made.save_model(args.output_dir)
    if args.push_to_hub:
        made.push_to_hub(dataset_name=script.dataset_name)
    return made


def _rows(script: ScriptArguments, mixture: DatasetMixtureConfig) -> Any:
    if mixture.datasets:
        return get_dataset(mixture)
    if script.dataset_name is None:
        raise UserError("which data? give --dataset_name, or in the file dataset_name or a list of datasets")
    from datasets import load_dataset

    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def _split(rows: Any, name: str) -> Any:
    if name not in rows:
        raise UserError(f"the dataset has no split '{name}'; it has: {', '.join(map(str, rows))}")
    return rows[name]


def _loading(model: ModelConfig) -> dict[str, Any]:
    """Keywords for from_pretrained, where they say something else than the defaults."""
    given = {"revision": (model.model_revision, "main"), "dtype": (model.dtype, "float32"), "attn_implementation": (model.attn_implementation, None)}
    return {name: value for name, (value, usual) in given.items() if value != usual}


def _rewards(script: RewardScriptArguments) -> list[Any]:
    """Reward models and functions: names of the library, file.py:function, module:function, or as in TRL
    module.function."""
    named = [*([script.reward_model_name_or_path] if script.reward_model_name_or_path else []), *(script.reward_funcs or [])]
    if not named:
        raise UserError("which rewards? give --reward_funcs, or in the file reward_funcs: [...], or reward_model_name_or_path")
    return [_reward(name) for name in named]


def _reward(name: str) -> Any:
    from posttrain.rewards import Rubric
    from posttrain.rewards.loading import names_model

    if name == OVERLONG["reward"]:
        return Rubric.from_config([OVERLONG])
    if "." in name and ":" not in name and not names_model(name):
        return ":".join(name.rsplit(".", 1))
    return name
