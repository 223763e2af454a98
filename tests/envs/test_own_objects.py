"""Functions that speak for the user, and objects whose methods are tools."""

import asyncio

import pytest
from talk import add

from posttrain.envs.chat import chat
from posttrain.envs.methods import factory
from posttrain.errors import UserError
from posttrain.event_loops import settled
from posttrain.types import Completion, StopReason, Task

TASK = Task(2, "Begin.", {"secret": 4, "hint": "even"})


def turn(message):
    return Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, message.get("content", ""), [{"role": "assistant", "content": ""} | message])


def reply(environment, message, task=TASK):
    env = environment.make(task)
    env.start()
    (answer,) = settled([env.reply(turn(message))])
    return answer


def test_the_function_hears_everything_and_the_columns_that_it_names():
    heard = []
    reply(chat(lambda messages, secret: heard.append((messages, secret)) or "go on"), {"content": "hm"})
    assert heard == [([{"role": "user", "content": "Begin."}, {"role": "assistant", "content": "hm"}], 4)]
    every = []
    reply(chat(lambda messages, **columns: every.append(columns)), {"content": "hm"})
    assert every == [TASK.columns]


def test_text_is_said_by_the_user_and_messages_are_as_they_are():
    assert reply(chat(lambda messages: "go on"), {}) == [{"role": "user", "content": "go on"}]
    several = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert reply(chat(lambda messages: several), {}) == several
    assert reply(chat(lambda messages: None), {}) is None


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"asks for the column 'secrt'; the data has: secret, hint. Did you mean 'secret'"):
        chat(lambda messages, secrt: None).make(TASK)
    assert chat(lambda messages, other=1: None).make(TASK).columns == {}
    with pytest.raises(UserError, match="must take `messages`"):
        chat(lambda text: None)


class Counter:
    made = 0

    def __init__(self):
        Counter.made += 1
        self.total = 0

    def reset(self, secret, **columns):
        self.total = secret

    def increase(self, by: int) -> int:
        """Increase the total.

        Args:
            by: How much.
        """
        self.total += by
        return self.total

    def _hidden(self):
        return None


CALL = {"tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "increase", "arguments": {"by": 3}}}]}


def test_every_episode_has_an_object_of_its_own_prepared_by_its_row():
    environment = factory(Counter)
    made = Counter.made
    assert [reply(environment, CALL)[0]["content"] for _ in range(2)] == ["7", "7"]
    assert Counter.made == made + 2


def test_public_methods_are_the_tools():
    environment = factory(Counter)
    assert [schema["function"]["name"] for schema in environment.tools] == ["increase"]
    assert list(environment.tools[0]["function"]["parameters"]["properties"]) == ["by"]
    assert not environment.gives_reward


def test_coroutines_of_an_object_share_one_loop():
    """A session that a tool opened can be closed."""
    loops = []

    class Session:
        def reset(self, **columns):
            pass

        async def increase(self, by: int) -> int:
            """Increase.

            Args:
                by: How much.
            """
            loops.append(asyncio.get_running_loop())
            return by

        async def get_reward(self):
            loops.append(asyncio.get_running_loop())
            return 1.0

        async def close(self):
            loops.append(asyncio.get_running_loop())

    env = factory(Session).make(TASK)
    env.start()
    completion = turn(CALL)
    settled([env.reply(completion)])
    settled([env.finish(completion)])
    assert completion.info["reward"] == 1.0
    assert len(loops) == 4, "that of the object which was only looked at was closed too"
    assert len(set(loops)) == 1


@pytest.mark.parametrize("wrong", [list, lambda: type("Empty", (), {"reset": lambda self: None})()])
def test_an_object_that_cannot_be_an_environment_is_refused(wrong):
    with pytest.raises(UserError, match=r"no method reset|no public method"):
        factory(wrong)


def test_a_plain_function_is_no_episode():
    assert add(1, 2) == 3
    with pytest.raises(UserError):
        chat(add)
