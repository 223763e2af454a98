"""The shape of verifiers 0.1, played by small classes of the same shape; with the library itself where it is installed."""

import pytest

from posttrain.envs.adapters.verifiers import verifiers_environment, verifiers_rows
from posttrain.errors import UserError
from posttrain.event_loops import settled
from posttrain.types import Completion, StopReason, Task

ROWS = [{"example_id": 0, "prompt": [{"role": "user", "content": "Say it twice."}], "answer": "a", "info": '{"times": 2}', "task": "t"}]


class Rubric:
    def __init__(self, funcs, weights):
        self.funcs, self.weights, self.class_objects = funcs, weights, {"parser": str.strip}


class Group:
    def __init__(self, *rubrics):
        self.rubrics = rubrics


def right(completion, answer, parser):
    return float(parser(completion[-1]["content"]) == answer)


async def turns(state, **kwargs):
    return state["turn"]


class Question:
    rubric = Rubric([right], [2.0])

    def get_dataset(self, n=-1):
        return ROWS


class Again(Question):
    rubric = Group(Rubric([right], [2.0]), Rubric([turns], [0.1]))

    async def setup_state(self, state):
        state["left"] = state["info"]["times"] - 1

    async def is_completed(self, state):
        return state["left"] <= 0

    async def env_response(self, messages, state):
        state["left"] -= 1
        state["heard"] = messages[-1]["content"]
        return [{"role": "user", "content": f"You said {state['heard']}. Again."}]


def played(env, *texts):
    (row,) = verifiers_rows(env)
    episode = verifiers_environment(env).make(Task(0, row["prompt"], {name: row[name] for name in row if name != "prompt"}))
    said, completion, answers = list(episode.start()), None, []
    messages = []
    for text in texts:
        messages.append({"role": "assistant", "content": text})
        completion = Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, text, messages)
        (answer,) = settled([episode.reply(completion)])
        answers.append(answer)
        messages += answer or []
    settled([episode.finish(completion)])
    return said, answers, completion.info


def test_a_question_and_its_answer():
    start, answers, info = played(Question(), " a ")
    assert (start, answers) == (ROWS[0]["prompt"], [None])
    assert info == {"right": 1.0, "reward": 2.0}


def test_turns_are_the_environments_until_it_is_complete():
    class Thrice(Again):
        async def setup_state(self, state):
            state["left"] = state["info"]["times"] + 1

    _, answers, info = played(Thrice(), "b", "c", "a")
    assert answers[0] == [{"role": "user", "content": "You said b. Again."}]
    assert [answer is None for answer in answers] == [False, False, True]
    assert info == {"right": 1.0, "turns": 3.0, "reward": pytest.approx(2.3)}


def test_an_episode_whose_first_turn_was_cut_is_scored_on_a_state_that_was_set_up():
    def left(state):
        return state["left"]

    class Reads(Again):
        rubric = Rubric([left], [1.0])

    (row,) = verifiers_rows(Reads())
    episode = verifiers_environment(Reads()).make(Task(0, row["prompt"], {"info": row["info"]}))
    completion = Completion([1], [2], [True], [0.0], [0.0], StopReason.LENGTH, "b", [{"role": "assistant", "content": "b"}])
    assert settled([episode.finish(completion)]) == [None]
    assert completion.info == {"left": 1.0, "reward": 1.0}


def test_a_reward_that_raises_is_an_error_and_no_zero():
    class Broken(Question):
        rubric = Rubric([lambda completion: 1 / 0], [1.0])

    (row,) = verifiers_rows(Broken())
    episode = verifiers_environment(Broken()).make(Task(0, row["prompt"], {}))
    completion = Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, "", [])
    (error,) = settled([episode.finish(completion)])
    assert isinstance(error, ZeroDivisionError)


def test_what_does_not_fit_is_refused():
    class Plural(Question):
        rubric = Rubric([lambda completions, answers: [1.0]], [1.0])

    class Empty(Question):
        rubric = Rubric([], [])

    class WithTools(Question):
        tool_defs = ({"name": "f"},)

    for env, says in ((Plural(), "whole groups"), (Empty(), "no reward would be given"), (WithTools(), "tools of its own")):
        with pytest.raises(UserError, match=says):
            verifiers_environment(env)


def test_the_library_itself():
    vf = pytest.importorskip("verifiers")
    if not hasattr(vf, "SingleTurnEnv"):
        pytest.skip("this version runs models through servers")
    from datasets import Dataset

    def exact(completion, answer):
        return float(completion[-1]["content"] == answer)

    class Echo(vf.MultiTurnEnv):
        async def env_response(self, messages, state, **kwargs):
            return [{"role": "user", "content": "Again."}]

    data = Dataset.from_list([{"question": "Say a.", "answer": "a"}])
    single = vf.SingleTurnEnv(dataset=data, system_prompt="Be brief.", rubric=vf.Rubric(funcs=[exact]))
    start, answers, info = played(single, "a")
    assert [message["role"] for message in start] == ["system", "user"]
    assert info["reward"] == 1.0
    _, answers, info = played(Echo(dataset=data, max_turns=2, rubric=vf.Rubric(funcs=[exact])), "b", "a")
    assert answers == [[{"role": "user", "content": "Again."}], None]
    assert info["reward"] == 1.0


def test_an_episode_that_was_only_looked_at_is_not_paid():
    """A trainer makes one to see its prompt; the rubric's functions read messages that are not there."""
    env = Question()
    (row,) = verifiers_rows(env)
    episode = verifiers_environment(env).make(Task(0, row["prompt"], {}))
    completion = Completion([], [], [], [], [], StopReason.LENGTH, "", [], turns=0)
    assert settled([episode.finish(completion)]) == [None]
    assert completion.info == {}
