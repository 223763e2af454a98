"""Streams against plain transformers: one row per completion, sdpa, the model's own head, log_softmax over the vocabulary."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.data.stream import PackItem, pack
from posttrain.models import rows
from posttrain.models.forward import logprobs, padded_logprobs
from posttrain.models.load import prepare_model

EXACT = (
    "llama", "llama tied", "qwen2", "qwen3", "qwen3 moe", "mistral", "mistral short window", "phi3",
    "gemma3", "gemma3 short window", "smollm3", "gpt2", "gpt neox", "cohere", "granite",
)  # fmt: skip
ITEMS = [
    PackItem([5, 9, 3, 7, 11, 4, 8], [[21, 22, 23, 24, 25, 26], [27], [28, 29, 30], []]),
    PackItem([6, 6], [[31, 32, 33, 34, 35, 36, 37, 38, 39]]),
    PackItem([12, 13, 14], [[40, 41], [40, 42]], [[True, True], [False, True]]),
]


def rows_of(items):
    for item in items:
        for index, completion in enumerate(item.completions):
            yield list(item.prompt_ids), list(completion), item.trained[index] if item.trained else [True] * len(completion)


def plain_logps(model, items, temperature=1.0):
    """[(row, col) -> log-prob], one forward per completion."""
    found = {}
    for row, (prompt, completion, trained) in enumerate(rows_of(items)):
        if not completion:
            continue
        table = (model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0] / temperature).log_softmax(-1)
        for col, token in enumerate(completion):
            if trained[col]:
                found[row, col] = table[len(prompt) + col - 1, token]
    return found


def weights_like(logps):
    return torch.linspace(-1.0, 2.0, logps.numel()).view_as(logps)


def compare(ours, plain, items, way=logprobs, temperature=1.0):
    """Largest difference of log-probs, and of each parameter's gradient relative to its norm."""
    logps = way(ours, pack(items), temperature=temperature).logps
    expected = plain_logps(plain, items, temperature)
    weights = weights_like(logps)
    (logps * weights).sum().backward()
    sum(value * weights[place] for place, value in expected.items()).backward()
    full = torch.zeros_like(logps)
    for place, value in expected.items():
        full[place] = value.detach()
    worst = 0.0
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad
        if b.grad is None or not b.grad.any():
            assert a.grad is None or a.grad.abs().max() < 1e-6, name
        else:
            worst = max(worst, float((a.grad - b.grad).norm() / b.grad.norm()))
    return float((logps - full).detach().abs().max()), worst


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("way", [logprobs, padded_logprobs])
def test_logps_and_every_gradient_equal_one_row_per_completion(tiny, family, way):
    plain = tiny(family)
    ours = copy.deepcopy(plain)
    prepare_model(ours)
    logp_error, grad_error = compare(ours, plain, ITEMS, way, temperature=0.8)
    assert logp_error < 1e-5
    assert grad_error < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3 moe", "gpt neox"])
def test_gradient_checkpointing_changes_nothing(tiny, family):
    plain = tiny(family).train()
    ours = copy.deepcopy(plain)
    prepare_model(ours)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert max(compare(ours, plain, ITEMS)) < 1e-5


def with_lora(model):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False))
    return adapted.eval()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_equal_those_of_plain_rows(tiny, checkpointing):
    plain = with_lora(tiny("qwen3"))
    ours = copy.deepcopy(plain)
    prepare_model(ours)
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ours.train()
    logp_error, grad_error = compare(ours, plain, ITEMS)
    assert logp_error < 1e-5
    assert grad_error < 1e-4


def test_observed_tokens_get_no_logp_and_no_gradient(tiny):
    model = tiny("llama")
    prepare_model(model)
    mask = [[True, False, True]]
    answer = logprobs(model, pack([PackItem([5, 6], [[7, 8, 9]], mask)]))
    assert answer.logps[0, 1] == 0
    assert answer.entropy[0, 1] == 0
    full = logprobs(model, pack([PackItem([5, 6], [[7, 8, 9]])]))
    grads = [torch.autograd.grad(x.logps[:, [0, 2]].sum(), model.lm_head.weight, retain_graph=True)[0] for x in (answer, full)]
    everything = torch.autograd.grad(answer.logps.sum(), model.lm_head.weight)[0]
    assert torch.allclose(grads[0], grads[1], atol=1e-6)
    assert torch.equal(everything, grads[0])


def test_siblings_and_neighbours_do_not_change_a_row(tiny):
    model = tiny("gemma3 short window")
    prepare_model(model)
    a = logprobs(model, pack([PackItem([5, 6, 7], [[8, 9, 10], [11, 12, 13]]), PackItem([14], [[15]])]))
    b = logprobs(model, pack([PackItem([5, 6, 7], [[8, 9, 10], [31, 32, 33]]), PackItem([44], [[45]])]))
    assert torch.equal(a.logps[0], b.logps[0])
    assert not torch.equal(a.logps[1], b.logps[1])


def test_entropy_argmax_and_sum_p2_are_those_of_the_whole_distribution(tiny):
    plain = tiny("llama").double()
    model = copy.deepcopy(plain)
    prepare_model(model)
    for way in (logprobs, padded_logprobs):
        answer = way(model, pack([PackItem([5, 6], [[7, 8, 9], [10]])]), temperature=0.7, want_argmax=True, want_sum_p2=True)
        p = (plain(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 1:-1] / 0.7).softmax(-1)
        assert torch.allclose(answer.entropy[0], -(p * p.log()).sum(-1), atol=1e-9)
        assert torch.allclose(answer.sum_p2[0], p.square().sum(-1), atol=1e-9)
        assert answer.argmax[0].tolist() == p.argmax(-1).tolist()


@pytest.mark.parametrize("way", [logprobs, padded_logprobs])
def test_a_constant_entropy_has_the_same_value_and_leaves_the_log_probs_gradient_alone(tiny, way):
    model, stream = tiny("llama"), pack(ITEMS)
    head = model.get_output_embeddings().weight
    free, constant = (way(model, stream, entropy_grad=wanted) for wanted in (True, False))
    assert torch.equal(free.entropy, constant.entropy)
    expected, gradient = (torch.autograd.grad((answer.logps * weights_like(answer.logps)).sum(), head)[0] for answer in (free, constant))
    torch.testing.assert_close(gradient, expected)
    zero = torch.autograd.grad(way(model, stream, entropy_grad=False).entropy.sum(), head)[0]
    assert not zero.any()


def test_padded_rows_in_several_chunks_are_the_same_rows(tiny, monkeypatch):
    model = tiny("qwen2")
    prepare_model(model)
    whole = padded_logprobs(model, pack(ITEMS)).logps
    monkeypatch.setattr(rows, "MAX_TOKENS", 24)
    assert len(list(rows.unroll(pack(ITEMS)))) > 2
    assert torch.allclose(padded_logprobs(model, pack(ITEMS)).logps, whole, atol=1e-6)


def test_a_stream_without_targets_gives_a_zero_that_is_connected_to_the_graph(tiny):
    model = tiny("llama")
    prepare_model(model)
    (logprobs(model, pack([PackItem([5, 6], [[]])])).logps.sum() * 0.0).backward()
    assert not model.model.layers[0].self_attn.q_proj.weight.grad.any()


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes |= {x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)}
        return out


def test_no_tensor_of_targets_times_vocabulary_or_stream_squared_is_made(tiny):
    model = tiny("llama", vocab_size=20011, num_hidden_layers=1)
    prepare_model(model)
    model.lm_head.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    stream = pack([PackItem(list(range(300)), [list(range(256))] * 8)])
    with Shapes() as seen:
        logprobs(model, stream).logps.sum().backward()
    assert stream.shape[0] * stream.shape[1] * 20011 not in seen.sizes
    assert len(stream) ** 2 not in seen.sizes
    assert max(seen.sizes) < min(2048 * 20011, len(stream) ** 2)


def test_bfloat16_autocast_agrees_with_float32_to_its_rounding(tiny):
    model = tiny("qwen3")
    prepare_model(model)
    exact = logprobs(model, pack(ITEMS)).logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = logprobs(model, pack(ITEMS)).logps
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.05
    rounded.sum().backward()


def test_a_ddp_wrapped_model_is_called_through_its_wrapper(tiny, tmp_path):
    model = tiny("llama tied")
    prepare_model(model)
    (logprobs(model, pack(ITEMS)).logps.sum()).backward()
    alone = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        calls = []
        wrapped.register_forward_hook(lambda *_: calls.append(1))
        logprobs(wrapped, pack(ITEMS)).logps.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert calls
    for parameter, expected in zip(model.parameters(), alone, strict=True):
        assert torch.allclose(parameter.grad, expected, atol=1e-5)
