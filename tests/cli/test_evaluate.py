"""`posttrain eval` beyond greedy accuracy: settings of training, drawn answers, comparisons, categories, duplicates, saved completions."""

import contextlib
import json
import tracemalloc
from dataclasses import replace
from statistics import fmean

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from posttrain.cli import completions, evaluations
from posttrain.cli.main import app
from posttrain.data.tokenizer import train_bpe
from posttrain.evaluation import pass_at_k
from posttrain.tracking.events import RunStore

QUESTIONS = [{"prompt": f"what is {a}+{b}?", "answer": str(a + b), "carry": "yes" if a + b > 3 else "no"} for a in range(4) for b in range(4)]
RECIPE = """
model: {name: first}
data: {train: train.jsonl}
rubric: [mine.py:even]
train: {max_completion_length: 5, temperature: 0.7}
eval: {data: exam.jsonl}
"""
MINE = """
import shutil
from pathlib import Path

from posttrain import verifier

@verifier
def even(completion):
    return len(completion) % 2 == 0

@verifier
def unsure(completion, answer):
    return None if answer == "3" or len(completion) % 3 == 0 else len(completion) % 2 == 0

@verifier
def fragile(completion, answer):
    return len(completion) % 2 == 0 if answer != "3" else completion.nothing

def long(completion):
    return len(completion)

def removes_the_folder(completion):
    shutil.rmtree(Path(__file__).with_name("out"), ignore_errors=True)
    return 1.0

class World:
    def reset(self, seed=None):
        return "Choose a number.", {}

    def step(self, action):
        return "", 1.0, True, False, {}

class Flaky:
    def __init__(self, task):
        self.task = task

    def start(self):
        return self.task.prompt

    def reply(self, rollout):
        return None

    def finish(self, rollout):
        if self.task.columns["answer"] == "3" and rollout.turns:
            raise ConnectionError("nobody is there")
"""


def save_model(folder, seed, chats=False):
    tokenizer = train_bpe([row["prompt"] for row in QUESTIONS], 300)
    if not chats:
        tokenizer.chat_template = None
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "first", 0)
    save_model(folder / "second", 1)
    save_model(folder / "chatty", 1, chats=True)
    return folder


@pytest.fixture
def run(tmp_path, models):
    """A finished run: it began with `first` and ended as `second`."""
    for name, target in (("first", "first"), ("model", "second")):
        (tmp_path / name).symlink_to(models / target)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "What is 0 + 0?"}, QUESTIONS[5], {"prompt": "x"}]))
    return tmp_path


def call(*args):
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def result_of(*args):
    called = call(*args, "--json")
    assert called.exit_code == 0, called.output
    return json.loads(called.stdout.splitlines()[-1])


def saved(run):
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def lines_of(run, *args):
    result_of(run, *args)
    return saved(run)


def change(run, **sections):
    """Other sections for the run's recipe."""
    (run / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(RECIPE) | sections))


def trained_with(run, method):
    with contextlib.closing(RunStore(run / "run.sqlite")) as store:
        store.write_meta({"method": method})


def final_model(run, target):
    (run / "model").unlink()
    (run / "model").symlink_to(target)


def test_every_figure_can_be_recomputed_from_the_saved_completions(run):
    found = result_of(run, "-n", "4", "--by", "carry", "--against", "start")
    lines = saved(run)
    assert len(lines) == 2 * 16 * 5

    def verdicts(model, drawn):
        return {(line["task"], line["sample"]): line["right"] for line in lines if line["model"].endswith(model) and line["drawn"] == drawn}

    new, old, drawn = verdicts("model", "greedy"), verdicts("first", "greedy"), verdicts("model", "sampled")
    assert found["accuracy"] == sum(new.values()) / 16
    assert found["against"]["accuracy"] == sum(old.values()) / 16
    assert found["against"]["difference"][0] == pytest.approx((sum(new.values()) - sum(old.values())) / 16)
    assert found["against"]["gained"] == sum(new[key] and not old[key] for key in new)
    assert found["sampled"]["pass_at"]["1"][0] == pytest.approx(sum(drawn.values()) / 64)
    assert found["sampled"]["pass_at"]["4"][0] == pytest.approx(sum(any(drawn[task, k] for k in range(4)) for task in range(16)) / 16)
    with_carry = [line["task"] for line in lines if line["sample"] == 0 and line["columns"]["carry"] == "yes"]
    row = next(row for row in found["by"]["values"] if row["value"] == "yes")
    assert (row["questions"], row["right"]) == (len(set(with_carry)), sum(new[task, 0] for task in set(with_carry)))


def test_a_model_against_itself_gained_nothing(run):
    found = result_of(run, "--against", run, "-n", "2")["against"]
    assert (found["difference"][0], found["p_value"], found["gained"], found["lost"]) == (0.0, 1.0, 0, 0)
    assert found["sampled_difference"]["p_value"] == 1.0
    assert found["difference"][1] < 0 < found["difference"][2]


def test_questions_of_the_training_data_are_reported(run):
    found = result_of(run)["duplicates"]
    assert (found["exact"], found["normalised"]) == (1, 1)
    assert "warning: 1 of 16 questions are in the training data and 1 more" in call(run).output
    (run / "train.jsonl").unlink()
    assert "not compared with the training data: the data file" in call(run).output


def test_the_temperature_is_that_of_training(run):
    def drawn(*args):
        result_of(run, "-n", "3", *args)
        return [line["completion"] for line in saved(run) if line["drawn"] == "sampled"]

    assert drawn() == drawn("--temperature", "0.7") != drawn("--temperature", "1.5")


def test_what_the_recipe_leaves_out_is_the_trainers_default(run):
    change(run, train={"top_p": 0.9})
    assert "max_new_tokens=512 need" in call(run).output  # more than this model has room for
    assert max(line["tokens"] for line in lines_of(run, "--samples", "3", "--max-new-tokens", "4")) == 4


def test_the_settings_are_those_of_the_trainer_that_made_the_run(run):
    """With other settings for other trainers in the recipe, and none of a machine that this one is not."""
    sections = {"train": {"max_completion_length": 5, "temperature": 1.5}, "rloo": {"max_completion_length": 4}}
    machine = {"bf16": True, "tf32": True, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 7, "num_generations": 5}
    change(run, **sections, ppo={"generation_kwargs": {"max_new_tokens": 7}, **machine})
    assert max(line["tokens"] for line in lines_of(run)) == 5
    trained_with(run, "PPO")

    def drawn(*args):
        return [line["completion"] for line in lines_of(run, "-n", "2", *args)]

    assert drawn() == drawn("--temperature", "0.7") != drawn("--temperature", "1.5")  # 0.7 is PPO's default
    assert max(line["tokens"] for line in saved(run)) == 7
    change(run, **sections)  # all of PPO's settings may be defaults
    assert evaluations.find_question(str(run), None, None, None).args.temperature == 0.7
    (run / "other.yaml").write_text(RECIPE)  # a recipe of another trainer
    assert max(line["tokens"] for line in lines_of(run, "--recipe", run / "other.yaml")) == 5


def test_a_stop_string_of_training_ends_the_answers(run):
    change(run, train={"max_completion_length": 12})
    free = {line["task"]: line["completion"] for line in lines_of(run)}
    letter = next(letter for text in free.values() for letter in text[1:-1] if letter.isascii() and letter.isalnum())
    change(run, train={"max_completion_length": 12, "generation_kwargs": {"stop_strings": [letter]}})
    stopped = {line["task"]: line["completion"] for line in lines_of(run)}
    assert all(free[task].startswith(text) for task, text in stopped.items())
    assert any(len(text) < len(free[task]) for task, text in stopped.items())


def test_rewards_weigh_what_they_weigh_in_training_and_environments_pay(run, models):
    change(run, rubric=["mine.py:even", "mine.py:long"], train={"max_completion_length": 5, "reward_weights": [2.0, -3.0]})
    found = result_of(run)
    assert [line["reward"] for line in saved(run)] == [2 * line["scores"]["even"] - 3 * line["scores"]["long"] for line in saved(run)]
    assert found["mean_reward"] == pytest.approx(fmean(line["reward"] for line in saved(run)))
    final_model(run, models / "chatty")
    change(run, env={"kind": "stepping", "name": "mine.py:World", "max_turns": 1})
    assert [line["reward"] for line in lines_of(run)] == [line["scores"]["even"] + line["scores"]["environment"] for line in saved(run)]


def test_what_could_not_be_judged_is_left_out_and_counted(run):
    change(run, rubric=["mine.py:unsure"])
    found = result_of(run, "-n", "4", "--by", "carry", "--against", "start")
    lines = saved(run)

    def judged(model, drawn):
        mine = [line for line in lines if line["model"].endswith(model) and line["drawn"] == drawn]
        return {task: [line["right"] for line in mine if line["task"] == task and line["right"] is not None] for task in range(16)}

    new, old, drawn = judged("model", "greedy"), judged("first", "greedy"), judged("model", "sampled")
    assert found["unjudged"] == [*new.values()].count([]) >= 4
    assert found["accuracy"] == pytest.approx(found["right"] / (16 - found["unjudged"]))
    for k, (value, _, _) in found["sampled"]["pass_at"].items():
        assert value == pytest.approx(fmean(pass_at_k(len(own), sum(own), int(k)) for own in drawn.values() if len(own) >= int(k)))
    assert found["sampled"]["unjudged"] == 64 - sum(map(len, drawn.values()))
    both = [task for task in range(16) if new[task] and old[task]]
    assert found["against"]["paired"] == len(both)
    assert found["against"]["difference"][0] == pytest.approx(fmean(new[task][0] - old[task][0] for task in both))
    assert sum(row["unjudged"] for row in found["by"]["values"]) == found["unjudged"]
    said = call(run, "--against", "start").output
    assert f"of {16 - found['unjudged']} right · {found['unjudged']} of 16 questions could not be judged" in said
    assert f"of {len(both)} questions judged in both" in said


def test_where_nothing_could_be_judged_there_is_no_accuracy(run):
    change(run, rubric=["mine.py:unsure"])
    (run / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS if row["answer"] == "3"))
    found = result_of(run, "--against", run, "-n", "2", "--by", "carry")
    assert (found["questions"], found["unjudged"], found["sampled"]["pass_at"]) == (4, 4, {})
    assert not {"accuracy", "right"} & found.keys()
    assert "4 questions; no accuracy, since no answer could be judged" in call(run, "--against", run, "-n", "2", "--by", "carry").output


def test_a_broken_reward_is_treated_as_in_training_and_told(run):
    change(run, rubric=["mine.py:fragile"])
    stopped = call(run)
    assert (stopped.exit_code, "reward 'fragile' raised AttributeError" in stopped.output) == (2, True)
    change(run, rubric=["mine.py:fragile"], train={"max_completion_length": 5, "reward_on_error": "drop"})
    found = result_of(run, "-n", "2")
    assert (found["unjudged"], found["unscored"], found["broken"]["answers"]) == (4, 4, 12)
    assert "reward 'fragile' raised AttributeError" in found["broken"]["first"]
    assert "warning: 4 answers, drawn ones included, have no reward" in call(run).output


def test_a_broken_environment_is_treated_as_in_training(run):
    env = {"kind": "own", "name": "mine.py:Flaky"}
    change(run, env=env, train={"max_completion_length": 3})
    assert "the environment Flaky raised ConnectionError" in call(run).output
    change(run, env=env, train={"max_completion_length": 3, "env_on_error": "drop"})
    found = result_of(run)
    assert [line["columns"]["answer"] for line in saved(run) if line["right"] is None and line["reward"] is None] == ["3"] * 4
    assert (found["unjudged"], found["broken"]["answers"]) == (4, 4)


def test_a_column_that_some_rows_lack_has_a_line_for_them(run):
    rows = [{name: value for name, value in row.items() if name != "carry" or number > 2} for number, row in enumerate(QUESTIONS)]
    (run / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {row["value"]: row["questions"] for row in result_of(run, "--by", "carry")["by"]["values"]} == {"yes": 6, "no": 7, "None": 3}


def test_training_data_that_are_streamed_are_not_held(run):
    (run / "train.jsonl").write_text("".join(json.dumps({"prompt": f"{number} " + "x" * 1000}) + "\n" for number in range(1000)))
    question = evaluations.find_question(str(run), None, None, None)
    tasks = evaluations.questions(question, evaluations.Asking(), question.rubric())

    def peak(streaming):
        recipe = replace(question.recipe, data=replace(question.recipe.data, streaming=streaming))
        tracemalloc.start()
        found = evaluations.duplicates(replace(question, recipe=recipe), tasks)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, memory

    (held, much), (streamed, little) = peak(False), peak(True)
    assert held == streamed
    assert little < much / 4


def test_the_report_reads_like_this(run):
    said = call(run, "-n", "2", "--against", "start", "--by", "carry").output
    for part in ("greedy accuracy ", "2 drawn answers each · pass@1 ", "pass@2 ", "against ", "questions gained, ", "by carry:", "completions: "):
        assert part in said


@pytest.mark.parametrize(
    ("args", "said"), [(("--by", "cary"), "Did you mean 'carry'?"), (("--against", "/no/such/run"), "there is no model or run at /no/such/run")]
)
def test_what_cannot_be_asked_is_said_before_anything_is_spent(run, args, said):
    result = call(run, *args)
    assert (result.exit_code, said in result.output) == (2, True), result.output
    assert not (run / "eval.jsonl").exists()


def test_prompts_that_the_other_model_cannot_be_asked_are_found_before_one_is(run, models):
    final_model(run, models / "chatty")
    (run / "exam.jsonl").unlink()
    (run / "eval_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    change(run, data={"system": "Add."}, rubric=["mine.py:fragile"])
    result = call(run, "--data", run / "eval_rows.jsonl", "--against", "start")
    assert (result.exit_code, "first cannot be asked: " in result.output, "no chat template" in result.output) == (2, True, True), result.output


@pytest.mark.parametrize("place", ["missing/answers.jsonl", "first"])
def test_a_place_that_cannot_be_written_is_found_before_a_model_is_asked(run, place):
    change(run, rubric=["mine.py:fragile"])
    result = call(run, "--save", run / place)
    assert (result.exit_code, f"error: cannot write {run / place}" in result.output) == (2, True), result.output


def test_the_figures_are_printed_though_the_completions_can_no_longer_be_saved(run):
    change(run, rubric=["mine.py:removes_the_folder"])
    (run / "out").mkdir()
    result = call(run, "--save", run / "out" / "answers.jsonl")
    assert "mean reward 1" in result.output
    assert "error: cannot write" in result.output.splitlines()[-1]
    assert result.exit_code == 2


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "answers.jsonl"
    completions.save(path, [{"number": 1}])

    def interrupted():
        yield {"number": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        completions.save(path, interrupted())
    assert [found.name for found in tmp_path.iterdir()] == ["answers.jsonl"]
    assert json.loads(path.read_text()) == {"number": 1}
    (tmp_path / "link").symlink_to(path)
    completions.save(tmp_path / "link", [{"number": 3}])
    assert (tmp_path / "link").is_symlink()
    assert json.loads(path.read_text()) == {"number": 3}
    completions.save(path, [{"text": "half a pair: \ud83d"}])
    assert json.loads(path.read_text()) == {"text": "half a pair: ?"}


def test_a_checkpoint_is_asked_as_its_run_is(run):
    (run / "checkpoint-7").symlink_to((run / "model").resolve())
    change(run, train={"max_completion_length": 3})
    of_checkpoint, of_run = result_of(run / "checkpoint-7"), result_of(run)
    assert of_checkpoint == {name: value for name, value in of_run.items() if name != "completions"}
    assert not (run / "model" / "eval.jsonl").exists()


def test_a_rubric_of_monitors_can_be_asked_though_not_trained_with(run):
    change(run, rubric=[{"reward": f"{run}/mine.py:even", "weight": 0}])
    result = result_of(run)
    assert "accuracy" in result
    assert result["mean_reward"] is None
