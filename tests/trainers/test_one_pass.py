"""A trained head is passed once where the loss says beforehand what gradient its log-probs get, and the update is the same."""

import collections
import importlib

import pytest
import torch
from peft import LoraConfig
from small import build_model, build_tokenizer, many_ones, weights_of

from posttrain import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from posttrain.models import forward
from posttrain.models import rows as padded
from posttrain.trainers import sft
from posttrain.trainers.core import base

SAMPLING = {"num_generations": 4, "max_completion_length": 6}
TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig, SAMPLING), "rloo": (RLOOTrainer, RLOOConfig, SAMPLING), "sft": (SFTTrainer, SFTConfig, {})}
TRAINERS["ppo"] = (PPOTrainer, PPOConfig, {"max_completion_length": 6, "num_ppo_epochs": 1, "num_mini_batches": 1})
ONCE, TWICE = True, False
CASES = {
    "grpo": ("grpo", {}, ONCE),
    "grpo, sequences": ("grpo", {"importance_sampling_level": "sequence"}, ONCE),
    "grpo, cispo": ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0}, ONCE),
    "grpo, kl in the loss": ("grpo", {"beta": 0.1}, TWICE),
    "grpo, kl in the reward": ("grpo", {"beta": 0.1, "kl_estimator": "k1_in_reward"}, ONCE),
    "grpo, an entropy bonus": ("grpo", {"entropy_coef": 0.01}, TWICE),
    "grpo, tokens chosen by entropy": ("grpo", {"top_entropy_quantile": 0.5}, TWICE),
    "grpo, old log-probs": ("grpo", {"num_iterations": 2}, TWICE),
    "rloo": ("rloo", {}, ONCE),
    "rloo, kl in the reward": ("rloo", {"beta": 0.1}, ONCE),
    "ppo": ("ppo", {}, ONCE),
    "ppo, several epochs": ("ppo", {"num_ppo_epochs": 2}, TWICE),
    "sft": ("sft", {}, ONCE),
    "sft, smoothed": ("sft", {"label_smoothing_factor": 0.1}, ONCE),
    "sft, dft": ("sft", {"loss_type": "dft"}, TWICE),
}


@pytest.fixture
def passes(monkeypatch):
    """How the head's gradients were made so far."""
    module = importlib.import_module("posttrain.ops.linear_logprobs")  # the package exports the function by the same name
    counted = collections.Counter()

    def count(name):
        real = getattr(module, name)

        def counting(*args, **kwargs):
            counted["direction" if kwargs.get("want_direction") else name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    for name in ("in_one_pass", "backward", "forward"):
        count(name)
    return counted


def trained(name, path, rows, model=None, peft_config=None, **settings):
    trainer_class, config_class, sizes = TRAINERS[name]
    tokenizer = build_tokenizer()
    args = {
        "output_dir": str(path),
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "save_strategy": "no",
        "use_cpu": True,
        "max_grad_norm": 1e9,
    }
    config = config_class(**args | sizes | {"seed": 3} | settings)
    rewards = [] if name == "sft" else [many_ones]
    data = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows] if name == "sft" else rows
    trainer = trainer_class(
        model or build_model(tokenizer), *rewards, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_passed_once_where_the_loss_allows_it(case, tmp_path, rows, passes, monkeypatch):
    name, settings, way = CASES[case]
    trainer = trained(name, tmp_path / "once", rows, **settings)
    ours = weights_of(trainer.model)
    assert (passes["in_one_pass"] > 0, passes["backward"] > 0) == ((True, False) if way is ONCE else (False, True))
    assert trainer.args.knows_gradient == (way is ONCE)  # the plan says so beforehand
    monkeypatch.setattr(base, "gains_by_known_grad", lambda model: False)
    theirs = weights_of(trained(name, tmp_path / "twice", rows, **settings).model)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert (ours - weights_of(build_model(build_tokenizer()))).abs().max() > 1e-3
    assert passes["backward"] > 0


@pytest.mark.parametrize("settings", [{"max_tokens_per_micro_batch": 24}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}])
def test_every_micro_batch_is_foreseen(settings, tmp_path, rows, passes):
    trained("grpo", tmp_path, rows, importance_sampling_level="sequence", **settings)
    assert passes["in_one_pass"] >= 2
    assert passes["backward"] == 0


def test_padded_rows_foresee_one_chunk_only(tmp_path, rows, passes, monkeypatch):
    """Each chunk's gradient of the head would wait for the backward."""
    monkeypatch.setattr(base, "make_logprobs", lambda model: forward.padded_logprobs)
    trained("sft", tmp_path / "one", rows)
    assert (passes["in_one_pass"], passes["backward"]) == (2, 0)
    monkeypatch.setattr(padded, "MAX_TOKENS", 16)
    trained("sft", tmp_path / "several", rows)
    assert passes["in_one_pass"] == 2
    assert passes["backward"] > 2


def test_a_loss_that_is_the_same_at_two_places_only_is_trained_all_the_same(tmp_path, rows, passes, monkeypatch):
    """The forecast is accepted, and found wrong in backward."""

    def bent(logps, mask):
        return -torch.where(mask.bool(), torch.where((logps == 0) | (logps == -1), logps, 2 * logps.square()), 0.0).sum()

    monkeypatch.setitem(sft.LOSSES, "nll", bent)
    ours = weights_of(trained("sft", tmp_path / "once", rows, learning_rate=1e-3).model)
    assert passes["in_one_pass"] == passes["backward"] == 2
    monkeypatch.setattr(base, "gains_by_known_grad", lambda model: False)
    assert torch.allclose(ours, weights_of(trained("sft", tmp_path / "twice", rows, learning_rate=1e-3).model), atol=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_frozen_head_is_passed_once(name, tmp_path, rows, passes):
    trained(name, tmp_path, rows, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert passes["direction"] > 0
    assert passes["in_one_pass"] == passes["backward"] == 0
