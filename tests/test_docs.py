"""The pages that are made from the source are up to date, and what they name exists."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from posttrain.cli.recipe import SECTION_NAMES
from posttrain.cli.yaml12 import read_yaml
from posttrain.doctor import _requirements

ROOT = Path(__file__).parents[1]
OURS = {file.name for folder in ("src", "tests", "docs", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")}
NOT_OURS = {"convert_hf_to_gguf.py", "extras.py", "mine.py", "quiz.py", "utils.py", "conftest.py"}  # llama.cpp's, examples, what there is not
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(path):
    if str(ROOT / "docs") not in sys.path:
        sys.path.append(str(ROOT / "docs"))  # where its own imports are
    spec = importlib.util.spec_from_file_location(path.stem + "_page_maker", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_settings_are_those_of_the_source():
    maker = load(ROOT / "docs" / "settings.py")
    for page in maker.TABLES:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert maker.filled(page, text) == text, f"{page} is out of date; run: python docs/settings.py"


def test_the_measured_tables_are_those_of_the_results():
    maker = load(ROOT / "docs" / "measured.py")
    for page in maker.TABLES:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert maker.filled(page, text) == text, f"{page} is out of date; run: python docs/measured.py"


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / name for name in ("SECURITY.md", "CONTRIBUTING.md", "AGENTS.md"))], ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.-])((?:tests|benchmarks|examples|docs)/[\w/.-]+\.(?:py|md))", text))
    named |= {
        f"src/posttrain/{name}"
        for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text)
        if name.split("/")[0] not in ("tests", "benchmarks", "examples", "docs")
    }
    missing = sorted(name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists())
    missing += sorted(name for name in re.findall(r"`(\w+\.py)`", text) if name not in OURS | NOT_OURS)  # by their last name alone
    assert not missing


def test_the_figures_on_memory_are_those_of_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    maker = load(ROOT / "benchmarks" / "memory.py")
    results = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert maker.page(results) in text, "docs/memory.md is out of date; run: python benchmarks/memory.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_recipes_of_a_page_have_sections_that_exist(page):
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        assert read_yaml(block, page.name).keys() <= {*SECTION_NAMES, "stages"}, block


def test_the_page_of_the_doctor_shows_all_that_is_required():
    shown = re.findall(r"^  ok +(\S+)", (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {requirement.name for requirement in _requirements("posttrain")} <= set(shown)


def test_the_site_has_every_page_and_finds_links_that_lead_nowhere(tmp_path, monkeypatch):
    """`make docs` builds it; the check of its links is tried on a site of two pages."""
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
    links = load(ROOT / "docs" / "links.py")
    (tmp_path / "index.html").write_text(
        '<a href="more.html#here">1</a> <a href="more.html#there">2</a> <a href="none.html">3</a> <a href="https://x.y">4</a>'
    )
    (tmp_path / "more.html").write_text('<h1 id="here"></h1> <a href="/index.html">5</a>')
    assert links.broken(tmp_path) == ["index.html -> more.html#there", "index.html -> none.html"]
