"""Columns that the docs name for the chat template, `tools` and `chat_template_kwargs`, count wherever prompts are made: trainers, exams, environments,
reward models. And what text rewards are given."""

import pytest
from small import build_model
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from posttrain import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, RLOOConfig, RLOOTrainer
from posttrain.data.tokenizer import train_bpe
from posttrain.envs.chat import chat
from posttrain.errors import UserError
from posttrain.evaluate import answers
from posttrain.rewards import Rubric
from posttrain.trainers.online.reward_model import ModelReward
from posttrain.types import Sampling, Task

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASK = [{"role": "user", "content": "Paris?"}]
ROWS = [
    {"prompt": ASK, "tools": [TOOL], "chat_template_kwargs": {"mood": "brisk"}},
    {"prompt": ASK, "tools": None, "chat_template_kwargs": None},
    {"prompt": ASK, "tools": [TOOL], "chat_template_kwargs": None},
]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_bpe(["Paris? weather brisk slow user assistant"] * 3, 300)
    made.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + made.chat_template.replace(
        "assistant\\n' }}", "assistant\\n' + (mood or '') }}"
    )
    return made


def wanted(tokenizer, row, **keywords):
    """By the tokenizer alone."""
    keywords |= row["chat_template_kwargs"] or {}
    text = tokenizer.apply_chat_template(row["prompt"], tools=row["tools"], tokenize=False, add_generation_prompt=True, **keywords)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def make(trainer, config, tokenizer, tmp_path, rows=ROWS, reward=lambda completions, **_: [0.0] * len(completions), env=None, **settings):
    args = config(
        output_dir=str(tmp_path),
        use_cpu=True,
        save_strategy="no",
        max_completion_length=6,
        num_generations=2,
        per_device_train_batch_size=2,
        max_steps=1,
        **settings,
    )
    model = build_model(tokenizer, max_position_embeddings=512)
    return trainer(model, reward, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, **({} if env is None else {"env": env}))


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig), (PPOTrainer, PPOConfig)])
def test_a_rows_columns_go_to_the_template_before_the_trainers_keywords(tmp_path, tokenizer, trainer, config):
    made = make(trainer, config, tokenizer, tmp_path, chat_template_kwargs={"mood": "slow"})
    expected = [wanted(tokenizer, row, mood="slow") for row in ROWS]
    assert made.prompt_ids == made.eval_prompt_ids[""] == expected
    assert len({tuple(ids) for ids in expected}) == 3


def test_an_exam_reads_them_too(tokenizer):
    tasks = [Task(number, ASK, {name: row[name] for name in ("tools", "chat_template_kwargs")}) for number, row in enumerate(ROWS)]
    model = build_model(tokenizer, max_position_embeddings=512).eval()
    groups = answers(model, tokenizer, tasks, Rubric(lambda completion: 0.0), Sampling(max_new_tokens=1), mood="slow")
    assert [group.completions[0].prompt_ids for group in groups] == [wanted(tokenizer, row, mood="slow") for row in ROWS]


def test_an_environment_reads_them_at_every_turn(tmp_path, tokenizer):
    said = chat(lambda messages: "slow" if len(messages) < 3 else None)
    made = make(GRPOTrainer, GRPOConfig, tokenizer, tmp_path, env=said, chat_template_kwargs={"mood": "slow"})
    assert made.prompt_ids == [wanted(tokenizer, row, mood="slow") for row in ROWS]
    for task, mood in zip(made.train_dataset, ("brisk", "slow", "slow"), strict=True):
        turn = [tokenizer.eos_token_id]
        assert tokenizer.decode(made.stage.chat_of(task).between(turn, ASK)).endswith(f"Paris?<|im_end|>\n<|im_start|>assistant\n{mood}")


def test_a_reward_model_reads_them_as_its_training_did(tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    reward = ModelReward(Qwen3ForSequenceClassification(config), tokenizer)
    reply = [*tokenizer("slow", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    asked = [ASK] * 3
    found = reward(
        asked, [[{"role": "assistant", "content": "slow"}]] * 3, [reply] * 3, [r["tools"] for r in ROWS], [r["chat_template_kwargs"] for r in ROWS]
    )
    import torch

    for row, score in zip(ROWS, found, strict=True):
        ids = torch.tensor([[*wanted(tokenizer, row), *reply]])
        assert score == pytest.approx(float(reward.model(ids).logits[0, 0].detach()), abs=1e-5)


def test_columns_that_no_template_can_take_are_refused_by_row(tmp_path, tokenizer):
    plain = {"prompt": "Paris?", "tools": None}
    for rows, words in (
        ([plain, {"prompt": "Paris?", "tools": [TOOL]}], "row 1 has `tools`, but its texts are no messages"),
        ([{"prompt": ASK, "chat_template_kwargs": "slow"}], "row 0: its chat_template_kwargs are not valid JSON"),
        ([{"prompt": ASK, "tools": [{"type": "function"}]}], "row 0: its tool .* has no name"),
    ):
        with pytest.raises(UserError, match=words):
            make(GRPOTrainer, GRPOConfig, tokenizer, tmp_path, rows=rows)


@pytest.mark.parametrize("skips", [True, False])
def test_rewards_read_special_tokens_if_they_are_wanted(tmp_path, tokenizer, skips):
    read = []

    def reward(completions, completion_ids, **_):
        read.extend(zip((c[-1]["content"] for c in completions), completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    made = make(GRPOTrainer, GRPOConfig, tokenizer, tmp_path, reward=reward, skip_special_tokens=skips, generation_kwargs={"stop_token_ids": [65]})
    made.train()
    assert read
    for text, ids in read:
        assert text == tokenizer.decode(ids, skip_special_tokens=skips)
