from posttrain.trainers.core.loader import PromptSampler
from posttrain.trainers.online.rows import GenerationBatch, Row, policy_batches


def row(group, index, length=3, advantage=1.0):
    return Row(group, index, [1, 2], list(range(3, 3 + length)), [True] * length, [-0.5] * length, advantage)


def sampler(size, prompts, every, epoch=0, seed=0, shuffle=True, keep_rest=False):
    return PromptSampler(size, prompts=prompts, every=every, epoch=lambda: epoch, seed=seed, shuffle=shuffle, keep_rest=keep_rest)


def test_prompts_come_once_a_cycle_and_the_other_micro_steps_are_empty():
    batches = list(sampler(7, prompts=2, every=3, shuffle=False))
    assert batches == [[0, 1], [], [], [2, 3], [], [], [4, 5], [], []]
    assert len(sampler(7, prompts=2, every=3)) == len(batches)


def test_an_incomplete_rollout_is_left_out_and_an_incomplete_batch_of_examples_kept():
    assert [len(batch) for batch in sampler(7, prompts=2, every=1)] == [2, 2, 2]
    assert [len(batch) for batch in sampler(7, prompts=2, every=1, keep_rest=True)] == [2, 2, 2, 1]


def test_each_epoch_has_its_own_order_and_the_same_one_every_time():
    orders = [[i for batch in sampler(20, 4, 1, epoch=epoch) for i in batch] for epoch in (0, 1, 0)]
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]
    assert sorted(orders[0]) == list(range(20))


def test_slices_partition_the_rollout_and_repeat_for_every_iteration():
    rows = [row(group, index) for group in range(3) for index in range(4)]
    batch = GenerationBatch(rows, [[3] * 4] * 3, slices=2)
    taken = [batch.next_slice() for _ in range(4)]  # two slices, two iterations
    assert [len(part.rows) for part in taken] == [6, 6, 6, 6]
    assert taken[0].rows + taken[1].rows == rows
    assert taken[2].rows == taken[0].rows
    assert [part.num_tokens for part in taken] == [18] * 4


def test_a_slice_counts_rows_of_other_processes_too():
    mine = [row(1, index) for index in range(4)]
    part = GenerationBatch(mine, [[2] * 4, [3] * 4], slices=1).next_slice()
    assert (len(part.rows), part.num_rows, part.num_tokens) == (4, 8, 20)


def test_a_rollout_survives_json_exactly():
    import json

    rows = [row(0, 0), row(0, 1)]
    rows[0].old_logps = [-0.1, 1 / 3, -1e-30]
    batch = GenerationBatch(rows, [[3, 3]], slices=2, used=1)
    assert GenerationBatch.from_json(json.loads(json.dumps(batch.to_json()))) == batch


def test_rows_of_a_group_share_its_prompt_and_keep_their_weights():
    import torch

    rows = [row(0, 0), row(0, 1), row(1, 0, length=2)]
    (batch,) = policy_batches(rows, [0.1, 0.2, 0.3], max_tokens=100, device=torch.device("cpu"))
    assert len(batch.stream) == 2 + 3 + 3 + 2 + 2
    assert batch.weights.tolist() == torch.tensor([0.1, 0.2, 0.3]).tolist()
    assert batch.mask.tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    assert batch.old_logps is None
