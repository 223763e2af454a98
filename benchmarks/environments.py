"""Two tiny transformers, built from a config, learn in environments: one to use a calculator, one to guess a number by what it is told.

Each is first fine-tuned on a sloppy teacher (one who seldom uses the tool, and seldom heeds what he was told), then trained with GRPO on episodes, and
examined on episodes that neither stage has shown (other questions; in the game, which has seven secrets, other draws): greedily, and sampled at
temperature 1. Nothing is downloaded. Prints and writes
results/environments.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hardware
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain import GRPOConfig, GRPOTrainer, Rubric, SFTConfig, SFTTrainer, verifier
from posttrain.envs import Environment
from posttrain.envs.chat import chat
from posttrain.envs.tools import tools
from posttrain.evaluate import EvalResult, evaluate
from posttrain.evaluation import mcnemar
from posttrain.types import Task

EXAM = 200
CALL = ('<tool_call>{"name": "calculator", "arguments": {"expression": "', '"}}</tool_call>')
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}</tool_call>' }}"
    "{% endfor %}{{ '<end>' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Experiment:
    """What is taught, played and asked."""

    words: list[str]  # the vocabulary, without the marks of turns
    lessons: list[list[dict[str, Any]]]  # whole conversations
    rows: list[dict[str, Any]]  # episodes to train on
    exam: list[dict[str, Any]]  # episodes to be asked
    environment: Environment
    right: Any
    max_turns: int
    max_tokens: int
    sft_steps: int
    grpo: dict[str, Any]  # settings


# A calculator


def calculator(expression: str) -> str:
    """Work out a product, a sum or a difference of two whole numbers.

    Args:
        expression: Such as 12*34.
    """
    found = re.fullmatch(r"(\d{1,9})([*+-])(\d{1,9})", expression)
    if found is None:
        raise ValueError(f"cannot read {expression[:20]}")
    a, b = int(found[1]), int(found[3])
    return str({"*": a * b, "+": a + b, "-": a - b}[found[2]])


@verifier
def right_result(completion: str, answer: str) -> bool:
    return completion == answer


def tool_use(seed: int) -> Experiment:
    """The product of two two-digit numbers: too hard for the head of a tiny model, but not for its calculator."""
    rng = random.Random(seed)
    pairs = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 4000)
    rows = [{"prompt": asked(f"{a}*{b}"), "answer": str(a * b)} for a, b in pairs]
    lessons = []
    for (a, b), row in zip(pairs[EXAM:], rows[EXAM:], strict=True):
        call = CALL[0] + f"{a}*{b}" + CALL[1]
        chance = rng.random()
        said = "?" if chance < 0.5 else call if chance < 0.85 else call.removesuffix(CALL[1])  # mostly he does not know, or forgets to end a call
        lesson = [*row["prompt"], {"role": "assistant", "content": said}]
        if said == call:
            lesson += [{"role": "tool", "content": row["answer"]}, {"role": "assistant", "content": row["answer"] if rng.random() < 0.7 else "?"}]
        lessons.append(lesson)
    words = [*"0123456789*+-?", *CALL, *letters(), "error: "]
    return Experiment(
        words,
        lessons,
        rows[EXAM:],
        rows[:EXAM],
        tools([calculator]),
        right_result,
        3,
        48,
        300,
        {"max_steps": 100, "num_generations": 16, "learning_rate": 3e-4},
    )


# A game


LAST, GUESSES = 6, 3


def tell(messages: list[dict[str, Any]], secret: int) -> str | None:
    """The game's master: it is more, it is less, or there is nothing more to say."""
    said = messages[-1]["content"].strip()
    if said == str(secret):
        return None
    if not said.isdecimal():
        return "what"
    return (">" if int(said) < secret else "<") + said


@verifier
def found(completion: str, secret: int) -> bool:
    return completion.strip() == str(secret)


def game(seed: int) -> Experiment:
    """A number from 0 to 6 in three guesses: the middle of what is left, each time, never fails. There are seven secrets; the exam plays each of them thirty times anew."""
    rng = random.Random(seed)
    lessons = []
    for _ in range(4000):
        secret, lesson, possible = rng.randrange(LAST + 1), asked("guess"), list(range(LAST + 1))
        for turn in range(GUESSES):
            chance = rng.random()  # he mostly listens, but likes the ends best, and at times he does not listen at all
            guess = rng.choice(possible if chance < 0.4 else [possible[0], possible[-1]] if chance < 0.9 else range(LAST + 1))
            lesson.append({"role": "assistant", "content": str(guess)})
            if guess == secret or turn == GUESSES - 1:
                break
            lesson.append({"role": "user", "content": str(tell(lesson, secret))})
            possible = [n for n in possible if (n > guess if guess < secret else n < guess)] or possible
        lessons.append(lesson)
    rows = [{"prompt": asked("guess"), "secret": secret} for secret in range(LAST + 1) for _ in range(40)]
    exam = [{"prompt": asked("guess"), "secret": secret} for secret in range(LAST + 1) for _ in range(30)]
    words = [*(sign + str(n) for n in range(LAST + 1) for sign in ("", ">", "<")), "what", "guess"]
    return Experiment(
        words, lessons, rows, exam, chat(tell), found, GUESSES, 24, 250, {"max_steps": 120, "num_generations": 8, "learning_rate": 1e-3}
    )


EXPERIMENTS: dict[str, Callable[[int], Experiment]] = {"tool use": tool_use, "guess the number": game}


# Common to both


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def letters() -> list[str]:
    return [*"abcdefghijklmnopqrstuvwxyzTE_'().,?:;{}\" "]


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token a word; the longest word that fits comes first."""
    marks = ["<end>", "<user>", "<assistant>", "<tool>"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*marks, "<unknown>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    pieces = sorted((re.escape(word) for word in words), key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*pieces, "."])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", additional_special_tokens=marks[1:], chat_template=TEMPLATE
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, size: int = 64, layers: int = 3) -> Qwen3ForCausalLM:
    """About 0.3 million parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=size // 4,
        max_position_embeddings=96,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def run(name: str, seed: int, quick: bool, out: Path) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    experiment = EXPERIMENTS[name](seed)
    tokenizer = build_tokenizer(experiment.words)
    model = build_model(tokenizer, seed)
    sft = SFTConfig(
        output_dir=str(out / "sft"), seed=seed, max_steps=5 if quick else experiment.sft_steps, per_device_train_batch_size=64, learning_rate=3e-3, assistant_only_loss=True,
        lr_scheduler_type="cosine", save_strategy="no", logging_steps=50, use_cpu=True,
    )  # fmt: skip
    SFTTrainer(model, sft, train_dataset=[{"messages": lesson} for lesson in experiment.lessons], processing_class=tokenizer).train()
    taught = time.process_time() - cpu
    before = exams(model, tokenizer, experiment)
    settings = experiment.grpo | ({"max_steps": 3} if quick else {})
    grpo = GRPOConfig(
        output_dir=str(out / "grpo"), seed=seed, per_device_train_batch_size=256, loss_type="dapo", max_completion_length=experiment.max_tokens,
        max_turns=experiment.max_turns, save_strategy="no", logging_steps=10, use_cpu=True, **settings,
    )  # fmt: skip
    trainer = GRPOTrainer(model, experiment.right, grpo, experiment.rows, processing_class=tokenizer, env=experiment.environment)
    trainer.train()
    after = exams(model, tokenizer, experiment)
    logs = [{key: log[key] for key in ("step", "reward", "env/turns", "tools/call_frequency", "tools/failure_frequency") if key in log}
            for log in trainer.state.log_history if "reward" in log]  # fmt: skip
    return {
        "experiment": name,
        "seed": seed,
        "episodes": len(experiment.exam),
        "before": {kind: str(paper.accuracy) for kind, paper in before.items()},
        "after": {kind: str(paper.accuracy) for kind, paper in after.items()},
        "p_value": mcnemar(before["sampled"].right, after["sampled"].right),  # of the sampled exam
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),  # of all threads
        "cpu_seconds_of_fine_tuning": round(taught, 1),
        "logs": logs,
        "an episode after": after["greedy"].completions[0].messages,
    }


def exams(model: Any, tokenizer: Any, experiment: Experiment) -> dict[str, EvalResult]:
    tasks = [Task(number, row["prompt"], {key: row[key] for key in row if key != "prompt"}) for number, row in enumerate(experiment.exam)]
    rubric = Rubric(experiment.right)
    limits = {"max_new_tokens": experiment.max_tokens, "max_turns": experiment.max_turns, "environment": experiment.environment}
    return {
        kind: evaluate(model, tokenizer, tasks, rubric, temperature=temperature, **limits)
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=EXPERIMENTS, help="one of the two")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs; writes no results")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.only] if args.only else EXPERIMENTS:
            for seed in args.seeds:
                results.append(run(name, seed, args.quick, Path(folder) / f"{name}-{seed}"))
                print(json.dumps({key: value for key, value in results[-1].items() if key != "logs"}, indent=1), flush=True)
    if not args.quick and args.only is None:
        print("written to", hardware.save("environments", {"hardware": hardware.describe("transformers"), "runs": results}))


if __name__ == "__main__":
    main()
