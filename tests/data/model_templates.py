"""Chat templates in the style of the models that people fine-tune, written for the tests: each shows the habits that make masks go wrong."""

import copy
import functools
from dataclasses import dataclass

from tokenizers import AddedToken

from posttrain.data.tokenizer import train_bpe


@dataclass(frozen=True)
class Family:
    template: str
    specials: tuple[str, ...]  # tokens of their own
    eos: str
    bos: str | None = None
    more_stops: tuple[str, ...] = ()  # of the generation config
    tools: bool = False


LLAMA3 = Family(  # trims, opens the system part by itself, ends a call of a tool with the same token
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge until 2023\\n\\n' + system }}{% if tools %}{{ tools | tojson }}{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in rest %}{% if m.tool_calls is defined %}"
    '{{ \'<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    eos="<|end_of_text|>",
    bos="<|begin_of_text|>",
    more_stops=("<|eot_id|>",),
    tools=True,
)
QWEN25 = Family(  # a system part that nobody gave; results of tools side by side in one turn of the user
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.' }}{% if tools %}{{ '\\n# Tools\\n' + tools | tojson }}{% endif %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{{ '\\n<tool_call>\\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    eos="<|im_end|>",
    tools=True,
)
QWEN3 = Family(  # thoughts of earlier questions are dropped; the last reply has one even where there was none
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if not thought and '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    eos="<|im_end|>",
)
GEMMA3 = Family(  # its own name for the assistant, no system role, another end than the tokenizer's
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    eos="<eos>",
    bos="<bos>",
    more_stops=("<end_of_turn>",),
)
PHI4 = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    ("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"),
    eos="<|im_end|>",
)
MISTRAL = Family(  # nothing opens a reply: the end of the question does; the reply begins with a space
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' + (first if loop.first else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    eos="</s>",
    bos="<s>",
)
DEEPSEEK_R1 = Family(  # opens a thought for the model, and drops finished thoughts from every reply
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{% set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}",
    ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"),
    eos="<|end_of_sentence|>",
    bos="<|begin_of_sentence|>",
)
FAMILIES = {
    "llama3": LLAMA3, "qwen2.5": QWEN25, "qwen3": QWEN3, "gemma3": GEMMA3, "phi4": PHI4, "mistral": MISTRAL, "deepseek-r1": DEEPSEEK_R1,
}  # fmt: skip


@functools.cache
def _plain_tokenizer():
    return train_bpe(["what is two and two? it is four, you are helpful: <think> I add them </think>"] * 3, 330)


def tokenizer_of(family: Family):
    tokenizer = copy.deepcopy(_plain_tokenizer())
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.specials])
    tokenizer.eos_token = family.eos
    if family.bos is not None:
        tokenizer.bos_token = family.bos
    tokenizer.chat_template = family.template
    return tokenizer


def stop_ids_of(family: Family, tokenizer):
    return [tokenizer.convert_tokens_to_ids(token) for token in (family.eos, *family.more_stops)]
