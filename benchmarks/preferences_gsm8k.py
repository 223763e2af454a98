"""DPO, KTO and a reward model on real pairs: does a small model learn, from right and wrong solutions of other questions, to prefer the right one?

731 GSM8K questions have a right and a wrong solution among those of four models. They are dealt into folds by question; for each fold a policy
(0.9M parameters, from scratch, taught GSM8K's training solutions) learns from the other folds' pairs and judges the held-out ones by its implicit
reward, log pi(y|x) - log ref(y|x); a reward model, which starts from the same policy, by its score. Chance is 50 %. Beside it stands what the taught policy's own log-probs, summed or per token, prefer.

usage: preferences_gsm8k.py --data GSM8K_FOLDER [--methods dpo kto reward] [--folds 5] [--threads 1]       writes results/preferences_gsm8k.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gsm8k_pairs
import hardware
import torch
from gsm8k_pairs import Accuracy, Question

from posttrain import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from posttrain.models.load import load_model, load_tokenizer
from posttrain.trainers.offline.pairs import encode_pairs

METHODS: dict[str, tuple[Any, Any]] = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig), "reward": (RewardTrainer, RewardConfig)}
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"per_device_train_batch_size": 16, "learning_rate": 3e-4, "beta": 0.1},
    "kto": {"per_device_train_batch_size": 32, "learning_rate": 3e-4, "beta": 0.1},
    "reward": {"per_device_train_batch_size": 16, "learning_rate": 3e-4},
}


def train(method: str, taught: Path, questions: list[Question], output: str, args: argparse.Namespace) -> Any:
    trainer_class, config_class = METHODS[method]
    rows = [row for question in questions for row in (question.judged if method == "kto" else question.pairs)]
    settings = SETTINGS[method] | ({"learning_rate": args.learning_rate} if args.learning_rate else {})
    config = config_class(
        output_dir=output,
        num_train_epochs=args.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        save_strategy="no",
        use_cpu=True,
        **settings,
    )
    trainer = trainer_class(load_model(str(taught)), args=config, train_dataset=rows, processing_class=load_tokenizer(str(taught)))
    trainer.train()
    return trainer


def judge(trainer: Any, questions: list[Question]) -> dict[str, list[list[float]]]:
    """By each judge, for every question, the margins of its pairs."""
    if isinstance(trainer, RewardTrainer):
        return {"score": [[chosen - rejected for chosen, rejected in trainer.score(question.pairs)] for question in questions]}
    found: dict[str, list[list[float]]] = {"implicit reward": [], "log-prob before": [], "log-prob per token before": []}
    for question in questions:
        examples = encode_pairs(trainer, question.pairs)
        policy, reference = trainer.sums(trainer.model, examples), trainer.references.of(examples)
        lengths = [[len(completion) for completion in example.completions] for example in examples]
        found["implicit reward"].append([(p[0] - r[0]) - (p[1] - r[1]) for p, r in zip(policy, reference, strict=True)])
        found["log-prob before"].append([r[0] - r[1] for r in reference])
        found["log-prob per token before"].append([r[0] / n[0] - r[1] / n[1] for r, n in zip(reference, lengths, strict=True)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and example_model_solutions.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only-folds", nargs="+", type=int, help="train and examine only these of the folds")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--teaching-epochs", type=float, default=3.0)
    parser.add_argument("--taught", type=Path, help="where the taught model is kept; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    questions = gsm8k_pairs.read_questions(args.data)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        taught = args.taught or Path(temporary) / "taught"
        gsm8k_pairs.taught_model(args.data, taught, epochs=args.teaching_epochs, seed=args.seed)
        for method in args.methods:
            started, margins, on_train = time.perf_counter(), {}, []
            for number, (seen, held_out) in enumerate(gsm8k_pairs.folds(questions, args.folds, args.seed)):
                if args.only_folds and number not in args.only_folds:
                    continue
                trainer = train(method, taught, seen, f"{temporary}/{method}-{number}", args)
                for judge_name, found in judge(trainer, held_out).items():
                    margins.setdefault(judge_name, []).extend(found)
                main_judge, on_seen = next(iter(judge(trainer, seen[:100]).items()))
                on_train.extend(on_seen)
            accuracies = {judge_name: Accuracy.of(found) for judge_name, found in margins.items()}
            accuracies[f"{main_judge}, on 100 questions of training"] = Accuracy.of(on_train)
            results[method] = {name: asdict(accuracy) for name, accuracy in accuracies.items()} | {"seconds": time.perf_counter() - started}
            for name, accuracy in accuracies.items():
                print(f"{method:4} {name:45} {accuracy}  ({accuracy.questions} questions)", flush=True)
    machine = hardware.describe("transformers")
    print(hardware.line(machine))
    settings = {"epochs": args.epochs, "teaching_epochs": args.teaching_epochs, "folds": args.folds, "seed": args.seed, "methods": SETTINGS}
    settings["only_folds"] = args.only_folds
    print("written to", hardware.save("preferences_gsm8k", {"hardware": machine, "settings": settings, "results": results}))


if __name__ == "__main__":
    main()
