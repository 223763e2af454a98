"""Scalar heads on streams: equal to plain transformers, differentiable, and gone from what is saved."""

import pytest
import torch
from small import build_float64_model, build_model, build_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from posttrain.data.stream import PackItem, pack
from posttrain.errors import UserError
from posttrain.models.forward import logprobs, padded_logprobs
from posttrain.models.heads import (
    add_value_head,
    load_reward_model,
    make_scores,
    padded_scores,
    reward_model,
    stream_scores,
    with_own_padding,
    without_submodule,
)
from posttrain.models.load import prepare_model

ROWS = [([1, 2, 3], [4, 5, 0]), ([1, 2, 3], [6, 0]), ([3, 4], []), ([3, 4], [2])]


@pytest.fixture
def stream():
    return pack([PackItem([1, 2, 3], [[4, 5, 0], [6, 0]]), PackItem([3, 4], [[], [2]])])


@pytest.fixture(params=[build_model, build_float64_model], ids=["qwen3", "gpt2-float64"])
def classifier(request):
    return reward_model(request.param(build_tokenizer()))


def plain_scores(model, rows=ROWS):
    model.config.pad_token_id = None
    return torch.stack([model(input_ids=torch.tensor([prompt + completion])).logits[0, 0] for prompt, completion in rows])


def test_the_score_is_that_of_the_last_token_in_plain_transformers(classifier, stream):
    classifier.eval()
    tolerance = 1e-12 if classifier.dtype == torch.float64 else 1e-5
    for scores in (stream_scores, padded_scores):
        assert torch.allclose(scores(classifier, stream).last, plain_scores(classifier), atol=tolerance)


def test_gradients_are_those_of_plain_rows(stream):
    model = reward_model(build_float64_model(build_tokenizer())).eval()
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    found = []
    for scores in (stream_scores(model, stream).last, padded_scores(model, stream).last, plain_scores(model)):
        model.zero_grad()
        (scores * weights).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(found[0], found[2], atol=1e-11)
    assert torch.allclose(found[1], found[2], atol=1e-11)


def test_states_are_scored_before_their_targets(classifier, stream):
    """The state before a token is that of a row which ends just before it."""
    classifier.eval()
    states = stream_scores(classifier, stream).states
    cut = [(prompt, completion[:t]) for prompt, completion in ROWS for t in range(len(completion))]
    expected = iter(plain_scores(classifier, cut).tolist())
    for row, (_, completion) in enumerate(ROWS):
        for t in range(3):
            assert states[row, t].item() == pytest.approx(next(expected) if t < len(completion) else 0.0, abs=1e-5)


def test_the_way_is_chosen_by_trial(classifier):
    assert make_scores(classifier) is stream_scores
    classifier.set_attn_implementation("eager")
    assert make_scores(classifier) is padded_scores


def test_a_value_head_reads_the_same_states_in_the_same_forward(stream):
    policy = build_float64_model(build_tokenizer()).eval()
    prepare_model(policy)
    head = add_value_head(policy)
    torch.nn.init.normal_(head.linear.weight)
    calls = []
    policy.transformer.register_forward_hook(lambda *args: calls.append(1))
    answer = logprobs(policy, stream, scorer=head)
    assert len(calls) == 1
    plain = logprobs(policy, stream)
    assert torch.equal(answer.logps, plain.logps)
    hidden = policy.transformer(input_ids=torch.tensor([[1, 2, 3, 4, 5, 0]])).last_hidden_state[0]
    expected = (hidden @ head.linear.weight[0] + head.linear.bias)[2:]  # before each of three tokens, and after the last
    assert torch.allclose(answer.values[0], expected[:3], atol=1e-12)
    assert answer.last_values[0].item() == pytest.approx(expected[3].item(), abs=1e-12)
    padded = padded_logprobs(policy, stream, scorer=head)
    assert torch.allclose(padded.values, answer.values, atol=1e-12)
    assert torch.allclose(padded.last_values, answer.last_values, atol=1e-12)


def test_a_value_head_starts_at_zero_and_stays_out_of_what_is_saved(tmp_path):
    policy = build_model(build_tokenizer())
    names = set(policy.state_dict())
    head = add_value_head(policy)
    assert not any(parameter.any() for parameter in head.parameters())
    assert len(policy.state_dict()) == len(names) + 2
    with without_submodule(policy, "value_head"):
        assert set(policy.state_dict()) == names
    assert policy.value_head is head


def test_a_saved_reward_model_is_a_classifier_of_transformers(tmp_path, classifier, stream):
    expected = stream_scores(classifier.eval(), stream).last
    classifier.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=classifier.dtype)
    assert plain.config.num_labels == 1
    assert torch.allclose(plain_scores(plain), expected, atol=1e-5)
    again = load_reward_model(str(tmp_path), dtype=classifier.dtype)
    assert torch.allclose(stream_scores(again.eval(), stream).last, expected, atol=1e-6)


def test_a_saved_language_model_becomes_a_reward_model(tmp_path):
    build_model(build_tokenizer()).save_pretrained(tmp_path)
    one, other = (load_reward_model(str(tmp_path), seed=1) for _ in range(2))
    assert torch.equal(one.score.weight, other.score.weight)
    assert one.score.out_features == 1


def test_padding_is_never_the_token_that_ends_a_text():
    tokenizer = build_tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token
    assert with_own_padding(tokenizer).pad_token is None  # there is no other special token: one row at a time, rather than wrong
    tokenizer.add_special_tokens({"unk_token": "?"})
    own = with_own_padding(tokenizer)
    assert own.pad_token == "?"
    assert tokenizer.pad_token == tokenizer.eos_token, "the user's tokenizer is left alone"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Qwen3ForSequenceClassification(Qwen3Config(**_TINY, num_labels=3)), "one label, but this Qwen3ForSequenceClassification has 3"),
        (lambda: BertForSequenceClassification(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)), "neither a causal language"),
    ],
)
def test_what_cannot_score_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        reward_model(make())


_TINY = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
