"""The demo: a tiny transformer, built from its config, learns two-digit addition. Nothing is downloaded.

Its teacher is sloppy: the worked examples forget the carry three times out of four, so the model learns the form and
the mistake. GRPO never sees an example, only whether an answer is a number (±1) and the right one (±3), and gets better
than the teacher. The evaluation asks sums that neither stage ever showed.
"""

from __future__ import annotations

import json
import random
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain.evaluate import EvalResult, evaluate
from posttrain.evaluation import mcnemar
from posttrain.io import write_whole
from posttrain.models.load import stop_token_ids
from posttrain.probe import Probe, probe
from posttrain.rewards import Rubric
from posttrain.tracking.terminal import make_console
from posttrain.trainers.core.checkpoints import whole
from posttrain.trainers.grpo import GRPOConfig, GRPOTrainer
from posttrain.trainers.sft import SFTConfig, SFTTrainer
from posttrain.types import Sampling, Task

MAX_NEW_TOKENS = 12  # a worked answer has at most 10 tokens and an end
EVAL_SIZE = 500
FORGETS = 0.75  # how often the teacher forgets a carry
SFT_STEPS, GRPO_STEPS = 400, 150
PROMPTS, GENERATIONS = 16, 16


def worked(a: int, b: int, carries: bool) -> str:
    """47+38 -> "15|08#85": the units' sum, the tens' sum with the carry, the answer. Without the carry: "15|07#75"."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + (units // 10 if carries else 0)
    return f"{units:02d}|{tens:02d}#{10 * tens + units % 10}"


def sums(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows, evaluation rows): all sums of two two-digit numbers, 500 of them held out. `completion` is the
    sloppy teacher's."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    rows = [{"prompt": f"{a}+{b}=", "completion": worked(a, b, rng.random() >= FORGETS), "answer": str(a + b)} for a, b in pairs]
    return rows[EVAL_SIZE:], rows[:EVAL_SIZE]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: index for index, token in enumerate(["<end>", *"0123456789+=|#"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", clean_up_tokenization_spaces=False)
    return fast


def tiny_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """About 0.8 million parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def run_demo(seed: int = 0, output_dir: str = "runs/demo", quick: bool = False) -> dict[str, Any]:
    """Teach, evaluate, train, evaluate again; returns the summary.

    `output_dir` holds the run, the model, its questions and summary.json, the taught model in sft/, and in sums.yaml
    the recipe of the training from there on.
    """
    console = make_console()
    out = Path(output_dir)
    started = time.perf_counter()
    tokenizer = tiny_tokenizer()
    model = tiny_model(seed, tokenizer)
    train_rows, eval_rows = sums(seed)
    tasks = [Task(i, row["prompt"], {"answer": row["answer"]}) for i, row in enumerate(eval_rows)]
    rubric = Rubric("arithmetic")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(f"posttrain demo · a {size:.1f}M-parameter transformer learns two-digit addition · {torch.get_num_threads()} CPU threads")

    out.mkdir(parents=True, exist_ok=True)
    prompts, questions = ([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows] for rows in (train_rows, eval_rows))
    _write_rows(out / "exam.jsonl", questions)
    _write_rows(out / "sums.jsonl", prompts)
    (out / "sums.yaml").write_text(recipe(seed, quick), encoding="utf-8")

    console.print("\n[bold]1 sft[/]    worked examples of a sloppy teacher, who forgets the carry three times out of four")
    teaching = SFTTrainer(model, sft_config(seed, out / "sft", quick), train_dataset=train_rows, processing_class=tokenizer)
    teaching.train()
    with whole(out / "sft" / "model") as staging:
        teaching.save_model(str(staging))
    console.print(f"\n[bold]2 eval[/]   {len(tasks)} sums that training never shows")
    before = _evaluated(model, tokenizer, tasks, rubric)
    console.print(f"         greedy {before.accuracy}")

    found = _probe(model, tokenizer, prompts, rubric, seed)
    console.print(f"\n[bold]3 probe[/]  {_probed(found)}")

    console.print(f"\n[bold]4 grpo[/]   {PROMPTS} prompts x {GENERATIONS} completions per step · rubric: a number ±1, the right one ±3")
    trainer = GRPOTrainer(model, rubric, grpo_config(seed, out, quick), prompts, processing_class=tokenizer)
    trainer.train()
    with whole(out / "model") as staging:
        trainer.save_model(str(staging))

    console.print("\n[bold]5 eval[/]   the same sums")
    after = _evaluated(model, tokenizer, tasks, rubric)
    p = mcnemar(before.right, after.right)
    gain = 100 * (after.accuracy.value - before.accuracy.value)
    console.print(f"         greedy {after.accuracy}   ({gain:+.1f} points, p {'< 1e-9' if p < 1e-9 else f'= {p:.2g}'})\n")
    for line in _changed(before, after):
        console.print(line, markup=False)

    seconds = time.perf_counter() - started
    summary = {"before": _scores(before), "after": _scores(after), "p_value": p, "seconds": seconds, "seed": seed, "max_new_tokens": MAX_NEW_TOKENS}
    summary["probe"] = {"verdict": found.verdict, "signal": asdict(found.signal[GENERATIONS]), "pass_at_1": asdict(found.pass_at[1])}
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    console.print(f"\n{seconds:.0f} s in all. The same questions again:  posttrain eval {shlex.quote(output_dir)}", soft_wrap=True)
    console.print(f"Do it yourself:  posttrain grpo {shlex.quote(str(out / 'sums.yaml'))}      Your own task: see the README", soft_wrap=True)
    return summary


def recipe(seed: int, quick: bool) -> str:
    """The demo's GRPO for `posttrain grpo`, beside the taught model and the sums: the same training, to be changed."""
    train = {name: value for name, value in grpo_settings(seed, quick).items() if name != "save_strategy"}
    sections = {
        "model": {"name": "sft/model"},
        "data": {"train": "sums.jsonl"},
        "rubric": ["arithmetic"],
        "train": train,
        "eval": {"data": "exam.jsonl"},
    }
    return yaml.safe_dump(sections, sort_keys=False)


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sft_config(seed: int, out: Path, quick: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=str(out),
        seed=seed,
        max_steps=10 if quick else SFT_STEPS,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_steps=20,
        use_cpu=True,
    )


def grpo_config(seed: int, out: Path, quick: bool) -> GRPOConfig:
    return GRPOConfig(output_dir=str(out), **grpo_settings(seed, quick))


def grpo_settings(seed: int, quick: bool) -> dict[str, Any]:
    return {
        "seed": seed,
        "max_steps": 3 if quick else GRPO_STEPS,
        "per_device_train_batch_size": PROMPTS * GENERATIONS,
        "num_generations": GENERATIONS,
        "max_completion_length": MAX_NEW_TOKENS,
        "learning_rate": 1e-4,
        "logging_steps": 5,
        "loss_type": "dapo",
        "save_strategy": "no",
        "use_cpu": True,
    }


def _evaluated(model: Any, tokenizer: Any, tasks: list[Task], rubric: Rubric) -> EvalResult:
    return evaluate(model, tokenizer, tasks, rubric, max_new_tokens=MAX_NEW_TOKENS)


def _probe(model: Any, tokenizer: Any, rows: list[dict[str, str]], rubric: Rubric, seed: int) -> Probe:
    """Two steps' worth of completions, from the prompts that GRPO is going to see."""
    tasks = [Task(i, row["prompt"], {"answer": row["answer"]}) for i, row in enumerate(rows)]
    sampling = Sampling(MAX_NEW_TOKENS, stop_token_ids=stop_token_ids(model, tokenizer))
    return probe(model, tokenizer, tasks, rubric, sampling, num_generations=GENERATIONS, groups_per_rollout=PROMPTS, seed=seed)


def _probed(found: Probe) -> str:
    ever, sampled = found.pass_at[found.k], found.pass_at[1]
    return f"p > 0 for {ever.value:.0%} of {found.n} prompts · {sampled.value:.0%} of completions right · {found.verdict}"


def _scores(paper: EvalResult) -> dict[str, Any]:
    accuracy = paper.accuracy
    return {"accuracy": accuracy.value, "interval": [accuracy.low, accuracy.high], "questions": accuracy.n}


def _changed(before: EvalResult, after: EvalResult, count: int = 3) -> list[str]:
    """A few sums that were wrong and are right now."""
    learned = [i for i, (old, new) in enumerate(zip(before.right, after.right, strict=True)) if new and old is False]
    return [f'"{before.tasks[i].prompt}"  before: {before.completions[i].text}   after: {after.completions[i].text}' for i in learned[:count]]
