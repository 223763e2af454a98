import pytest

from posttrain.envs.adapters.stepping import stepping
from posttrain.errors import UserError
from posttrain.types import Completion, StopReason, Task

ROW = Task(7, "Play.", {"seed": 11, "map_size": 4})


def turn(text):
    return Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, text, [{"role": "assistant", "content": text}])


def played(environment, *texts, task=ROW):
    """(the first message, what each turn was answered, what was reported)"""
    env = environment.make(task)
    (start,) = env.start()
    answers, completion = [], None
    for text in texts:
        completion = turn(text)
        messages = env.reply(completion)
        answers.append(messages and messages[0]["content"])
        if messages is None:
            break
    env.finish(completion)
    return start["content"], answers, completion.info


class Corridor:
    """Five steps to the right pay 1 each, and the last one ends it."""

    def __init__(self, seed=None):
        self.place = 0

    def reset(self, seed=None):
        self.seed = seed
        return f"at 0, seed {seed}", {}

    def step(self, action):
        self.place += action
        return f"at {self.place}", float(action), self.place >= 2, self.place <= -2, {}

    def close(self):
        self.closed = True


class Result:
    def __init__(self, observation, reward, done):
        self.observation, self.reward, self.done = observation, reward, done


class Remote:
    """As OpenEnv's clients."""

    def __init__(self):
        self.left = 2

    def reset(self):
        return Result("ready", None, False)

    def step(self, action):
        self.left -= 1
        return Result({"left": self.left, "did": action}, None if self.left else 0.5, self.left == 0)


def test_gymnasiums_shape():
    start, answers, info = played(stepping(Corridor), "I go 1", "and 1 more")
    assert start == "Play.\nat 0, seed 11"
    assert answers == ["at 1", None]
    assert info == {"reward": 2.0, "steps": 2.0, "invalid_actions": 0.0}


def test_being_truncated_ends_an_episode_too():
    assert played(stepping(Corridor), "-1", "-1")[1] == ["at -1", None]


def test_openenvs_shape_with_an_action_and_a_description_of_ones_own():
    environment = stepping(Remote, action=str.upper, describe=lambda seen: f"<{seen}>")
    start, answers, info = played(environment, "go", "on")
    assert start == "Play.\n<ready>"
    assert answers == ["<{'left': 1, 'did': 'GO'}>", None]
    assert info["reward"] == 0.5


def test_a_turn_without_an_action_is_answered_and_pays_nothing():
    _, answers, info = played(stepping(Corridor), "what?", "9" * 50, "1", "1")
    assert [answer and answer.startswith("No action: ") for answer in answers] == [True, True, False, None]
    assert info == {"reward": 2.0, "steps": 2.0, "invalid_actions": 2.0}


def test_the_maker_gets_the_columns_that_it_names():
    seen = {}

    def make(map_size, slippery=False):
        seen.update(map_size=map_size, slippery=slippery)
        return Corridor()

    stepping(make).make(ROW)
    assert seen == {"map_size": 4, "slippery": False}


def test_rows_without_a_seed_use_their_number():
    assert played(stepping(Corridor), "2", task=Task(7, "Play.", {}))[0] == "Play.\nat 0, seed 7"


def test_a_wrapper_that_hands_its_keywords_on_is_seeded():
    class Wrapped(Corridor):
        def reset(self, **kwargs):
            return super().reset(**kwargs)

    assert played(stepping(Wrapped), "2")[0] == "Play.\nat 0, seed 11"


def test_an_object_that_does_not_step_is_refused():
    with pytest.raises(UserError, match="list has no method reset"):
        stepping(list).make(ROW)


def test_a_real_gymnasium_environment():
    gymnasium = pytest.importorskip("gymnasium")

    def make(map_size):
        return gymnasium.make("FrozenLake-v1", is_slippery=False, map_name=f"{map_size}x{map_size}")

    start, answers, info = played(stepping(make), "down: 1", "1", "5 is no action", "2", "2", "1", "2")
    assert start == "Play.\n0"
    assert answers == ["4", "8", "No action: 5 is not in Discrete(4)", "9", "10", "14", None]
    assert info == {"reward": 1.0, "steps": 6.0, "invalid_actions": 1.0}


def test_a_real_gymnasium_environment_draws_from_the_rows_seed():
    gymnasium = pytest.importorskip("gymnasium")
    environment = stepping(lambda: gymnasium.make("CartPole-v1"))
    starts = [environment.make(Task(n, "Balance.", {"seed": seed})).start() for n, seed in ((0, 3), (1, 3), (2, 4))]
    assert starts[0] == starts[1] != starts[2]
