"""GRPO on adapters: the base never moves, the reference is the model without them, and a run resumes."""

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from small import build_model

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}


def with_lora(make_trainer, **settings):
    return make_trainer(trainer_kwargs={"peft_config": LoraConfig(**LORA)}, beta=0.1, **settings)


def test_only_adapters_move_and_the_kl_starts_at_zero(make_trainer):
    trainer = with_lora(make_trainer, max_steps=3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    kls = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert abs(kls[0]) < 1e-6  # fresh adapters do nothing, so policy and reference agree
    assert kls[2] > kls[0]


def test_the_kl_of_adapters_that_are_trained_further_starts_at_zero(make_trainer):
    first = with_lora(make_trainer, max_steps=3, learning_rate=5e-2)
    first.train()
    second = make_trainer(model=first.model, beta=0.1, max_steps=3, learning_rate=5e-2)
    second.train()
    kls = [log["kl"] for log in second.state.log_history if "kl" in log]
    assert abs(kls[0]) < 1e-6
    assert kls[2] > 1e-4


def test_the_engine_and_the_trainer_agree_with_adapters_on(make_trainer):
    trainer = with_lora(make_trainer, max_steps=3, learning_rate=5e-2)
    trainer.train()
    assert all(log["sampling/logp_difference/max"] < 1e-4 for log in trainer.state.log_history if "ratio" in log)


def test_an_adapter_run_resumes_to_the_same_bits(make_trainer):
    whole = with_lora(make_trainer, max_steps=4)
    whole.train()
    expected = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    with_lora(make_trainer, max_steps=4, save_strategy="steps", save_steps=2).train()
    resumed = with_lora(make_trainer, max_steps=4, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())


def test_a_saved_adapter_loads_with_peft(make_trainer, tokenizer, tmp_path):
    trainer = with_lora(make_trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(build_model(tokenizer), tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3, 4]])
    trainer.model.eval()
    assert torch.allclose(loaded(ids).logits, trainer.model(ids).logits, atol=1e-5)
