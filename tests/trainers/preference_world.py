"""Run by `accelerate launch` from test_preference_resume.py: updates of DPO and of KTO; process 0 saves the weights.

usage: preference_world.py OUTPUT PROCESSES        the global batch is the same for every number of processes, and divides unevenly
"""

import sys

import torch
from small_preferences import PAIRS, start

output, processes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
rows = [*PAIRS, PAIRS[2]]  # seven: the last micro-step of an epoch has rows for one of two processes only
runs = {
    "dpo": {"loss_type": ["sigmoid", "aot", "sft"], "precompute_ref_log_probs": True, "max_steps": 4},
    "kto": {"max_steps": 7},
}
weights = {}
for kind, settings in runs.items():
    batch = {"per_device_train_batch_size": 2 // processes, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    trainer = start(kind, f"{output}.{kind}", rows=rows, **batch, **settings)
    trainer.train()
    assert trainer.args.world_size == processes
    weights |= {f"{kind}.{name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
if trainer.is_world_process_zero():
    torch.save(weights, output)
