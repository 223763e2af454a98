"""Run as a program by test_signals.py: GRPO whose steps take a while, as one process or as two. usage: stopped_run.py OUTPUT_DIR"""

import sys
import time

import torch
from small import build_model, build_tokenizer

from posttrain import GRPOConfig, GRPOTrainer
from posttrain.errors import TrainingError


def reward(completions, **kwargs):
    print("scoring", flush=True)
    time.sleep(0.2)
    return [float(len(text)) for text in completions]


torch.set_num_threads(1)
args = GRPOConfig(
    output_dir=sys.argv[1],
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=4,
    max_steps=500,
    save_steps=400,
    use_cpu=True,
)
trainer = GRPOTrainer(build_model(build_tokenizer()), reward, args, [{"prompt": "1+1="}] * 4, processing_class=build_tokenizer())
try:
    trainer.train()
except KeyboardInterrupt:
    sys.exit(130)
except TrainingError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
