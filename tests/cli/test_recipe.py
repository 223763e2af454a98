"""Recipes: what is read, what is refused, what is laid over."""

import time
from importlib import resources

import pytest
import yaml

from posttrain.cli.recipe import Recipe, find_recipe, lay_over, load_yaml, read_recipe
from posttrain.cli.stages import read_stages
from posttrain.errors import UserError

MINIMAL = "model: {name: some/model}\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_every_packaged_recipe_can_be_read_by_name():
    names = [entry.name for entry in resources.files("posttrain").joinpath("recipes").iterdir() if entry.name.endswith(".yaml")]
    assert {"arithmetic.yaml", "gsm8k.yaml", "gsm8k-tiny.yaml"} <= set(names)
    for name in names:
        if "stages" in load_yaml(find_recipe(name)):
            assert read_stages(name, (), None)
            continue
        assert isinstance(read_recipe(name), Recipe)
        assert read_recipe(name.removesuffix(".yaml")) == read_recipe(f"recipes/{name}")


def test_sections_and_defaults(recipe_file):
    recipe = read_recipe(recipe_file(MINIMAL + "eval:\nrubric: [arithmetic]\ntrain: {beta: 0.04}\n"))
    assert (recipe.model.name, recipe.model.lora, recipe.engine.kind, recipe.eval.every) == ("some/model", None, "local", None)
    assert (recipe.train, recipe.rubric) == ({"beta": 0.04}, ["arithmetic"])


def test_a_recipe_written_back_reads_the_same(recipe_file, tmp_path):
    recipe = read_recipe("gsm8k")
    assert read_recipe(recipe_file(recipe.to_yaml())) == recipe


def test_secrets_are_not_written_back(recipe_file):
    text = MINIMAL + "train: {hub_token: hf_abc, model_init_kwargs: {token: hf_abc, revision: main}}\nsft: {eos_token: <|im_end|>}\n"
    text += "rubric: [{reward: mine.py:judge, api_key: sk-abc}]\n"
    written = read_recipe(recipe_file(text)).to_yaml()
    assert "hf_abc" not in written
    assert "sk-abc" not in written
    recipe = read_recipe(recipe_file(written))
    assert recipe.train == {"hub_token": None, "model_init_kwargs": {"token": None, "revision": "main"}}
    assert recipe.sft == {"eos_token": "<|im_end|>"}  # a token of the vocabulary


def test_overrides_are_laid_over_the_file_and_read_as_yaml(recipe_file):
    overrides = [
        "train.learning_rate=1.0e-6",
        "model.name=other",
        "eval.every=5",
        "rubric=[gsm8k]",
        "model.lora.r=4",
        "data.prompt={q}: {r}",
        "data.system=null",
    ]
    recipe = read_recipe(recipe_file(MINIMAL), overrides)
    assert recipe.train == {"learning_rate": 1e-6}
    assert (recipe.model.name, recipe.eval.every, recipe.rubric, recipe.data.prompt) == ("other", 5, ["gsm8k"], "{q}: {r}")
    assert (recipe.model.lora.r, recipe.model.lora.alpha) == (4, 64)


def test_only_true_and_false_are_booleans_and_exponents_need_no_point(recipe_file):
    recipe = read_recipe(recipe_file(MINIMAL + "train: {a: no, b: on, c: true, d: 1e-6, e: 5, f: -1.5E3, g: 1.e2, h: e5, i: null}"))
    assert recipe.train == {"a": "no", "b": "on", "c": True, "d": 1e-6, "e": 5, "f": -1500.0, "g": 100.0, "h": "e5", "i": None}
    assert read_recipe(recipe_file(recipe.to_yaml())) == recipe


def test_paths_beside_the_recipe_become_absolute(recipe_file, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "mine.py").write_text("")
    recipe = read_recipe(recipe_file(MINIMAL + "rubric: ['mine.py:f', {reward: 'mine.py:g', weight: 2}]\n"))
    assert recipe.data.train == str(tmp_path / "rows.jsonl")
    assert recipe.rubric == [f"{tmp_path}/mine.py:f", {"reward": f"{tmp_path}/mine.py:g", "weight": 2}]
    assert recipe.model.name == "some/model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {name: x}\n" + MINIMAL, r"modle is not a setting; a recipe has: model, .* Did you mean model\?"),
        ("model: {nam: x}\ndata: {}\n", r"model\.nam is not a setting; .* Did you mean model\.name\?"),
        (MINIMAL + "eval: {evry: 5}", r"Did you mean eval\.every\?"),
        ("model: {name: x, lora: {rank: 4, alpah: 3}}\ndata: {}", r"model\.lora\.rank is not a setting"),
        ("model: {name: x, load_in_4bit: true}\ndata: {}", "4-bit weights of a pretrained model"),
        ("model: {}\ndata: {}", "model needs one of"),
        ("model: {name: x, from_scratch: {}}\ndata: {}", "model needs one of"),
        ("model: {from_scratch: {}}\ndata: {}", "belong together"),
        ("model: {from_scratch: {}, tokenizer: {kind: wordpiece}}\ndata: {}", "use bpe"),
        ("data: {train: x}", "needs the sections model and data"),
        ("model: some/model\ndata: {}", "model must be a section"),
        (MINIMAL + "train: 5", "train must be a mapping"),
        (MINIMAL + "model: {name: y}", "'model' stands twice"),
        ("model: {name: x\ndata: {}", "is not valid YAML"),
        ("- a\n- b", "must hold sections"),
        ("", "must hold sections"),
        ("model: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(recipe_file, text, message):
    with pytest.raises(UserError, match=message):
        read_recipe(recipe_file(text))


@pytest.mark.parametrize(("override", "message"), [("rubric.0=x", "rubric has no settings"), ("train.x=[", "not valid YAML"), ("train.x.y=1", None)])
def test_an_override_that_cannot_be_laid_over_is_explained(override, message):
    values = yaml.safe_load("rubric: [a]")
    if message is None:
        lay_over(values, override)
        assert values["train"] == {"x": {"y": 1}}
    else:
        with pytest.raises(UserError, match=message):
            lay_over(values, override)


def test_a_recipe_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(UserError, match=r"no recipe gsm8k-tinny; packaged ones are: .*arithmetic, .*gsm8k.* Did you mean 'gsm8k-tiny.yaml'"):
        read_recipe("gsm8k-tinny")
    with pytest.raises(UserError, match=r"no recipe \./nowhere/gsm8k.yaml"):
        read_recipe("./nowhere/gsm8k.yaml")


def test_sections_may_share_settings_by_an_anchor(recipe_file):
    text = "sft: &all {max_steps: 3, seed: 1}\ntrain:\n  <<: *all\n  seed: 2\n"
    assert read_recipe(recipe_file(MINIMAL + text)).train == {"max_steps": 3, "seed": 2}


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join([f'*{b}'] * 9)}]\n" for b, n in zip("abcdefghi", "bcdefghij", strict=True)),
        "model: &m [*m]\n",
        "model: " + "[" * 2000,
        "model: " + "{a: " * 60 + "1" + "}" * 60,
        "date: 2026-13-45\n",
        "seed: " + "9" * 5000 + "\n",
        "x: !!python/object/apply:os.system [true]\n",
        'data: "' + "x" * 2**21 + '"\n',
        "".join(f"k{n}: 1\n" for n in range(26_000)),
        "? [1, 2]\n: 3\n",
    ],
    ids=["aliases", "a circle", "unclosed", "deep", "no date", "digits", "a tag", "long", "many keys", "a list as key"],
)
def test_a_strangers_recipe_is_a_sentence_in_little_time(recipe_file, text):
    started = time.process_time()
    with pytest.raises(UserError):
        read_recipe(recipe_file(text))
    assert time.process_time() - started < 10
