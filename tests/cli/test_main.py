"""The commands, as a user types them: what they do, and the one sentence they say when they cannot."""

import json
import os
import subprocess
import sys

import pytest
from recorded import another_writer
from typer.testing import CliRunner

from posttrain.cli import runs
from posttrain.cli.main import app
from posttrain.errors import RewardError, TrainingError, UserError
from posttrain.tracking.lock import is_written
from posttrain.tracking.reader import RunReader

ROWS = [{"question": f"what is {a}+{b}?", "answer": f"{a}+{b}=#### {a + b}"} for a in range(4) for b in range(4)]
RECIPE = """
model: {{name: {folder}/model}}
data: {{train: rows.jsonl, prompt: "{{question}}", answer: "{{answer|after:####}}"}}
rubric: [{{reward: mine.py:is_short}}, arithmetic]
train: {{output_dir: {folder}/run, num_generations: 2, per_device_train_batch_size: 4, max_completion_length: 6, max_steps: 2, save_steps: 1,
        learning_rate: 1e-3, use_cpu: true}}
sft: {{output_dir: {folder}/sft, max_steps: 1, per_device_train_batch_size: 2, use_cpu: true}}
"""
REWARDS = """
from pathlib import Path
from posttrain import verifier

def is_short(completion):
    return -len(completion) / 100

def breaks_in_step_4(completion):
    here = Path(__file__).parent
    assert not (here / "broken").exists() or not (here / "run" / "checkpoint-3").exists()
    return -len(completion) / 100

def raises(completion):
    raise KeyError("oops")

def nan(completion):
    return float("nan")

def misnamed(completion, anwser):
    return 0.0

def too_few(completions, **columns):
    return [0.0]

@verifier
def exact(completion, answer):
    return completion == answer
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.data.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([row["question"] for row in ROWS], 300)
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def folder(tmp_path, model_folder):
    """A recipe with its data, rewards and model; runs go into the same folder."""
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.py").write_text(REWARDS)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def sentence(result, code=2):
    """The one line of an error; nothing else may be said."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--train.beta_kl=0.1", "error: train.beta_kl is not a setting of GRPO. Did you mean train.beta?"),
        ("--trian.beta=0.1", "Did you mean --train?"),
        ("--resum", "Did you mean --resume?"),
        ("--data.trian=x", "data.trian is not a setting; data has:"),
        ("--data.train=gone.jsonl", "gone.jsonl does not exist"),
        ("--data.prompt={qestion}", "asks for the column 'qestion'; the data has: question, answer. Did you mean 'question'?"),
        ("--data.prompt={question|int}", "row 0: 'question' is no whole number"),
        ("--data.answer=null", "the data has no column"),
        ("--rubric=[mine.py:misnamed]", "asks for the column 'anwser'; the data has:"),
        ("--rubric=[]", "the recipe has no rubric"),
        ("--rubric=[gsm9k]", "Did you mean 'gsm8k'?"),
        ("--model.name=/no/such/model", "there is no model directory '/no/such/model'"),
        ("--model.load_in_4bit=true", "4-bit weights of a pretrained model"),
        ("--train.num_generations=1", "num_generations=1"),
        ("--train.num_generations=3", "do not divide into groups"),
        ("--train.learning_rate=fast", "train.learning_rate must be a number, not 'fast'"),
        ("--train.max_completion_length=60", "beyond the model's context of 64"),
        ("--train.repetition_penalty=1.2", "repetition_penalty"),
        ("--train.fsdp=full_shard", "not built yet"),
        ("--engine.kind=vllm", "engine='vllm'"),
        ("--model.dtype=float8", "model.dtype: float8 is not known"),
        ("--train.max_steps", "--train.max_steps has no value"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(folder, override, said, monkeypatch):
    monkeypatch.chdir(folder)
    if override == "--data.answer=null":  # then nothing fills `answer`, but the raw data still has it: take it away
        (folder / "rows.jsonl").write_text('{"question": "x"}\n')
        said = "asks for the column 'answer'; the data has: question, prompt"
    before = sorted(path.name for path in folder.iterdir())
    assert said in sentence(call("grpo", folder / "recipe.yaml", override))
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


def test_an_empty_dataset_is_refused(folder):
    (folder / "rows.jsonl").write_text("")
    assert "has no rows" in sentence(call("grpo", folder / "recipe.yaml"))


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("raises", "reward 'raises' raised KeyError: 'oops'"),
        ("nan", "reward 'nan' returned nan for prompt"),
        ("too_few", "returned 1 scores for the 4 completions"),
    ],
)
def test_a_broken_reward_stops_training_with_a_sentence(folder, reward, said):
    assert said in sentence(call("grpo", folder / "recipe.yaml", f"--rubric=[{folder}/mine.py:{reward}]"))
    assert not is_written(folder / "run" / "run.sqlite")  # another process may go on


@pytest.mark.parametrize("option", ["--no-resume", "--resume", "--overwrite"])
def test_a_training_is_refused_where_another_one_writes(folder, option):
    with another_writer(folder / "run"):
        assert "another training writes here" in sentence(call("grpo", folder / "recipe.yaml", option))
        assert RunReader(folder / "run").steps() == [1]
        assert not (folder / "run" / "recipe.yaml").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder):
    result = call("grpo", folder / "recipe.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 prompts x 2 completions" in result.output
    assert not (folder / "run").exists()


def test_a_run_leaves_a_model_and_a_recipe_that_evaluate_on_their_own(folder):
    result = call("grpo", folder / "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert (folder / "run" / "model" / "model.safetensors").is_file()
    evaluated = call("eval", folder / "run", "--data", folder / "rows.jsonl", "--samples", "5", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    found = json.loads(evaluated.stdout.splitlines()[-1])
    assert found["questions"] == 5
    assert 0 <= found["accuracy"] <= 1

    assert "holds an earlier run, saved up to checkpoint-2. Go on with --resume" in sentence(call("grpo", folder / "recipe.yaml"))
    assert call("grpo", folder / "recipe.yaml", "--resume", "--train.max_steps=3").exit_code == 0
    assert (folder / "run" / "checkpoint-3").is_dir()
    (folder / "run" / "mine.txt").write_text("not posttrain's")
    assert call("grpo", folder / "recipe.yaml", "--overwrite", "--train.max_steps=1").exit_code == 0
    assert sorted(path.name for path in (folder / "run").glob("checkpoint-*")) == ["checkpoint-1"]
    assert (folder / "run" / "mine.txt").is_file()


def test_resuming_what_never_saved_starts_from_the_beginning(folder):
    result = call("grpo", folder / "recipe.yaml", "--resume", "--train.max_steps=1")
    assert result.exit_code == 0, result.output
    assert "starting from the beginning" in result.output


def test_a_finished_model_is_not_written_over_where_no_checkpoint_was_kept(folder):
    unsaved = ("--train.save_strategy=no", "--train.max_steps=1")
    assert call("grpo", folder / "recipe.yaml", *unsaved).exit_code == 0
    assert "holds the model of an earlier run. Start over with --overwrite" in sentence(call("grpo", folder / "recipe.yaml", *unsaved))
    assert "and no checkpoint to go on from. Start over with --overwrite" in sentence(call("grpo", folder / "recipe.yaml", *unsaved, "--resume"))
    assert call("grpo", folder / "recipe.yaml", *unsaved, "--overwrite").exit_code == 0


def test_a_run_that_goes_on_no_longer_has_the_model_of_its_earlier_end(folder):
    recipe, run = (folder / "recipe.yaml", "--rubric=[mine.py:breaks_in_step_4]"), folder / "run"
    assert call("grpo", *recipe).exit_code == 0
    told = (run / "recipe.yaml").read_text()
    assert "cannot resume" in sentence(call("grpo", *recipe, "--resume", "--train.max_steps=5", "--train.learning_rate=1e-2"))
    assert runs.model_of(str(run)) == str(run / "model")  # nothing was trained
    assert (run / "recipe.yaml").read_text() == told
    (folder / "broken").touch()
    assert "breaks_in_step_4" in sentence(call("grpo", *recipe, "--resume", "--train.max_steps=5"))
    assert runs.model_of(str(run)) == str(run / "checkpoint-3")
    assert not list(run.glob(".*model"))
    (folder / "broken").unlink()
    assert call("grpo", *recipe, "--resume", "--train.max_steps=5").exit_code == 0
    assert runs.model_of(str(run)) == str(run / "model")
    assert call("grpo", *recipe, "--resume", "--train.max_steps=5").exit_code == 0  # there is nothing left to train
    assert runs.model_of(str(run)) == str(run / "model")


KILLED = """
import os, sys
from transformers import PreTrainedTokenizerBase

save = PreTrainedTokenizerBase.save_pretrained
PreTrainedTokenizerBase.save_pretrained = lambda self, directory, **options: save(self, directory, **options) if "checkpoint" in str(directory) else os._exit(9)

from posttrain.cli.main import app
app(sys.argv[1:])
"""  # when the config and the weights of the last model are written, but not its tokenizer


def test_a_run_that_is_killed_while_it_writes_its_model_has_that_of_its_last_checkpoint(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, "grpo", str(folder / "recipe.yaml")], capture_output=True, text=True, env=environment)
    assert killed.returncode == 9, killed.stderr
    assert runs.model_of(str(folder / "run")) == str(folder / "run" / "checkpoint-2")
    assert call("grpo", folder / "recipe.yaml", "--resume").exit_code == 0
    assert runs.model_of(str(folder / "run")) == str(folder / "run" / "model")
    assert not list((folder / "run").glob(".*"))


def test_what_the_system_refuses_is_a_sentence_too(folder):
    (folder / "file").write_text("no directory")
    result = call("grpo", folder / "recipe.yaml", f"--train.output_dir={folder}/file/run")
    assert "Not a directory" in sentence(result, code=1)


def test_resume_and_overwrite_exclude_each_other(folder):
    assert "give one of them" in sentence(call("grpo", folder / "recipe.yaml", "--resume", "--overwrite"))


def test_sft_trains_on_the_completion_column(folder):
    assert "SFT needs rows with the columns (prompt, completion)" in sentence(call("sft", folder / "recipe.yaml"))
    result = call("sft", folder / "recipe.yaml", "--data.completion={answer}")
    assert result.exit_code == 0, result.output
    assert (folder / "sft" / "model" / "model.safetensors").is_file()


def test_lora_runs_are_evaluated_on_their_base_model(folder):
    result = call("grpo", folder / "recipe.yaml", "--model.lora.r=2", "--train.max_steps=1", "--train.save_strategy=no")
    assert result.exit_code == 0, result.output
    evaluated = call("eval", folder / "run", "--data", folder / "rows.jsonl", "--samples", "2")
    assert evaluated.exit_code == 0, evaluated.output
    assert "of 2 right" in evaluated.output


def greedy(model_folder, prompt, tokens):
    """What transformers' own generate says, as text without special tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_accuracy_is_the_share_of_greedy_answers_that_the_verifier_accepts(folder, model_folder):
    prompts = ["what is 1+1?", "what is 2+2?", "is", "3"]
    answers = [greedy(model_folder, prompt, 5) for prompt in prompts]
    rows = [
        {"prompt": prompt, "answer": answer if index else "something else"}
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    (folder / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "exam.yaml").write_text("model: {name: model}\ndata: {}\nrubric: [mine.py:exact]\n")
    result = call("eval", model_folder, "--data", folder / "exam.jsonl", "--recipe", folder / "exam.yaml", "--max-new-tokens", "5", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["accuracy"], found["right"], found["questions"]) == (0.75, 3, 4)


def test_a_rubric_that_decides_nothing_gives_a_mean_reward_and_says_why(folder, model_folder):
    (folder / "exam.yaml").write_text('model: {name: model}\ndata: {prompt: "{question}"}\nrubric: [mine.py:is_short]\n')
    result = call("eval", model_folder, "--data", folder / "rows.jsonl", "--recipe", folder / "exam.yaml", "--samples", "2", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert "no accuracy" in result.output
    assert "mean reward -0." in result.output


def test_a_run_with_its_own_exam_needs_no_options(folder, model_folder):
    run = folder / "finished"
    run.mkdir()
    (run / "model").symlink_to(model_folder)
    answers = [{"prompt": "what is 1+1?", "answer": "2"}, {"prompt": "what is 2+2?", "answer": "4"}]
    (run / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (run / "summary.json").write_text('{"max_new_tokens": 3}')
    result = call("eval", run)
    assert result.exit_code == 0, result.output
    assert "of 2 right" in result.output


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("eval", "/no/such/run", "--data", "x.jsonl"), "there is no model or run at /no/such/run"),
        (("eval", "{folder}/model"), "nothing to ask"),
        (("eval", "{folder}/model", "--data", "{folder}/rows.jsonl"), "nothing says what a right answer is"),
        (("eval", "{folder}", "--data", "{folder}/rows.jsonl", "--recipe", "nope"), "there is no recipe nope"),
        (("sample", "/no/such/model", "hello"), "there is no model or run at /no/such/model"),
        (("sample", "{folder}/model", "hello", "--system", "x"), "no chat template"),
    ],
)
def test_questions_that_cannot_be_asked_are_explained(folder, args, said):
    assert said in sentence(call(*(arg.format(folder=folder) for arg in args)))


def test_sample_prints_n_completions_and_is_greedy_at_temperature_zero(model_folder):
    result = call("sample", model_folder, "what is 1+1?", "-n", "2", "--temperature", "0", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output
    expected = greedy(model_folder, "what is 1+1?", 4)
    assert result.stdout.count(expected) >= 2


@pytest.mark.parametrize(("error", "code"), [(UserError("no\n good"), 2), (RewardError("no\n good"), 2), (TrainingError("no\n good"), 1)])
def test_errors_become_exit_codes(folder, monkeypatch, error, code):
    from posttrain.cli import build

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(build, "make_trainer", fail)
    assert sentence(call("grpo", folder / "recipe.yaml"), code) == "error: no good"
    monkeypatch.setenv("POSTTRAIN_TRACEBACK", "1")
    assert call("grpo", folder / "recipe.yaml").exception is error


def test_ctrl_c_exits_with_130(folder, monkeypatch):
    from posttrain.cli import build

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "make_trainer", interrupted)
    assert call("grpo", folder / "recipe.yaml").exit_code == 130


def test_help_needs_no_torch():
    code = "import sys; from posttrain.cli.main import app; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_program_exits_with_the_sentence_on_stderr():
    done = subprocess.run([sys.executable, "-m", "posttrain.cli.main", "grpo", "no-such-recipe"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no recipe no-such-recipe; packaged ones are: align, arithmetic")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("rubric", "said"),
    [
        ("[{reward: mine.py:is_short, weight: 2.0}]", "weight of 'is_short': 1.0 -> 2.0"),
        ("[mine.py:breaks_in_step_4]", "without the reward 'is_short'"),
    ],
)
def test_a_run_does_not_go_on_with_another_rubric(folder, rubric, said):
    began = ("grpo", folder / "recipe.yaml", "--rubric=[mine.py:is_short]")
    assert call(*began, "--train.max_steps=2").exit_code == 0
    refused = call("grpo", folder / "recipe.yaml", f"--rubric={rubric}", "--resume", "--train.max_steps=3")
    assert "another rubric" in sentence(refused)
    assert said in sentence(refused)
    assert call(*began, "--resume", "--train.max_steps=3").exit_code == 0
