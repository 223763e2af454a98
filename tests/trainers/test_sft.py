"""Supervised fine-tuning end to end on a tiny model: its loss against plain float64 rows, and what must not change it."""

import functools

import pytest
import torch
from small import build_float64_model, build_model, build_tokenizer, weights_of

from posttrain import SFTConfig, SFTTrainer
from posttrain.errors import UserError

PAIRS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}" + "1" * (a % 3)} for a in range(6) for b in range(2)]
CHATML = (
    "{% for message in messages %}{{ message['role'] | replace('user', '+') | replace('assistant', '=') + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
)
CHATS = [
    {"messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, (f"{a}", "22", f"1{a}", "333"), strict=True)]}
    for a in range(6)
]
TEXTS = [{"text": f"{a}+{a}={2 * a}"} for a in range(8)]


@pytest.fixture
def make(tmp_path):
    def make(data, model=None, **settings):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = CHATML
        base = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2, "seed": 3, "max_steps": 2}
        own = {key: settings.pop(key) for key in ("eval_dataset", "formatting_func", "peft_config") if key in settings}
        config = SFTConfig(**base | {"per_device_train_batch_size": 4} | settings)
        return SFTTrainer(
            model if model is not None else build_float64_model(tokenizer), config, train_dataset=data, processing_class=tokenizer, **own
        )

    return make


def window_of(trainer, count=None):
    """The micro-batches of one update over the first examples, and the gradients and loss that they give."""
    return trainer.window([trainer.train_dataset[:count]])


def loss_and_gradients(trainer, units=None):
    """One update's loss and gradients, summed over its micro-batches."""
    trainer.model.zero_grad()
    total = 0.0
    for batch in trainer.window([units if units is not None else list(trainer.train_dataset)]):
        loss = trainer.loss(trainer.model, batch)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def reference(trainer, objective):
    """`objective(log-probs over the vocabulary (V,), target)` of every trained token in its own plain row, over their number."""
    trainer.model.zero_grad()
    total, count = 0.0, 0
    for example in trainer.examples:
        ids = torch.tensor(list(example.ids))
        table = trainer.model(input_ids=ids[None]).logits[0].log_softmax(-1)  # (S, V)
        for place in range(1, len(ids)):
            if example.trained[place]:
                total = total + objective(table[place - 1], ids[place])
                count += 1
    loss = total / count
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def nll(table, target):
    return -table[target]


def smoothed(table, target):
    return -(0.8 * table[target] + 0.2 * table.mean())


def dft(table, target):
    return -table[target].detach().exp() * table[target]


@pytest.mark.parametrize("data", [PAIRS, CHATS, TEXTS], ids=["pairs", "chats", "texts"])
@pytest.mark.parametrize(
    ("settings", "objective"),
    [({}, nll), ({"loss_type": "chunked_nll"}, nll), ({"label_smoothing_factor": 0.2}, smoothed), ({"loss_type": "dft"}, dft)],
    ids=["nll", "chunked", "smoothed", "dft"],
)
def test_loss_and_gradients_equal_a_plain_float64_reference(make, data, settings, objective):
    trainer = make(data, **settings)
    trainer.model.train()
    ours, our_gradients = loss_and_gradients(trainer)
    theirs, their_gradients = reference(trainer, objective)
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert torch.allclose(our_gradients, their_gradients, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"neftune_noise_alpha": 5.0}], ids=str)
@pytest.mark.parametrize(
    "change", [{"max_tokens_per_micro_batch": 8}, {"max_tokens_per_micro_batch": 23}, {"packing": True, "max_length": 32}], ids=str
)
def test_micro_batches_and_packing_do_not_change_the_update(make, settings, change):
    expected, expected_gradients = loss_and_gradients(make(PAIRS, **settings))
    loss, gradients = loss_and_gradients(make(PAIRS, **settings, **change))
    assert loss == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(gradients, expected_gradients, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"neftune_noise_alpha": 5.0}], ids=str)
def test_the_order_of_examples_does_not_change_the_update(make, settings):
    trainer = make(PAIRS, **settings)
    expected, expected_gradients = loss_and_gradients(trainer)
    loss, gradients = loss_and_gradients(trainer, list(trainer.train_dataset)[::-1])
    assert loss == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(gradients, expected_gradients, atol=1e-12)


def test_noise_changes_the_loss_of_training_and_not_of_evaluation(make):
    still, noisy = make(PAIRS, eval_dataset=PAIRS), make(PAIRS, eval_dataset=PAIRS, neftune_noise_alpha=10.0)
    assert loss_and_gradients(still)[0] != pytest.approx(loss_and_gradients(noisy)[0], abs=1e-6)
    assert still.evaluate()["eval_loss"] == noisy.evaluate()["eval_loss"]


def test_noise_has_the_size_of_the_paper(make):
    """Uniform in [-1, 1] times alpha / sqrt(L D): its standard deviation is alpha / sqrt(3 L D)."""
    from posttrain.data.stream import PackItem, pack
    from posttrain.models.embedding_noise import embedding_noise

    model = build_float64_model(build_tokenizer())
    stream = pack([PackItem([1] * 10, [[2] * 30], row_ids=[7]), PackItem([1] * 40, [[2] * 120], row_ids=[8])])
    embedding = model.get_input_embeddings()
    plain = embedding(stream.input_ids)
    with embedding_noise(model, stream, 5.0, (0,)):
        noise = embedding(stream.input_ids) - plain  # (S, D)
    for part, length in ((noise[:40], 40), (noise[40:], 160)):
        assert part.abs().max() <= 5.0 / (length * 32) ** 0.5
        assert part.std().item() == pytest.approx(5.0 / (3 * length * 32) ** 0.5, rel=0.1)
    assert torch.equal(embedding(stream.input_ids), plain)


def test_bins_are_what_a_batch_counts_with_packing(make):
    trainer = make(PAIRS, packing=True, max_length=16)
    sizes = [sum(len(example.ids) for example in one) for one in trainer.train_dataset]
    assert max(sizes) <= 16
    assert len(sizes) < len(PAIRS) / 1.5
    assert sorted(example.number for one in trainer.train_dataset for example in one) == list(range(len(PAIRS)))


def test_examples_that_are_too_long_are_cut_or_split(make):
    long = [{"text": "1+2=3" * 5}]  # 25 tokens and the end
    assert [len(example.ids) for example in make(long, max_length=10).examples] == [10]
    split = make(long, packing=True, packing_strategy="bfd_split", max_length=10)
    assert [len(example.ids) for one in split.train_dataset for example in one] == [10, 10, 6]
    assert sum(example.targets for one in split.train_dataset for example in one) == 26 - 3  # the first of each piece has nothing before it


def trained_text(trainer, number=0):
    example = trainer.examples[number]
    return trainer.tokenizer.decode([id for id, trained in zip(example.ids, example.trained, strict=True) if trained])


@pytest.mark.parametrize(
    ("data", "settings", "expected"),
    [
        (PAIRS, {}, "0<end>"),
        (PAIRS, {"completion_only_loss": False}, "+0=0<end>"),
        (TEXTS, {}, "+0=0<end>"),
        (CHATS, {}, "0<end>=22<end>+10<end>=333<end>"),
        (CHATS, {"assistant_only_loss": True}, "22<end>333<end>"),
        ([{"prompt": CHATS[0]["messages"][:3], "completion": CHATS[0]["messages"][3:]}], {}, "333<end>"),
        ([{"prompt": CHATS[0]["messages"][:3], "completion": CHATS[0]["messages"][3:]}], {"assistant_only_loss": True}, "333<end>"),
        ([{"prompt": CHATS[0]["messages"][:3], "completion": "333"}], {"assistant_only_loss": True, "completion_only_loss": False}, "22<end>333<end>"),
        ([{"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]}], {}, "22<end>333<end>"),  # what the user says is only read
        ([{"story": "1+1=2"}], {"dataset_text_field": "story"}, "+1=2<end>"),
        ([{"a": "1", "b": "2"}], {"formatting_func": lambda row: f"{row['a']}={row['b']}"}, "=2<end>"),
        ([{"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}], {"assistant_only_loss": True}, "2<end>"),
    ],
)  # fmt: skip
def test_what_is_trained(make, data, settings, expected):
    assert trained_text(make(data, **settings)) == expected


@pytest.mark.parametrize("data", [PAIRS, CHATS, TEXTS], ids=["pairs", "chats", "texts"])
def test_training_lowers_the_loss_and_raises_the_accuracy(make, data):
    trainer = make(data, build_model(build_tokenizer()), eval_dataset=data, max_steps=25)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] / 2
    assert after["eval_mean_token_accuracy"] > before["eval_mean_token_accuracy"] + 0.3


def test_several_evaluation_sets_are_named(make):
    logs = make(PAIRS, eval_dataset={"sums": PAIRS, "texts": TEXTS}).evaluate()
    assert set(logs) - {"epoch"} == {
        f"eval_{name}_{key}" for name in ("sums", "texts") for key in ("loss", "mean_token_accuracy", "entropy", "num_tokens")
    }


class Stream:
    def __iter__(self):
        return iter(PAIRS)


def test_a_stream_trains_as_a_list_does_in_the_same_order(make):
    tokenizer = build_tokenizer()
    settings = {"max_steps": 5, "shuffle_dataset": False}  # more than one reading of it
    listed, streamed = (make(data, build_model(tokenizer), **settings) for data in (PAIRS, Stream()))
    listed.train()
    streamed.train()
    assert torch.equal(weights_of(listed), weights_of(streamed))


def test_a_dataset_of_the_hub_library_is_taken_whole_or_as_a_stream(make):
    import datasets

    dataset = datasets.Dataset.from_list(PAIRS)
    tokenizer = build_tokenizer()
    whole, streamed = (make(data, build_model(tokenizer), shuffle_dataset=False) for data in (dataset, dataset.to_iterable_dataset()))
    whole.train()
    streamed.train()
    assert torch.equal(weights_of(whole), weights_of(streamed))


@pytest.mark.parametrize("data", [PAIRS, Stream()], ids=["list", "stream"])
def test_a_resumed_run_ends_with_the_same_weights(make, data):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "neftune_noise_alpha": 5.0}
    through = make(data, build_model(build_tokenizer()), **settings)
    through.train()
    resumed = make(data, build_model(build_tokenizer()), **settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-4")
    assert torch.equal(weights_of(through), weights_of(resumed))


LONG = "1+" * 40
BAD = [
    ([{"prompt": LONG, "completion": "1"}], {"max_length": 20}, "row 0: its prompt has 80 tokens, which leaves no room for its completion within max_length=20"),
    ([*PAIRS, {"prompt": "1", "completion": ""}], {}, "row 12: its completion is empty"),
    ([*PAIRS, {"prompt": "1", "completion": [{"role": "assistant", "content": "1"}]}], {}, "`prompt` holds text, `completion` holds messages"),
    ([{"text": "1"}, {"text": ["1"]}], {}, "column `text` holds"),
    ([{"id": 1, "text": "1"}, {"id": 1, "text": "2"}], {}, "row 1 has the id 1, which row 0 has too"),
    ([{"question": "1"}], {}, "SFT needs rows with the columns (prompt, completion) or (messages) or (text); the data has: question"),
    ([], {}, "the data are empty"),
    (None, {}, "SFT needs a train_dataset"),
    (iter(PAIRS), {}, "can be read only once"),
    (Stream(), {"max_steps": -1}, "give max_steps"),
    (Stream(), {"packing": True}, "a stream of rows does not allow"),
    (TEXTS, {"assistant_only_loss": True}, "assistant_only_loss needs conversations"),
    (CHATS, {"completion_only_loss": True}, "completion_only_loss needs rows with prompt and completion"),
    ([{"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "1"}]}], {"assistant_only_loss": True, "max_length": 20},
     "row 0: none of its tokens is trained within max_length=20 (it has 85)"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "settings", "sentence"), BAD)
def test_bad_data_are_an_error_before_training(make, data, settings, sentence):
    with pytest.raises(UserError) as raised:
        make(data, **settings)
    assert sentence in str(raised.value)


def test_a_template_without_an_end_is_refused(make):
    trainer = make(CHATS)
    trainer.tokenizer.chat_template = (
        "{% for message in messages %}{{ '+' + message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '+' }}{% endif %}"
    )
    for data in (CHATS, [{"prompt": CHATS[0]["messages"][:1], "completion": "2"}]):
        with pytest.raises(UserError, match="does not end a reply with a stop token"):
            SFTTrainer(trainer.model, trainer.args, train_dataset=data, processing_class=trainer.tokenizer)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss_type": "dtf"}, "Did you mean 'dft'"),
        ({"packing": True, "max_length": None}, "give max_length"),
        ({"packing_strategy": "wrapped"}, "they read each other"),
        ({"label_smoothing_factor": 0.1, "loss_type": "dft"}, "contradict each other"),
        ({"truncation_mode": "keep_end"}, "loses its end"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "always prepared here"),
        ({"activation_offloading": "yes"}, "use True, False or 'auto'"),
        ({"tile_rows": 0}, "1 or more, or 'auto'"),
        ({"adapter_dtype": "float16"}, "use 'float32' or 'bfloat16'"),
        ({"train_sampling_strategy": "sequential"}, "shuffle_dataset"),
        ({"max_lenght": 5}, "Did you mean 'max_length'"),
    ],
)
def test_settings_that_cannot_work_are_sentences(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        SFTConfig(**settings)


def test_defaults_of_trl_are_accepted_where_they_are_spelt_out():
    SFTConfig(
        dataset_num_proc=None, truncation_mode="keep_start", packing=False, packing_strategy="bfd", padding_free=False, eval_packing=None,
        completion_only_loss=None, assistant_only_loss=False, loss_type="nll", activation_offloading=False, dataset_text_field="text",
    )  # fmt: skip


def test_the_plan_says_what_is_trained_and_whether_it_ends(make):
    assert "12 examples, " in make(PAIRS).plan()
    assert "100% of the examples teach where to stop" in make(PAIRS).plan()
    assert " 0% of the examples teach where to stop" in make([{"text": "1+2=3" * 5}], max_length=10).plan()


def test_settings_that_have_nothing_to_set_are_accepted_with_a_line(caplog):
    SFTConfig(output_dir="x", use_cpu=True, dataset_num_proc=4, pad_to_multiple_of=8, eval_packing=True)
    lines = "\n".join(caplog.messages)
    assert [word in lines for word in ("tokenized in this process", "no padding", "packing does not change")] == [True] * 3
    assert len(caplog.messages) == 3


def test_other_constructor_arguments_are_refused_with_what_to_use():
    refused = {"data_collator": list, "compute_metrics": print}
    for name, value in refused.items():
        with pytest.raises(UserError, match=name):
            functools.partial(SFTTrainer, "model")(**{name: value})


def test_a_base_model_learns_a_reasoning_format_of_its_own(make, tmp_path):
    """No chat template before; afterwards every reply is opened for the model, and it writes the rest of the format."""
    from posttrain.data.tokenizer import train_bpe

    texts = [f"<start_working_out>{a} and {a}<end_working_out><SOLUTION>{2 * a}</SOLUTION>" for a in range(5)]
    tokenizer = train_bpe(texts, 300)
    tokenizer.chat_template = None
    rows = [{"prompt": [{"role": "user", "content": f"{a}+{a}"}], "completion": text} for a, text in enumerate(texts)]
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, save_strategy="no", max_steps=100, learning_rate=1e-2, per_device_train_batch_size=5, max_length=256, lr_scheduler_type="constant",
        chat_template_path="plain", reply_opening="<start_working_out>",
    )  # fmt: skip
    model = build_model(tokenizer, max_position_embeddings=256)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    assert trained_text(trainer, 2) == "2 and 2<end_working_out><SOLUTION>4</SOLUTION><|im_end|>"
    trainer.train()
    prompt = tokenizer.apply_chat_template(rows[2]["prompt"], add_generation_prompt=True, return_tensors="pt")
    reply = model.generate(**prompt, do_sample=False, max_new_tokens=60)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply) == "2 and 2<end_working_out><SOLUTION>4</SOLUTION><|im_end|>"


def test_added_tokens_and_adapters_do_not_go_together(make):
    from peft import LoraConfig

    with pytest.raises(UserError, match="use chat_template_path='plain'"):
        make(PAIRS, peft_config=LoraConfig(), chat_template_path="chatml")


def test_adapters_learn_too(make):
    from peft import LoraConfig

    tokenizer = build_tokenizer()
    trainer = make(PAIRS, build_model(tokenizer), peft_config=LoraConfig(r=8, target_modules="all-linear"), eval_dataset=PAIRS, max_steps=25)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3


def test_token_ids_train_as_the_text_they_were_made_of(make):
    tokenizer = build_tokenizer()
    texts = [{"text": f"{a}+{a}={2 * a}"} for a in range(4)]
    tokenized = [{"input_ids": [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]} for row in texts]
    weights = []
    for rows in (texts, tokenized):
        trainer = make(rows)
        trainer.train()
        weights.append(weights_of(trainer))
    assert torch.equal(*weights)


def test_iterable_datasets_are_streams(make):
    from datasets import Dataset, IterableDataset

    for dataset in (IterableDataset.from_generator(lambda: iter(PAIRS)), Dataset.from_list(PAIRS).to_iterable_dataset()):
        trainer = make(dataset, eval_dataset={"same": dataset}, max_steps=1)
        trainer.train()
        logs = trainer.evaluate()
        assert {"eval_same_loss", "eval_same_mean_token_accuracy", "eval_same_num_tokens", "eval_same_entropy"} <= logs.keys()
