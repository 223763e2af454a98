import pytest

from posttrain.errors import UserError
from posttrain.rollout.stopping import check_sampling, stop_reason
from posttrain.types import Sampling, StopReason


class Pieces:
    """A tokenizer whose tokens are pieces of text."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, token_ids, skip_special_tokens):
        return "".join(self.pieces[token] for token in token_ids)


def stops_after(token_ids, sampling, tokenizer):
    for length in range(1, len(token_ids) + 1):
        reason = stop_reason(token_ids[:length], sampling, tokenizer)
        if reason is not None:
            return length, reason
    return None


def test_a_stop_string_across_token_boundaries_ends_with_the_token_that_completes_it():
    tokenizer = Pieces("a", "</an", "sw", "er>", "er> tail", "x")
    sampling = Sampling(max_new_tokens=50, stop_strings=("</answer>",))
    assert stops_after([0, 1, 2, 3, 5], sampling, tokenizer) == (4, StopReason.STOP)
    assert stops_after([0, 1, 2, 4, 5], sampling, tokenizer) == (4, StopReason.STOP)
    assert stops_after([0, 1, 5, 2, 3], sampling, tokenizer) is None


def test_silent_tokens_inside_a_stop_string_do_not_hide_it():
    tokenizer = Pieces("E", "N", "D", "")
    sampling = Sampling(max_new_tokens=50, stop_strings=("END",))
    assert stops_after([2] * 30 + [0, 3, 3, 1, 3, 3, 2], sampling, tokenizer) == (37, StopReason.STOP)


def test_stop_wins_over_length_on_the_last_token():
    tokenizer = Pieces("a", "b")
    sampling = Sampling(max_new_tokens=2, stop_token_ids=(1,), stop_strings=("aa",))
    assert stops_after([0, 1], sampling, tokenizer) == (2, StopReason.STOP)
    assert stops_after([0, 0], sampling, tokenizer) == (2, StopReason.STOP)
    assert stops_after([0, 0], Sampling(max_new_tokens=2, stop_token_ids=(1,)), tokenizer) == (2, StopReason.LENGTH)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"stop_strings": ("",)},
    ],
)
def test_settings_that_cannot_be_drawn_from_are_refused_by_name(wrong):
    name = next(iter(wrong))
    with pytest.raises(UserError, match=name.replace("_strings", " string")):
        check_sampling(Sampling(**{"max_new_tokens": 4, **wrong}), Pieces("a"))


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(UserError, match="tokenizer"):
        check_sampling(Sampling(max_new_tokens=4, stop_strings=("a",)), None)
