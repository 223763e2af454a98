"""Who may import whom, and what the package never does. Read from the source, so that nothing has to be run for it."""

import ast
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import posttrain

ROOT = Path(posttrain.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
STDLIB = set(sys.stdlib_module_names)

# Part of the package -> its floor. A part imports itself and lower floors; the columns of floor 3 never each other.
FLOOR = {
    "types": 0,
    "sizes": 0,
    "errors": 0,
    "characters": 0,
    "secrets": 0,
    "io": 0,
    "event_loops": 0,
    "processes": 0,
    "ops": 1,
    "sandbox": 1,
    "evaluation": 1,
    "reasoning_gym_tasks": 1,
    "losses": 2,
    "models": 3,
    "data": 3,
    "rollout": 3,
    "rewards": 3,
    "envs": 3,
    "tracking": 3,
    "methods": 2,
    "trainers": 4,
    "memory": 4,
    "policy": 4,
    "export": 5,
    "evaluate": 5,
    "probe": 5,
    "doctor": 5,
    "demo": 5,
    "watch": 5,
    "compat": 5,
    "cli": 6,
}
# On these floors parts may import each other: the nouns and their errors; what composes; what shows it.
SHARED = {0, 4, 5}
# Parts that may import nothing from outside but the standard library and these.
OUTSIDE = {
    "types": set(),
    "sizes": set(),
    "errors": set(),
    "characters": set(),
    "secrets": set(),
    "io": set(),
    "event_loops": set(),
    "processes": set(),
    "sandbox": set(),
    "evaluation": {"numpy", "scipy"},
    "reasoning_gym_tasks": {"reasoning_gym"},
    "ops": {"torch", "transformers", "triton"},
    "losses": {"torch"},
}
# A GPU machine or a small installation may lack these: they are imported where they are used.
LAZY = {"datasets", "peft", "bitsandbytes", "triton", "vllm"}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str  # absolute
    annotation: bool  # under `if TYPE_CHECKING:`
    top_level: bool  # runs when the file is imported

    @property
    def part(self) -> str | None:
        """The part of posttrain that is imported; None for other packages."""
        names = self.module.split(".")
        return names[1] if names[0] == "posttrain" and len(names) > 1 else None

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(file: Path, source: str | None = None) -> list[Import]:
    """Every import of a file: relative ones, those in functions, and names taken from posttrain's lazy front door."""
    package = ["posttrain", *file.relative_to(ROOT).parts[:-1]]
    found: list[Import] = []

    def visit(node: ast.AST, annotation: bool, top_level: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(file, node.lineno, alias.name, annotation, top_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], node.module or ""]).rstrip(".") if node.level else str(node.module)
            for alias in node.names:
                module = posttrain._HOME.get(alias.name, f"posttrain.{alias.name}") if base == "posttrain" else base
                if module != "posttrain.__version__":
                    found.append(Import(file, node.lineno, module, annotation, top_level))
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, True, top_level)
            for child in node.orelse:
                visit(child, annotation, top_level)
        else:
            inside = top_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, annotation, inside)

    visit(ast.parse(file.read_text() if source is None else source), False, True)
    return found


def breaks_the_floors(found: Import) -> bool:
    if found.part is None or found.file == ROOT / "__init__.py":
        return False
    here, there = part_of(found.file), found.part
    if here == there:
        return False
    if found.annotation:  # a type's name is no dependency, but it does not look upstairs either
        return FLOOR[there] > FLOOR[here]
    return FLOOR[there] > FLOOR[here] or (FLOOR[there] == FLOOR[here] and FLOOR[here] not in SHARED)


ALL_IMPORTS = [found for file in FILES for found in imports_of(file)]


def test_every_part_has_a_floor():
    parts = {part_of(file) for file in FILES} - {"__init__", "__main__"}
    assert parts <= FLOOR.keys()


def test_nobody_imports_a_sibling_or_a_higher_floor():
    assert [str(found) for found in ALL_IMPORTS if breaks_the_floors(found)] == []


@pytest.mark.parametrize(
    ("file", "source", "is_wrong"),
    [
        ("losses/x.py", "from posttrain.models.load import load_policy", True),
        ("losses/x.py", "from posttrain.ops import linear_logprobs", False),
        ("rewards/x.py", "def f():\n    from ..data import chat", True),
        ("rewards/x.py", "import posttrain.rollout.play", True),
        ("rollout/local/x.py", "from ...models import forward", True),
        ("rollout/local/x.py", "from . import cache", False),
        ("models/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from posttrain.data.stream import Stream", False),
        ("models/x.py", "from posttrain.data.stream import Stream", True),
        ("tracking/x.py", "from posttrain import Rubric", True),
        ("tracking/x.py", "from posttrain import __version__", False),
        ("trainers/x.py", "from posttrain.cli.main import run", True),
        ("models/x.py", "from posttrain.trainers.core.base import BaseTrainer", True),
        ("data/x.py", "from posttrain import demo", True),
        ("types.py", "from posttrain.ops import linear_logprobs", True),
        ("data/x.py", "import typing\nif typing.TYPE_CHECKING:\n    from posttrain.trainers.grpo import GRPOTrainer", True),
    ],
)
def test_the_reader_of_imports_sees(file, source, is_wrong):
    assert any(breaks_the_floors(found) for found in imports_of(ROOT / file, source)) == is_wrong


def test_low_floors_import_little_from_outside():
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if (allowed := OUTSIDE.get(part_of(found.file))) is not None
        and found.module.split(".")[0] not in STDLIB | allowed | {"posttrain"}
        and not found.annotation
    ]
    assert wrong == []


def test_what_an_installation_may_lack_is_imported_where_it_is_used():
    wrong = [str(found) for found in ALL_IMPORTS if found.module.split(".")[0] in LAZY and found.top_level and not found.annotation]
    assert wrong == []


def test_probe_and_memory_import_no_trainer():
    assert [str(found) for found in ALL_IMPORTS if part_of(found.file) in ("probe", "memory") and found.part == "trainers"] == []


# What runs a program inside the sandbox, never in a process of ours; the argument of `compile` is hostile text there.
RUNS_PROGRAMS = {"sandbox/inside/host.py", "sandbox/inside/test_runner.py"}


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Calls that run or unpickle what they are given."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        refused = (
            name in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("trust_remote_code") == "True"
            or keywords.get("shell") == "True"
            or keywords.get("allow_pickle") == "True"
        )
        if refused:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_in_the_package_pickles_or_runs_text():
    wrong = [str(found) for found in ALL_IMPORTS if found.module.split(".")[0] in UNSAFE_MODULES]
    wrong += [f"{file.relative_to(ROOT)} {call}" for file in FILES if not runs_programs(file) for call in unsafe_calls(ast.parse(file.read_text()))]
    assert wrong == []


def runs_programs(file: Path) -> bool:
    return file.relative_to(ROOT).as_posix() in RUNS_PROGRAMS


def test_what_runs_programs_is_imported_inside_the_sandbox_only():
    hosts = {"posttrain.sandbox.inside"} | {f"posttrain.{name.removesuffix('.py').replace('/', '.')}" for name in RUNS_PROGRAMS}
    assert [str(found) for found in ALL_IMPORTS if found.module in hosts and found.file.parent.name != "inside"] == []


@pytest.mark.parametrize(
    ("source", "is_unsafe"),
    [
        ("eval(answer)", True),
        ("model.eval()", False),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("re.compile(pattern)", False),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", True),
        ("subprocess.run(line, shell=True)", True),
    ],
)
def test_the_reader_of_calls_sees(source, is_unsafe):
    assert bool(unsafe_calls(ast.parse(source))) == is_unsafe


def test_importing_posttrain_is_quick_and_does_not_import_torch():
    script = "import sys, posttrain; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    seconds = []
    for _ in range(3):  # the best of three: other work on the machine is not what is tested
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", script], check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


def test_every_public_name_is_there():
    for name in posttrain.__all__:
        assert getattr(posttrain, name) is not None
    assert set(posttrain.__all__) == {*posttrain._HOME, "__version__"}
    assert set(dir(posttrain)) == set(posttrain.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'GRPOTrainr'"):
        posttrain.GRPOTrainr  # noqa: B018


def test_no_file_of_the_package_is_longer_than_a_chapter():
    assert {str(file.relative_to(ROOT)): lines for file in FILES if (lines := len(file.read_text().splitlines())) > 400} == {}


def test_every_file_says_what_it_is():
    silent = [str(file.relative_to(ROOT)) for file in FILES if file.read_text().strip() and ast.get_docstring(ast.parse(file.read_text())) is None]
    assert silent == []
