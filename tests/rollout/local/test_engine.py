import copy
import gc
import weakref

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from posttrain.errors import UserError
from posttrain.rollout.local import engine as engine_module
from posttrain.rollout.local import weights
from posttrain.rollout.local.engine import LocalEngine
from posttrain.types import Request, Sampling, StopReason

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3-moe", "mistral", "mistral-window", "phi3", "gemma3-window", "smollm3", "gpt2", "gpt-neox"]


@pytest.fixture(autouse=True)
def _fast_products_for_tiny_weights_too(monkeypatch):
    monkeypatch.setattr(weights, "_LARGE", 0)


def plain_logits(model, token_ids):
    """(tokens, V) of one unpadded row by an ordinary forward in eval mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    model.train(was_training)
    return logits


def plain_logprobs(model, prompt_ids, token_ids, temperature=1.0):
    logits = plain_logits(model, [*prompt_ids, *token_ids])[len(prompt_ids) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)[torch.arange(len(token_ids)), token_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_generate(family, tiny, prompts, complete, requests_for):
    model = tiny(family).eval()
    done, _ = complete(LocalEngine(max_slots=4), model, requests_for(prompts, temperature=0.0))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert done[i].token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_those_of_a_plain_forward(family, tiny, prompts, complete, requests_for):
    model = tiny(family)
    done, _ = complete(LocalEngine(), model, requests_for(prompts, temperature=0.7))
    for i, prompt in enumerate(prompts):
        expected = plain_logprobs(model, prompt, done[i].token_ids, temperature=0.7)
        assert torch.allclose(torch.tensor(done[i].logps).double(), expected, atol=1e-4)
        assert done[i].sampled_logps == done[i].logps


@pytest.mark.parametrize("family", ["qwen3", "gemma3-window", "mistral-window"])
def test_long_prompts_computed_piece_by_piece_give_the_same(family, tiny, prompts, complete, requests_for):
    model = tiny(family)
    whole, _ = complete(LocalEngine(), model, requests_for(prompts, temperature=0.0))
    pieces, _ = complete(LocalEngine(prefill_tokens=5), model, requests_for(prompts, temperature=0.0))
    assert {i: c.token_ids for i, c in whole.items()} == {i: c.token_ids for i, c in pieces.items()}


def test_a_completion_does_not_depend_on_slots_batch_or_order(tiny, prompts, complete, requests_for):
    model = tiny()
    requests = [
        Request(r.id, r.prompt_ids, Sampling(max_new_tokens=4 + 3 * r.id, top_k=50 if r.id % 2 else 0, stop_token_ids=(5,)), r.key)
        for r in requests_for(prompts)
    ]
    reference, _ = complete(LocalEngine(), model, requests)
    for max_slots, order in [(1, requests), (2, requests[::-1]), (3, requests[3:] + requests[:3])]:
        done, _ = complete(LocalEngine(max_slots=max_slots), model, order)
        assert {i: c.token_ids for i, c in done.items()} == {i: c.token_ids for i, c in reference.items()}
    alone, _ = complete(LocalEngine(), model, requests[4:5])
    assert alone[4].token_ids == reference[4].token_ids


def test_equal_prompts_with_different_keys_differ(tiny, prompts, complete, requests_for):
    done, _ = complete(LocalEngine(), tiny(), requests_for(prompts))
    assert prompts[0] == prompts[5]
    assert done[0].token_ids != done[5].token_ids


def test_a_finished_row_makes_room_at_once(tiny, prompts, complete):
    lengths = [2, 9, 3, 4, 1, 6]
    requests = [Request(i, prompts[i], Sampling(max_new_tokens=n), (i,)) for i, n in enumerate(lengths)]
    done, steps = complete(LocalEngine(max_slots=2), tiny(), requests)
    assert [len(done[i].token_ids) for i in range(6)] == lengths
    free_at = [0, 0]  # a slot decodes a token per step and takes the next request right after its last one
    for n in lengths:
        slot = free_at.index(min(free_at))
        free_at[slot] += n
    assert steps == max(free_at)


def test_max_kv_tokens_limits_what_decodes_together_and_nothing_else(tiny, prompts, complete, requests_for):
    model = tiny()
    unlimited, few_steps = complete(LocalEngine(), model, requests_for(prompts))
    limited, many_steps = complete(LocalEngine(max_kv_tokens=31), model, requests_for(prompts))
    assert {i: c.token_ids for i, c in limited.items()} == {i: c.token_ids for i, c in unlimited.items()}
    assert many_steps > few_steps
    with pytest.raises(UserError, match="max_kv_tokens"):
        complete(LocalEngine(max_kv_tokens=30), model, requests_for(prompts))


def test_each_prompt_is_computed_once_and_stored_once(tiny, prompts, complete):
    model = tiny()
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    requests = [Request(i, prompts[1], Sampling(max_new_tokens=5), (i,)) for i in range(8)]
    complete(LocalEngine(), model, requests)
    assert seen == [len(prompts[1])] + [8] * 4


def test_the_head_sees_only_last_positions(tiny, prompts, complete, requests_for):
    model = tiny()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1].numel()))
    complete(LocalEngine(), model, requests_for(prompts))
    assert seen == [5] + [6] * 11


def test_stop_token_at_the_limit_is_stop_and_otherwise_length(tiny, prompts, complete, requests_for):
    model = tiny()
    (reference, *_), _ = complete(LocalEngine(), model, requests_for(prompts[:1]))[0].values(), None
    stop_token = reference.token_ids[3]
    first = reference.token_ids.index(stop_token) + 1
    for limit, reason in [(first, StopReason.STOP), (first - 1, StopReason.LENGTH), (first + 1, StopReason.STOP)]:
        done, _ = complete(LocalEngine(), model, requests_for(prompts[:1], max_new_tokens=limit, stop_token_ids=(stop_token,)))
        assert done[0].stop is reason
        assert done[0].token_ids == reference.token_ids[: min(limit, first)]


def test_kv_memory_is_freed_when_idle_and_on_exit(tiny, prompts, requests_for):
    engine = LocalEngine()
    with engine.serving(tiny(), version=0):
        for request in requests_for(prompts):
            engine.submit(request)
        engine.step()
        engine.step()
        cache = engine._rollout.cache
        held = [weakref.ref(tensor) for slab in (cache.prompts, cache.suffixes) for pair in slab._layers.values() for tensor in pair]
        assert cache.nbytes > 0
        assert len(held) == 8
    gc.collect()
    assert all(tensor() is None for tensor in held)


def test_modes_flags_and_methods_are_restored_after_an_exception(tiny):
    model = tiny()
    model.lm_head.eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    engine = LocalEngine()

    def interrupted_rollout():
        with engine.serving(model, version=0):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted_rollout()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert not model.lm_head.weight.requires_grad
    with pytest.raises(RuntimeError, match="inside"):
        engine.step()


def test_what_a_module_made_while_sampling_and_keeps_can_be_trained_with(tiny, prompts, complete, requests_for):
    class Gain(torch.nn.Module):
        attribute = None

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.register_buffer("buffer", None)
            self.listed, self.named = [], {}

        def forward(self, hidden):
            if self.attribute is None:
                self.attribute, self.buffer = hidden.new_full((), 2.0), hidden.new_full((), 3.0)
                self.listed.append(hidden.new_full((), 5.0))
                self.named["it"] = hidden.new_full((), 7.0)
                self.weight.data = self.weight.data * 11
            return hidden * (self.weight * self.attribute * self.buffer * self.listed[0] * self.named["it"])

    model = tiny("qwen3")
    gain = Gain()
    model.model.norm = torch.nn.Sequential(model.model.norm, gain)
    weight = gain.weight
    complete(LocalEngine(), model, requests_for(prompts[:1]))
    logits = model(input_ids=torch.tensor([prompts[0]])).logits
    logits.sum().backward()
    assert gain.weight is weight
    torch.testing.assert_close(weight.grad * weight, logits.sum(), rtol=1e-4, atol=1e-3)  # the logits are linear in it


def test_lora_adapters_are_live(tiny, prompts, complete, requests_for):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.5))
    without, _ = complete(LocalEngine(), model, requests_for(prompts))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    done, _ = complete(LocalEngine(), model, requests_for(prompts))
    assert done[1].token_ids != without[1].token_ids
    for i, prompt in enumerate(prompts):
        assert torch.allclose(torch.tensor(done[i].logps).double(), plain_logprobs(model, prompt, done[i].token_ids), atol=1e-4)
    assert model.training


def test_gradient_checkpointing_does_not_reach_the_rollout(tiny, prompts, complete, requests_for):
    model = tiny()
    plain, _ = complete(LocalEngine(), model, requests_for(prompts))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed, _ = complete(LocalEngine(), model, requests_for(prompts))
    assert [plain[i].token_ids for i in plain] == [checkpointed[i].token_ids for i in plain]
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("enclosed", [True, False])
def test_training_after_a_bf16_rollout_gets_the_same_gradients(tiny, prompts, complete, requests_for, monkeypatch, emulated, enclosed):
    monkeypatch.setattr(engine_module, "rollout_dtype", lambda requested, device: None if emulated else requested)
    model = tiny()
    twin = copy.deepcopy(model)
    ids = torch.tensor([prompts[1]])

    def gradients(of):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            of(input_ids=ids, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in of.named_parameters()}

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enclosed):
        done, _ = complete(LocalEngine(autocast_dtype=torch.bfloat16), model, requests_for(prompts))
        got = gradients(model)
    expected = gradients(twin)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert all(abs(sum(c.logps) - plain_logprobs(twin, prompts[i], c.token_ids).sum()) < 1.0 for i, c in done.items())


def test_under_autocast_each_weight_is_cast_once(tiny, prompts, complete, requests_for, monkeypatch):
    monkeypatch.setattr(engine_module, "rollout_dtype", lambda requested, device: requested)
    model = tiny("llama")
    model.model.requires_grad_(False)  # as under an adapter: frozen weights are kept too
    with torch.profiler.profile(record_shapes=True) as profile:
        complete(LocalEngine(autocast_dtype=torch.bfloat16), model, requests_for(prompts[:1]))
    shape = list(model.model.layers[0].mlp.down_proj.weight.shape)
    casts = [event for event in profile.events() if event.name == "aten::_to_copy" and event.input_shapes and event.input_shapes[0] == shape]
    assert len(casts) == 2  # one for each layer
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_accelerates_forward_wrapper_does_not_choose_the_precision(tiny, prompts, complete, requests_for, monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the precision is the process's; another test may have chosen one
    monkeypatch.setattr(engine_module, "rollout_dtype", lambda requested, device: None)
    model = tiny()
    expected, _ = complete(LocalEngine(), model, requests_for(prompts))
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    wrapper = prepared.forward
    done, _ = complete(LocalEngine(autocast_dtype=torch.bfloat16), prepared, requests_for(prompts))
    assert {i: c.logps for i, c in done.items()} == {i: c.logps for i, c in expected.items()}
    assert prepared.forward == wrapper


def test_weight_first_products_equal_linear():
    torch.manual_seed(0)
    for outputs, bias in [(250, True), (256, False), (4096, True), (8192, False)]:
        linear = torch.nn.Linear(96, outputs, bias=bias)
        x = torch.randn(1, 7, 96)
        assert torch.allclose(weights._weight_first(linear)(x), linear(x), atol=1e-5)


@pytest.mark.parametrize(
    ("rope", "word"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "dynamic"),
        (
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
                "factor": 4.0,
            },
            "longrope",
        ),
    ],
)
def test_rope_that_depends_on_the_longest_row_is_refused(rope, word):
    config = LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, rope_parameters=rope)
    with pytest.raises(UserError, match=word), LocalEngine().serving(LlamaForCausalLM(config), version=0):
        pass


def test_recurrent_models_are_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UserError, match="hf engine"), LocalEngine().serving(model, version=0):
        pass


def test_models_that_mix_attention_with_convolutions_are_refused_at_the_first_prompt(complete, requests_for):
    shape = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Lfm2ForCausalLM(Lfm2Config(**shape, num_hidden_layers=2, layer_types=["conv", "full_attention"]))
    with pytest.raises(UserError, match="1 of the 2 layers"):
        complete(LocalEngine(), model, requests_for([(3, 4)]))


def test_what_does_not_fit_the_context_is_refused(tiny, requests_for):
    engine = LocalEngine()
    with engine.serving(tiny(), version=0):
        with pytest.raises(UserError, match="128"):
            engine.submit(requests_for([tuple(range(3, 120))], max_new_tokens=12)[0])
        engine.submit(requests_for([tuple(range(3, 119))], max_new_tokens=12)[0])
        with pytest.raises(UserError, match="no tokens"):
            engine.submit(Request(9, (), Sampling(max_new_tokens=2), (0,)))
