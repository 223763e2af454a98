"""Run as a program by test_full_disk.py: small runs in which no file may grow beyond a limit, as on a full disk. usage: full_disk_run.py OUTPUT_DIR

One line of JSON for every limit: how the run ended, and what lies in its directory.
"""

import json
import resource
import sys
from pathlib import Path

import torch
from small import build_model, build_tokenizer
from transformers.utils import logging

from posttrain import DPOConfig, DPOTrainer
from posttrain.errors import TrainingError
from posttrain.trainers.core import checkpoints, manifest

LIMITS = [0, 500, 2_000, 6_000, 20_000, 60_000, 70_000, 90_000, 120_000, 135_000, 150_000, 10_000_000]
torch.set_num_threads(1)
logging.disable_progress_bar()
tokenizer = build_tokenizer()
rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "1"} for a in range(3) for b in range(3)]
for limit in LIMITS:
    folder = Path(sys.argv[1]) / str(limit)
    args = DPOConfig(output_dir=str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=2, precompute_ref_log_probs=True, use_cpu=True)
    trainer = DPOTrainer(build_model(tokenizer), None, args, train_dataset=rows, processing_class=tokenizer)
    ended, said = "done", ""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        trainer.train()
        with checkpoints.written_whole(folder / "model", main=True) as staging:
            trainer.save_model(str(staging), _internal_call=True)
    except TrainingError as error:
        ended, said = "sentence", str(error)
    except BaseException as error:
        ended, said = "raw", repr(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for checkpoint in checkpoints.named_so(folder):
        manifest.check_files(checkpoint, manifest.read(checkpoint))
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) if folder.is_dir() else []
    print(json.dumps({"limit": limit, "ended": ended, "said": said, "left": left}), file=sys.stderr)
