"""What is written and printed of settings and of texts that are not ours: no secrets, no control characters, and never the end of a command."""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from posttrain.characters import shown, spelled, visible
from posttrain.cli.main import app
from posttrain.errors import EnvError, RewardError, TrainingError, UserError
from posttrain.secrets import is_secret, redacted, redacted_message

PLANTED = ["PLANTED4", "PLANTED5", "PLANTED6", "PLANTED7", "PLANTED8", "PLANTED9"]
SECRET_SETTINGS = """
rubric: [{{reward: "mine.py:scored", api_key: {0}, my_token: {1}, url: "http://user:{2}@127.0.0.1/x", headers: {{Authorization: "Bearer {3}"}}}}]
train: {{num_generations: 2, per_device_train_batch_size: 4, max_completion_length: 4, max_steps: 2, save_steps: 1, use_cpu: true,
        output_dir: run, hub_token: {4}, model_init_kwargs: {{token: {5}}}}}
"""
RECIPE = """
model: {{name: {model}}}
data: {{train: rows.jsonl}}
"""
PLAIN = "rubric: [mine.py:{reward}]\ntrain: {{num_generations: 2, per_device_train_batch_size: 4, max_completion_length: 4, max_steps: 2, save_strategy: 'no', "
PLAIN += "use_cpu: true, output_dir: run, log_completions: true}}\n"
REWARDS = """
def scored(completions, api_key=None, my_token=None, url=None, headers=None, **columns):
    return [float(len(text)) for text in completions]

def length(completion):
    return float(len(completion))

def quotes(completion):
    raise ValueError("cannot read \\x1b]0;owned\\x07\\x1b[31m" + completion + "\\u202e")

def tells(completion):
    raise ValueError("401 for https://me:QUOTED4@host/v1 with {'api_key': 'QUOTED5'}")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that speaks Chinese, which neither cp1252 nor ASCII can hold."""
    from small import build_model
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(["<end>", *"你好吗我很天地人"])}, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    folder = tmp_path_factory.mktemp("speaks") / "model"
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, model, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "你好" + "吗" * n, "completion": "我很"}) + "\n" for n in range(4)))
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(folder, model, rest):
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model) + rest)
    return str(folder / "recipe.yaml")


def call(*args):
    return CliRunner().invoke(app, list(args))


def holding(folder, secrets):
    """(secret, file) of every file below that holds one, in whatever format."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml"] + [*folder.glob("run/recipe.yaml")]
    return [(secret, str(path)) for path in files for secret in secrets if secret.encode() in path.read_bytes()]


def test_no_file_of_a_run_or_its_report_holds_a_secret_and_the_run_goes_on_with_other_ones(folder, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_PLANTEDPLANTEDPLANTED1")
    done = call("grpo", recipe(folder, model, SECRET_SETTINGS.format(*PLANTED)))
    assert done.exit_code == 0, done.output
    assert call("report", "run", "-o", "report.html").exit_code == 0
    assert call("export", "run", "exported").exit_code == 0
    assert holding(folder, [*PLANTED, "hf_PLANTEDPLANTEDPLANTED1"]) == []
    assert all(secret not in done.output for secret in PLANTED)
    others = [secret.replace("PLANTED", "RENEWED") for secret in PLANTED]
    resumed = call("grpo", recipe(folder, model, SECRET_SETTINGS.format(*others)), "--resume", "--train.max_steps=3")
    assert resumed.exit_code == 0, resumed.output
    assert (folder / "run" / "checkpoint-3").is_dir()
    assert holding(folder, others) == []


def test_a_manifest_of_an_older_version_with_a_secret_in_it_still_compares():
    from posttrain.trainers.core.manifest import Manifest, check_same, settings_of

    class Args:
        def to_dict(self):
            return {"beta": 0.1, "model_init_kwargs": {"token": "other"}, "headers": {"x-api-key": "k"}}

    check_same(Manifest(1, {"beta": 0.1, "model_init_kwargs": {"token": "SECRET"}, "headers": None}), settings_of(Args()), {})
    with pytest.raises(UserError, match=r"beta: 0.2 -> 0.1"):
        check_same(Manifest(1, {"beta": 0.2}), settings_of(Args()), {})


def test_what_reads_like_a_secret_but_is_none_stays():
    kept = {
        "eos_token": "<|im_end|>",
        "sft": {"think_token": "<think>"},
        "max_tokens": 5,
        "criteria": "Basic correctness",
        "system": "Bearer bonds are an asset; see http://host:80/a?b=1",
        "token": False,
        "data": ["squad:plain:train", "git@host:repo", None],
    }
    assert redacted(kept) == kept


@pytest.mark.parametrize(
    "value",
    [
        {"headers": {"X-API-Key": "PLANTED"}},
        {"headers": [{"Cookie": "PLANTED"}]},
        {"auth": ["me", "PLANTED"]},
        {"proxy": "socks5://me:PLANTED@host:1"},
        {"proxy": "https://me:PLAN@PLANTED@host:1"},
        {"remote": "https://PLANTEDPLANTEDPLANTED@host/x.git"},
        {"data": "https://host/rows.jsonl?X-Amz-Signature=PLANTED&n=1"},
        {"deep": [[{"deeper": {"client_secret": "PLANTED"}}]]},
        {"note": "hf_PLANTEDPLANTEDPLANTED"},
        {"header": "Bearer PLANTED"},
        {"password": 12345},
    ],
)
def test_secrets_are_found_at_any_depth_and_in_urls(value):
    written = json.dumps(redacted(value))
    assert "PLANTED" not in written
    assert "12345" not in written


def test_a_message_quotes_no_secret(folder, model, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "opaque-value-of-a-key")
    assert "opaque" not in str(UserError("the server said: unknown key opaque-value-of-a-key"))
    assert redacted_message("got eos_token: <end>, 12 tokens: a b") == "got eos_token: <end>, 12 tokens: a b"
    stopped = call("grpo", recipe(folder, model, PLAIN.format(reward="tells")))
    assert stopped.exit_code == 2
    assert "401 for https://me:***@host/v1" in stopped.output
    assert not re.search("QUOTED", stopped.output)


def test_the_exception_of_a_reward_reaches_the_terminal_without_its_control_characters(folder, model):
    stopped = call("grpo", recipe(folder, model, PLAIN.format(reward="quotes")))
    assert stopped.exit_code == 2, stopped.output
    assert r"cannot read \x1b]0;owned\x07\x1b[31m" in stopped.output
    assert not set(stopped.output) & set("\x1b\x07\u202e\x9b")


@pytest.mark.parametrize(
    "args",
    [
        ["sft", "no\x1b[2Jsuch.yaml"],
        ["report", "no\x1b[2Jrun"],
        ["watch", "no\x1b[2Jrun"],
        ["eval", "./no\x1b[2Jmodel", "--recipe", "gsm8k", "--data", "rows.jsonl"],
        ["sample", "./no\x1b[2Jmodel", "hi"],
        ["grpo", "gsm8k", "--train.x\x1b[2J=1"],
        ["reward", "check", "no\x1b[2Jsuch.py:f"],
    ],
)
def test_names_with_escapes_are_written_out_in_every_commands_errors(args):
    said = call(*args)
    assert said.exit_code != 0
    assert "\x1b" not in said.output
    assert r"\x1b[2J" in said.output


@pytest.mark.parametrize("kind", [UserError, RewardError, EnvError, TrainingError])
def test_every_kind_of_error_shows_its_message_and_not_its_escapes(kind):
    said = str(kind("one\nline \x1b[31m \x9b5m " + "x" * 50_000_000 + " \u2066end"))
    assert said.startswith("one\nline \\x1b[31m \\x9b5m x")
    assert said.endswith(r" \u2066end")
    assert len(said) < 21_000


def test_hidden_characters_are_those_that_unicode_calls_so():
    import unicodedata

    for code in [*range(0x3000), 0xFEFF, 0xE0041, 0x1F600, 0xD800]:
        char = chr(code)
        hidden = unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert (visible(char) != char) == hidden, hex(code)
        assert (shown(char) != char) == (hidden and char not in "\n\t"), hex(code)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16", None])
def test_what_an_encoding_lacks_is_spelled(encoding):
    text = spelled("a 你 é", encoding)
    assert text == {"cp1252": r"a \u4f60 é", "ascii": r"a \u4f60 \xe9"}.get(encoding or "", "a 你 é")


def test_no_command_ends_where_output_is_cp1252(folder, model):
    recipe(folder, model, PLAIN.format(reward="length"))
    commands = [
        ["grpo", "recipe.yaml"],
        ["sample", str(model), "你好", "--max-new-tokens", "4", "-n", "4"],
        ["data", "preview", "recipe.yaml", "--kind", "sft", "-n", "1"],
        ["probe", "recipe.yaml", "--prompts", "2", "--completions", "2"],
        ["eval", "run", "--data", "rows.jsonl"],
        ["doctor"],
        ["grpo", "--help"],
    ]
    script = (  # one process for all of them, each as the console script is called
        "import json, sys\nfrom posttrain.cli.main import run\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = command\n"
        "    try:\n        run()\n    except SystemExit as end:\n        print(f'END {command[0]} {end.code}', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(commands)], capture_output=True, env=environment, cwd=folder)
    assert b"Traceback" not in done.stdout + done.stderr, done.stderr[-2000:]
    parts = re.split(rb"END (\S+) (\d)\n", done.stdout)
    assert parts[1::3] == [command[0].encode() for command in commands], done.stderr[-2000:]
    assert all(code in b"013" for code in parts[2::3]), done.stdout[-2000:]
    assert [rb"\u" in part for part in parts[0:9:3]] == [True] * 3, parts[0:9:3]  # completions, and rows


def test_a_prompt_that_the_locale_could_not_read_is_read_as_utf8():
    from posttrain.cli.options import as_utf8

    assert as_utf8("你好 é".encode().decode("ascii", "surrogateescape")) == "你好 é"
    assert as_utf8("\udcff") == "\ufffd"  # no UTF-8 either
    assert as_utf8("你好 é") == "你好 é"


def test_a_script_of_a_user_prints_completions_where_output_is_cp1252(folder, model):
    script = (
        "from posttrain import GRPOTrainer, GRPOConfig\n"
        "args = GRPOConfig(output_dir='run', num_generations=2, per_device_train_batch_size=4, max_completion_length=4, max_steps=1, save_strategy='no',\n"
        "    use_cpu=True, log_completions=True)\n"
        f"GRPOTrainer({str(model)!r}, lambda completion: float(len(completion)), args, [{{'prompt': '\\u4f60\\u597d'}}] * 4).train()\n"
        "print('trained')\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, cwd=folder)
    assert done.stdout.endswith(b"trained" + os.linesep.encode()), done.stderr[-2000:]
    assert rb"\u4f60" in done.stdout


def test_tokens_of_a_vocabulary_are_no_secrets():
    assert [name for name in ("hub_token", "HF_TOKEN", "judge_api_key", "eos_token", "max_tokens") if is_secret(name, "x")] == [
        "hub_token",
        "HF_TOKEN",
        "judge_api_key",
    ]
    assert not is_secret("push_token", None)
