"""How the house is built and which words it uses: no import circle, no class name twice, short files, the field's words. Read from the source."""

import ast
import io
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_floors import FILES, ROOT, imports_of


def module_of(file: Path) -> str:
    return ".".join(("posttrain", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(file: Path) -> set[str]:
    """The modules of the package that a file imports at any place: in functions and under TYPE_CHECKING too."""
    package = ["posttrain", *file.relative_to(ROOT).parts[:-1]]
    found = {each.module for each in imports_of(file) if each.part}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):  # in `from posttrain.rewards import scoring` the module is in the alias
            base = ".".join([*package[: len(package) - node.level + 1], node.module or ""]).rstrip(".") if node.level else str(node.module)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names
            if names <= MODULES.keys():
                found.discard(base)
    return found & MODULES.keys()


MODULES = {module_of(file): file for file in FILES}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(found)


def test_no_modules_import_each_other():
    """The package's front door is left out: it imports nothing until a name is asked for."""
    edges = {name: imported_modules(file) - {name, "posttrain"} for name, file in MODULES.items()}
    assert circles(edges) == CIRCLES


def test_the_finder_of_circles_sees():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_every_class_has_a_name_of_its_own():
    names = Counter(node.name for file in FILES for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef))
    assert sorted(name for name, times in names.items() if times > 1) == []


def test_files_are_chapters():
    lines = {module: len(file.read_text().splitlines()) for module, file in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > 400} == {}
    assert statistics.median(lines.values()) <= 120


# Circles that are still there. The list only shrinks.
CIRCLES: list[list[str]] = []

# Where a word stands -> the field's word. Patterns are searched in the names that a file defines, split into words ("SampledLogprobs" is
# "sampled logprobs"), and in docstrings and comments. A word with a meaning of its own here ("wall clock") is left out by its pattern.
WORDS = {
    r"\bbegun anew\b": "restarted",
    r"\b(lets?|letting) go of\b": "close, free, release",
    r"\b(takes?|taken) back\b": "rollback",
    r"\bsilent (group|prompt|question)s?\b|\bgroups? without signal\b": "zero-variance group",
    r"\bundecided\b": "high-entropy",
    r"\b(cut|cuts) off\b": "truncated",
    r"\bchance of silence\b|\bsilent logs\b|\bis silent\b": "zero variance",
    r"\b(own|shared) mass\b": "lse",
    r"\bwith pay\b|\bpays\b(?! to keep)|\bpaid\b(?! for)": "rewards, gives a reward",
    r"\bdice\b": "counter-based random numbers",
    r"\blanes?\b": "executor",
    r"\bwalls?\b(?![ -]?(clock|time)| s\b|\", \"cpu)": "isolation backend",  # `wall_s` and the outcome "wall" are the wall clock
    r"\bkeepers?\b": "supervisor",
    r"\bnurser(y|ies)\b": "fork server",
    r"\bexaminers?\b": "test runner",
    r"\bforeseen\b|\bexpected grad\b": "known upstream gradient",
    r"\bfrozen pass(es)?\b": "evaluating without gradient",
    r"\bexams?\b": "evaluation",
    r"\bthrift\b": "MemorySwitches",
    r"\bsampl(er|ing) log(p|prob)s\b|\bsampled logprobs\b": "sampled_logps",
}


def words_of(identifier: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).replace("_", " ").strip().lower()


def said_in(source: str) -> Iterator[tuple[int, str]]:
    """(line, text): the names that a source defines, its docstrings and its comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, words_of(node.name)
        elif isinstance(node, ast.arg):
            yield node.lineno, words_of(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, words_of(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, words_of(node.attr)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text.lower()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lower()


def words_found(source: str) -> dict[str, list[int]]:
    """The patterns of WORDS that a source says -> the lines."""
    found: dict[str, list[int]] = {}
    for line, text in said_in(source):
        for pattern in WORDS:
            if re.search(pattern, text):
                found.setdefault(pattern, []).append(line)
    return found


def test_the_words_are_the_fields():
    counts = Counter(file.relative_to(ROOT).as_posix() for file in FILES for lines in words_found(file.read_text()).values() for _ in lines)
    assert {file: count for file, count in counts.items() if count > STILL.get(file, 0)} == {}, "see WORDS for the field's word"
    assert {file: count for file, count in STILL.items() if count > counts[file]} == {}, "fewer than noted: lower the number in STILL"


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("sampler_logps = 1", True),
        ("class ExamResult: pass", True),
        ("def example(): pass", False),
        ("# the wall of the sandbox", True),
        ("# wall clock", False),
        ("x = 'the wall'", False),
        ("def f(wall_seconds): pass", True),
    ],
)
def test_the_reader_of_words_sees(source, is_found):
    assert bool(words_found(source)) == is_found


# Files that still say such words -> how often. It only shrinks.
STILL: dict[str, int] = {}
