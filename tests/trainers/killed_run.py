"""Run as a program by test_resume.py: a small run that kills itself (SIGKILL) at a named moment, or goes on from its last checkpoint.

usage: killed_run.py OUTPUT_DIR MOMENT TIMES [ALGORITHM]        MOMENT "never" runs to the end; TIMES: at which occurrence to die
"""

import os
import signal
import sys
from pathlib import Path

import torch
from small import build_model, build_tokenizer
from transformers import TrainerCallback

from posttrain import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from posttrain.trainers.core import checkpoints

output_dir, moment, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0


def reached(name):
    global seen
    if name == moment:
        seen += 1
        if seen >= times:
            os.kill(os.getpid(), signal.SIGKILL)


def reward(completions, **kwargs):
    reached("reward")
    return [text.count("1") / 4 + len(text) / 100 for text in completions]


class Moments(TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        reached("before the optimizer step")

    def on_optimizer_step(self, *args, **kwargs):
        reached("after the optimizer step")

    def on_log(self, *args, **kwargs):
        reached("after the log")

    def on_save(self, *args, **kwargs):
        reached("after the checkpoint")


torch.set_num_threads(1)
tokenizer = build_tokenizer()
SHARED = {
    "output_dir": output_dir,
    "per_device_train_batch_size": 8,
    "max_completion_length": 5,
    "max_steps": 9,
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
    "learning_rate": 1e-2,
    "save_steps": 3,
    "save_total_limit": 2,
    "use_cpu": True,
    "seed": 5,
}
# With each, a rollout feeds four updates: two slices, twice.
ALGORITHMS = {
    "grpo": lambda: (
        GRPOTrainer,
        GRPOConfig(
            num_generations=4,
            steps_per_generation=2,
            num_iterations=2,
            beta=0.05,
            entropy_coef=0.01,
            use_adaptive_entropy=True,
            entropy_target=3.0,
            **SHARED,
        ),
        {},
    ),
    "ppo": lambda: (
        PPOTrainer,
        PPOConfig(num_mini_batches=2, num_ppo_epochs=2, vf_coef=0.5, whiten_rewards=True, value_learning_rate=0.1, **SHARED),
        {},
    ),
    "ppo-two-models": lambda: (
        PPOTrainer,
        PPOConfig(num_mini_batches=2, num_ppo_epochs=2, vf_coef=0.5, **SHARED),
        {"value_model": build_model(tokenizer, seed=8)},
    ),
}
trainer_class, config, more = ALGORITHMS[sys.argv[4] if len(sys.argv) > 4 else "grpo"]()
trainer = trainer_class(
    build_model(tokenizer, attention_dropout=0.0),
    reward,
    config,
    [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(4)],
    processing_class=tokenizer,
    callbacks=[Moments()],
    **more,
)

# Moments that no callback announces are reached by wrapping what is about to happen.
engine_step, save_optimizer, rename, rmtree = trainer.engine.step, trainer._save_optimizer_and_scheduler, Path.rename, checkpoints.shutil.rmtree


def step():
    reached("rollout")
    return engine_step()


def save(directory):
    reached("checkpoint half written")
    save_optimizer(directory)


def renamed(self, target):
    reached("before the rename")
    return rename(self, target)


def removed(path, *args, **kwargs):
    if ".deleting" in str(path):
        reached("while an old checkpoint is deleted")
    return rmtree(path, *args, **kwargs)


trainer.engine.step, trainer._save_optimizer_and_scheduler, Path.rename, checkpoints.shutil.rmtree = step, save, renamed, removed
next(p for p in trainer.model.parameters()).register_hook(lambda gradient: reached("backward"))


class Watched(TrainerCallback):
    """Announces every statement of the store, also those inside its transactions."""

    def on_train_begin(self, *args, **kwargs):
        trainer.recorder._store._db.set_trace_callback(lambda statement: reached("log half written") if "INTO rollouts" in statement else None)


trainer.add_callback(Watched())

last = checkpoints.last_checkpoint(output_dir)
trainer.train(resume_from_checkpoint=str(last) if last else None)
trainer.save_model(str(Path(output_dir) / "final"))
