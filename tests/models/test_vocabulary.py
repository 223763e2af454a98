"""A tokenizer with more tokens than the model has embeddings: a sentence before training, where such a token occurs."""

import pytest
from peft import LoraConfig, get_peft_model
from small import build_model, build_tokenizer, many_ones

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, Policy, SFTConfig, SFTTrainer
from posttrain.errors import UserError
from posttrain.models.load import load_tokenizer

SENTENCE = r"row 1 has the token '<new>' with id 13, but the model's embedding ends at 12"


@pytest.fixture
def larger():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def common(folder):
    return {"output_dir": str(folder / "run"), "use_cpu": True, "save_strategy": "no", "max_steps": 1, "per_device_train_batch_size": 2}


def test_a_token_without_an_embedding_is_a_sentence(larger, tmp_path):
    model = build_model(build_tokenizer())
    with pytest.raises(UserError, match=SENTENCE):
        SFTTrainer(model, SFTConfig(**common(tmp_path)), train_dataset=[{"text": "1+1"}, {"text": "<new>"}], processing_class=larger)
    pairs = [{"prompt": "1+1=", "chosen": "2", "rejected": right} for right in ("3", "<new>")]
    with pytest.raises(UserError, match=SENTENCE):
        DPOTrainer(model, args=DPOConfig(**common(tmp_path)), train_dataset=pairs, processing_class=larger)
    online = GRPOConfig(**common(tmp_path), num_generations=2, max_completion_length=4)
    with pytest.raises(UserError, match=SENTENCE):
        GRPOTrainer(model, many_ones, online, train_dataset=[{"prompt": "1="}, {"prompt": "<new>"}], processing_class=larger)
    with pytest.raises(UserError, match=SENTENCE):
        Policy(model, larger).generate(["1=", "<new>"])


def test_a_token_that_does_not_occur_is_nobodys_business(larger, tmp_path):
    SFTTrainer(build_model(build_tokenizer()), SFTConfig(**common(tmp_path)), train_dataset=[{"text": "1+1"}] * 2, processing_class=larger).train()


def test_adapters_without_a_tokenizer_have_that_of_their_model(larger, tmp_path):
    build_model(build_tokenizer()).save_pretrained(tmp_path / "base")
    larger.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    assert len(load_tokenizer(str(tmp_path / "adapter"))) == len(larger)
