"""Chat templates in the manner of known families, on a byte-level tokenizer: for tests of turns, tools and episodes."""

from posttrain.data.tokenizer import train_bpe

OPEN = "{% for m in messages %}"
SHUT = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

TOOLS_FIRST = "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>\\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}\\n</tool_call>' }}"
    "{% endfor %}"
)
# tool results share one turn of the user, as long as they follow each other
TOOL_TURN = (
    "{% if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}{% else %}"
)
SAID = "{{ '<|im_start|>' + m.role + '\\n' + m.content }}" + CALLS + "{{ '<|im_end|>\\n' }}{% endif %}"
HERMES = TOOLS_FIRST + OPEN + TOOL_TURN + SAID + SHUT

# thoughts are dropped from replies before the last question; an empty one stands before the last reply
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + TOOLS_FIRST
    + OPEN
    + TOOL_TURN
    + "{% set content = m.content %}{% if m.role == 'assistant' and loop.index0 < ns.last %}{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    + "{{ '<|im_start|>' + m.role + '\\n' + ('<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' and loop.last and '</think>' not in content else '') + content }}"
    + CALLS
    + "{{ '<|im_end|>\\n' }}{% endif %}"
    + SHUT
)

LLAMA = (
    TOOLS_FIRST
    + OPEN
    + "{{ '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\\n\\n' }}"
    + "{% if m.tool_calls %}{{ '{\"name\": \"' + m.tool_calls[0].function.name + '\", \"parameters\": ' + (m.tool_calls[0].function.arguments | tojson) + '}' }}"
    + "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)

# the tools are shown before the last question: a further question moves them
MISTRAL = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + OPEN
    + "{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}"
    + "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    + "{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    + "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [{\"name\": \"' + m.tool_calls[0].function.name + '\", \"arguments\": ' + (m.tool_calls[0].function.arguments | tojson) + '}]<|im_end|>' }}"
    + "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)

XML = HERMES.replace(
    CALLS,
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>\\n<function=' + c.function.name + '>\\n' }}{% for k, v in c.function.arguments.items() %}"
    "{{ '<parameter=' + k + '>\\n' + v + '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}",
)
NUMBERED = OPEN + "{{ '<|im_start|>' + m.role + ' 1 of ' + (messages | length | string) + '\\n' + m.content + '<|im_end|>\\n' }}" + SHUT
ENDLESS = OPEN + "{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def build_talker(template=HERMES):
    """A tokenizer of bytes (and a few merges) with the template; <|im_end|> ends a turn."""
    tokenizer = train_bpe(["the tool said it, and the user asked again"] * 2, 290)
    tokenizer.chat_template = template
    return tokenizer


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b
