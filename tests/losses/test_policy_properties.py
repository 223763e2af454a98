"""What must hold for every objective: splits, order, masks, the active side of the clip, ratio 1 before the first update."""

import math

import pytest
import torch

from posttrain.errors import UserError
from posttrain.losses.policy import OBJECTIVES, PolicyOptions, find_objective, policy_terms
from posttrain.losses.tally import Tally

B, T = 12, 7
OPTIONS = PolicyOptions(beta=0.1, off_policy_mask_threshold=0.2)


def rows(seed=0):
    torch.manual_seed(seed)
    lengths = torch.tensor([7, 1, 0, 3, 5, 2, 7, 4, 6, 0, 1, 3])
    mask = torch.arange(T) < lengths[:, None]
    logps = -3 * torch.rand(B, T, dtype=torch.float64)
    old, ref = logps + 0.3 * torch.randn_like(logps), logps + 0.3 * torch.randn_like(logps)
    return {"logps": logps, "old": old, "ref": ref, "mask": mask, "advantages": torch.randn(B, dtype=torch.float64)}


def step(name, batch, parts, options=OPTIONS):
    """A whole optimizer step: its micro-batches are the index lists `parts`. Returns loss, gradient (B, T), metrics."""
    objective, leaf = OBJECTIVES[name], batch["logps"].clone().requires_grad_()
    counts = {"num_rows": B, "num_tokens": int(batch["mask"].sum()), "max_completion_length": 9}
    loss, metrics = torch.zeros((), dtype=torch.float64), {}
    for part in parts:
        mask = batch["mask"][part]
        width = max(int(mask.sum(1).max()), 1)  # each micro-batch is padded to its own longest row
        old, ref, mask = batch["old"][part][:, :width], batch["ref"][part][:, :width], mask[:, :width]
        terms = policy_terms(leaf[part][:, :width], old, batch["advantages"][part], mask, objective=objective, options=options, ref_logps=ref)
        share = (terms.per_token * objective.row_weights(mask.sum(1).double(), **counts)[:, None]).sum()
        share.backward()
        loss += share.detach()
        metrics = {k: v if k not in metrics else metrics[k] + v for k, v in terms.metrics.items()}
    return loss, leaf.grad, metrics


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_gradient_and_metrics_are_the_same_for_every_split_and_order(name, level):
    batch, options = rows(), PolicyOptions(beta=0.1, off_policy_mask_threshold=0.2, importance_sampling_level=level)
    loss, gradient, metrics = step(name, batch, [list(range(B))], options)
    for seed in range(6):
        order = torch.randperm(B, generator=torch.Generator().manual_seed(seed)).tolist()
        size = (1, 2, 3, 5, 7, 12)[seed]
        parts = [order[i : i + size] for i in range(0, B, size)]
        other_loss, other_gradient, other_metrics = step(name, batch, parts, options)
        torch.testing.assert_close(other_loss, loss, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-9, atol=1e-15)
        assert {k: v.mean for k, v in other_metrics.items()} == pytest.approx({k: v.mean for k, v in metrics.items()}, rel=1e-5)
        assert all(torch.equal(v.row_min, metrics[k].row_min) and torch.equal(v.row_max, metrics[k].row_max) for k, v in other_metrics.items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_tokens_get_no_gradient_and_their_content_does_not_matter(name):
    batch = rows()
    loss, gradient, _ = step(name, batch, [list(range(B))])
    assert (gradient[~batch["mask"]] == 0).all()
    assert (gradient[batch["mask"]] != 0).any()
    for key in ("logps", "old", "ref"):
        batch[key] = torch.where(batch["mask"], batch[key], torch.nan)
    again, gradient_again, _ = step(name, batch, [list(range(B))])
    assert torch.equal(again, loss)
    assert torch.equal(gradient_again, gradient)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ratio_is_one_before_the_first_update_and_the_gradient_is_reinforce(name, level):
    batch = rows()
    leaf = batch["logps"].float().requires_grad_()  # float32, as in training: still exactly 1
    options = PolicyOptions(epsilon_high=5.0, importance_sampling_level=level)
    terms = policy_terms(leaf, None, batch["advantages"], batch["mask"], objective=OBJECTIVES[name], options=options)
    ratio = terms.metrics["ratio"]
    assert (ratio.mean, ratio.row_min.item(), ratio.row_max.item()) == (1.0, 1.0, 1.0)
    terms.per_token.sum().backward()
    expected = -batch["advantages"].float()[:, None] * batch["mask"]
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_clip_is_counted_on_its_active_side_only():
    log_ratio = torch.log(torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5], [0.5, 1.0, 1.5]]))
    mask = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    terms = policy_terms(log_ratio, torch.zeros(3, 3), torch.tensor([1.0, -1.0, 0.0]), mask, objective=OBJECTIVES["dapo"], options=PolicyOptions())
    total = {k: v.total.item() for k, v in terms.metrics.items()}
    assert (total["clip_ratio/low"], total["clip_ratio/high"], total["clip_ratio/region"]) == (1, 1, 2)
    assert terms.metrics["clip_ratio/low"].count.item() == 8


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_the_clip_fraction_is_the_share_of_tokens_whose_gradient_it_stops(name):
    batch = rows(3)
    leaf = batch["logps"].requires_grad_()
    terms = policy_terms(leaf, batch["old"], batch["advantages"], batch["mask"], objective=OBJECTIVES[name], options=PolicyOptions(epsilon=0.03))
    terms.per_token.sum().backward()
    stopped = (leaf.grad == 0) & batch["mask"]
    share = stopped.any(1)[batch["mask"].any(1)].double().mean() if name == "gspo" else stopped.sum() / batch["mask"].sum()
    assert 0 < share < 1
    assert terms.metrics["clip_ratio/region"].mean == pytest.approx(share.item())


def test_gspo_is_grpo_with_a_ratio_per_sequence():
    batch, whole = rows(), [list(range(B))]
    gspo = step("gspo", batch, whole)
    grpo = step("grpo", batch, whole, PolicyOptions(beta=0.1, off_policy_mask_threshold=0.2, importance_sampling_level="sequence"))
    assert torch.equal(gspo[0], grpo[0])
    assert torch.equal(gspo[1], grpo[1])


def test_a_fully_masked_row_changes_only_objectives_that_count_rows():
    mask = torch.tensor([[True, True], [False, False]])
    weights = {
        name: objective.row_weights(mask.sum(1), num_rows=2, num_tokens=2, max_completion_length=8).tolist() for name, objective in OBJECTIVES.items()
    }
    assert weights["grpo"] == weights["gspo"] == weights["sapo"] == [0.25, 0.0]
    assert weights["bnpo"][0] == weights["dapo"][0] == weights["cispo"][0] == weights["vespo"][0] == 0.5
    assert weights["dr_grpo"][0] == 1 / 16
    assert weights["luspo"][0] == 0.5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_truncated_completions_only_has_loss_zero_that_is_connected(name):
    logps, mask = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4, dtype=torch.bool)
    terms = policy_terms(logps, None, torch.ones(3), mask, objective=OBJECTIVES[name], options=PolicyOptions())
    weights = OBJECTIVES[name].row_weights(mask.sum(1), num_rows=3, num_tokens=0, max_completion_length=4)
    loss = (terms.per_token * weights[:, None]).sum()
    loss.backward()
    assert loss.item() == 0
    assert (logps.grad == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_advantage_zero_means_gradient_exactly_zero(name):
    batch = rows()
    leaf = batch["logps"].requires_grad_()
    terms = policy_terms(leaf, batch["old"], torch.zeros(B), batch["mask"], objective=OBJECTIVES[name], options=PolicyOptions())
    terms.per_token.sum().backward()
    assert (leaf.grad == 0).all()


def test_nothing_but_the_policy_gets_a_gradient():
    batch = rows()
    inputs = {key: batch[key].clone().requires_grad_() for key in ("logps", "old", "ref", "advantages")}
    terms = policy_terms(
        inputs["logps"], inputs["old"], inputs["advantages"], batch["mask"], objective=OBJECTIVES["dapo"], options=OPTIONS, ref_logps=inputs["ref"]
    )
    terms.per_token.sum().backward()
    assert [key for key, leaf in inputs.items() if leaf.grad is not None] == ["logps"]
    assert not any(t.requires_grad for tally in terms.metrics.values() for t in (tally.total, tally.row_min, tally.row_max))


def test_the_sampler_may_be_another_than_the_old_policy_for_the_off_policy_mask():
    logps, old, mask = torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    sampling = torch.tensor([[0.5, 0.7], [0.1, 0.2]])
    terms = policy_terms(
        logps, old, -torch.ones(2), mask, objective=OBJECTIVES["dapo"], options=PolicyOptions(off_policy_mask_threshold=0.3), rollout_logps=sampling
    )
    assert terms.per_token.tolist() == [[0, 0], [1, 1]]
    assert terms.metrics["off_policy_kept"].mean == 0.5


def test_kl_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="ref_logps"):
        policy_terms(torch.zeros(1, 1), None, torch.ones(1), torch.ones(1, 1), objective=OBJECTIVES["grpo"], options=PolicyOptions(beta=0.1))


def test_an_unknown_loss_type_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'dr_grpo'"):
        find_objective("drgrpo")


def test_a_tally_of_nothing_has_no_mean_and_adds_nothing():
    empty, some = Tally.of(torch.ones(2, 3), torch.zeros(2, 3)), Tally.of(torch.tensor([[2.0, 4.0]]), torch.tensor([[1, 1]]))
    assert math.isnan(empty.mean)
    rows = some + Tally.of(torch.tensor([[6.0, 8.0], [9.0, 9.0]]), torch.tensor([[1, 1], [0, 0]])) + empty
    assert ((empty + some).mean, rows.mean, rows.row_min.item(), rows.row_max.item()) == (3.0, 5.0, 3.0, 7.0)
    assert (Tally.of(torch.ones(0, 3), torch.ones(0, 3)) + some).mean == 3.0
