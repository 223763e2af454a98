"""What is trained is float32; frozen weights keep a checkpoint's 16 bits where the run computes in them; float16 is refused."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import build_model, build_tokenizer, many_ones

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from posttrain.errors import UserError
from posttrain.models.precision import beside_adapters, stored_dtype

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
TEXT = [{"prompt": f"{a}+1=", "completion": str(a)} for a in range(8)]
PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a), "rejected": "9"} for a in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of one model in three dtypes."""
    folder, tokenizer = tmp_path_factory.mktemp("checkpoints"), build_tokenizer()
    for name in ("float32", "bfloat16", "float16"):
        build_model(tokenizer).to(getattr(torch, name)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def make(kind, model, folder, **settings):
    """A trainer of each kind, on a model or a name."""
    more = {key: settings.pop(key) for key in ("peft_config",) if key in settings}
    common = {"output_dir": str(folder / "run"), "use_cpu": True, "save_strategy": "no", "max_steps": 2, "per_device_train_batch_size": 4} | settings
    online = {"num_generations": 4, "max_completion_length": 4}
    if kind is SFTTrainer:
        return SFTTrainer(model, SFTConfig(**common), train_dataset=TEXT, processing_class=build_tokenizer(), **more)
    if kind is DPOTrainer:
        return DPOTrainer(model, args=DPOConfig(**common), train_dataset=PAIRS, processing_class=build_tokenizer(), **more)
    if kind is RewardTrainer:
        return RewardTrainer(model, RewardConfig(**common), train_dataset=PAIRS, processing_class=build_tokenizer(), **more)
    if kind is PPOTrainer:
        return PPOTrainer(
            model, many_ones, PPOConfig(**common, max_completion_length=4), train_dataset=TEXT, processing_class=build_tokenizer(), **more
        )
    return GRPOTrainer(model, many_ones, GRPOConfig(**common | online), train_dataset=TEXT, processing_class=build_tokenizer(), **more)


KINDS = [SFTTrainer, DPOTrainer, RewardTrainer, GRPOTrainer, PPOTrainer]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_model_that_is_handed_over_learns_as_its_checkpoint_by_name_does(folder, kind, caplog):
    """At the default rate, where updates of bfloat16 weights round away."""
    from transformers import AutoModelForCausalLM

    caplog.set_level(logging.WARNING)
    ends = []
    for model in (AutoModelForCausalLM.from_pretrained(folder / "bfloat16"), str(folder / "bfloat16")):
        trainer = make(kind, model, folder, learning_rate=1e-6, disable_dropout=True)
        before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert (ends[-1] != before).float().mean() > 0.6
    assert ends[0].dtype == torch.float32
    assert torch.equal(*ends)
    assert sum("it is trained in float32" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_float16_weights_are_not_trained(folder, kind):
    given = build_model(build_tokenizer()).half()
    for model, settings in ((given, {}), (str(folder / "float32"), {"model_init_kwargs": {"dtype": "float16"}})):
        with pytest.raises(UserError, match="float16 weights cannot be trained"):
            make(kind, model, folder, **settings)


def test_bfloat16_that_was_asked_for_stays_and_its_price_is_said(folder, caplog):
    caplog.set_level(logging.WARNING)
    for name in ("dtype", "torch_dtype"):  # the second is what most scripts say
        trainer = make(SFTTrainer, str(folder / "float32"), folder, model_init_kwargs={name: "bfloat16"})
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert sum("round away" in record.message for record in caplog.records) == 2
    with pytest.raises(UserError, match="one setting with two values"):
        SFTConfig(output_dir="x", use_cpu=True, model_init_kwargs={"dtype": "float32", "torch_dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("checkpoint", "computes_in", "held"),
    [
        ("bfloat16", torch.bfloat16, torch.bfloat16), ("bfloat16", None, torch.float32), ("bfloat16", torch.float16, torch.float32),
        ("float16", torch.float16, torch.float16), ("float16", torch.bfloat16, torch.float32), ("float32", torch.bfloat16, torch.float32),
    ],
)  # fmt: skip
def test_frozen_weights_keep_the_bits_that_the_run_computes_in(folder, checkpoint, computes_in, held):
    assert beside_adapters(str(folder / checkpoint), computes_in, LORA) is held
    changed = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")  # its factors were taken out of the weights
    assert beside_adapters(str(folder / checkpoint), computes_in, changed) is torch.float32


@pytest.mark.parametrize("biases", ["all", "lora_only"])
def test_biases_that_are_trained_have_a_float32_model_beside_them_or_are_refused(tmp_path, biases):
    """A layer adds its bias in the dtype of its weight."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, attention_bias=True).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], bias=biases, task_type="CAUSAL_LM")
    assert beside_adapters(str(tmp_path / "base"), torch.bfloat16, lora) is torch.float32
    trainer = make(SFTTrainer, str(tmp_path / "base"), tmp_path, peft_config=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapters"))
    assert beside_adapters(str(tmp_path / "adapters"), torch.bfloat16) is torch.float32
    for name, given in (("base", {"peft_config": lora}), ("adapters", {})):
        with pytest.raises(UserError, match=r"the bias of .*q_proj.* is trained in torch.float32 beside frozen weights in torch.bfloat16"):
            make(SFTTrainer, str(tmp_path / name), tmp_path, model_init_kwargs={"dtype": "bfloat16"}, **given)


def test_a_run_that_computes_in_float16_samples_prompts_of_uneven_lengths(folder, tmp_path):
    """They are masked, by a number that float16 has; what was sampled has the log-probs that training finds."""
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, save_strategy="no", fp16=True, max_steps=1, num_generations=2, per_device_train_batch_size=4, max_completion_length=4
    )  # fmt: skip
    rows = [{"prompt": "1+1="}, {"prompt": "11+1+11+1="}]
    trainer = GRPOTrainer(str(folder / "float16"), many_ones, args, rows, processing_class=build_tokenizer(), peft_config=LORA)
    trainer.train()
    assert trainer.state.log_history[0]["sampling/logp_difference/max"] < 1e-3


def test_a_config_without_a_dtype_leaves_it_to_the_weights(folder, tmp_path):
    build_model(build_tokenizer()).to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_dtype(str(tmp_path)) is torch.bfloat16
    assert stored_dtype(str(folder / "float16")) is torch.float16
    assert stored_dtype(str(tmp_path / "nothing")) is None


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        *((kind, ["embed_tokens"]) for kind in KINDS),
        (SFTTrainer, None),
        (SFTTrainer, ["norm", "lm_head"]),
        (SFTTrainer, ["mlp"]),
        (GRPOTrainer, ["self_attn"]),
    ],
)
def test_beside_frozen_bfloat16_everything_that_is_trained_is_float32(folder, kind, whole):
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    trainer = make(kind, str(folder / "bfloat16"), folder, peft_config=lora, model_init_kwargs={"dtype": "bfloat16"}, learning_rate=1e-3)
    frozen = {name: (p.dtype, p.detach().clone()) for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert {dtype for dtype, _ in frozen.values()} == {torch.bfloat16}
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, (_, value) in frozen.items())
    assert any(not torch.equal(now[name], value) for name, value in trained.items())


def test_adapters_that_somebody_made_beside_bfloat16_have_their_whole_modules_in_float32(folder):
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(build_model(build_tokenizer()).to(torch.bfloat16), lora)
    assert model.lm_head.modules_to_save["default"].weight.dtype == torch.bfloat16  # as PEFT leaves it
    trainer = make(GRPOTrainer, model, folder)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()


def test_a_base_in_bfloat16_gives_the_gradients_of_the_same_base_in_float32_up_to_rounding(folder):
    """The same numbers, held in 16 bits: the gradient of every factor points the same way."""
    gradients = []
    for dtype in ("float32", "bfloat16"):
        trainer = make(SFTTrainer, str(folder / "bfloat16"), folder, peft_config=LORA, model_init_kwargs={"dtype": dtype})
        for name, parameter in trainer.model.named_parameters():  # B is 0 at first, and A has no gradient then
            if "lora_B" in name:
                torch.manual_seed(1)
                parameter.data.normal_(0, 0.1)
        update = next(iter(trainer.get_train_dataloader()))
        trainer.loss(trainer.model, trainer.window([update])[0]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999
    assert 0.98 < gradients[1].norm() / gradients[0].norm() < 1.02
