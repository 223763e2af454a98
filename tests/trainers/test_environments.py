"""Episodes in training: what is trained, what is counted, who pays. The policy's words are a script, its gradients are a real model's."""

import contextlib
import copy
import json

import pytest
import torch
from small import weights_of
from talk import HERMES, MISTRAL, add, build_talker
from transformers import GPT2Config, GPT2LMHeadModel

from posttrain import GRPOConfig, GRPOTrainer, UserError
from posttrain.envs import Environment, Single
from posttrain.envs.chat import chat
from posttrain.errors import EnvError
from posttrain.rewards import Rubric, verifier
from posttrain.rewards.library.length import brevity
from posttrain.rewards.library.repetition import repetition
from posttrain.tracking.reader import CompletionKey, RunReader
from posttrain.types import Env, RequestOutput, StopReason

CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
WORSE = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
SCRIPT = {0: [CALL, "5"], 1: ["4"], 2: [WORSE, CALL, "5 it is"], 3: [CALL, "x"]}  # sample index -> turns
ROWS = [{"prompt": [{"role": "user", "content": f"What is {n}+3?"}], "answer": "5"} for n in range(4)]


class Script:
    """An engine that says for each sample what is written."""

    def __init__(self, tokenizer, script=SCRIPT):
        self.tokenizer, self.script, self.waiting = tokenizer, script, []

    @contextlib.contextmanager
    def serving(self, model, version):
        yield

    def submit(self, request):
        self.waiting.append(request)

    def step(self):
        done, self.waiting = self.waiting, []
        return [self.complete(request) for request in done]

    def complete(self, request):
        *_, index, turn = request.key
        ids = self.tokenizer(self.script[index][turn])["input_ids"] + [self.tokenizer.eos_token_id]
        return RequestOutput(request.id, ids, [-1.0] * len(ids), [-1.0] * len(ids), StopReason.STOP, 0)


def ends_with_five(completions, answer, **kwargs):
    """TRL's shape: each completion is its messages."""
    return [float(completion[-1]["content"] == right) for completion, right in zip(completions, answer, strict=True)]


@pytest.fixture
def make(tmp_path):
    def make(template=HERMES, rows=ROWS, reward=ends_with_five, script=SCRIPT, config=None, **kwargs):
        tokenizer = build_talker(template)
        torch.manual_seed(0)
        sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 1024, "eos_token_id": tokenizer.eos_token_id}
        model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).double()
        settings = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 300, "max_steps": 1,
            "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no", "use_cpu": True,
        }  # fmt: skip
        trainer = GRPOTrainer(model, reward, GRPOConfig(**settings | (config or {})), rows, processing_class=tokenizer, **kwargs)
        trainer.engine = Script(tokenizer, script)
        return trainer

    return make


def log_of(trainer):
    return next(log for log in trainer.state.log_history if "reward" in log)


def test_a_step_is_the_policy_gradient_of_sampled_tokens_alone_given_all_before_them(make):
    trainer = make(tools=[add])
    plain = copy.deepcopy(trainer.model)
    trainer.train()
    groups = trainer._last_groups
    tokens = sum(sum(completion.sampled) for group in groups for completion in group.completions)
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        for completion, advantage in zip(group.completions, (rewards - rewards.mean()) / (rewards.std() + 1e-4), strict=True):
            ids = torch.tensor([completion.prompt_ids + completion.token_ids])
            logps = plain(input_ids=ids).logits[0, :-1].log_softmax(-1)
            for place, sampled in enumerate(completion.sampled, start=len(completion.prompt_ids)):
                if sampled:
                    loss = loss - advantage * logps[place - 1, ids[0, place]] / tokens
    loss.backward()
    expected = torch.cat([(p - p.grad).detach().flatten() for p in plain.parameters()])
    before = torch.cat([p.detach().flatten() for p in plain.parameters()])
    assert not torch.allclose(before, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(weights_of(trainer), expected, atol=1e-9, rtol=0)


def test_weights_do_not_depend_on_how_episodes_are_packed(make):
    weights = []
    for budget in (4096, 700, 50):
        trainer = make(tools=[add], config={"max_tokens_per_micro_batch": budget})
        trainer.train()
        weights.append(weights_of(trainer))
    assert all(torch.allclose(other, weights[0], atol=1e-12) for other in weights[1:])


def test_rewards_see_the_whole_conversation_and_the_last_turn(make):
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer = make(tools=[add], reward=reward)
    trainer.train()
    roles = [[message["role"] for message in completion] for completion in seen[:4]]
    assert roles == [
        ["assistant", "tool", "assistant"],
        ["assistant"],
        ["assistant", "tool", "assistant", "tool", "assistant"],
        ["assistant", "tool", "assistant"],
    ]
    assert [message["content"] for message in seen[2]][1::2] == ["error: add needs the parameter 'b'", "5"]
    assert seen[0][0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 3}}

    texts = []
    trainer = make(tools=[add], reward=lambda completion: texts.append(completion) or 0.0)
    trainer.train()
    assert texts[:4] == ["5", "4", "5 it is", "x"]


def test_lengths_count_what_was_sampled_and_calls_what_was_called(make):
    trainer = make(tools=[add])
    trainer.train()
    log = log_of(trainer)
    sampled = [sum(len(trainer.tokenizer(turn)["input_ids"]) + 1 for turn in turns) for turns in SCRIPT.values()]
    assert log["completions/mean_length"] == pytest.approx(sum(sampled) / 4)
    assert log["num_tokens"] == 2 * sum(sampled)
    assert log["tools/call_frequency"] == pytest.approx((1 + 0 + 2 + 1) / 4)
    assert log["tools/failure_frequency"] == pytest.approx((0 + 0.5 + 0) / 3)  # of the three that called
    assert log["env/turns"] == pytest.approx((2 + 1 + 3 + 2) / 4)


def test_the_record_keeps_every_turn(make, tmp_path):
    trainer = make(tools=[add])
    trainer.train()
    reader = RunReader(tmp_path / "run")
    episode = reader.episode(CompletionKey(1, 0, 2))
    assert (episode.turns, episode.info["tool_failures"]) == (3, 1.0)
    assert episode.messages == trainer._last_groups[0].completions[2].messages
    assert reader.completions(1, 0)[2].text == "5 it is"
    assert reader.episode(CompletionKey(9, 0, 0)) is None
    reader.close()


@pytest.mark.parametrize("limit", [{"max_turns": 2}, {"max_tool_calling_iterations": 1}])
def test_the_turn_limit_under_both_of_its_names(make, limit):
    trainer = make(tools=[add], config=limit)
    trainer.train()
    assert log_of(trainer)["env/turns"] == pytest.approx((2 + 1 + 2 + 2) / 4)
    assert log_of(trainer)["env/out_of_turns"] == 0.25


def test_evaluation_plays_episodes_too(make):
    trainer = make(tools=[add], eval_dataset=ROWS[:2])
    assert trainer.evaluate()["eval_env/turns"] == pytest.approx(2.0)


def test_a_function_can_speak_for_the_user(make):
    heard = []

    async def respond(messages, answer):
        heard.append([message["content"] for message in messages])
        return None if messages[-1]["content"].startswith(answer) else "Think again."

    trainer = make(env=chat(respond), script={0: ["5"], 1: ["4", "5"], 2: ["1", "2", "5 it is"], 3: ["5"]})
    trainer.train()
    assert ["What is 0+3?", "1", "Think again.", "2", "Think again.", "5 it is"] in heard
    assert log_of(trainer)["env/turns"] == pytest.approx((1 + 2 + 3 + 1) / 4)


class Account:
    """As TRL's environments: methods are tools."""

    def reset(self, answer, **columns):
        self.answer, self.seen = int(answer), None
        return " (in your head)"

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.seen = a + b
        return self.seen

    async def get_reward(self):
        return 2.0 if self.seen == self.answer else 0.0


def test_an_object_with_state_pays_its_own_reward(make):
    trainer = make(environment_factory=Account, reward=None)
    trainer.train()
    assert log_of(trainer)["rewards/environment/mean"] == pytest.approx((2 + 0 + 2 + 2) / 4)
    assert trainer.tokenizer.decode(trainer._last_groups[0].completions[0].prompt_ids).count("(in your head)") == 1


def test_what_an_environment_pays_is_added_to_the_rewards(make):
    trainer = make(environment_factory=Account)
    assert trainer.rubric.names == ["ends_with_five", "environment"]


@pytest.mark.parametrize(
    ("rubric", "weight"),
    [
        (Rubric("environment"), 1.0),
        (Rubric("environment", retries=1), 1.0),
        (Rubric.from_config(["environment"]), 1.0),
        (Rubric.from_config([{"reward": "environment", "weight": 0.1}]), 0.1),
    ],
)
def test_an_environment_is_paid_once_and_as_the_rubric_says(make, rubric, weight):
    trainer = make(environment_factory=Account, reward=rubric)
    trainer.train()
    assert trainer._last_groups[0].rewards == pytest.approx([2 * weight, 0, 2 * weight, 2 * weight])


def sing() -> str:
    """Sing."""
    return "la" * 40


def test_what_a_tool_says_is_neither_length_nor_repetition_of_the_policys(make):
    turns = ['<tool_call>{"name": "sing", "arguments": {}}</tool_call>', "5"]
    tokenizer, seen = build_talker(), []
    said = [token for turn in turns for token in (*tokenizer(turn)["input_ids"], tokenizer.eos_token_id)]

    def batch(completions, completion_ids):
        seen.extend(completion_ids)
        return [0.0] * len(completions)

    rewards = [brevity(target=len(said), limit=2 * len(said)), repetition(), batch]
    trainer = make(tools=[sing], reward=rewards, script={index: turns for index in range(4)})
    trainer.train()
    share = 1 - len(set(zip(said, said[1:], said[2:], strict=False))) / (len(said) - 2)
    completion = trainer._last_groups[0].completions[0]
    assert completion.scores["brevity"] == 1.0
    assert completion.scores["repetition"] == pytest.approx(-share)
    assert log_of(trainer)["completions/repeated"] == pytest.approx(share)
    assert seen[0] == completion.token_ids, "TRL's functions get every token"


class Unready(Account):
    """Cannot pay before it was played with, lets go of what it holds, and says nothing of an episode without a sum."""

    held = 0

    def reset(self, answer, **columns):
        Unready.held += 1
        self.sums = []
        self.answer = int(answer)

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.sums.append(a + b)
        return a + b

    def get_reward(self):
        return float(self.sums[-1] == self.answer) if self.sums else None

    def close(self):
        Unready.held -= 1


def test_an_object_is_closed_and_may_have_nothing_to_pay(make):
    Unready.held = 1  # one that is looked at is closed without having been prepared
    trainer = make(environment_factory=Unready, reward=None)
    trainer.train()
    assert Unready.held == 0
    assert trainer._last_groups[0].rewards == [1.0, None, 1.0, 1.0]


async def says_it_later(self, **columns):
    return "!"


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("reset", [lambda self, **columns: [{"type": "text", "text": "!"}], says_it_later])
def test_a_reset_that_does_not_answer_with_text_is_a_sentence(make, reset):
    odd = type("Odd", (Account,), {"reset": reset})
    with pytest.raises(UserError, match=r"reset of Odd answered with .* a plain function that answers with text or None"):
        make(environment_factory=odd, reward=None)


class Flaky(Env):
    """Breaks over the second completion of every prompt, after its first turn."""

    made = 0

    def __init__(self, task):
        self.task, self.number = task, Flaky.made % 4
        Flaky.made += 1

    def start(self):
        return self.task.prompt

    def reply(self, completion):
        if self.number == 1:
            raise ConnectionError("nobody is there")
        return None


def test_a_broken_episode_is_dropped_from_its_group_counted_and_noted_once(make, tmp_path):
    script = {0: ["5"], 1: ["5"], 2: ["5 it is"], 3: ["5"]}
    trainer = make(env=Environment(Flaky, starts_with_prompt=True), script=script, config={"env_on_error": "drop", "max_steps": 2})
    Flaky.made = 0
    trainer.train()
    assert [group.rewards for group in trainer._last_groups] == [[1.0, None, 0.0, 1.0]] * 2
    assert [log["episodes/dropped"] for log in trainer.state.log_history if "reward" in log] == [2, 2]
    assert [log["unscored"] for log in trainer.state.log_history if "reward" in log] == [0.25, 0.25]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["episodes_dropped"] == 4
    with contextlib.closing(RunReader(tmp_path / "run")) as reader:
        notes = [note.text for note in reader.notes() if note.kind == "env"]
        assert [completion.advantage for completion in reader.completions(1, 0)][1] == 0
    assert len(notes) == 1
    assert "the environment Flaky raised ConnectionError: nobody is there" in notes[0]
    assert "Traceback" in notes[0]


def test_a_broken_episode_is_neither_solved_nor_unsolved(make):
    @verifier
    def says_five(completion):
        return completion == "5"

    script = {0: ["4"], 1: ["5"], 2: ["5"], 3: ["4"]}
    trainer = make(env=Environment(Flaky, starts_with_prompt=True), script=script, reward=says_five, config={"env_on_error": "drop"})
    Flaky.made = 0
    trainer.train()
    assert log_of(trainer)["solved"] == pytest.approx(1 / 3)


def test_the_default_stops_at_a_broken_environment(make):
    trainer = make(env=Environment(Flaky, starts_with_prompt=True), script={index: ["5"] for index in range(4)})
    Flaky.made = 0
    with pytest.raises(EnvError, match="nobody is there"):
        trainer.train()


def test_a_class_of_ones_own_is_an_environment(make):
    class Twice(Env):
        def __init__(self, task):
            self.task, self.said = task, 0

        def start(self):
            return self.task.prompt

        def reply(self, completion):
            self.said += 1
            return [{"role": "user", "content": "Again."}] if self.said < 2 else None

    trainer = make(env=Twice, script={index: ["5", "6"] for index in range(4)})
    trainer.train()
    assert log_of(trainer)["env/turns"] == 2.0


def test_what_an_environment_reports_may_have_the_name_of_a_tools_figure(make):
    class Calls(Single):
        def finish(self, completion):
            completion.info["tool_calls"] = 3

    trainer = make(env=Calls, script={index: ["5"] for index in range(4)})
    trainer.train()
    assert log_of(trainer)["env/tool_calls"] == 3.0


def test_one_question_with_one_answer_is_what_it_is_without_an_environment(make):
    script = {0: ["5"], 1: ["4"], 2: ["5"], 3: ["x"]}
    with_env, without = make(env=Environment(Single), script=script), make(script=script)
    with_env.train()
    without.train()
    assert torch.equal(weights_of(with_env), weights_of(without))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tools": [add], "env": Single}, "env and tools say two things"),
        ({"env": "guess"}, "env must be an Environment"),
        ({"tools": [add], "template": "{{ messages[0].content }}"}, "no tool calls in a known format"),
        ({"env": Environment(Single, tools=({"type": "function", "function": {"name": "f"}},)), "template": MISTRAL}, "differently"),
        ({"rollout_func": print}, "env="),
        ({"tools": [add], "config": {"max_turns": 3, "max_tool_calling_iterations": 4}}, "two names for one thing"),
        ({"tools": [add], "config": {"max_turns": 0}}, "max_turns=0"),
        ({"tools": [add], "config": {"env_on_error": "dropp"}}, "Did you mean 'drop'"),
    ],
)
def test_what_cannot_work_is_refused_before_training(make, arguments, says):
    with pytest.raises(UserError, match=says):
        make(**arguments)
