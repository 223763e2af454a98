"""A run is a function of its seed: what the process drew before the trainer was made plays no part, and what rewards draw is resumed."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig
from small import build_model, build_tokenizer, many_ones, weights_of
from small_preferences import PAIRS

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(4)]
ONLINE = {"per_device_train_batch_size": 8, "max_completion_length": 4}
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, ROWS, {}, {}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}, {}),
    "reward": (RewardTrainer, RewardConfig, PAIRS, {}, {}),
    "ppo": (PPOTrainer, PPOConfig, ROWS, ONLINE, {"reward_funcs": many_ones}),
    "grpo": (GRPOTrainer, GRPOConfig, ROWS, {**ONLINE, "num_generations": 4}, {"reward_funcs": many_ones}),
}


@pytest.fixture
def directory(tmp_path):
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def draw_something():
    """As another process would: every global generator somewhere else."""
    random.seed()
    np.random.seed(int.from_bytes(random.randbytes(4), "big"))
    torch.seed()


def start(kind, directory, seed, lora, reward_funcs=None, **more):
    trainer, config, rows, settings, inputs = TRAINERS[kind]
    output = {"output_dir": f"{directory}/../{kind}", "use_cpu": True, "save_strategy": "no", "max_steps": 2, "learning_rate": 1e-2}
    draw_something()
    return trainer(
        directory,
        args=config(**output | settings | more, seed=seed),
        train_dataset=rows,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1) if lora else None,
        **inputs | ({"reward_funcs": reward_funcs} if reward_funcs else {}),
    )


@pytest.mark.parametrize(("kind", "lora"), [("reward", False), *((kind, True) for kind in TRAINERS)])
def test_the_same_seed_gives_the_same_run_whatever_was_drawn_before(directory, kind, lora):
    ends = []
    for _ in range(2):
        trainer = start(kind, directory, 3, lora)
        trainer.train()
        ends.append(weights_of(trainer))
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", TRAINERS)
def test_another_seed_gives_other_adapters(directory, kind):
    assert not torch.equal(*(weights_of(start(kind, directory, seed, lora=True)) for seed in (3, 4)))


def test_a_value_model_without_a_head_gets_one_of_the_seed(directory):
    heads = []
    for seed in (3, 3, 4):
        draw_something()
        settings = PPOConfig(output_dir=f"{directory}/../ppo", use_cpu=True, save_strategy="no", seed=seed, **ONLINE)
        heads.append(PPOTrainer(directory, many_ones, settings, ROWS, value_model=directory).values.score.weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("saved", [1, 2], ids=["within an epoch", "at its end"])
def test_rewards_that_draw_at_random_go_on_where_they_were(directory, saved):
    seen = []

    def noisy(completions, **kwargs):
        seen.append([random.random() + np.random.rand() + torch.rand(1).item() for _ in completions])
        return seen[-1]

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": saved, "per_device_train_batch_size": 40}  # ten prompts of twenty a step
    ends = []
    for last in (None, f"{directory}/../grpo/checkpoint-{saved}"):
        trainer = start("grpo", directory, 3, lora=False, reward_funcs=noisy, **settings)
        trainer.train(resume_from_checkpoint=last)
        ends.append(weights_of(trainer))
    assert len(seen) == 4 + 4 - saved
    assert seen[4:] == seen[saved:4]
    assert torch.equal(*ends)
