"""What other systems lack: UTF-8 as the default encoding, POSIX modules and signals, fork. As far as one machine can show it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain

ROOT = Path(posttrain.__file__).parent
FILES = [file for file in sorted(ROOT.rglob("*.py")) if "inside" not in file.relative_to(ROOT).parts]  # sandbox/inside runs on Linux only
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
# file -> what it uses of POSIX, each behind a question about the system
GUARDED = {
    "cli/threads.py": {"os.sched_getaffinity"},
    "cli/watch.py": {"os.nice"},
    "doctor.py": {"os.sysconf"},
    "processes.py": {"os.killpg"},
    "rewards/check/bench.py": {"signal.SIGALRM", "signal.setitimer", "signal.ITIMER_REAL"},
    "rewards/surroundings.py": {"signal.setitimer", "signal.ITIMER_REAL"},
    "rewards/execution/worker.py": {"resource"},
    "rewards/execution/process.py": {"os.killpg", "signal.SIGKILL"},
    "tracking/recorder.py": {"os.sysconf"},
}
NAMES = {
    *(
        f"os.{name}"
        for name in ("fork", "getuid", "geteuid", "killpg", "mkfifo", "nice", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname")
    ),
    *(f"signal.{name}" for name in ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGUSR1", "ITIMER_REAL", "alarm", "pause", "setitimer")),
}


def posix_only(source):
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {name.split(".")[0] for name in named} & MODULES
        elif isinstance(node, ast.Attribute):
            found |= {ast.unparse(node)} & NAMES
    return found


def test_what_only_posix_has_is_used_where_it_is_known_to_be_guarded():
    found = {file.relative_to(ROOT).as_posix(): used for file in FILES if (used := posix_only(file.read_text(encoding="utf-8")))}
    assert {name: used for name, used in found.items() if not name.startswith("sandbox/")} == GUARDED


def unnamed_encodings(source):
    """Lines that open text in whatever encoding the system has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = ast.unparse(node.func)
        opens = name == "open" or (name.endswith(".open") and name not in ("os.open", "webbrowser.open"))
        is_binary = any(
            isinstance(part, ast.Constant) and isinstance(part.value, str) and "b" in part.value
            for argument in node.args
            for part in ast.walk(argument)
        )
        if name.endswith((".read_text", ".write_text")) or (opens and not is_binary):
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_every_text_file_is_opened_with_its_encoding():
    assert [f"{file.relative_to(ROOT)} {line}" for file in FILES for line in unnamed_encodings(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("source", "count"),
    [("p.read_text()", 1), ("p.read_text(encoding='utf-8')", 0), ("open(p)", 1), ("open(p, 'rb')", 0), ("p.open('w')", 1), ("os.open(p, 0)", 0)],
)
def test_the_reader_of_opened_files_sees(source, count):
    assert len(unnamed_encodings(source)) == count


def test_a_run_is_trained_and_reported_without_posix_modules_and_with_spawned_workers(tmp_path):
    """A system without POSIX, as far as our own files can tell: its modules cannot be imported, its names are not there."""
    script = tmp_path / "elsewhere.py"
    script.write_text(
        f"""
import multiprocessing, os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MODULES - {"posix"}!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

def main():
    import accelerate, nicegui, torch, transformers, transformers.trainer  # what others do about it is theirs
    from small import build_model, build_tokenizer
    for name in {MODULES - {"posix"}!r}:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Absent())
    for name in ("SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "setitimer", "getitimer", "ITIMER_REAL", "alarm", "pause"):
        delattr(signal, name)
    for name in ("killpg", "mkfifo", "nice", "sched_getaffinity", "setsid", "statvfs"):
        delattr(os, name)
    multiprocessing.set_start_method("spawn")
    from posttrain import GRPOConfig, GRPOTrainer, Rubric, SFTConfig, SFTTrainer
    tokenizer = build_tokenizer()
    common = dict(max_steps=2, use_cpu=True, save_steps=1, per_device_train_batch_size=4, dataloader_num_workers=1)
    rows = [{{"prompt": "1+1=", "completion": "2"}}] * 8
    SFTTrainer(build_model(tokenizer), SFTConfig(output_dir="sft", **common), train_dataset=rows, processing_class=tokenizer).train()
    config = GRPOConfig(output_dir="grpo", num_generations=2, max_completion_length=4, **common)
    GRPOTrainer(build_model(tokenizer), Rubric("arithmetic"), config, [{{"prompt": "1+1=", "answer": "2"}}] * 8, processing_class=tokenizer).train()
    from typer.testing import CliRunner
    from posttrain.cli.main import app
    for command in (["report", "grpo", "-o", "report.html"], ["reward", "check", "arithmetic"], ["plan", "--help"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code in (0, 1) and not isinstance(done.exception, (AttributeError, ImportError)), (command, done.output, done.exception)
    print("all done")

if __name__ == "__main__":
    main()
""",
        encoding="utf-8",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.strip().endswith(b"all done"), done.stderr[-3000:]
    assert (tmp_path / "report.html").is_file()
