"""Rows that can teach nothing are counted, said and left out; where all are such, it is an error. And what messages say about being trained."""

import copy
import logging

import pytest
from small import build_model, build_tokenizer
from small_preferences import PAIRS, start

from posttrain import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from posttrain.data.tokenizer import train_bpe
from posttrain.errors import UserError

EQUAL = {"prompt": "1+1=", "chosen": "2", "rejected": "2"}
EQUAL_WHEN_CUT = {"prompt": "1+1=", "chosen": "22222222221", "rejected": "22222222222"}


ASK = {"role": "user", "content": "two and two?"}
FOUR, FIVE = ({"role": "assistant", "content": said} for said in ("four", "five"))


def of_pairs(trainer, tmp_path, tokenizer, rows):
    config = {DPOTrainer: DPOConfig, RewardTrainer: RewardConfig}[trainer]
    args = config(output_dir=str(tmp_path), use_cpu=True, save_strategy="no")
    return trainer(build_model(tokenizer, max_position_embeddings=256), args=args, train_dataset=rows, processing_class=copy.copy(tokenizer))


def make(kind, tmp_path, rows, **settings):
    if kind != "reward":
        return start(kind, tmp_path, rows=rows, max_length=12, **settings)
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", max_length=12, **settings)
    return RewardTrainer(build_model(build_tokenizer()), args, rows, processing_class=build_tokenizer())


@pytest.mark.parametrize("row", [EQUAL, EQUAL_WHEN_CUT])
@pytest.mark.parametrize("kind", ["dpo", "orpo", "cpo", "reward"])
def test_pairs_that_are_all_equal_are_an_error(tmp_path, kind, row):
    with pytest.raises(UserError, match="in every pair `chosen` and `rejected` are the same within max_length=12"):
        make(kind, tmp_path, [row] * 3)


@pytest.mark.parametrize(("kind", "settings"), [("dpo", {}), ("reward", {}), ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0})])
def test_equal_pairs_are_left_out_and_counted(tmp_path, caplog, kind, settings):
    with caplog.at_level(logging.WARNING, "posttrain"):
        trainer = make(kind, tmp_path, [PAIRS[0], EQUAL, EQUAL_WHEN_CUT, PAIRS[1]], **settings)
    assert "in 2 of 4 pairs" in caplog.text
    assert "left out (the first is row 1)" in caplog.text
    assert len(trainer.train_dataset) == 2
    assert all(pair.completions[0] != pair.completions[1] for pair in trainer.train_dataset)


def test_an_equal_pair_of_conversations_without_a_prompt_is_counted_too(tmp_path, chatter, caplog):
    rows = [{"chosen": [ASK, FOUR], "rejected": [ASK, other]} for other in (FIVE, FOUR)]
    for trainer in (DPOTrainer, RewardTrainer):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "posttrain"):
            made = of_pairs(trainer, tmp_path, chatter, rows)
        assert "in 1 of 2 pairs `chosen` and `rejected` are the same" in caplog.text
        assert len(made.train_dataset) == 1


def test_a_prompt_of_text_stands_for_all_turns_that_a_pair_shares(tmp_path, chatter):
    talk = [ASK, FIVE, {"role": "user", "content": "no"}]
    for prompt in ("two and two?", "no"):
        row = {"prompt": prompt, "chosen": [*talk, FOUR], "rejected": [*talk, FIVE]}
        example = of_pairs(DPOTrainer, tmp_path, chatter, [row]).train_dataset[0]
        assert chatter.decode(example.prompt_ids) == chatter.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert [chatter.decode(ids) for ids in example.completions] == ["four<|im_end|>", "five<|im_end|>"]


@pytest.mark.parametrize(("kind", "settings"), [("orpo", {}), ("dpo", {"loss_type": ["sigmoid", "sft"]})])
def test_equal_pairs_stay_where_the_chosen_one_is_imitated(tmp_path, caplog, kind, settings):
    with caplog.at_level(logging.WARNING, "posttrain"):
        trainer = make(kind, tmp_path, [PAIRS[0], EQUAL], **settings)
    assert "in 1 of 2 pairs" in caplog.text
    assert len(trainer.train_dataset) == 2


def test_a_reward_model_scores_every_pair(tmp_path):
    trainer = make("reward", tmp_path, PAIRS[:2])
    (first, second), _ = trainer.score([EQUAL, PAIRS[0]])
    assert first == second


def test_completions_called_good_and_bad_are_counted(tmp_path, caplog):
    both = [{"prompt": "1=", "completion": "1", "label": label} for label in (True, False)]
    with pytest.raises(UserError, match="all completions are called good and bad, both"):
        start("kto", tmp_path, rows=both)
    with pytest.raises(UserError, match="all completions have weight 0"):
        start("kto", tmp_path, rows=[{"prompt": f"{n}=", "completion": "1", "label": True} for n in range(3)], desirable_weight=0.0)
    with caplog.at_level(logging.WARNING, "posttrain"):
        start("kto", tmp_path, rows=[*both, {"prompt": "2=", "completion": "2", "label": True}])
    assert "2 of 3 completions are called good and bad" in caplog.text


@pytest.fixture(scope="module")
def chatter():
    return train_bpe(["what is two and two? four five no user assistant"] * 3, 300)


def sft(tmp_path, chatter, rows, **settings):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", **settings)
    return SFTTrainer(build_model(chatter, max_position_embeddings=256), args, train_dataset=rows, processing_class=chatter)


def trained(trainer, place=0):
    example = trainer.examples[place]
    return trainer.tokenizer.decode([id for id, on in zip(example.ids, example.trained, strict=True) if on])


TALK = [
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "five", "weight": 0},
    {"role": "user", "content": "no"},
    {"role": "assistant", "content": "four", "weight": 1},
]


def test_a_reply_of_weight_0_is_read_only(tmp_path, chatter):
    assert trained(sft(tmp_path, chatter, [{"messages": TALK}], assistant_only_loss=True)) == "four<|im_end|>"
    whole = trained(sft(tmp_path, chatter, [{"messages": TALK}]))
    assert "five" not in whole
    assert "two and two?" in whole
    assert "four<|im_end|>" in whole
    rest = trained(sft(tmp_path, chatter, [{"prompt": TALK[:1], "completion": TALK[1:]}]))
    assert rest == "four<|im_end|>"


def test_weights_that_mean_nothing_here_are_sentences(tmp_path, chatter):
    user = [{**TALK[0], "weight": 0}, *TALK[1:]]
    assert trained(sft(tmp_path, chatter, [{"messages": user}], assistant_only_loss=True)) == "four<|im_end|>"
    for messages, words in (
        (user, "row 0: a message that is not the assistant's has weight 0; set assistant_only_loss=True"),
        ([TALK[0], {**TALK[1], "weight": 0.5}], r"row 0: the weight of a message in 'messages' is 0.5; it is 1 .trained. or 0"),
        (
            [TALK[0], {"role": "assistant", "content": "five", "train": False}],
            "row 0: a message of 'messages' has the key 'train', which is not read",
        ),
    ):
        with pytest.raises(UserError, match=words):
            sft(tmp_path, chatter, [{"messages": messages}])


def test_rows_without_a_trained_token_are_left_out_and_counted(tmp_path, chatter, caplog):
    silent = {"messages": TALK[:2]}
    with pytest.raises(UserError, match="no row can teach anything; the first: row 0: every reply has weight 0"):
        sft(tmp_path, chatter, [silent, silent], assistant_only_loss=True)
    with caplog.at_level(logging.WARNING, "posttrain"):
        trainer = sft(tmp_path, chatter, [silent, {"messages": TALK}], assistant_only_loss=True)
    assert "1 of 2 rows can teach nothing and are left out; the first: row 0" in caplog.text
    assert [example.number for example in trainer.examples] == [1]


def test_a_stream_without_a_trained_token_ends(tmp_path, chatter):
    class Stream:
        def __iter__(self):
            return iter([{"messages": TALK[:2]}] * 3)

    with pytest.raises(UserError, match="no row of the stream can teach anything"):
        sft(tmp_path, chatter, Stream(), assistant_only_loss=True, max_steps=2).train()


def test_a_prompt_that_a_completion_repeats_is_its_prompt(tmp_path, chatter):
    ask, good, bad = TALK[0], {"role": "assistant", "content": "four"}, {"role": "assistant", "content": "five"}
    plain = {"prompt": [ask], "chosen": [good], "rejected": [bad]}
    for row in (
        plain,
        {**plain, "chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": "two and two?", "chosen": [ask, good], "rejected": [ask, bad]},
    ):
        model = build_model(chatter, max_position_embeddings=256)
        trainer = DPOTrainer(model, args=DPOConfig(output_dir=str(tmp_path), use_cpu=True), train_dataset=[row], processing_class=copy.copy(chatter))
        example = trainer.train_dataset[0]
        assert chatter.decode(example.prompt_ids) == "<|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\n"
        assert [chatter.decode(ids) for ids in example.completions] == ["four<|im_end|>", "five<|im_end|>"]


def test_a_user_who_speaks_in_a_completion_is_refused_by_row(tmp_path, chatter):
    rows = [{"prompt": TALK[:1], "chosen": [{"role": "assistant", "content": "four"}], "rejected": TALK[3:] + TALK[2:]}]
    with pytest.raises(UserError, match="row 0: its rejected holds a message of 'user', which would be trained as if the assistant wrote it"):
        DPOTrainer(
            build_model(chatter, max_position_embeddings=256),
            args=DPOConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=rows,
            processing_class=chatter,
        )


def test_half_a_character_is_refused_by_its_row(tmp_path, chatter):
    with pytest.raises(UserError, match="row 1: text holds half a character"):
        sft(tmp_path, chatter, [{"text": "four"}, {"text": "a \ud83d b"}])
