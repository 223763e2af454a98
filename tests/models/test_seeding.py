"""What is drawn for a model before anything is trained depends on the seed, not on what was drawn before, and it disturbs nobody."""

import json
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig
from small import build_tokenizer

from posttrain import load_policy
from posttrain.models.adapters import add_lora
from posttrain.models.heads import load_reward_model, reward_model
from posttrain.models.load import load_model
from posttrain.models.seeding import seeded
from posttrain.models.templates import grow_embeddings, set_chat_template

INITIALISATIONS = [True, False, "gaussian", "olora", "pissa", "orthogonal", "mica"]


def draw_something(state):
    """As a caller may have done: another state of every global generator."""
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def next_numbers():
    return random.random(), np.random.rand(), torch.rand(1).item()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def made(make, seed, model=lambda: None):
    """Its weights from two states of the generators, which must be the same. What comes next in each state is as if nothing had been drawn."""
    found = []
    for state in (1, 2):
        begun = model()
        draw_something(state)
        expected = next_numbers()
        draw_something(state)
        found.append(weights(make(seed, begun)))
        assert next_numbers() == expected
    assert same(*found)
    return found[0]


def assert_depends_on_the_seed_alone(make, model=lambda: None):
    assert not same(made(make, 3, model), made(make, 4, model))


def test_inside_the_generators_begin_at_the_seed_and_afterwards_go_on():
    draw_something(1)
    expected = next_numbers()
    draw_something(1)
    with seeded(5):
        first = next_numbers()
    with seeded(5):
        again = next_numbers()
    assert first == again != expected
    with pytest.raises(KeyError), seeded(5):
        raise KeyError
    assert next_numbers() == expected


@pytest.mark.parametrize("initialisation", INITIALISATIONS, ids=str)
def test_adapters_depend_on_the_seed_alone(tiny, initialisation):
    def make(seed, model):
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=initialisation, modules_to_save=["lm_head"])
        return add_lora(model, config, seed=seed)

    one, other = (made(make, seed, lambda: tiny("llama")) for seed in (3, 4))
    if initialisation in (True, False, "gaussian", "orthogonal"):
        assert not same(one, other)


def test_adapters_of_a_policy_depend_on_its_seed(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    assert_depends_on_the_seed_alone(lambda seed, _: load_policy(str(tmp_path), lora=lora, device="cpu", seed=seed).model)


def test_a_reward_head_depends_on_the_seed(tiny):
    assert_depends_on_the_seed_alone(lambda seed, model: reward_model(model, seed=seed), lambda: tiny("llama"))


def test_a_reward_head_that_a_checkpoint_lacks_depends_on_the_seed(tiny, tmp_path):
    model = reward_model(tiny("llama"))
    model.save_pretrained(tmp_path, state_dict={name: value for name, value in model.state_dict().items() if not name.startswith("score")})
    assert_depends_on_the_seed_alone(lambda seed, _: load_reward_model(str(tmp_path), seed=seed))


def test_layers_that_a_checkpoint_lacks_depend_on_the_seed(tiny, tmp_path):
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert_depends_on_the_seed_alone(lambda seed, _: load_model(str(tmp_path), seed=seed))


def test_rows_for_new_tokens_depend_on_the_seed(tiny):
    def make(seed, model):
        tokenizer = build_tokenizer()
        tokenizer.add_tokens([f"<{number}>" for number in range(60)])
        set_chat_template(tokenizer, "chatml")
        grow_embeddings(model, tokenizer, seed=seed)
        return model

    assert_depends_on_the_seed_alone(make, lambda: tiny("llama"))
