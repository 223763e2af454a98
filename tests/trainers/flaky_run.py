"""Run as a program by test_reward_failures.py: GRPO with a reward in workers that raises and returns NaN. usage: flaky_run.py OUTPUT_DIR [DIE_AT_STEP]"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from small import build_model, build_tokenizer
from transformers import TrainerCallback

from posttrain import GRPOConfig, GRPOTrainer, Rubric
from posttrain.trainers.core.checkpoints import last_checkpoint

output_dir = sys.argv[1]
FLAKY = Path(__file__).parents[1] / "rewards" / "flaky.py"


class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if sys.argv[2:] == [str(state.global_step)]:
            os.kill(os.getpid(), signal.SIGKILL)


torch.set_num_threads(1)
tokenizer = build_tokenizer()
trainer = GRPOTrainer(
    build_model(tokenizer),
    Rubric.from_config([{"reward": f"{FLAKY}:raises_sometimes", "timeout": 60, "on_error": "drop", "workers": 2}]),
    GRPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=5,
        max_steps=7,
        save_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        seed=5,
    ),
    [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(4)],
    processing_class=tokenizer,
    callbacks=[Dies()],
)
last = last_checkpoint(output_dir)
trainer.train(resume_from_checkpoint=str(last) if last else None)
trainer.save_model(str(Path(output_dir) / "final"))
