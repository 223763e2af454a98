"""Environments and reasoning-gym through the command line: recipes in, a trained model and its examination out."""

import json
from pathlib import Path

import pytest
import yaml
from talk import HERMES, build_talker
from typer.testing import CliRunner

from posttrain.cli.main import app

GAME = '''
def answer(messages, secret):
    return None if messages[-1]["content"] == secret else "no"

def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b

def near(completion):
    return len(completion) / 10

class Own:
    def __init__(self, task):
        self.task = task

    def start(self):
        return self.task.prompt

    def reply(self, rollout):
        return None

    def finish(self, rollout):
        rollout.info["reward"] = 1.0

class Counter:
    def reset(self, **columns):
        self.count = 0

    def count_up(self) -> int:
        """Count."""
        self.count += 1
        return self.count

class World:
    def reset(self, seed=None):
        return seed, {}

    def step(self, action):
        return 0, 1.0, True, False, {}
'''


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random model with a chat template, saved; half of its turns end early."""
    import torch
    from small import build_model

    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_talker(HERMES)
    made = build_model(tokenizer, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():
        made.model.norm.weight.zero_()  # every token is equally likely: turns of all lengths
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(recipe, *options):
    with open("recipe.yaml", "w") as file:
        yaml.safe_dump(recipe, file)
    with open("game.py", "w") as file:
        file.write(GAME)
    with open("rows.jsonl", "w") as file:
        for n in range(4):
            file.write(json.dumps({"prompt": [{"role": "user", "content": f"Guess {n}"}], "secret": str(n)}) + "\n")
    return CliRunner().invoke(app, ["grpo", "recipe.yaml", *options])


def recipe_of(model, env, **sections):
    train = {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 40,
        "max_steps": 1,
        "use_cpu": True,
        "output_dir": "run",
    }
    base = {"model": {"name": model}, "data": {"train": "rows.jsonl"}, "rubric": ["game.py:near"], "env": env, "train": train}
    return base | sections


@pytest.mark.parametrize(
    "env",
    [
        {"kind": "chat", "name": "game.py:answer", "max_turns": 2},
        {"kind": "tools", "tools": ["game.py:add"], "timeout": 5},
        {"kind": "own", "name": "game.py:Own"},
        {"kind": "factory", "name": "game.py:Counter"},
        {"kind": "stepping", "name": "game.py:World", "max_turn_tokens": 10},
    ],
    ids=lambda env: env["kind"],
)
def test_every_kind_of_environment_is_ready_to_train(model, env):
    result = run(recipe_of(model, env), "--dry-run")
    assert result.exit_code == 0, result.output


def test_a_recipe_trains_in_an_environment_and_is_examined_in_it(model):
    result = run(recipe_of(model, {"kind": "chat", "name": "game.py:answer", "max_turns": 3}))
    assert result.exit_code == 0, result.output
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["metrics"]["env/turns"] >= 1
    examined = CliRunner().invoke(app, ["eval", "run", "--data", "rows.jsonl", "--json"])
    assert examined.exit_code == 0, examined.output
    assert json.loads(examined.output)["questions"] == 4


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"kind": "tool"}, "Did you mean tools"),
        ({"kind": "chat", "name": "game.py:answer", "timeout": 5}, "env.timeout belongs to the kinds tools, factory"),
        ({"kind": "factory", "name": "game.py:Counter", "call_format": "plain"}, "env.call_format belongs to"),
        ({"max_turns": 3}, "env.max_turns belongs to"),
        ({"kind": "tools"}, "belong together"),
        ({"kind": "chat"}, "env.name"),
        ({"kind": "chat", "name": "game.py:anser"}, "Did you mean 'answer'"),
        ({"kind": "tools", "tools": ["game.py:near"]}, "the tool near cannot be shown to a model"),
        ({"kind": "chat", "name": "game.py:near"}, "it must take `messages`"),
        ({"kind": "stepping", "name": "game.py:Counter"}, "has no method step"),
    ],
)
def test_a_mistake_is_a_sentence(model, env, says):
    result = run(recipe_of(model, env), "--dry-run")
    assert result.exit_code == 2
    assert says in result.output


def test_other_trainers_refuse_an_environment(model):
    with open("game.py", "w") as file:
        file.write(GAME)
    with open("sft.jsonl", "w") as file:
        file.write(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with open("sft.yaml", "w") as file:
        yaml.safe_dump({"model": {"name": model}, "data": {"train": "sft.jsonl"}, "env": {"kind": "chat", "name": "game.py:answer"}}, file)
    result = CliRunner().invoke(app, ["sft", "sft.yaml", "--dry-run"])
    assert result.exit_code == 2
    assert "does not play in environments" in result.output


@pytest.mark.parametrize("task", ["leg_counting", "basic_arithmetic?min_terms=2&max_terms=3", "spell_backward?max_word_len=4"])
def test_tasks_of_reasoning_gym_train_from_a_recipe(model, task):
    pytest.importorskip("reasoning_gym")
    source = f"reasoning-gym:{task}{'&' if '?' in task else '?'}size=12&seed=1"
    data = {"train": source, "system": "Answer in <answer> tags."}
    rubric = [{"reward": "reasoning_gym"}, {"reward": "game.py:near", "weight": 0.1}]
    result = run(recipe_of(model, {"kind": "single"}, data=data, rubric=rubric))
    assert result.exit_code == 0, result.output
    assert "rewards/reasoning_gym/mean" in json.loads(Path("run/summary.json").read_text())["metrics"]
