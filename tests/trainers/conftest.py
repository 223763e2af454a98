"""Small things that trainer tests share: a character tokenizer, a tiny model, a dataset, a reward with signal."""

import functools

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain import GRPOConfig, GRPOTrainer


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def build_tokenizer():
    vocabulary = {token: index for index, token in enumerate(["<end>", *"0123456789+="])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def build_model(tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    return Qwen3ForCausalLM(Qwen3Config(**sizes | changes))


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_model(tokenizer):
    return functools.partial(build_model, tokenizer)


@pytest.fixture
def rows():
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(4)]


def many_ones(completions, **kwargs):
    """Some signal from the first step on: the share of the digit 1, and a little for length so that few rewards are equal."""
    return [text.count("1") / 4 + len(text) / 100 for text in completions]


@pytest.fixture
def make_trainer(tmp_path, tokenizer, make_model, rows):
    def make(reward=many_ones, model=None, data=None, trainer_kwargs=None, **settings):
        base = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "use_cpu": True,
            "seed": 3,
        }
        return GRPOTrainer(
            model if model is not None else make_model(),
            reward,
            GRPOConfig(**base | settings),
            rows if data is None else data,
            processing_class=tokenizer,
            **(trainer_kwargs or {}),
        )

    return make


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
