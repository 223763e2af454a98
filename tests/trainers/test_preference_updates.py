"""An update of DPO, KTO, ORPO and CPO is that of plain rows and autograd, and does not depend on how it is cut."""

import pytest
import torch
from small import build_float64_model, weights_of
from small_preferences import PAIRS, start

from posttrain.trainers.kto import following_of_another


def plain_logps(model, tokenizer, prompt, completion):
    """Log-probs of a completion's tokens from a whole row of its own, with plain softmax."""
    prompt_ids, ids = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
    return logits[len(prompt_ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


def gradients_of(trainer):
    """Of one update, from the trainer's own window and loss."""
    trainer.model.zero_grad()
    everyone = [trainer.train_dataset]
    loss = torch.zeros((), dtype=torch.float64)
    for batch in trainer.window(everyone):
        part = trainer.loss(trainer.model, batch)
        part.backward()
        loss += part.detach()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def moved(model, seed=5):
    """The policy, some way from its reference."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)


def expected(trainer, objective):
    """`objective` of the (policy, reference) token log-probs of every pair, and its gradient."""
    policy, reference, tokenizer = trainer.model, build_float64_model(trainer.tokenizer), trainer.tokenizer
    policy.zero_grad()
    rows = []
    for pair in PAIRS:
        sides = []
        for name in ("chosen", "rejected"):
            with torch.no_grad():
                theirs = plain_logps(reference, tokenizer, pair["prompt"], pair[name])
            sides.append((plain_logps(policy, tokenizer, pair["prompt"], pair[name]), theirs))
        rows.append(sides)
    loss = objective(rows)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def dpo(rows):
    ratios = [[(ours - theirs).sum() for ours, theirs in pair] for pair in rows]
    return torch.stack([-torch.nn.functional.logsigmoid(0.1 * (c - r)) for c, r in ratios]).mean()


def ld_dpo(rows):
    losses = []
    for pair in rows:
        shorter = min(len(ours) for ours, _ in pair)
        c, r = ((ours - theirs)[:shorter].sum() + 0.3 * (ours - theirs)[shorter:].sum() for ours, theirs in pair)
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (c - r)))
    return torch.stack(losses).mean()


def sft_and_ipo(rows):
    nll = -torch.cat([pair[0][0] for pair in rows]).mean()
    margins = [(c - rc).mean() - (r - rr).mean() for (c, rc), (r, rr) in rows]
    return 0.5 * nll + 2.0 * torch.stack([(m - 5.0) ** 2 for m in margins]).mean()


def orpo(rows):
    nll = -torch.cat([pair[0][0] for pair in rows]).mean()
    p = [[ours.mean().exp() for ours, _ in pair] for pair in rows]
    return nll - 0.1 * torch.stack([torch.log(torch.sigmoid(torch.log(c / (1 - c)) - torch.log(r / (1 - r)))) for c, r in p]).mean()


def simpo(rows):
    nll = -torch.cat([pair[0][0] for pair in rows]).mean()
    margins = torch.stack([c.mean() - r.mean() for (c, _), (r, _) in rows])
    return -torch.nn.functional.logsigmoid(2.0 * margins - 0.5).mean() + 0.2 * nll


CASES = {
    "dpo": ("dpo", {}, dpo),
    "ld-dpo": ("dpo", {"ld_alpha": 0.3}, ld_dpo),
    "sft and ipo": ("dpo", {"loss_type": ["sft", "ipo"], "loss_weights": [0.5, 2.0]}, sft_and_ipo),
    "orpo": ("orpo", {}, orpo),
    "simpo": ("cpo", {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.2}, simpo),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [1, 1000], ids=["a-pair-a-stream", "one-stream"])
def test_shared_prompts_give_the_loss_and_gradient_of_separate_rows(tmp_path, case, budget):
    kind, settings, objective = CASES[case]
    trainer = start(kind, tmp_path, float64=True, max_tokens_per_micro_batch=budget, **settings)
    moved(trainer.model)
    loss, gradient = gradients_of(trainer)
    plain_loss, plain_gradient = expected(trainer, objective)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert torch.allclose(gradient, plain_gradient, rtol=1e-5, atol=1e-8)


def test_kto_is_that_of_separate_rows(tmp_path):
    """z from the completion of the next row with another prompt, over the whole update."""
    trainer = start("kto", tmp_path, float64=True, beta=0.4, desirable_weight=1.5)
    moved(trainer.model, seed=0)
    loss, gradient = gradients_of(trainer)
    policy, reference = trainer.model, build_float64_model(trainer.tokenizer)
    rows = [(pair["prompt"], pair[name], name == "chosen") for name in ("chosen", "rejected") for pair in PAIRS]
    others = [next(rows[(i + step) % 12][1] for step in range(1, 12) if rows[(i + step) % 12][0] != rows[i][0]) for i in range(12)]

    def ratio(prompt, completion):
        return (plain_logps(policy, trainer.tokenizer, prompt, completion) - plain_logps(reference, trainer.tokenizer, prompt, completion)).sum()

    with torch.no_grad():
        z = torch.stack([ratio(prompt, other) for (prompt, _, _), other in zip(rows, others, strict=True)]).mean().clamp(min=0)
    assert z > 0, "the test must see z at work"
    losses = []
    for prompt, completion, good in rows:
        gain = 0.4 * (ratio(prompt, completion) - z)
        losses.append(1.5 * (1 - torch.sigmoid(gain)) if good else 1 - torch.sigmoid(-gain))
    policy.zero_grad()
    torch.stack(losses).mean().backward()
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert torch.allclose(gradient, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), rtol=1e-5, atol=1e-8)


VARIANTS = {
    "dpo": ("dpo", {}),
    "dpo-transport": ("dpo", {"loss_type": ["aot", "aot_unpaired"], "label_smoothing": 0.1}),
    "dpo-weighted": ("dpo", {"loss_type": ["sigmoid", "sft"], "use_weighting": True, "ld_alpha": 0.5}),
    "kto": ("kto", {}),
    "kto-unpaired-apo": ("kto", {"loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0}),
    "orpo": ("orpo", {}),
    "cpo": ("cpo", {"loss_type": "simpo", "beta": 2.0}),
}


def trained(kind, tmp_path, rows=PAIRS, **settings):
    trainer = start(kind, tmp_path, rows=rows, float64=True, optim="sgd", learning_rate=0.3, max_steps=2, shuffle_dataset=False, **settings)
    trainer.train()
    return weights_of(trainer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_is_the_same_for_every_split_and_accumulation(tmp_path, variant):
    kind, settings = VARIANTS[variant]
    rows = 12 if kind == "kto" else 6
    whole = trained(kind, tmp_path, per_device_train_batch_size=rows, **settings)
    cuts = [
        {"max_tokens_per_micro_batch": 1},
        {"max_tokens_per_micro_batch": 30, "per_device_train_batch_size": 2, "gradient_accumulation_steps": rows // 2},
    ]
    for cut in cuts:
        again = trained(kind, tmp_path, **{"per_device_train_batch_size": rows} | cut | settings)
        assert torch.allclose(again, whole, rtol=1e-7, atol=1e-9), cut


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "kto"])
def test_an_update_is_the_same_in_every_order(tmp_path, variant):
    """But for KTO, where a row's mismatched completion is that of its neighbour in the data."""
    kind, settings = VARIANTS[variant]
    batch = {"per_device_train_batch_size": 12 if kind == "kto" else 6}
    assert torch.allclose(
        trained(kind, tmp_path, rows=PAIRS[::-1], **batch, **settings), trained(kind, tmp_path, **batch, **settings), rtol=1e-7, atol=1e-9
    )


def test_a_model_that_takes_no_streams_gives_the_same_update(tmp_path, monkeypatch):
    from posttrain.models import forward

    streamed = trained("dpo", tmp_path)
    monkeypatch.setattr(forward, "stream_support", lambda model: "the test says so")
    assert torch.allclose(trained("dpo", tmp_path), streamed, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [("ab", [1, 0]), ("aab", [2, 2, 0]), ("abb", [1, 0, 0]), ("aba", [1, 2, 1]), ("aaa", [1, 2, 0]), ("aabba", [2, 2, 4, 4, 2])],
)
def test_a_mismatched_completion_comes_from_the_next_row_with_another_prompt(prompts, expected):
    assert following_of_another(list(prompts)) == expected
