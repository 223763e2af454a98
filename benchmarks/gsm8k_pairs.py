"""Preference pairs from real data: a right and a wrong solution of the same GSM8K question, written by four models; and a small model to judge them.

For preferences_gsm8k.py and whoever else needs the pairs. Questions, not pairs, are dealt into folds, so nothing of a held-out question was seen.
The policy is a transformer from scratch with a BPE tokenizer, taught GSM8K's own training solutions first (other questions than those of the pairs).
"""

from __future__ import annotations

import json
import random
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTHORS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
PAIRS, SOLUTIONS = "example_model_solutions.jsonl", "train.jsonl"
VOCABULARY = 2000
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}  # 0.9M parameters
_CALCULATOR = re.compile(r"<<[^>]*>>")  # "<<16-3=13>>13": marks of a calculator, which repeat what is said


@dataclass(frozen=True)
class Question:
    """Distinct solutions of one question; both lists hold at least one."""

    prompt: str
    right: list[str]
    wrong: list[str]

    @property
    def pairs(self) -> list[dict[str, str]]:
        return [{"prompt": self.prompt, "chosen": good, "rejected": bad} for good in self.right for bad in self.wrong]

    @property
    def judged(self) -> list[dict[str, Any]]:
        """As single completions with a label."""
        labelled = [(good, True) for good in self.right] + [(bad, False) for bad in self.wrong]
        return [{"prompt": self.prompt, "completion": text, "label": label} for text, label in labelled]


def read_questions(data: Path) -> list[Question]:
    """Every question that has both a right and a wrong solution: 731 of them."""
    questions = []
    for line in (data / PAIRS).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_kind: dict[bool, list[str]] = {True: [], False: []}
        for author in AUTHORS:
            text = _plain(row[author]["solution"])
            if text and text not in by_kind[True] + by_kind[False]:
                by_kind[row[author]["is_correct"]].append(text)
        if by_kind[True] and by_kind[False]:
            questions.append(Question(_prompt(row["question"]), by_kind[True], by_kind[False]))
    return questions


def read_solutions(data: Path) -> list[dict[str, str]]:
    """GSM8K's own training rows in the form of the pairs."""
    rows = [json.loads(line) for line in (data / SOLUTIONS).read_text(encoding="utf-8").splitlines()]
    return [{"prompt": _prompt(row["question"]), "completion": _plain(row["answer"].replace("\n#### ", "\nA: "))} for row in rows]


def _prompt(question: str) -> str:
    return f"{question.strip()}\nSolution:\n"


def _plain(solution: str) -> str:
    return _CALCULATOR.sub("", solution).strip()


def folds(questions: list[Question], count: int, seed: int) -> list[tuple[list[Question], list[Question]]]:
    """(train, held out) for each fold; every question is held out once."""
    order = list(questions)
    random.Random(seed).shuffle(order)
    return [([q for i, q in enumerate(order) if i % count != fold], order[fold::count]) for fold in range(count)]


def taught_model(data: Path, directory: Path, *, epochs: float, seed: int) -> None:
    """A tokenizer and a model in `directory`, trained on GSM8K's training solutions. Kept if it is there already."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from posttrain import SFTConfig, SFTTrainer
    from posttrain.data.tokenizer import train_bpe

    if (directory / "config.json").is_file():
        return
    rows = read_solutions(data)
    tokenizer = train_bpe((text for row in rows for text in row.values()), VOCABULARY)
    torch.manual_seed(seed)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = SFTConfig(
        output_dir=str(directory / "teaching"),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        logging_steps=20,
        save_strategy="no",
        use_cpu=True,
        seed=seed,
    )
    trainer = SFTTrainer(Qwen3ForCausalLM(Qwen3Config(**ids, **MODEL)), args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(directory))


@dataclass(frozen=True)
class Accuracy:
    """How often the right solution of a pair is preferred. A question counts once, whatever its number of pairs; equal is half right."""

    value: float
    low: float  # of the 95 % interval, from the spread between questions
    high: float
    questions: int

    @classmethod
    def of(cls, margins: list[list[float]]) -> Accuracy:
        """From the margins (score of the right one minus that of the wrong one) of every question's pairs."""
        shares = [statistics.fmean([float(m > 0) + 0.5 * float(m == 0) for m in pairs]) for pairs in margins]
        mean, half = statistics.fmean(shares), 1.96 * statistics.stdev(shares) / len(shares) ** 0.5
        return cls(mean, mean - half, mean + half, len(shares))

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"
