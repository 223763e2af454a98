"""`quantization_config` of a trainer: frozen weights in 4 bits beside the adapters that are trained, of a model given by its name."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from posttrain.errors import UserError
from posttrain.models.load import is_quantised

pytest.importorskip("bitsandbytes")

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}
PAIRS = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}, {"prompt": "1+2=", "chosen": "3", "rejected": "4"}]


def four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def saved(tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer, GRPOTrainer, RewardTrainer])
def test_adapters_learn_beside_packed_weights(trainer, saved, tmp_path):
    common = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True, "learning_rate": 1e-2, "save_strategy": "no"}
    args, rows = {
        SFTTrainer: (
            SFTConfig(**common, per_device_train_batch_size=2),
            [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS],
        ),
        DPOTrainer: (DPOConfig(**common, per_device_train_batch_size=2), PAIRS),
        RewardTrainer: (RewardConfig(**common, per_device_train_batch_size=2), PAIRS),
        GRPOTrainer: (GRPOConfig(**common, per_device_train_batch_size=4, num_generations=4, max_completion_length=4), [{"prompt": "1+1="}]),
    }[trainer]
    rewards = (
        {"reward_funcs": lambda completions, completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]} if trainer is GRPOTrainer else {}
    )
    made = trainer(saved, args=args, train_dataset=rows, peft_config=LoraConfig(**LORA), quantization_config=four_bits(), **rewards)
    assert is_quantised(made.model)
    before = {name: weight.detach().clone() for name, weight in made.model.named_parameters() if weight.requires_grad}
    made.train()
    assert before
    assert any(not torch.equal(before[name], weight) for name, weight in made.model.named_parameters() if name in before)


def test_packed_weights_cannot_be_trained(saved, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
    with pytest.raises(UserError, match="needs peft_config"):
        SFTTrainer(saved, args, train_dataset=[{"text": "1+1=2"}], quantization_config=four_bits())
