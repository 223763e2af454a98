"""Twenty templates in the style of known models: what each trainer reads of a row, however it is spelled, is what the template's author renders of it
in his own spelling, with plain jinja2; or the row is refused by name, with the part that the template drops."""

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken
from transformers import Qwen3Config, Qwen3ForCausalLM

import posttrain
from posttrain.data.conversation import encode_conversation
from posttrain.data.prompts import to_tasks
from posttrain.data.tokenizer import train_bpe
from posttrain.errors import UserError
from posttrain.policy import Policy

FOLDER = Path(__file__).parent / "author_templates"


@dataclass(frozen=True)
class Author:
    """How the author of a template wants a conversation, and what he writes of it."""

    eos: str
    bos: str | None = None
    more_stops: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False  # writes schemas
    calls: bool = False
    thoughts: bool = False
    text_beside_calls: bool = True
    arguments_as_text: bool = False
    blocks: bool = False  # content is a list of blocks
    names: bool = False


L3 = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "more_stops": ("<|eot_id|>",)}
IM = {"eos": "<|im_end|>"}
GEMMA = {"bos": "<bos>", "eos": "<eos>", "more_stops": ("<end_of_turn>",)}
DEEPSEEK = {"bos": "<|begin_of_sentence|>", "eos": "<|end_of_sentence|>"}
AUTHORS = {
    "llama-3": Author(**L3),
    "llama-3.1": Author(**L3, tools=True, calls=True, text_beside_calls=False),
    "llama-vision": Author(**L3, blocks=True),
    "qwen2.5": Author(**IM, tools=True, calls=True),
    "qwen3": Author(**IM, tools=True, calls=True, thoughts=True),
    "qwen3-coder": Author(**IM, tools=True, calls=True),
    "gemma-2": Author(**GEMMA, system=False),
    "gemma-3": Author(**GEMMA),
    "mistral-v0.3": Author(bos="<s>", eos="</s>", tools=True, calls=True, text_beside_calls=False),
    "mistral-small": Author(bos="<s>", eos="</s>"),
    "phi-3": Author(eos="<|endoftext|>", more_stops=("<|end|>",)),
    "phi-4-mini": Author(eos="<|endoftext|>", more_stops=("<|end|>",)),
    "lfm2": Author(bos="<|startoftext|>", **IM, tools=True),
    "cohere": Author(bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", tools=True, calls=True, text_beside_calls=False),
    "glm-4": Author(eos="<|endoftext|>", tools=True, calls=True, thoughts=True),
    "gpt-oss": Author(eos="<|return|>", more_stops=("<|call|>",), tools=True, calls=True, thoughts=True),
    "deepseek-v3": Author(**DEEPSEEK, calls=True, arguments_as_text=True),
    "deepseek-r1": Author(**DEEPSEEK),
    "nemotron": Author(**L3),
    "named-speakers": Author(**IM, tools=True, calls=True, names=True),
}

SYSTEM, ASK, TOLD, AGAIN, SURE = "Be brief.", "What is 2 + 2?", "It is four.", "Sure?", "Yes."
QUESTION = "Weather in Paris?"
ARGUMENTS = {"city": "Paris", "unit": None, "days": 2}
SCHEMA = {
    "name": "get_weather", "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": "string"}, "days": {"type": "integer"}}},
}  # fmt: skip
TOOLS = [{"type": "function", "function": SCHEMA}]
SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|im_start|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|endoftext|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|startoftext|>",
    "<BOS_TOKEN>",
    "<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|return|>",
    "<|call|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<|User|>",
    "<|Assistant|>",
]


def said(role, content, **more):
    return {"role": role, "content": content, **more}


TALK = [said("system", SYSTEM), said("user", ASK), said("assistant", TOLD), said("user", AGAIN), said("assistant", SURE)]


def in_blocks(messages):
    """As users of vision models write it, in two blocks."""
    split = [(m, len(m["content"]) // 2) for m in messages]
    return [{**m, "content": [{"type": "text", "text": m["content"][:at]}, {"type": "text", "text": m["content"][at:]}]} for m, at in split]


def calling(arguments, **more):
    return {
        "role": "assistant",
        "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}],
        **more,
    }


def with_tools(call):
    result = {"role": "tool", "name": "get_weather", "tool_call_id": "call00000", "content": "Sunny."}
    return [said("user", QUESTION), call, result, said("assistant", "It is sunny.")]


@functools.cache
def environment():
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **{k: v for k, v in how.items() if k != "ensure_ascii"})

    def refuse(words):
        raise jinja2.TemplateError(words)

    made.globals["raise_exception"] = refuse
    return made


@functools.cache
def template(name):
    return environment().from_string((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


def authors_text(name, messages, **given):
    """What the author renders, in his own spelling of the conversation. Nothing of the library takes part."""
    author = AUTHORS[name]
    if author.blocks:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    keywords = {"bos_token": author.bos or "", "eos_token": author.eos, "tools": None, "add_generation_prompt": False} | given
    return template(name).render(messages=messages, **keywords)


def authors_call(name, **more):
    author = AUTHORS[name]
    return calling(json.dumps(ARGUMENTS) if author.arguments_as_text else ARGUMENTS, **more)


@functools.cache
def _tokenizer():
    made = train_bpe(["What is 2 + 2? It is four. Weather in Paris is sunny, says the tool {}"] * 3, 330)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return made


@functools.cache
def _model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(_tokenizer()), max_position_embeddings=4096, **sizes))


@functools.cache
def tokenizer_of(name):
    made, author = copy.deepcopy(_tokenizer()), AUTHORS[name]
    made.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    made.eos_token = author.eos
    if author.bos is not None:
        made.bos_token = author.bos
    return made


def ids_of(text):
    return _tokenizer()(text, add_special_tokens=False)["input_ids"]


PAIRED = {
    "DPO": (posttrain.DPOTrainer, posttrain.DPOConfig),
    "ORPO": (posttrain.ORPOTrainer, posttrain.ORPOConfig),
    "CPO": (posttrain.CPOTrainer, posttrain.CPOConfig),
    "KTO": (posttrain.KTOTrainer, posttrain.KTOConfig),
    "reward": (posttrain.RewardTrainer, posttrain.RewardConfig),
}
ONLINE = {
    "GRPO": (posttrain.GRPOTrainer, posttrain.GRPOConfig),
    "RLOO": (posttrain.RLOOTrainer, posttrain.RLOOConfig),
    "PPO": (posttrain.PPOTrainer, posttrain.PPOConfig),
}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """One trainer of each kind. Rows are handed to what it makes token ids with, under one template after another."""
    common = {"use_cpu": True, "report_to": "none", "save_strategy": "no"}
    plain = [{"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}] * 2
    made = {"SFT": posttrain.SFTTrainer(
        copy.deepcopy(_model()), posttrain.SFTConfig(output_dir=str(tmp_path_factory.mktemp("sft")), max_length=4096, **common),
        train_dataset=[{"text": "a"}], processing_class=tokenizer_of("qwen3"),
    )}  # fmt: skip
    for name, (trainer, config) in PAIRED.items():
        args = config(output_dir=str(tmp_path_factory.mktemp(name)), max_length=4096, **common)
        made[name] = trainer(copy.deepcopy(_model()), args=args, train_dataset=plain, processing_class=tokenizer_of("qwen3"))
    for name, (trainer, config) in ONLINE.items():
        args = config(output_dir=str(tmp_path_factory.mktemp(name)), max_completion_length=8, **common)
        rewards = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
        made[name] = trainer(
            copy.deepcopy(_model()), rewards, args, train_dataset=[{"prompt": "2 + 2 = "}] * 8, processing_class=tokenizer_of("qwen3")
        )
    return made


def under(trainer, name):
    trainer.tokenizer = tokenizer_of(name)
    ends = [trainer.tokenizer.convert_tokens_to_ids(token) for token in (AUTHORS[name].eos, *AUTHORS[name].more_stops)]
    trainer.model.config.eos_token_id = ends
    if trainer.model.can_generate():
        trainer.model.generation_config.eos_token_id = ends
    return trainer


def sft_ids(trainers, name, row):
    return list(under(trainers["SFT"], name)._new_maker()(row).ids)


def until_the_end(name, text):
    """The author's text up to the last token that ends a reply: that is where a completion ends."""
    return text[: max(text.rfind(stop) + len(stop) for stop in (AUTHORS[name].eos, *AUTHORS[name].more_stops) if stop in text)]


def check_pairs(trainers, name, prompt, reply, whole, **columns):
    """Every trainer on pairs reads the author's text, from the beginning to the end of the chosen reply, and the prompt in its tokens."""
    row = {"prompt": prompt, "chosen": reply, "rejected": [said("assistant", "No idea.")], **columns}
    for kind in PAIRED:
        example = under(trainers[kind], name).encode([row, row])[0]
        text = _tokenizer().decode([*example.prompt_ids, *example.completions[0]])
        assert text == until_the_end(name, whole), kind
        assert ids_of(_tokenizer().decode(example.prompt_ids)) == example.prompt_ids, kind


def check_prompts(trainers, name, prompt, text, **columns):
    """Every online trainer, and a policy that is asked, starts from the author's text."""
    tasks = to_tasks([{"prompt": prompt, **columns}])
    for kind in ONLINE:
        assert under(trainers[kind], name)._encode(tasks) == [ids_of(text)], kind
    keywords = columns.get("chat_template_kwargs", {}) | ({"tools": columns["tools"]} if "tools" in columns else {})
    found = Policy(_model(), tokenizer_of(name)).sample(prompt, max_new_tokens=1, chat_template_kwargs=keywords)
    assert found[0].completions[0].prompt_ids == ids_of(text)


@pytest.mark.parametrize("name", AUTHORS)
def test_text_in_blocks_is_text(trainers, name):
    talk = TALK if AUTHORS[name].system else TALK[1:]
    whole = authors_text(name, talk)
    for messages in (talk, in_blocks(talk)):
        assert sft_ids(trainers, name, {"messages": messages}) == ids_of(whole)
        check_pairs(trainers, name, messages[:-1], messages[-1:], whole)
        check_prompts(trainers, name, messages[:-1], authors_text(name, talk[:-1], add_generation_prompt=True))


SPELLINGS = {
    "as given": calling(ARGUMENTS),
    "null content": calling(ARGUMENTS, content=None),
    "empty content": calling(ARGUMENTS, content=""),
    "arguments as text": calling(json.dumps(ARGUMENTS), content=None),
    "padding of a table": {**calling(ARGUMENTS, content=None), "name": None, "reasoning_content": None, "tool_call_id": None},
}


@pytest.mark.parametrize("name", AUTHORS)
def test_calls_are_read_as_their_author_renders_them_or_refused(trainers, name):
    for call in SPELLINGS.values():
        messages = with_tools(call)
        if not AUTHORS[name].calls:
            with pytest.raises(UserError, match=r"row 0: .*(tool call|refuses the conversation)"):
                sft_ids(trainers, name, {"messages": messages})
            with pytest.raises(UserError, match=r"row 0: .*(tool call|refuses the conversation)"):
                check_prompts(trainers, name, messages[:3], "")
            continue
        whole = authors_text(name, with_tools(authors_call(name)))
        assert sft_ids(trainers, name, {"messages": messages}) == ids_of(whole)
        check_pairs(trainers, name, messages[:3], messages[3:], whole)
        check_prompts(trainers, name, messages[:3], authors_text(name, with_tools(authors_call(name))[:3], add_generation_prompt=True))


@pytest.mark.parametrize("name", [name for name, author in AUTHORS.items() if author.calls])
def test_a_call_that_is_preferred_is_what_is_learned(trainers, name):
    whole = authors_text(name, [said("user", QUESTION), authors_call(name)])
    assert "get_weather" in whole
    for call in SPELLINGS.values():
        check_pairs(trainers, name, [said("user", QUESTION)], [call], whole)


@pytest.mark.parametrize("name", AUTHORS)
def test_tools_are_shown_as_their_author_shows_them_or_refused(trainers, name):
    talk = TALK if AUTHORS[name].system else TALK[1:]
    for tools in (TOOLS, json.dumps(TOOLS), [SCHEMA]):
        if not AUTHORS[name].tools:
            with pytest.raises(UserError, match=r"row 0: .*drops the tools of the row"):
                sft_ids(trainers, name, {"messages": talk, "tools": tools})
            with pytest.raises(UserError, match=r"row 0: .*drops the tools of the row"):
                check_prompts(trainers, name, talk[:-1], "", tools=tools)
            continue
        if tools == [SCHEMA] and name in ("llama-3.1", "qwen2.5", "qwen3", "qwen3-coder", "mistral-v0.3", "lfm2", "glm-4", "named-speakers"):
            shown = [SCHEMA]  # they write schemas as they get them
        else:
            shown = TOOLS
        whole = authors_text(name, talk, tools=shown)
        assert sft_ids(trainers, name, {"messages": talk, "tools": tools}) == ids_of(whole)
        if not isinstance(tools, str):
            check_prompts(trainers, name, talk[:-1], authors_text(name, talk[:-1], tools=shown, add_generation_prompt=True), tools=tools)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", AUTHORS)
def test_thoughts_are_read_as_their_author_renders_them_or_refused(trainers, name, key):
    messages = [said("user", ASK), said("assistant", TOLD, **{key: "I add them."})]
    if not AUTHORS[name].thoughts:
        with pytest.raises(UserError, match=rf"row 0: .*drops the thought \({key}\) of message 1"):
            sft_ids(trainers, name, {"messages": messages})
        return
    author = [said("user", ASK), said("assistant", TOLD, thinking="I add them.", reasoning_content="I add them.")]
    whole = authors_text(name, author)
    assert "I add them." in whole
    assert sft_ids(trainers, name, {"messages": messages}) == ids_of(whole)
    check_pairs(trainers, name, messages[:1], messages[1:], whole)
    again = [*messages, said("user", AGAIN)]  # a thought before an earlier question: whatever the author does with it
    check_prompts(trainers, name, again, authors_text(name, [*author, said("user", AGAIN)], add_generation_prompt=True))


@pytest.mark.parametrize("name", AUTHORS)
def test_text_beside_a_call_and_names_of_speakers_are_written_or_refused(trainers, name):
    if AUTHORS[name].calls:
        messages = with_tools(calling(ARGUMENTS, content="I look it up."))
        if AUTHORS[name].text_beside_calls:
            whole = authors_text(name, with_tools(authors_call(name, content="I look it up.")))
            assert sft_ids(trainers, name, {"messages": messages}) == ids_of(whole)
        else:
            with pytest.raises(UserError, match=r"row 0: .*drops (the content|the name of a tool call)"):
                sft_ids(trainers, name, {"messages": messages})
    messages = [said("user", ASK, name="Ada"), said("assistant", TOLD)]
    if AUTHORS[name].names:
        assert sft_ids(trainers, name, {"messages": messages}) == ids_of(authors_text(name, messages))
    else:
        with pytest.raises(UserError, match=r"row 0: .*drops the name of message 0"):
            sft_ids(trainers, name, {"messages": messages})


def test_the_twenty_are_all_there():
    assert sorted(AUTHORS) == sorted(path.stem for path in FOLDER.glob("*.jinja"))
    assert len(AUTHORS) == 20


def test_replies_are_told_apart_where_a_template_ends_the_whole_with_a_token():
    tokenizer, author = tokenizer_of("phi-3"), AUTHORS["phi-3"]
    stops = [tokenizer.convert_tokens_to_ids(token) for token in author.more_stops]
    ids, trained = encode_conversation(tokenizer, TALK, assistant_only=True, stop_ids=stops)
    assert tokenizer.decode(ids) == authors_text("phi-3", TALK)
    assert tokenizer.decode([id for id, on in zip(ids, trained, strict=True) if on]) == f"{TOLD}<|end|>{SURE}<|end|>\n<|endoftext|>"
