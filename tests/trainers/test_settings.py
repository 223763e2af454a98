"""Settings, whoever gives them: a constructor, a script's command line, a TrainingArguments, a recipe."""

import contextlib
import dataclasses
import io
import math

import pytest
from transformers import HfArgumentParser, TrainingArguments

from posttrain import CPOConfig, DPOConfig, GRPOConfig, KTOConfig, ORPOConfig, PPOConfig, RewardConfig, RLOOConfig, SFTConfig
from posttrain.cli.values import read_settings
from posttrain.errors import UserError
from posttrain.rollout.stopping import check_sampling
from posttrain.trainers.core.config import as_config
from posttrain.types import Sampling

CONFIGS = [CPOConfig, DPOConfig, GRPOConfig, KTOConfig, ORPOConfig, PPOConfig, RewardConfig, RLOOConfig, SFTConfig]


def parsed(cls, *arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            return HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", "x", "--use_cpu", *arguments])[0]
        except SystemExit:
            pytest.fail(said.getvalue()[-300:])


def values_of(config):
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_scripts_parser_reads_every_setting_and_keeps_the_defaults(cls):
    assert values_of(parsed(cls)) | {"logging_dir": None} == values_of(cls(output_dir="x", use_cpu=True)) | {"logging_dir": None}


@pytest.mark.parametrize(
    ("cls", "arguments", "expected"),
    [
        (SFTConfig, ["--report_to", "none"], {"report_to": []}),
        (SFTConfig, ["--report_to", "tensorboard", "wandb"], {"report_to": ["tensorboard", "wandb"]}),
        (DPOConfig, ["--loss_type", "sigmoid"], {"loss_type": ["sigmoid"]}),
        (DPOConfig, ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5"], {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        (GRPOConfig, ["--loss_type", "dr_grpo", "--scale_rewards", "False"], {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        (GRPOConfig, ["--scale_rewards", "batch", "--reward_weights", "1", "2"], {"scale_rewards": "batch", "reward_weights": [1.0, 2.0]}),
        (GRPOConfig, ["--generation_kwargs", '{"temperature": 0.5}'], {"generation_kwargs": {"temperature": 0.5}}),
        (GRPOConfig, ["--chat_template_kwargs", '{"enable_thinking": false}'], {"chat_template_kwargs": {"enable_thinking": False}}),
        (RLOOConfig, ["--reward_clip_range", "-1", "1"], {"reward_clip_range": [-1.0, 1.0]}),
        (KTOConfig, ["--model_init_kwargs", '{"dtype": "bfloat16"}'], {"model_init_kwargs": {"dtype": "bfloat16"}}),
        (PPOConfig, ["--tile_rows", "64", "--activation_offloading"], {"tile_rows": 64, "activation_offloading": True}),
        (SFTConfig, ["--tile_rows", "none", "--completion_only_loss"], {"tile_rows": None, "completion_only_loss": True}),
        (RewardConfig, ["--activation_offloading", "false"], {"activation_offloading": False}),
        (ORPOConfig, ["--activation_offloading", "auto", "--tile_rows", "auto"], {"activation_offloading": "auto", "tile_rows": "auto"}),
        (CPOConfig, ["--learning_rate", "1e-5", "--max_steps", "7"], {"learning_rate": 1e-5, "max_steps": 7}),
    ],
)
def test_a_scripts_parser_gives_the_values_that_were_meant(cls, arguments, expected):
    config = parsed(cls, *arguments)
    assert {name: getattr(config, name) for name in expected} == expected


NUMBERS = sorted({(cls, name) for cls in (GRPOConfig, DPOConfig, PPOConfig) for name, kinds in cls.kinds.items() if "float" in kinds}, key=str)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_number_of_any_config_may_be_other_than_finite(value):
    for cls, name in NUMBERS:
        given = [value] if "list" in cls.kinds[name] else value
        with pytest.raises(UserError, match=rf"^{name}="):
            cls(output_dir="x", use_cpu=True, **{name: given})


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        *[(cls, {"learning_rate": value}) for cls in CONFIGS for value in (-1e-6, 1e38, math.inf)],
        (GRPOConfig, {"temperature": math.inf}),
        (GRPOConfig, {"generation_kwargs": {"temperature": math.nan}}),
        (GRPOConfig, {"epsilon": -0.2}),
        (GRPOConfig, {"sapo_temperature_neg": 0.0, "loss_type": "sapo"}),
        (GRPOConfig, {"num_generations": 2.5}),
        (PPOConfig, {"value_learning_rate": -1.0}),
        (SFTConfig, {"per_device_train_batch_size": 0}),
        (SFTConfig, {"gradient_accumulation_steps": -1}),
        (SFTConfig, {"adam_beta1": 1.0}),
        (SFTConfig, {"adam_epsilon": -1e-8}),
        (SFTConfig, {"weight_decay": -0.1}),
        (SFTConfig, {"max_grad_norm": -1.0}),
        (SFTConfig, {"num_train_epochs": -1.0}),
        (SFTConfig, {"max_steps": -2}),
        (SFTConfig, {"seed": -1}),
        (SFTConfig, {"seed": 2**40}),
        (SFTConfig, {"learning_rate": "fast"}),
        (SFTConfig, {"model_init_kwargs": "bfloat16"}),
        (KTOConfig, {"desirable_weight": -1.0}),
        *[(cls, settings) for cls in CONFIGS for settings in ({"max_steps": 10**400}, {"learning_rate": None}, {"optim": "adamw_torhc"})],
        (SFTConfig, {"tile_rows": True}),
        (SFTConfig, {"lr_scheduler_type": "linaer"}),
        (SFTConfig, {"logging_steps": 0, "logging_strategy": "steps"}),
    ],
    ids=str,
)
def test_a_number_out_of_its_range_is_refused_by_name(cls, settings):
    with pytest.raises(UserError, match=rf"{next(iter(settings))}|temperature"):
        cls(output_dir="x", use_cpu=True, **settings)


def test_numbers_in_other_clothes_are_taken():
    import numpy as np

    config = SFTConfig(output_dir="x", use_cpu=True, learning_rate="1e-4", max_steps=1e3, weight_decay=np.float32(0.5), max_grad_norm=math.inf)
    assert (config.learning_rate, config.max_steps, config.weight_decay, config.max_grad_norm) == (1e-4, 1000, 0.5, math.inf)
    assert type(config.max_steps) is int


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -1.0])
def test_no_engine_is_asked_for_a_temperature_that_is_none(temperature):
    with pytest.raises(UserError, match="temperature"):
        check_sampling(Sampling(4, temperature), None)


@pytest.mark.parametrize("cls", CONFIGS)
def test_the_fields_of_training_arguments_are_taken(cls):
    given = TrainingArguments(
        "mine", learning_rate=3e-5, max_steps=7, seed=5, use_cpu=True, save_strategy="no", report_to="none", lr_scheduler_type="cosine"
    )
    config = as_config(given, cls)
    assert isinstance(config, cls)
    taken = {
        name: getattr(config, name) for name in ("output_dir", "learning_rate", "max_steps", "seed", "use_cpu", "lr_scheduler_type", "save_strategy")
    }
    assert taken == {name: getattr(given, name) for name in taken}
    assert not config.remove_unused_columns
    assert as_config(config, cls) is config
    assert isinstance(as_config(None, cls), cls)


def test_settings_of_earlier_versions_have_their_names_of_today():
    config = SFTConfig(output_dir="x", use_cpu=True, warmup_ratio=0.1, evaluation_strategy="no")
    assert (config.warmup_steps, config.get_warmup_steps(50)) == (0.1, 5)
    assert SFTConfig(output_dir="x", use_cpu=True, warmup_ratio=0.0, warmup_steps=7).warmup_steps == 7
    with pytest.raises(UserError, match="one setting with two values"):
        SFTConfig(output_dir="x", use_cpu=True, warmup_ratio=0.1, warmup_steps=7)


def test_another_trainers_settings_are_refused():
    with pytest.raises(UserError, match="args is a SFTConfig; this trainer takes a DPOConfig"):
        as_config(SFTConfig(output_dir="x", use_cpu=True), DPOConfig)
    with pytest.raises(UserError, match="args is a dict"):
        as_config({"output_dir": "x"}, DPOConfig)


def test_recipes_still_give_lists_mappings_and_switches():
    values = {
        "loss_type": ["sigmoid", "sft"],
        "activation_offloading": True,
        "tile_rows": "auto",
        "model_init_kwargs": {"dtype": "float32"},
        "report_to": "none",
    }
    assert read_settings("dpo", values, DPOConfig, "DPO") == values
    assert read_settings("train", {"scale_rewards": False}, GRPOConfig, "GRPO") == {"scale_rewards": False}
