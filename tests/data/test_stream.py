"""Packing and splitting, checked against hand-made streams and by walking back from targets to tokens."""

from __future__ import annotations

import pytest
import torch

from posttrain.data.stream import PackItem, pack, split
from posttrain.errors import UserError

TWO_GROUPS = [PackItem([10, 11, 12], [[1, 2], [3]]), PackItem([20], [[4, 5, 6]])]


def test_a_hand_made_stream():
    stream = pack(TWO_GROUPS)
    assert stream.input_ids.tolist() == [10, 11, 12, 1, 2, 3, 20, 4, 5, 6]
    assert stream.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    assert [tuple(segment) for segment in stream.segments] == [(0, 3, None), (3, 2, 0), (5, 1, 0), (6, 1, None), (7, 3, 3)]
    assert stream.targets.tolist() == [1, 2, 3, 4, 5, 6]
    assert stream.logit_index.tolist() == [2, 3, 2, 6, 7, 8]
    assert stream.rows.tolist() == [0, 0, 1, 2, 2, 2]
    assert stream.cols.tolist() == [0, 1, 0, 0, 1, 2]
    assert stream.shape == (3, 3)
    assert stream.row_ids.tolist() == [0, 1, 2]


def test_the_first_token_of_every_completion_is_predicted_by_the_last_prompt_token():
    stream = pack(TWO_GROUPS)
    first = stream.cols == 0
    assert stream.input_ids[stream.logit_index[first]].tolist() == [12, 12, 20]


def test_untrained_tokens_stay_in_the_stream_but_get_no_logit_row():
    stream = pack([PackItem([9], [[1, 2, 3]], [[True, False, True]])])
    assert stream.input_ids.tolist() == [9, 1, 2, 3]
    assert stream.targets.tolist() == [1, 3]
    assert stream.logit_index.tolist() == [0, 2]
    assert stream.cols.tolist() == [0, 2]
    assert stream.shape == (1, 3)


def test_empty_completions_keep_their_row():
    stream = pack([PackItem([9], [[], [1], []])])
    assert stream.shape == (3, 1)
    assert stream.rows.tolist() == [1]
    assert [segment.length for segment in stream.segments] == [1, 0, 1, 0]


def test_a_stream_without_any_target_is_still_a_stream():
    stream = pack([PackItem([9, 8], [[]])])
    assert stream.shape == (1, 0)
    assert stream.targets.shape == (0,)
    assert stream.scatter(torch.zeros(0)).shape == (1, 0)


def test_scatter_puts_values_in_place_and_carries_gradients_back():
    stream = pack([PackItem([9], [[1, 2], [3]], [[False, True], [True]])])
    values = torch.tensor([5.0, 7.0], requires_grad=True)
    table = stream.scatter(values, fill=-1.0)
    assert table.tolist() == [[-1.0, 5.0], [7.0, -1.0]]
    (table * torch.tensor([[100.0, 2.0], [3.0, 100.0]])).sum().backward()
    assert values.grad.tolist() == [2.0, 3.0]


def test_row_ids_of_the_caller_survive_packing():
    stream = pack([PackItem([9], [[1], [2]], row_ids=[7, 3]), PackItem([8], [[1]], row_ids=[5])])
    assert stream.row_ids.tolist() == [7, 3, 5]


def test_to_moves_every_tensor():
    moved = pack(TWO_GROUPS).to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.shape == (3, 3)


def test_an_empty_prompt_is_refused_with_a_sentence():
    with pytest.raises(UserError, match="nothing predicts the first token"):
        pack([PackItem([], [[1]])])


def test_a_mask_of_the_wrong_length_is_refused_with_a_sentence():
    with pytest.raises(UserError, match="as long as their completions"):
        pack([PackItem([1], [[1, 2]], [[True]])])


def tokens_by_row(parts):
    found = {}
    for part in parts:
        for item in part:
            masks = item.trained or [[True] * len(completion) for completion in item.completions]
            for number, completion, mask in zip(item.row_ids, item.completions, masks, strict=True):
                assert number not in found
                found[number] = (list(item.prompt_ids), list(completion), list(mask))
    return found


@pytest.mark.parametrize("budget", [1, 7, 12, 20, 1000])
def test_a_split_keeps_every_row_once_with_its_own_prompt_and_mask(budget):
    items = [
        PackItem([1, 2, 3], [[4] * 5, [5] * 2, [], [6] * 9], [[True] * 5, [False, True], [], [True] * 9]),
        PackItem([7], [[8], [9]], [[True], [False]]),
        PackItem([1, 2, 3], [[4]], [[True]]),
    ]
    parts = split(items, budget)
    assert tokens_by_row(parts) == tokens_by_row(split(items, 10**9))
    assert sorted(tokens_by_row(parts)) == list(range(7))
    for part in parts:
        assert sum(map(len, part)) <= budget or (len(part) == 1 and len(part[0].completions) == 1)


def test_groups_within_the_budget_are_not_split():
    parts = split([PackItem([1, 2], [[3], [4]]), PackItem([5], [[6, 7]])], 7)
    assert [[len(item.completions) for item in part] for part in parts] == [[2, 1]]
    assert [[len(item.completions) for item in part] for part in split([PackItem([1, 2], [[3], [4]])] * 2, 7)] == [[2], [2]]


def test_given_row_ids_are_kept_by_a_split():
    parts = split([PackItem([1], [[2] * 5, [3] * 5], row_ids=(11, 4))], 6)
    assert [[list(item.row_ids) for item in part] for part in parts] == [[[11]], [[4]]]


def test_a_group_over_the_budget_is_split_evenly():
    item = PackItem([1] * 250, [[2] * 256 for _ in range(16)])
    assert [len(part[0].completions) for part in split([item], 4096)] == [8, 8]  # not 15 and 1: the largest part decides the memory
    ragged = PackItem([1] * 10, [[2] * n for n in (50, 10, 10, 10, 40)])
    parts = split([ragged], 100)
    assert [len(part[0]) for part in parts] == [70, 70]


def test_no_part_exceeds_the_budget_where_a_completion_fits():
    import random

    rng = random.Random(0)
    for _ in range(200):
        item = PackItem([1] * rng.randint(1, 30), [[2] * rng.randint(0, 40) for _ in range(rng.randint(1, 9))])
        budget = rng.randint(5, 120)
        parts = split([item], budget)
        assert [row for part in parts for piece in part for row in piece.row_ids] == list(range(len(item.completions)))
        assert all(len(piece) <= budget or len(piece.completions) == 1 for part in parts for piece in part)
