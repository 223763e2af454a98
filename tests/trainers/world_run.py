"""Run by `accelerate launch` from test_grpo_invariance.py: two whole trainer steps; process 0 saves the weights, and what was logged.

usage: world_run.py OUTPUT PROCESSES [ALGORITHM]        the global batch is the same for every number of processes; three groups divide unevenly over two
"""

import sys

import torch
from small import build_model, build_tokenizer

from posttrain import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, RLOOConfig, RLOOTrainer

output, processes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
tokenizer = build_tokenizer()


def reward(completions, **kwargs):
    return [text.count("1") / 4 + len(text) / 100 for text in completions]


TIMES = ("time/", "step_time", "tokens_per_second", "train_", "total_flos", "memory/")
SHARED = {
    "output_dir": output + ".run",
    "per_device_train_batch_size": 12 // processes,
    "num_generations": 4,
    "max_completion_length": 5,
    "max_steps": 2,
    "learning_rate": 0.1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "use_cpu": True,
    "seed": 5,
}
ALGORITHMS = {
    "grpo": (GRPOTrainer, GRPOConfig, {"beta": 0.1, "num_iterations": 2, "entropy_coef": 0.01}),
    "ppo": (PPOTrainer, PPOConfig, {"num_ppo_epochs": 2, "vf_coef": 0.5, "whiten_rewards": True, "temperature": 1.0}),
    "rloo": (RLOOTrainer, RLOOConfig, {"num_iterations": 2, "normalize_advantages": True}),
}
trainer_class, config_class, settings = ALGORITHMS[sys.argv[3] if len(sys.argv) > 3 else "grpo"]
trainer = trainer_class(
    build_model(tokenizer),
    reward,
    config_class(**SHARED, **settings),
    [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(4)],
    processing_class=tokenizer,
)
trainer.train()
assert trainer.args.world_size == processes
if trainer.is_world_process_zero():
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    logs = [(step, name, value) for step, log in enumerate(trainer.state.log_history) for name, value in log.items()]
    logged = {f"log {step} {name}": torch.tensor(value) for step, name, value in logs if not name.startswith(TIMES)}
    torch.save({**weights, **logged}, output)
