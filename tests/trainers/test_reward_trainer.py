"""The reward trainer: what it learns, what it saves, what it does with long pairs, and what does not change its update."""

import random

import pytest
import torch
from small import build_float64_model, build_model, weights_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain import RewardConfig, RewardTrainer, UserError
from posttrain.trainers.reward import fit


def pairs(count, seed=0):
    """The right sum, and one that is too large."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = rng.randrange(10), rng.randrange(10)
        rows.append({"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + rng.randrange(1, 5))})
    return rows


@pytest.fixture
def make(tmp_path, tokenizer):
    def build(model=None, rows=None, eval_rows=None, peft_config=None, **settings):
        base = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "max_steps": 3,
            "save_strategy": "no",
            "use_cpu": True,
            "seed": 3,
        }
        return RewardTrainer(
            build_model(tokenizer) if model is None else model,
            RewardConfig(**base | settings),
            pairs(24) if rows is None else rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return build


def test_accuracy_on_held_out_pairs_rises(make):
    trainer = make(rows=pairs(400), eval_rows=pairs(60, seed=1), per_device_train_batch_size=32, max_steps=80, learning_rate=3e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.7
    assert after["eval_accuracy"] > 0.9
    assert after["eval_loss"] < before["eval_loss"] / 2
    assert {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens"} <= trainer.state.log_history[2].keys()


def test_the_loss_is_that_of_plain_rows_in_float64(make, tokenizer):
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(pairs(5))]
    trainer = make(model=build_float64_model(tokenizer), rows=rows, center_rewards_coefficient=0.01)
    batch = next(trainer.batches(trainer.train_dataset, trainer.train_dataset))
    trainer.model.zero_grad()
    found = trainer.loss(trainer.model, batch)
    found.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    trainer.model.config.pad_token_id = None
    expected = 0.0
    for row in rows:
        chosen, rejected = (
            trainer.model(input_ids=torch.tensor([tokenizer(row["prompt"])["input_ids"] + tokenizer(row[name])["input_ids"] + [0]])).logits[0, 0]
            for name in ("chosen", "rejected")
        )
        expected = expected + torch.log1p(torch.exp(-(chosen - rejected - row["margin"]))) + 0.01 * (chosen + rejected) ** 2
    (expected / 5).backward()
    assert found.item() == pytest.approx(expected.item() / 5, rel=1e-9)
    assert torch.allclose(gradient, torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), atol=1e-10)


def test_an_update_does_not_depend_on_how_it_is_cut(make, tokenizer):
    def run(**settings):
        trainer = make(model=build_float64_model(tokenizer), optim="sgd", lr_scheduler_type="constant", learning_rate=0.5, **settings)
        trainer.train()
        return weights_of(trainer)

    whole = run()
    assert torch.allclose(run(max_tokens_per_micro_batch=1), whole, rtol=1e-9, atol=1e-11)
    assert torch.allclose(run(max_tokens_per_micro_batch=30), whole, rtol=1e-9, atol=1e-11)
    assert torch.allclose(run(per_device_train_batch_size=2, gradient_accumulation_steps=4), whole, rtol=1e-9, atol=1e-11)


def test_what_is_saved_scores_the_same_in_plain_transformers(make, tokenizer, tmp_path):
    trainer = make(learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for row, scores in zip(pairs(5), trainer.score(pairs(5)), strict=True):
        for name, score in zip(("chosen", "rejected"), scores, strict=True):
            ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] + tokenizer(row[name])["input_ids"] + [tokenizer.eos_token_id]])
            assert plain(input_ids=ids).logits.item() == pytest.approx(score, abs=1e-5)


def test_with_another_padding_token_batches_score_the_same(make, tokenizer, tmp_path):
    tokenizer.add_special_tokens({"unk_token": "="})  # any token that ends no completion
    trainer = make()
    trainer.save_model(str(tmp_path / "model"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert plain.config.pad_token_id == tokenizer.convert_tokens_to_ids("=")
    rows = [[1, 2, 0], [1, 2, 3, 4, 0]]
    alone = [plain(input_ids=torch.tensor([row])).logits.item() for row in rows]
    padded = torch.tensor([[*rows[0], plain.config.pad_token_id, plain.config.pad_token_id], rows[1]])
    together = plain(input_ids=padded, attention_mask=(padded != plain.config.pad_token_id).long()).logits[:, 0].tolist()
    assert together == pytest.approx(alone, abs=1e-5)


def test_lora_trains_the_adapter_and_the_whole_head(make, tokenizer, tmp_path):
    from peft import AutoPeftModelForSequenceClassification, LoraConfig

    build_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make(model=str(tmp_path / "base"), peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), learning_rate=1e-2)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trainable)
    assert all("lora_" in name or "score" in name for name in trainable)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1).eval()
    loaded.config.pad_token_id = AutoTokenizer.from_pretrained(tmp_path / "adapter").pad_token_id  # an adapter does not carry the config
    row, (score, _) = pairs(1)[0], trainer.score(pairs(1))[0]
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] + tokenizer(row["chosen"])["input_ids"] + [0]])
    assert loaded(input_ids=ids).logits.item() == pytest.approx(score, abs=1e-5)


def test_a_resumed_run_ends_in_the_same_bits(make, tokenizer, tmp_path):
    whole = make(max_steps=4, save_steps=2, save_strategy="steps", output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make(max_steps=4, save_steps=2, save_strategy="steps", output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize(
    ("lengths", "limit", "kept"),
    [
        ((3, 4, 5), 10, (3, 4, 5)),
        ((3, 4, 9), 10, (3, 4, 7)),  # completions lose their end
        ((9, 4, 2), 10, (6, 4, 2)),  # then the prompt its beginning
        ((9, 8, 2), 10, (5, 5, 2)),
        ((1, 50, 60), 4, (1, 3, 3)),
        ((50, 1, 1), 2, (1, 1, 1)),
    ],
)
def test_long_pairs_are_cut_by_the_rule(lengths, limit, kept):
    prompt, chosen, rejected = (list(range(length)) for length in lengths)
    cut = fit(prompt, chosen, rejected, limit)
    assert tuple(map(len, cut)) == kept
    assert cut[0] == prompt[len(prompt) - kept[0] :]
    assert cut[1:] == (chosen[: kept[1]], rejected[: kept[2]])
    assert kept[0] + max(kept[1:]) <= limit


def test_no_pair_is_dropped_for_its_length(make, caplog):
    rows = [*pairs(8), {"prompt": "1+1=" * 9, "chosen": "2" * 20, "rejected": "3"}]
    trainer = make(rows=rows, max_length=16)
    assert len(trainer.train_dataset) == 9
    assert max(len(e.prompt_ids) + max(map(len, e.completions)) for e in trainer.train_dataset) == 16
    assert "1 of 9 pairs are longer than max_length=16 tokens and were cut" in caplog.text


def test_an_implicit_prompt_is_found(make):
    trainer = make(rows=[{"chosen": "1+1=2", "rejected": "1+1=3"}] * 8)
    assert len(trainer.train_dataset[0].prompt_ids) >= 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "2"}, "are the same within max_length=1024, so there is nothing to prefer"),
        ({"prompt": "1+1=", "chosen": "2"}, "a reward model needs rows with the columns"),
        ({"prompt": "1+1=", "chosen": "2", "rejected": ""}, "its rejected is empty"),
        ({"prompt": "1+1=", "chosen": "2", "rejected": [{"role": "assistant", "content": "3"}]}, "use one kind for both"),
        ({"chosen": "2", "rejected": "3"}, "begin differently, so they have no prompt in common"),
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": "big"}, "a margin is a number"),
    ],
)
def test_bad_rows_are_explained(make, row, said):
    with pytest.raises(UserError, match=said):
        make(rows=[row])


@pytest.mark.parametrize("name", ["chat_template_path", "eos_token"])
def test_names_of_trl_that_would_do_something_else_are_refused(name):
    with pytest.raises(UserError, match=name):
        RewardConfig(**{name: 7})


@pytest.mark.parametrize("name", ["dataset_num_proc", "pad_to_multiple_of"])
def test_names_of_trl_that_have_nothing_to_set_are_accepted_with_a_line(name, caplog):
    assert getattr(RewardConfig(output_dir="x", use_cpu=True, **{name: 7}), name) == 7
    assert len(caplog.messages) == 1
    assert f"{name}=7" in caplog.messages[0]


def test_names_of_trl_are_settings(tmp_path):
    RewardConfig(output_dir=str(tmp_path), learning_rate=1e-4, disable_dropout=True, max_length=512, center_rewards_coefficient=0.01, use_cpu=True)
