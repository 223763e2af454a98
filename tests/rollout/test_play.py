from posttrain.rollout.hf import HFEngine
from posttrain.rollout.local.engine import LocalEngine
from posttrain.rollout.play import generate, play
from posttrain.types import RequestOutput, Sampling, StopReason, Task


class Echo:
    """An engine that finishes requests in reverse order; a completion's tokens are its key."""

    def __init__(self):
        self.requests = []

    def submit(self, request):
        self.requests.append(request)

    def step(self):
        request = self.requests.pop()
        return [RequestOutput(request.id, list(request.key), [0.0] * 5, [-1.0] * 5, StopReason.STOP, 3)]


def play_echo(tasks, **kwargs):
    return play(tasks, [[1, 2]] * len(tasks), Echo(), Sampling(5), num_generations=3, seed=11, step=4, decode=str, **kwargs)


def test_groups_come_in_the_order_of_tasks_and_rollouts_in_the_order_of_index():
    groups = play_echo([Task(8, "a"), Task(2, "b")])
    assert [group.task.id for group in groups] == [8, 2]
    assert [completion.token_ids for completion in groups[1].completions] == [[11, 4, 2, index, 0] for index in range(3)]
    completion = groups[0].completions[0]
    assert (completion.prompt_ids, completion.sampled, completion.text, completion.policy_version) == ([1, 2], [True] * 5, "[11, 4, 8, 0, 0]", 3)
    assert completion.sampled_logps == [-1.0] * 5


def test_a_task_twice_in_a_batch_makes_two_groups_with_their_own_numbers():
    groups = play_echo([Task(8, "a"), Task(8, "a")])
    keys = [tuple(completion.token_ids) for group in groups for completion in group.completions]
    assert len(set(keys)) == 6
    assert keys[:3] == [tuple(r.token_ids) for r in play_echo([Task(8, "a")])[0].completions]


def test_conversational_prompts_get_messages_and_text_prompts_none():
    groups = play_echo([Task(0, [{"role": "user", "content": "hi"}]), Task(1, "hi")])
    assert groups[0].completions[0].messages == [{"role": "assistant", "content": groups[0].completions[0].text}]
    assert groups[1].completions[0].messages is None


def test_a_group_is_announced_when_its_last_completion_is_there():
    announced = []
    groups = play_echo([Task(0, "a"), Task(1, "b")], on_group=announced.append)
    assert [group.task.id for group in announced] == [1, 0]
    assert {id(group) for group in announced} == {id(group) for group in groups}


def test_generate_returns_completions_in_the_order_of_prompts(tiny, prompts):
    model = tiny()
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    fast = generate(model, None, prompts, sampling, num_generations=2)
    slow = generate(model, None, prompts, sampling, engine=HFEngine(), num_generations=2)
    assert [[c.token_ids for c in row] for row in fast] == [[c.token_ids for c in row] for row in slow]
    assert [len(row) for row in fast] == [2] * 6


def test_the_same_step_drawn_again_gives_the_same_tokens(tiny, prompts):
    model = tiny()
    engine = LocalEngine(max_slots=5)
    tasks = [Task(i, "p") for i in range(3)]
    with engine.serving(model, version=0):
        once, again, later = (play(tasks, prompts[:3], engine, Sampling(6), num_generations=4, seed=1, step=step, decode=str) for step in (0, 0, 1))
    tokens = [[[r.token_ids for r in group.completions] for group in groups] for groups in (once, again, later)]
    assert tokens[0] == tokens[1] != tokens[2]
