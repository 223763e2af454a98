import pytest
from small import many_ones

from posttrain import GRPOConfig, GRPOTrainer, Rubric, reward


def test_evaluation_during_training_is_logged_and_picks_the_best_checkpoint(make_model, tokenizer, rows, tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        num_generations_eval=2,
        max_completion_length=6,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="reward",
        greater_is_better=True,
        learning_rate=1e-2,
        use_cpu=True,
    )
    trainer = GRPOTrainer(make_model(), many_ones, config, rows, eval_dataset=rows[:6], processing_class=tokenizer)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(evaluations) == 2
    assert trainer.state.best_metric == max(log["eval_reward"] for log in evaluations)
    assert {"eval_rewards/many_ones/mean", "eval_completions/mean_length", "eval_frac_reward_zero_std"} <= evaluations[0].keys()


def test_evaluation_does_not_change_training(make_trainer, rows):
    def train(**settings):
        trainer = make_trainer(max_steps=4, trainer_kwargs={"eval_dataset": rows[:4]}, **settings)
        trainer.train()
        return [log["reward"] for log in trainer.state.log_history if "reward" in log]

    assert train(eval_strategy="steps", eval_steps=1) == train()


def test_named_evaluation_sets_have_their_own_metrics(make_trainer, rows):
    trainer = make_trainer(trainer_kwargs={"eval_dataset": {"easy": rows[:2], "hard": rows[2:4]}})
    assert {"eval_easy_reward", "eval_hard_reward"} <= trainer.evaluate().keys()


def test_weights_and_parts_of_a_rubric_are_logged_unweighted(make_trainer):
    @reward
    def short(completion):
        return 1.0

    @reward
    def wrong(completion):
        return -0.5

    trainer = make_trainer(reward=Rubric(short, wrong), reward_weights=[2.0, 1.0], max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["rewards/short/mean"], log["rewards/wrong/mean"]) == (1.0, -0.5)
    assert log["reward"] == pytest.approx(1.5)


def test_a_script_for_text_prompts_runs_unchanged(make_model, tokenizer, rows, tmp_path):
    from datasets import Dataset

    def reward_len(completions, **kwargs):
        return [-abs(4 - len(completion)) for completion in completions]

    dataset = Dataset.from_list(rows)
    training_args = GRPOConfig(
        output_dir=str(tmp_path), num_generations=4, max_completion_length=5, max_steps=2, use_cpu=True, report_to="none", bf16=False
    )
    trainer = GRPOTrainer(
        model=make_model(), reward_funcs=[reward_len], args=training_args, train_dataset=dataset, processing_class=tokenizer, callbacks=None
    )
    trainer.train()
    assert "rewards/reward_len/mean" in trainer.state.log_history[0]
