import asyncio
import sys
import threading
import time

import pytest
from talk import add

from posttrain.envs.tools import MAX_CALLS, Tool, tools
from posttrain.errors import UserError
from posttrain.event_loops import settled
from posttrain.types import Completion, StopReason, Task

TASK = Task(0, "What is 5+7?", {})


def call(name, **arguments):
    return {"id": "call00000", "type": "function", "function": {"name": name, "arguments": arguments}}


def said(*calls, malformed=()):
    message = {"role": "assistant", "content": "", "tool_calls": list(calls)}
    if malformed:
        message["malformed_calls"] = list(malformed)
    return Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, "", [message])


def answered(functions, completion, **settings):
    """(contents of the answers, what was counted)"""
    env = tools(functions, **settings).make(TASK)
    (answers,) = settled([env.reply(completion)])
    env.finish(completion)
    if isinstance(answers, Exception):
        raise answers
    return answers and [answer["content"] for answer in answers], completion.info


def test_the_schema_comes_from_signature_and_docstring():
    schema = Tool(add).schema
    assert schema["function"]["name"] == "add"
    assert schema["function"]["description"] == "Add two numbers."
    assert schema["function"]["parameters"]["properties"]["a"] == {"type": "integer", "description": "The first number."}
    assert schema["function"]["parameters"]["required"] == ["a", "b"]


def test_a_call_is_answered_in_a_message_of_the_tool():
    env = tools([add]).make(TASK)
    (answers,) = settled([env.reply(said(call("add", a=5, b=7)))])
    assert answers == [{"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "12"}]


def test_a_turn_without_a_call_ends_the_episode():
    assert answered([add], said()) == (None, {"tool_calls": 0.0, "tool_failures": 0.0})


def test_async_tools_and_results_that_are_no_text():
    async def look(where: str) -> dict:
        """Look somewhere.

        Args:
            where: The place.
        """
        await asyncio.sleep(0)
        return {"where": where, "found": [1, None, "é"]}

    assert answered([look], said(call("look", where="here")))[0] == ['{"where": "here", "found": [1, null, "é"]}']


def fails(a: int) -> int:
    """Fail.

    Args:
        a: Anything.
    """
    raise KeyError("no such thing")


def sleeps(a: int) -> int:
    """Sleep.

    Args:
        a: Anything.
    """
    time.sleep(5)
    return a


async def sleeps_async(a: int) -> int:
    """Sleep.

    Args:
        a: Anything.
    """
    await asyncio.sleep(5)
    return a


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (said(call("ad", a=1, b=2)), "there is no tool 'ad'; there are: add, fails, sleeps, sleeps_async. Did you mean 'add'?"),
        (said(call("add", a=1)), "needs the parameter 'b'"),
        (said(call("add", a=1, b=2, c=3)), "has no parameter 'c'; it takes: a, b"),
        (said(call("add", a=1, b="two")), "must be of type integer, not the text 'two'"),
        (said(call("add", a=1, b=2.5)), "must be of type integer, not 2.5"),
        (said(call("add", a=1, b=True)), "must be of type integer, not true"),
        (said(call("add", a=1, b=None)), "must be of type integer, not null"),
        (said(call("fails", a=1)), "KeyError: 'no such thing'"),
        (said(call("sleeps", a=1)), "sleeps did not answer within 0.2 seconds"),
        (said(call("sleeps_async", a=1)), "sleeps_async did not answer within 0.2 seconds"),
        (said(malformed=["the tool call is not valid JSON"]), "error: the tool call is not valid JSON; nothing was called"),
    ],
)
def test_whatever_goes_wrong_is_told_to_the_model_and_counted(turn, says):
    started = time.perf_counter()
    (content,), counted = answered([add, fails, sleeps, sleeps_async], turn, timeout=0.2)
    assert content.startswith("error: ")
    assert says in content
    assert counted == {"tool_calls": 1.0, "tool_failures": 1.0}
    assert time.perf_counter() - started < 2


async def cancels(a: int) -> int:
    """Cancel.

    Args:
        a: Anything.
    """
    raise asyncio.CancelledError


async def meets_a_timeout(a: int) -> int:
    """Meet a timeout.

    Args:
        a: Anything.
    """
    raise TimeoutError("the socket timed out")


async def blocks(a: int) -> int:
    """Block the loop.

    Args:
        a: Anything.
    """
    time.sleep(4)
    return a


def returns_what_blocks(a: int) -> int:
    """Return a coroutine that blocks the loop.

    Args:
        a: Anything.
    """
    return blocks(a)


async def doubles(a: int) -> int:
    """Double.

    Args:
        a: Anything.
    """
    await asyncio.sleep(0)
    return 2 * a


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (cancels, "error: CancelledError: "),
        (meets_a_timeout, "error: TimeoutError: the socket timed out"),
        (blocks, "error: blocks did not answer within 0.2 seconds"),
        (returns_what_blocks, "error: returns_what_blocks did not answer within 0.2 seconds"),
    ],
)
def test_an_async_tool_that_goes_wrong_is_told_and_the_next_one_answers(function, says):
    started = time.perf_counter()
    contents, counted = answered([function, doubles], said(call(function.__name__, a=1), call("doubles", a=2)), timeout=0.2)
    assert contents == [says, "4"]
    assert counted == {"tool_calls": 2.0, "tool_failures": 1.0}
    assert time.perf_counter() - started < 3.5


def test_text_that_is_a_number_is_one_where_a_number_is_wanted():
    assert answered([add], said(call("add", a="5", b=7)))[0] == ["12"]


def test_good_and_bad_calls_of_one_turn_are_all_answered():
    contents, counted = answered([add], said(call("add", a=1, b=2), call("sub"), malformed=["cut"]))
    assert contents[0] == "3"
    assert all(content.startswith("error") for content in contents[1:])
    assert counted == {"tool_calls": 3.0, "tool_failures": 2.0}


def test_a_turn_with_hundreds_of_calls_is_not_obeyed():
    contents, _ = answered([add], said(*[call("add", a=1, b=2)] * 300))
    assert contents[:MAX_CALLS] == ["3"] * MAX_CALLS
    assert "284 further calls" in contents[MAX_CALLS]
    assert len(contents) == MAX_CALLS + 1


def test_a_long_answer_is_cut():
    def shout(a: int) -> str:
        """Shout.

        Args:
            a: How often.
        """
        return "A" * a

    (content,), _ = answered([shout], said(call("shout", a=100)), max_result_chars=10)
    assert content == "A" * 10 + " [cut]"


def test_sync_tools_of_several_episodes_run_at_once():
    barrier = threading.Barrier(4, timeout=5)

    def meet() -> str:
        """Wait for the others."""
        barrier.wait()
        return "met"

    made = tools([meet])
    answers = settled([made.make(TASK).reply(said(call("meet"))) for _ in range(4)])
    assert [answer[0]["content"] for answer in answers] == ["met"] * 4


def test_a_tool_that_a_model_could_not_understand_is_refused():
    def bare(a):
        return a

    def untold(a: int) -> int:
        """Say nothing of a."""
        return a

    for function in (bare, untold):
        with pytest.raises(UserError, match=f"the tool {function.__name__} cannot be shown"):
            tools([function])
    with pytest.raises(UserError, match="two tools are called add"):
        tools([add, add])
    with pytest.raises(UserError, match="no tools"):
        tools([])


async def leaves(code: int) -> int:
    """Leave.

    Args:
        code: What to say.
    """
    sys.exit(code)


def test_a_tool_that_leaves_is_told_to_the_model():
    env = tools([leaves]).make(TASK)
    ((answer,),) = settled([env.reply(said(call("leaves", code=3)))])
    assert answer["content"] == "error: SystemExit: 3"
