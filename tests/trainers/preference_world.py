"""Run by `accelerate launch` from test_preference_resume.py: two whole updates; process 0 saves the weights.

usage: preference_world.py OUTPUT PROCESSES KIND        the global batch is the same for every number of processes, and divides unevenly
"""

import sys

import torch
from small_preferences import PAIRS, start

output, processes, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
rows = [*PAIRS, PAIRS[2]]  # seven: the last micro-step of an epoch has rows for one of two processes only
settings = {"loss_type": ["sigmoid", "aot", "sft"], "precompute_ref_log_probs": True} if kind == "dpo" else {}
trainer = start(
    kind, output + ".run", rows=rows, per_device_train_batch_size=2 // processes, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.1,
    max_steps=4 if kind == "dpo" else 7, **settings,
)  # fmt: skip
trainer.train()
assert trainer.args.world_size == processes
if trainer.is_world_process_zero():
    torch.save({name: p.detach().clone() for name, p in trainer.model.named_parameters()}, output)
