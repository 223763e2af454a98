import asyncio
import time

import numpy
import pytest
import torch
from small import build_model
from talk import HERMES, build_talker

from posttrain.data.turns import TurnTokens
from posttrain.errors import EnvError, RewardError, UserError
from posttrain.rollout import episodes
from posttrain.rollout.episodes import EpisodeStage
from posttrain.rollout.hf import HFEngine
from posttrain.rollout.local.engine import LocalEngine
from posttrain.rollout.play import play
from posttrain.types import Env, RequestOutput, Sampling, StopReason, Task

TOKENIZER = build_talker(HERMES)
END = TOKENIZER.eos_token_id
TASK = Task(3, [{"role": "user", "content": "Begin."}], {"n": 2})


class Script:
    """An engine that says the n-th line in the n-th turn of an episode, `slow` ones later; it keeps the requests."""

    def __init__(self, lines, finish_together=True):
        self.lines, self.requests, self.waiting = lines, [], []
        self.finish_together = finish_together

    def submit(self, request):
        self.requests.append(request)
        self.waiting.append(request)

    def step(self):
        done, self.waiting = (self.waiting, []) if self.finish_together else (self.waiting[-1:], self.waiting[:-1])
        return [self.complete(request) for request in done]

    def complete(self, request):
        turn = request.key[-1]
        ids = TOKENIZER(self.lines[min(turn, len(self.lines) - 1)])["input_ids"] + [END]
        cut = ids[: request.sampling.max_new_tokens]
        stop = StopReason.STOP if cut == ids else StopReason.LENGTH
        return RequestOutput(request.id, cut, [-0.5] * len(cut), [-0.25] * len(cut), stop, 9)


class Countdown(Env):
    """Answers n times."""

    def __init__(self, task):
        self.left = task.columns.get("n", 0)
        self.finished = 0

    def start(self):
        return [{"role": "user", "content": "Begin."}]

    def reply(self, completion):
        self.left -= 1
        return [{"role": "user", "content": f"left: {self.left}"}] if self.left >= 0 else None

    def finish(self, completion):
        self.finished += 1
        completion.info["left"] = float(self.left)


def stage_of(make, **limits):
    return EpisodeStage(make, TurnTokens(TOKENIZER, (END,)), **limits)


def played(engine, make=Countdown, tasks=(TASK,), tokens=400, generations=2, on_group=None, **limits):
    return play(
        list(tasks),
        [],
        engine,
        Sampling(tokens, stop_token_ids=(END,)),
        num_generations=generations,
        seed=5,
        step=6,
        decode=lambda ids: TOKENIZER.decode(ids, skip_special_tokens=True),
        on_group=on_group,
        stage=stage_of(make, **limits),
    )


def test_only_what_the_policy_said_is_sampled():
    completion = played(Script(["one", "two", "three"]))[0].completions[0]
    said = [token for token, sampled in zip(completion.token_ids, completion.sampled, strict=True) if sampled]
    assert TOKENIZER.decode(said) == "one<|im_end|>two<|im_end|>three<|im_end|>"
    assert [logprob == 0.0 for logprob in completion.logps] == [not sampled for sampled in completion.sampled]
    assert [logprob == 0.0 for logprob in completion.sampled_logps] == [not sampled for sampled in completion.sampled]


def test_prompt_and_completion_are_the_conversation_as_the_template_writes_it():
    completion = played(Script(["one", "two", "three"]))[0].completions[0]
    messages = [*TASK.prompt, *completion.messages]
    assert [message["content"] for message in messages] == ["Begin.", "one", "left: 1", "two", "left: 0", "three"]
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert TOKENIZER.decode(completion.prompt_ids + completion.token_ids) == whole.rstrip()
    assert (completion.text, completion.turns, completion.stop, completion.policy_version) == ("three", 3, StopReason.STOP, 9)


def test_every_turn_continues_the_very_tokens_before_it():
    engine = Script(["one", "two", "three"])
    completions = played(engine)[0].completions
    for request in engine.requests:
        completion = completions[request.key[3]]
        whole = [*completion.prompt_ids, *completion.token_ids]
        assert list(request.prompt_ids) == whole[: len(request.prompt_ids)]


def test_a_turns_random_numbers_depend_on_seed_step_task_index_and_turn_alone():
    engine = Script(["one"])
    played(engine)
    assert [request.key for request in engine.requests] == [(5, 6, 3, index, turn) for turn in range(3) for index in range(2)]
    assert len({request.id for request in engine.requests}) == 6


def test_the_order_of_arrival_changes_nothing():
    tasks = [TASK, Task(4, TASK.prompt, {"n": 0}), Task(5, TASK.prompt, {"n": 3})]
    together = played(Script(["one", "two"]), tasks=tasks)
    apart = played(Script(["one", "two"], finish_together=False), tasks=tasks)
    assert together == apart


def test_the_turn_limit_ends_an_episode_before_an_answer_that_nobody_could_use():
    completion = played(Script(["one"]), max_turns=2)[0].completions[0]
    assert completion.turns == 2
    assert [message["role"] for message in completion.messages] == ["assistant", "user", "assistant"]
    assert completion.info == {"out_of_turns": 1.0, "left": 0.0}
    assert all(completion.sampled[-2:])
    assert played(Script(["one"]), max_turns=3)[0].completions[0].info["out_of_turns"] == 0.0


def test_a_turn_that_is_cut_ends_its_episode_unanswered():
    completion = played(Script(["a long first turn, much too long"]), max_turn_tokens=5)[0].completions[0]
    assert (completion.stop, completion.turns, len(completion.token_ids)) == (StopReason.LENGTH, 1, 5)
    assert completion.info == {"left": 2.0}


def test_an_answer_that_does_not_fit_is_left_out_whole():
    free = played(Script(["one", "two", "three"]))[0].completions[0]
    second = free.sampled.index(True, free.sampled.index(False))  # where the second turn begins
    for tokens in (second, second + 1):
        completion = played(Script(["one", "two", "three"]), tokens=tokens)[0].completions[0]
        assert completion.stop is StopReason.LENGTH
        assert len(completion.token_ids) <= tokens
        assert completion.sampled[-1]
    assert completion.turns == 2  # with one token of room the policy speaks again, and is cut


def test_no_episode_is_longer_than_the_limit_of_the_whole():
    for tokens in range(1, 60):
        completion = played(Script(["one", "two"]), tokens=tokens, tasks=[Task(0, TASK.prompt, {"n": 9})])[0].completions[0]
        assert len(completion.token_ids) <= tokens
        assert completion.is_truncated
        assert completion.sampled[-1], "nothing follows the last turn"


def test_coroutines_of_one_moment_wait_together():
    running, most = 0, 0

    class Slow(Countdown):
        async def reply(self, completion):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.05)
            running -= 1
            return super().reply(completion)

        async def finish(self, completion):
            super().finish(completion)

    assert played(Script(["one", "two", "three"]), make=Slow, generations=8) == played(Script(["one", "two", "three"]), generations=8)
    assert most == 8


def test_episodes_end_once_each():
    made = []

    def make(task):
        made.append(Countdown(task))
        return made[-1]

    played(Script(["one"]), make=make, tasks=[TASK, Task(4, TASK.prompt, {"n": 0})])
    assert [env.finished for env in made] == [1] * 4


class Held(Countdown):
    """Holds something until it is finished. `breaks`: (what it does, the number of the one that raises over it)."""

    made: list["Held"]
    breaks = ("", -1)

    def __init__(self, task):
        super().__init__(task)
        self.number = len(Held.made)
        self.perhaps("make")
        Held.made.append(self)

    def perhaps(self, what):
        if Held.breaks == (what, self.number):
            raise ConnectionError("nobody is there")

    def start(self):
        self.perhaps("start")
        return super().start()

    def reply(self, completion):
        self.perhaps("reply")
        return super().reply(completion)

    async def finish(self, completion):
        super().finish(completion)
        self.turns = completion.turns
        self.perhaps("finish")
        if not completion.turns:
            raise OSError("stuck")  # heard by nobody: another error is on its way


class Interrupted(Script):
    def step(self):
        if any(request.key[-1] == 1 for request in self.waiting):
            raise KeyboardInterrupt
        return super().step()


def refuses(group):
    raise RewardError("broken")


@pytest.mark.parametrize(
    ("breaks", "engine", "on_group", "error"),
    [
        (("make", 3), Script, None, EnvError),
        (("start", 3), Script, None, EnvError),
        (("reply", 1), Script, None, EnvError),
        (("finish", 2), Script, None, EnvError),
        (("", -1), Interrupted, None, KeyboardInterrupt),
        (("", -1), Script, refuses, RewardError),
    ],
)
def test_every_environment_is_finished_once_however_the_rollout_ends(breaks, engine, on_group, error):
    Held.made, Held.breaks = [], breaks
    tasks = [TASK, Task(4, TASK.prompt, {"n": 0})]
    with pytest.raises(error):
        played(engine(["one"]), make=Held, tasks=tasks, on_group=on_group)
    assert [env.finished for env in Held.made] == [1] * (3 if breaks[0] == "make" else 4)
    assert all(env.turns == 0 for env in Held.made[:2]), "given up in the middle: nothing is paid"


def test_environments_that_start_differently_are_finished_too():
    made = []

    class Dice(Countdown):
        def start(self):
            made.append(self)
            return [{"role": "user", "content": f"roll {len(made)}"}]

    with pytest.raises(UserError, match="in different ways"):
        played(Script(["one"]), make=Dice)
    assert [env.finished for env in made] == [1, 1]


def test_one_that_never_lets_go_is_not_waited_for(monkeypatch):
    class Clings(Held):
        async def finish(self, completion):
            await asyncio.sleep(60)

    monkeypatch.setattr(episodes, "GIVE_UP_SECONDS", 0.1)
    Held.made, Held.breaks = [], ("reply", 0)
    started = time.perf_counter()
    with pytest.raises(EnvError, match="nobody is there"):
        played(Script(["one"]), make=Clings)
    assert time.perf_counter() - started < 10


class Broken(Countdown):
    def reply(self, completion):
        return self.answer()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda self: 1 / 0, "Broken raised ZeroDivisionError.*test_episodes.py.*prompt 3"),
        (lambda self: "hello", "must answer with a list of messages"),
        (lambda self: [], "must answer with"),
        (lambda self: [{"role": "user"}], "must answer with"),
    ],
)
def test_a_broken_environment_is_an_error_that_names_it(answer, says):
    Broken.answer = answer
    with pytest.raises(EnvError, match=says):
        played(Script(["one"]), make=Broken)


def test_a_coroutine_that_raises_is_the_same_error():
    class Raises(Countdown):
        async def reply(self, completion):
            raise ValueError("no")

    with pytest.raises(EnvError, match="Raises raised ValueError: no"):
        played(Script(["one"]), make=Raises)


class Leaves(Countdown):
    def reply(self, completion):
        raise SystemExit("goodbye")


def test_an_environment_that_leaves_is_the_same_error():
    with pytest.raises(EnvError, match="Leaves raised SystemExit: goodbye"):
        played(Script(["one"]), make=Leaves)


@pytest.mark.parametrize("where", ["make", "start"])
def test_one_that_breaks_at_the_beginning_is_named_with_its_prompt(where):
    class Late(Countdown):
        def __init__(self, task):
            super().__init__(task)
            if where == "make":
                raise ConnectionError("nobody is there")

        def start(self):
            raise ConnectionError("nobody is there")

    for on_error in ("stop", "drop"):
        with pytest.raises(EnvError, match=r"raised ConnectionError: nobody is there at .*test_episodes.py.* the beginning of prompt 3"):
            played(Script(["one"]), make=Late, on_error=on_error)


class Sometimes(Countdown):
    """The second episode of a task breaks in its second answer, as it is told."""

    made = 0

    def __init__(self, task):
        super().__init__(task)
        self.number, Sometimes.made = Sometimes.made, Sometimes.made + 1

    def reply(self, completion):
        return type(self).breaks(self) if self.number % 3 == 1 and self.left == 1 else super().reply(completion)


async def raises_later(self):
    raise ValueError("no")


@pytest.mark.parametrize(
    ("breaks", "says"),
    [(lambda self: 1 / 0, "ZeroDivisionError"), (raises_later, "ValueError: no"), (lambda self: "hello", "must answer with a list of messages")],
)
def test_a_broken_episode_can_be_dropped_and_leaves_the_others_as_they_are(breaks, says):
    Sometimes.made, Sometimes.breaks = 0, breaks
    tasks = [TASK, Task(4, TASK.prompt, {"n": 1})]
    whole = played(Script(["one", "two", "three"]), tasks=tasks, generations=3)
    groups = played(Script(["one", "two", "three"]), make=Sometimes, tasks=tasks, generations=3, on_error="drop")
    broken = groups[0].completions[1]
    assert says in broken.broken
    assert "prompt 3" in broken.broken
    assert (broken.turns, [message["role"] for message in broken.messages]) == (2, ["assistant", "user", "assistant"])
    assert broken.sampled[-1]
    assert broken.info == {"left": 1.0}, "it was finished all the same"
    for place in ((0, 0), (0, 2), (1, 0), (1, 2)):
        assert groups[place[0]].completions[place[1]] == whole[place[0]].completions[place[1]]


def test_one_that_breaks_when_it_lets_go_is_dropped_too():
    class Holds(Countdown):
        def finish(self, completion):
            completion.info["left"] = 1.0
            raise OSError("stuck")

    completion = played(Script(["one"]), make=Holds, on_error="drop")[0].completions[0]
    assert "Holds raised OSError: stuck" in completion.broken
    with pytest.raises(EnvError, match="stuck"):
        played(Script(["one"]), make=Holds)


def test_what_an_environment_reports_are_numbers():
    class Reports(Countdown):
        def finish(self, completion):
            completion.info |= {"one": torch.tensor(1.0), "two": numpy.float32(2.0), "three": True, "colour": "red"}

    with pytest.raises(EnvError, match=r"Reports reports colour='red' for prompt 3; rollout.info holds numbers only"):
        played(Script(["one"]), make=Reports)
    completion = played(Script(["one"]), make=Reports, on_error="drop")[0].completions[0]
    assert completion.info == {"one": 1.0, "two": 2.0, "three": 1.0}
    assert {type(value) for value in completion.info.values()} == {float}


def test_a_wrong_input_stops_whatever_the_policy():
    class Refuses(Countdown):
        def reply(self, completion):
            raise UserError("the row has no level")

    with pytest.raises(UserError, match="no level"):
        played(Script(["one"]), make=Refuses, on_error="drop")


def test_completions_of_a_task_must_start_alike():
    class Dice(Countdown):
        count = 0

        def start(self):
            Dice.count += 1
            return [{"role": "user", "content": f"roll {Dice.count}"}]

    with pytest.raises(UserError, match="Dice starts prompt 3 in different ways"):
        played(Script(["one"]), make=Dice)


def test_both_engines_play_the_same_episodes_and_later_turns_have_the_models_own_log_probs():
    model = build_model(TOKENIZER, max_position_embeddings=512)
    ends = tuple(range(3, len(TOKENIZER), 4))  # a random model seldom ends its turn by itself
    sampling = Sampling(200, temperature=0.0, stop_token_ids=ends)
    tasks = [TASK, Task(4, [{"role": "user", "content": "Begin."}], {"n": 3})]
    drawn = []
    for engine in (LocalEngine(TOKENIZER), HFEngine(TOKENIZER)):
        with engine.serving(model, version=0):
            groups = play(tasks, [], engine, sampling, num_generations=2, seed=0, step=0, decode=str, stage=stage_of(Countdown))
        drawn.append([completion for group in groups for completion in group.completions])
    assert [completion.token_ids for completion in drawn[0]] == [completion.token_ids for completion in drawn[1]]
    assert max(completion.turns for completion in drawn[0]) > 2
    for completion in drawn[0]:
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        logps = (
            model(input_ids=ids)
            .logits[0, len(completion.prompt_ids) - 1 : -1]
            .log_softmax(-1)
            .gather(1, ids[0, len(completion.prompt_ids) :, None])[:, 0]
        )
        sampled = torch.tensor(completion.sampled)
        torch.testing.assert_close(torch.tensor(completion.logps)[sampled], logps.detach()[sampled], atol=1e-4, rtol=0)
