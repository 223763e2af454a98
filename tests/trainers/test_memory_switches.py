"""Each switch that saves memory, alone and with the others, gives the gradients of a step without any of them."""

import itertools

import pytest
import torch
from peft import LoraConfig
from small import build_model, build_tokenizer, weights_of
from transformers import BitsAndBytesConfig

from posttrain import SFTConfig, SFTTrainer
from posttrain.data.stream import PackItem, pack, split
from posttrain.models.adapters import add_lora, reference_for
from posttrain.models.forward import logprobs
from posttrain.models.load import load_model, prepare_model
from posttrain.models.tiles import tiled
from posttrain.ops.offload import ActivationOffload

ITEMS = [PackItem([3, 4, 5, 6, 7], [[7, 8, 9, 1], [10, 2, 2], [5, 6, 4, 3, 9]]), PackItem([5, 9], [[4, 4, 4], [1, 2]])]
WEIGHTS = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))  # of every completion's tokens in the loss
SWITCHES = ("checkpoints", "offload", "tiles", "micro-batches")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    build_model(build_tokenizer(), hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(directory)
    return str(directory)


def four_bits():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=True)


def with_adapters(model):
    adapted = add_lora(model, LoraConfig(**LORA))
    randomise(adapted)
    return adapted


def randomise(adapted):
    """Fresh adapters do nothing."""
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.fixture(params=["full", "lora", "qlora"])
def model(request, saved):
    if request.param == "qlora":
        pytest.importorskip("bitsandbytes")
    base = load_model(saved, **({"quantization_config": four_bits()} if request.param == "qlora" else {}))
    return (base if request.param == "full" else with_adapters(base)).train()


def gradients(model, switches=()):
    for module in model.modules():
        if "gradient_checkpointing" in vars(module):
            module.gradient_checkpointing = False
    if "checkpoints" in switches:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    offloaded = 0
    for part in split(ITEMS, 14 if "micro-batches" in switches else 100):
        stream = pack(part)
        with tiled(model, 3 if "tiles" in switches else 1000):
            hooks = ActivationOffload(smallest=0 if "offload" in switches else 2**40)
            with hooks:
                logps = logprobs(model, stream).logps
                loss = (logps * WEIGHTS[stream.row_ids, : logps.shape[1]]).sum()
            loss.backward()
            offloaded += hooks.offloaded_bytes
    assert (offloaded > 0) == ("offload" in switches)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_equal(grads, expected):
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, expected[name], rtol=1e-4, atol=2e-6 * float(expected[name].abs().max())), name


def test_every_combination_of_switches_gives_the_same_gradients(model):
    expected = gradients(model)
    assert expected
    for number in range(1, len(SWITCHES) + 1):
        for switches in itertools.combinations(SWITCHES, number):
            assert_equal(gradients(model, switches), expected)


def test_checkpoints_and_offloading_change_no_bit(model):
    expected = gradients(model)
    for switches in (["checkpoints"], ["offload"], ["checkpoints", "offload"]):
        for name, grad in gradients(model, switches).items():
            assert torch.equal(grad, expected[name]), (switches, name)


def test_what_is_frozen_never_gets_a_gradient(saved):
    model = with_adapters(load_model(saved))
    assert all("lora_" in name for name in gradients(model, SWITCHES))


def test_gradients_beside_4_bits_are_those_beside_the_dequantised_weights(saved):
    pytest.importorskip("bitsandbytes")
    quantised = load_model(saved, quantization_config=four_bits())
    twin = load_model(saved, quantization_config=four_bits()).dequantize().float()
    prepare_model(twin)
    exact = gradients(with_adapters(load_model(saved)).train())
    ours, theirs = gradients(with_adapters(quantised).train(), SWITCHES), gradients(with_adapters(twin).train())
    assert_equal(ours, theirs)
    assert any(not torch.allclose(theirs[name], exact[name], rtol=1e-2) for name in exact)  # the weights really were rounded


def test_the_reference_beside_4_bits_is_the_model_without_its_adapters(saved):
    pytest.importorskip("bitsandbytes")
    plain = load_model(saved, quantization_config=four_bits())
    adapted = add_lora(load_model(saved, quantization_config=four_bits()), LoraConfig(**LORA))
    stream, reference = pack(ITEMS), reference_for(adapted, needed=True)
    randomise(adapted)
    with torch.no_grad():
        assert not torch.allclose(logprobs(adapted, stream).logps, logprobs(plain, stream).logps, atol=1e-3)
    with torch.no_grad(), reference.active() as reference:
        assert torch.equal(logprobs(reference, stream).logps, logprobs(plain, stream).logps)


def test_a_checkpoint_that_is_quantised_already_is_loaded_and_trained(saved, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = load_model(saved, quantization_config=four_bits())
    model.save_pretrained(tmp_path / "packed")
    again = load_model(str(tmp_path / "packed"))
    assert "Linear4bit" in str(again)
    assert_equal(gradients(with_adapters(again).train()), gradients(with_adapters(load_model(saved, quantization_config=four_bits())).train()))


@pytest.mark.parametrize(
    "switches", [{"activation_offloading": True}, {"activation_offloading": "auto"}, {"tile_rows": 4}, {"tile_rows": "auto"}], ids=str
)
def test_trainers_have_the_switches(tmp_path, switches):
    def train(**settings):
        base = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no", "seed": 1}
        rows = [{"text": f"{a}+{b}={a + b}"} for a in range(4) for b in range(4)]
        tokenizer = build_tokenizer()
        trainer = SFTTrainer(build_model(tokenizer), SFTConfig(**base | settings), train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return weights_of(trainer)

    assert torch.allclose(train(gradient_checkpointing=True, **switches), train(gradient_checkpointing=False), rtol=0, atol=1e-5)


def test_adapters_are_made_in_the_precision_that_was_asked_for(make_trainer):
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(trainer_kwargs={"peft_config": LoraConfig(**LORA)}, adapter_dtype=dtype)
        trainer.train()
        assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {getattr(torch, dtype)}


def test_grpo_trains_adapters_beside_4_bits_with_the_local_engine(make_trainer, saved):
    """Engine and trainer agree on every log-prob, the packed weights stay as they are, and the KL is against the adapter switched off."""
    pytest.importorskip("bitsandbytes")
    model = load_model(saved, quantization_config=four_bits())
    settings = {"beta": 0.1, "max_steps": 3, "learning_rate": 5e-2, "tile_rows": 4, "gradient_checkpointing": True}
    trainer = make_trainer(model=model, trainer_kwargs={"peft_config": LoraConfig(**LORA)}, **settings)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert all(log["sampling/logp_difference/max"] < 1e-3 for log in logs)
    assert abs(logs[0]["kl"]) < 1e-6
    assert logs[-1]["kl"] > 1e-6


def test_an_8bit_optimizer_trains(make_trainer):
    pytest.importorskip("bitsandbytes")
    model = build_model(build_tokenizer(), hidden_size=64, intermediate_size=128, head_dim=16)
    trainer = make_trainer(model=model, optim="adamw_8bit", max_steps=2)
    before = weights_of(trainer).clone()
    trainer.train()
    assert not torch.equal(weights_of(trainer), before)
