"""Small things that trainer tests share: a character tokenizer, a tiny model, a dataset, a reward with signal."""

import functools

import pytest
import torch
from small import build_model, build_tokenizer, many_ones

from posttrain import GRPOConfig, GRPOTrainer


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_model(tokenizer):
    return functools.partial(build_model, tokenizer)


@pytest.fixture
def rows():
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(4)]


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
