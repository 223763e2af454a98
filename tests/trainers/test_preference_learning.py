"""What preference learning is for: the closed form on a bandit, margins and generated preferences that grow, references that stay."""

import itertools
import math

import pytest
import torch
from small import build_model, build_tokenizer, weights_of
from small_preferences import PAIRS, start

from posttrain.losses.preference import Pairs, PreferenceOptions, preference_loss


def bandit_minimiser(rewards, beta, losses=None, flipped=0.0, **options):
    """The policy that minimises the expected loss under Bradley-Terry labels, all pairs of actions alike, a share `flipped` of labels wrong."""
    reference = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.5], dtype=torch.float64).log_softmax(0)
    logits = reference.clone().requires_grad_()
    winners, losers = map(list, zip(*itertools.permutations(range(len(rewards)), 2), strict=True))
    right = torch.sigmoid(rewards[winners] - rewards[losers])
    chances = (1 - flipped) * right + flipped * (1 - right)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")
    ones = torch.ones(len(winners), dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        pairs = Pairs(policy[winners], policy[losers], reference[winners], reference[losers], ones, ones, -policy[winners], 1.0)
        loss = (chances * preference_loss(pairs, PreferenceOptions(beta=beta, **options), losses or {"sigmoid": 1.0})).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(0), (reference + rewards / beta).log_softmax(0)


REWARDS = torch.tensor([0.0, 0.4, -0.3, 0.9, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_on_a_bandit_the_minimiser_is_the_closed_form(beta):
    found, closed_form = bandit_minimiser(REWARDS, beta)
    assert torch.allclose(found.exp(), closed_form.exp(), rtol=0, atol=1e-7)


def test_robust_dpo_finds_the_closed_form_through_flipped_labels():
    found, closed_form = bandit_minimiser(REWARDS, 0.5, {"robust": 1.0}, flipped=0.2, label_smoothing=0.2)
    assert torch.allclose(found.exp(), closed_form.exp(), rtol=0, atol=1e-6)
    plain, _ = bandit_minimiser(REWARDS, 0.5, flipped=0.2)
    assert (plain.exp() - closed_form.exp()).abs().max() > 0.02, "plain DPO believes the flipped labels"


def test_the_trainer_recovers_the_rewards_that_its_labels_express(tmp_path):
    """Rewards 0, log 2 and log 4: of 15 comparisons of each two, 10, 12 and 10 go to the better one. beta log(pi / ref) is r up to a constant."""
    wins = {("1", "0"): 10, ("2", "0"): 12, ("2", "1"): 10}
    rows = []
    for (better, worse), count in wins.items():
        rows += [{"prompt": "5=", "chosen": better, "rejected": worse}] * count + [{"prompt": "5=", "chosen": worse, "rejected": better}] * (
            15 - count
        )
    settings = {
        "per_device_train_batch_size": 45,
        "max_steps": 150,
        "logging_steps": 150,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "beta": 0.5,
        "precompute_ref_log_probs": True,
    }
    trainer = start("dpo", tmp_path, rows=rows, **settings)
    trainer.train()
    for first, (better, worse) in zip((0, 15, 30), wins, strict=True):
        example = trainer.train_dataset[first]
        (ours,), theirs = trainer.sums(trainer.model, [example]), example.ref_logps
        margin = 0.5 * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
        assert margin == pytest.approx(math.log(2) * (int(better) - int(worse)), abs=0.02)


def starts_even(trainer, count=200):
    """The share of drawn completions that begin with an even digit."""
    tokenizer, model = trainer.tokenizer, trainer.model.eval()
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer("3+4=")["input_ids"]] * count)
    drawn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=True, top_k=0)
    return sum(text[:1] in set("02468") for text in tokenizer.batch_decode(drawn[:, ids.shape[1] :])) / count


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "cpo"])
def test_margins_and_the_generated_preference_rate_improve(tmp_path, kind):
    even, odd = ["2", "46", "808", "6+1"], ["1", "35", "971", "7+2"]
    rows = [{"prompt": f"{a}+{b}=", "chosen": even[(a + b) % 4], "rejected": odd[(a * b) % 4]} for a in range(6) for b in range(6)]
    train, held_out = rows[:24], rows[24:]
    trainer = start(kind, tmp_path, rows=train, per_device_train_batch_size=12, max_steps=40, learning_rate=3e-3, trainer={"eval_dataset": held_out})
    before = trainer.evaluate()
    rate = starts_even(trainer)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.01
    if kind != "kto":  # single completions have no pair to be right about
        assert after["eval_rewards/accuracies"] > 0.9
    assert starts_even(trainer) > rate + 0.3


def test_before_the_first_update_policy_and_reference_agree(tmp_path):
    trainer = start("dpo", tmp_path, max_steps=1, logging_steps=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0.0
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected", "entropy", "num_tokens"} <= first.keys()
    assert "mean_token_accuracy" in first


def test_the_training_loss_is_the_evaluation_loss_of_the_same_rows(tmp_path):
    trainer = start("kto", tmp_path, per_device_train_batch_size=12, max_steps=2, trainer={"eval_dataset": {"same": PAIRS, "less": PAIRS[:2]}})
    trainer.train()
    logs = trainer.evaluate()
    trainer.train_dataset, trainer.args.max_steps = trainer.eval_examples["same"], 1
    (batch,) = trainer.window([trainer.train_dataset])
    with trainer.evaluating(trainer.model) as module:
        assert logs["eval_same_loss"] == pytest.approx(float(trainer.loss(module, batch)), rel=1e-6)
    assert "eval_less_loss" in logs


def test_with_lora_the_reference_is_the_model_without_its_adapter(tmp_path):
    from peft import LoraConfig

    trainer = start("dpo", tmp_path, learning_rate=0.1, trainer={"peft_config": LoraConfig(r=4, target_modules="all-linear")})
    assert trainer.references.model.frozen is None, "no second model is held"
    before = trainer.references.of(trainer.train_dataset)
    base = start("dpo", tmp_path / "plain")
    assert torch.allclose(torch.tensor(before), torch.tensor(base.sums(base.model, base.train_dataset)), atol=1e-5)
    trainer.train()
    assert trainer.references.of(trainer.train_dataset) == before
    assert trainer.sums(trainer.model, trainer.train_dataset) != before


@pytest.mark.parametrize("settings", [{}, {"precompute_ref_log_probs": True}], ids=["live", "ahead"])
def test_adapters_that_are_trained_further_start_at_their_reference(tmp_path, settings):
    from peft import LoraConfig

    first = start("dpo", tmp_path, learning_rate=0.1, trainer={"peft_config": LoraConfig(r=4, target_modules="all-linear")})
    first.train()
    second = start("dpo", tmp_path / "second", model=first.model, learning_rate=0.02, logging_steps=1, **settings)
    second.train()
    log = second.state.log_history[0]
    assert (log["loss"], log["rewards/margins"]) == (pytest.approx(math.log(2), abs=1e-6), pytest.approx(0.0, abs=1e-6))
    assert second.state.log_history[2]["rewards/margins"] > 1e-3


def test_a_given_reference_is_used_and_stays(tmp_path):
    other = build_model(build_tokenizer(), seed=9)
    trainer = start("dpo", tmp_path, trainer={"ref_model": other})
    whole = weights_of(type("Holder", (), {"model": other}))
    expected = trainer.sums(other, trainer.train_dataset)
    trainer.train()
    assert trainer.references.of(trainer.train_dataset) == expected
    assert torch.equal(weights_of(type("Holder", (), {"model": other})), whole)


def test_a_synced_reference_moves_towards_the_policy(tmp_path):
    trainer = start("dpo", tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5, max_steps=2)
    before = trainer.references.of(trainer.train_dataset)
    trainer.train()
    assert trainer.references.of(trainer.train_dataset) == before, "the sync comes with the window of the third step"
    trainer.references.follow(trainer.model, 2)
    after = trainer.references.of(trainer.train_dataset)
    assert after != before
    weights = [p.detach() for p in trainer.references.model.frozen.parameters()]
    start_weights = [p.detach() for p in build_model(trainer.tokenizer).parameters()]
    for moved, ours, old in zip(weights, trainer.model.parameters(), start_weights, strict=True):
        assert torch.allclose(moved, (ours.detach() + old) / 2, atol=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_computed_ahead_gives_the_same_run_without_a_second_model(tmp_path, kind):
    settings = {"shuffle_dataset": False, "per_device_train_batch_size": 12 if kind == "kto" else 6}
    plain = start(kind, tmp_path / "plain", trainer={"eval_dataset": PAIRS[:3]}, **settings)
    ahead = start(kind, tmp_path / "ahead", trainer={"eval_dataset": PAIRS[:3]}, precompute_ref_log_probs=True, **settings)
    assert ahead.references.model is None
    for trainer in (plain, ahead):
        trainer.train()
    assert torch.allclose(weights_of(ahead), weights_of(plain), atol=1e-6)
    assert ahead.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_the_reference_on_disk_is_computed_once(tmp_path, monkeypatch):
    from posttrain.trainers.offline import reference_file

    first = start("dpo", tmp_path, precompute_ref_log_probs=True)
    first.train()
    monkeypatch.setattr(reference_file, "save", lambda *args: pytest.fail("it was computed again"))
    second = start("dpo", tmp_path, precompute_ref_log_probs=True)
    second.train()
    assert [example.ref_logps for example in second.train_dataset] == [example.ref_logps for example in first.train_dataset]
    assert torch.equal(weights_of(first), weights_of(second))
