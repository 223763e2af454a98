"""PPO: its loss against loops over completions, what it learns, how its values are kept, and what does not change its update."""

import math

import pytest
import torch
from small import build_float64_model, build_model, many_ones, weights_of
from transformers import AutoModelForCausalLM

from posttrain import ModelReward, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, Rubric, UserError
from posttrain.models.heads import reward_model


@pytest.fixture
def make(tmp_path, tokenizer, rows):
    def build(model=None, reward=many_ones, data=None, trainer_kwargs=None, **settings):
        base = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "max_completion_length": 6,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "temperature": 1.0,
            "use_cpu": True,
            "seed": 3,
        }
        return PPOTrainer(
            build_model(tokenizer) if model is None else model,
            reward,
            PPOConfig(**base | settings),
            rows if data is None else data,
            processing_class=tokenizer,
            **(trainer_kwargs or {}),
        )

    return build


def test_the_reward_rises(make):
    trainer = make(per_device_train_batch_size=32, num_mini_batches=1, max_steps=50, learning_rate=3e-3, vf_coef=0.5, bootstrap_truncated=False)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5
    log = trainer.state.log_history[0]
    assert {
        "policy_loss",
        "value_loss",
        "value/explained_variance",
        "kl",
        "ratio",
        "objective/rlhf_reward",
        "objective/non_score_reward",
    } <= log.keys()


def test_values_learn_what_a_prompt_is_worth(make, tokenizer):
    """The reward is known from the prompt alone, and the policy cannot change it: values explain nearly all of it."""

    def first_digit(prompts, completions):
        return [float(prompt[0]) / 4 for prompt in prompts]

    trainer = make(reward=first_digit, per_device_train_batch_size=32, num_mini_batches=1, max_steps=90, learning_rate=3e-3, vf_coef=1.0, kl_coef=0.0,
                   num_ppo_epochs=2, cliprange_value=1.0, bootstrap_truncated=False)  # fmt: skip
    trainer.train()
    explained = [log["value/explained_variance"] for log in trainer.state.log_history if "value/explained_variance" in log]
    assert explained[0] < 0.1
    assert sum(explained[-3:]) / 3 > 0.8


def naive_update(trainer, completions):
    """Advantages, returns and the loss of a whole rollout from one plain forward a completion: loops over tokens, Python floats, no streams."""
    args, model, head, reference = trainer.args, trainer.model, trainer.values, trainer.reference.frozen
    tokens = []  # [logp, old logp, value, old value, reference]
    credit = []
    for completion in completions:
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        P, R = len(completion.prompt_ids), len(completion.token_ids)
        hidden = model.transformer(input_ids=ids).last_hidden_state[0]
        logps = [(model.lm_head(hidden[P - 1 + t]) / args.temperature).log_softmax(-1)[completion.token_ids[t]] for t in range(R)]
        values = [(hidden[P - 1 + t] @ head.linear.weight[0]) + head.linear.bias[0] for t in range(R + 1)]
        ref = [(reference(input_ids=ids).logits[0, P - 1 + t] / args.temperature).log_softmax(-1)[completion.token_ids[t]].item() for t in range(R)]
        rewards = [-args.kl_coef * (math.exp(ref[t] - logps[t].item()) - 1 - (ref[t] - logps[t].item())) for t in range(R)]
        rewards[-1] += completion.reward - (args.missing_eos_penalty if completion.is_truncated else 0.0)
        after = [v.item() for v in values[1:R]] + [values[R].item() if completion.is_truncated else 0.0]
        deltas = [rewards[t] + args.gamma * after[t] - values[t].item() for t in range(R)]
        advantages = [sum((args.gamma * args.lam) ** (k - t) * deltas[k] for k in range(t, R)) for t in range(R)]
        credit += advantages
        tokens += [(logps[t], values[t], advantages[t], advantages[t] + values[t].item()) for t in range(R)]
    mean = sum(credit) / len(credit)
    deviation = (sum((a - mean) ** 2 for a in credit) / (len(credit) - 1) + 1e-8) ** 0.5
    loss = 0.0
    for logp, value, advantage, target in tokens:
        ratio = (logp - logp.detach()).exp()
        loss = loss - ratio * (advantage - mean) / deviation + args.vf_coef * 0.5 * (value - target) ** 2  # nothing is clipped at the start
    return loss / len(tokens)


def test_the_first_update_is_that_of_plain_loops(make, tokenizer):
    """Loss and gradient, of policy and value head, in float64; with both kinds of ends, k3, discount, penalty."""
    model = build_float64_model(tokenizer)
    trainer = make(model=model, num_mini_batches=1, num_ppo_epochs=1, kl_coef=0.3, kl_estimator="k3", gamma=0.9, lam=0.8, vf_coef=0.7,
                   missing_eos_penalty=0.25, per_device_train_batch_size=16, temperature=0.8)  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainer.reference.frozen.parameters():
            p.add_(0.05 * torch.randn_like(p))
        trainer.values.linear.weight.copy_(0.3 * torch.randn_like(trainer.values.linear.weight))
    groups = trainer.collect(trainer.train_dataset[:16])
    completions = [completion for _, group in groups for completion in group.completions]
    assert {completion.is_truncated for completion in completions} == {True, False}
    trainer.buffer = trainer.learn_from(groups)
    batches = trainer.batches([trainer.buffer.next_slice()])
    trainer.model.zero_grad()
    found = sum(trainer.loss(trainer.model, batch) for batch in batches)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    expected = naive_update(trainer, completions)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-8)
    for name, p in trainer.model.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=1e-8), name


@pytest.mark.parametrize("separate", [False, True], ids=["shared-backbone", "model-of-its-own"])
def test_an_update_does_not_depend_on_how_it_is_cut(make, tokenizer, separate):
    def run(**settings):
        kwargs = {"value_model": build_float64_model(tokenizer, seed=7)} if separate else {}
        trainer = make(model=build_float64_model(tokenizer), optim="sgd", lr_scheduler_type="constant", learning_rate=0.3, vf_coef=0.5,
                       trainer_kwargs=kwargs, **settings)  # fmt: skip
        trainer.train()
        return torch.cat([weights_of(trainer), *(p.detach().flatten() for p in trainer.values.parameters())])

    whole = run()
    for budget in (1, 25):
        assert torch.allclose(run(max_tokens_per_micro_batch=budget), whole, rtol=1e-9, atol=1e-11)
    assert torch.allclose(run(per_device_train_batch_size=2, gradient_accumulation_steps=4), whole, rtol=1e-9, atol=1e-11)


def test_a_rollout_is_trained_on_as_often_as_said(make):
    trainer = make(num_ppo_epochs=3, num_mini_batches=2, max_steps=12)
    trainer.train()
    assert trainer.args.updates_per_rollout == 6
    fresh = [log["step"] for log in trainer.state.log_history if "reward" in log]
    assert fresh == [1, 7]
    ratios = [log["clip_ratio/region_mean"] for log in trainer.state.log_history if "clip_ratio/region_mean" in log]
    assert ratios[0] == 0.0


def test_a_shared_backbone_runs_once_for_policy_and_values(make):
    trainer = make(num_ppo_epochs=1, num_mini_batches=1, kl_coef=0.0, max_steps=1)
    trained = []
    trainer.model.model.layers[0].register_forward_hook(lambda module, *rest: trained.append(1) if torch.is_grad_enabled() else None)
    trainer.train()
    assert len(trained) == 1


def test_what_is_saved_is_a_plain_language_model(make, tmp_path, tokenizer):
    trainer = make()
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert trainer.model.value_head is trainer.values


def test_an_unscored_completion_teaches_nothing(make):
    trainer = make(reward=lambda completions, **kwargs: [None] * len(completions), weight_decay=0.0, max_steps=1)
    before = weights_of(trainer)
    trainer.train()
    assert torch.equal(weights_of(trainer), before)


def test_a_trained_reward_model_is_climbed(make, tokenizer, tmp_path):
    """Reward model from pairs that prefer the digit 1, then PPO against it: the digit becomes frequent."""
    rows = [{"prompt": f"{a}+{b}=", "chosen": "11" + str(c), "rejected": "7" + str(c)} for a in range(4) for b in range(4) for c in range(4)]
    judge = RewardTrainer(build_model(tokenizer, seed=5), RewardConfig(output_dir=str(tmp_path / "reward"), per_device_train_batch_size=16,
                          max_steps=20, learning_rate=3e-3, save_strategy="no", use_cpu=True), rows, processing_class=tokenizer)  # fmt: skip
    judge.train()
    judge.save_model(str(tmp_path / "reward" / "model"))
    trainer = make(reward=None, per_device_train_batch_size=32, num_mini_batches=1, max_steps=30, learning_rate=3e-3, bootstrap_truncated=False,
                   kl_coef=0.0, trainer_kwargs={"reward_model": str(tmp_path / "reward" / "model")})  # fmt: skip
    trainer.train()
    rewards = [log["rewards/model/mean"] for log in trainer.state.log_history if "rewards/model/mean" in log]
    assert sum(rewards[-3:]) > sum(rewards[:3])


def test_a_reward_model_scores_the_sampled_tokens(tokenizer):
    model = reward_model(build_model(tokenizer, seed=2)).eval()
    judge = ModelReward(model, tokenizer)
    prompts, ids = ["1+2=", "1+2=", "3="], [[4, 5, 0], [6, 7], [0]]
    texts = [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    model.config.pad_token_id = None
    expected = [model(input_ids=torch.tensor([tokenizer(p)["input_ids"] + i])).logits.item() for p, i in zip(prompts, ids, strict=True)]
    assert judge(prompts, texts, ids) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kl_estimator": "k2"}, "use 'k1' or 'k3'"),
        ({"lam": 1.5}, "lies between 0 and 1"),
        ({"num_ppo_epochs": 0}, "set it to 1 or more"),
        ({"num_iterations": 3}, "called num_ppo_epochs in PPO"),
        ({"steps_per_generation": 5}, "set num_mini_batches only"),
        ({"missing_eos_penalty": -1.0}, "give a positive number"),
        ({"zero_signal_groups": "drop"}, "leave it at 'keep'"),
        ({"kl_coef": 0.0, "sync_ref_model": True}, "kl_coef=0.0 uses none"),
        ({"response_length": 53}, "max_completion_length"),
        ({"total_episodes": 1000}, "max_steps"),
        ({"stop_token": "eos"}, "end-of-sequence"),
        ({"cliprang": 0.1}, "Did you mean 'cliprange'"),
    ],
)
def test_bad_settings_are_explained(make, settings, said):
    with pytest.raises(UserError, match=said):
        make(**settings)


def test_bad_arguments_are_explained(make, tokenizer):
    model = reward_model(build_model(tokenizer))
    for kwargs, said in [
        ({"ref_model": model}, "leave it out"),
        ({"value_model": model, "reward_model": model}, "would be trained away"),
        ({"reward_model": build_model(tokenizer)}, "has no trained score"),
    ]:
        with pytest.raises(UserError, match=said):
            make(trainer_kwargs=kwargs)
    with pytest.raises(UserError, match="put the model into the rubric"):
        make(reward=Rubric(many_ones), trainer_kwargs={"reward_model": model})
    with pytest.raises(UserError, match="reward_funcs is empty"):
        make(reward=None)


def test_names_of_trl_are_settings(tmp_path):
    PPOConfig(output_dir=str(tmp_path), learning_rate=3e-6, num_mini_batches=1, num_ppo_epochs=4, temperature=0.7, kl_coef=0.05, kl_estimator="k1",
              cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, gamma=1.0, lam=0.95, whiten_rewards=True, missing_eos_penalty=1.0, use_cpu=True,
              local_rollout_forward_batch_size=64, num_sample_generations=10)  # fmt: skip


def test_lora_trains_the_adapter_and_the_value_head_and_resumes(make, tokenizer, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig

    build_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}

    def lora_trainer():
        torch.manual_seed(0)  # where adapters start is drawn
        return make(model=str(tmp_path / "base"), trainer_kwargs={"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}, **settings)

    whole = lora_trainer()
    trainable = [name for name, p in whole.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "value_head" in name for name in trainable)
    assert any("value_head" in name for name in trainable)
    whole.train()
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    resumed = lora_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))  # in the middle of a rollout
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_a_resumed_run_with_other_starting_values_is_refused(make, tmp_path, tokenizer):
    make(max_steps=2, save_steps=1, save_strategy="steps", trainer_kwargs={"value_model": build_model(tokenizer, seed=1)}).train()
    other = make(max_steps=2, save_steps=1, save_strategy="steps", trainer_kwargs={"value_model": build_model(tokenizer, seed=2)})
    with pytest.raises(UserError, match="value_weights"):
        other.train(resume_from_checkpoint=True)


def test_a_reference_that_follows_leaves_the_values_alone(make):
    trainer = make(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, max_steps=3)
    trainer.train()
    assert "value_head" not in dict(trainer.reference.frozen.named_children())
    assert trainer.model.value_head is trainer.values


def test_values_may_learn_faster_than_the_policy(make):
    trainer = make(value_learning_rate=0.5, learning_rate=1e-3, max_steps=1, lr_scheduler_type="constant")
    trainer.train()
    values = {id(p) for p in trainer.values.parameters()}
    groups = trainer.optimizer.param_groups
    assert {group["lr"] for group in groups if any(id(p) in values for p in group["params"])} == {0.5}
    assert {group["lr"] for group in groups if any(id(p) not in values for p in group["params"])} == {1e-3}
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))
