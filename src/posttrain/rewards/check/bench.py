"""Scores texts with a rubric: the form in which gold answers earn most, what they earn, and what a wrong answer earns.

Every text is scored as its row's only completion. A reward that breaks is noted, also if its policy drops the
completion, and the text counts as not scored. `answer` is the gold column.
"""

from __future__ import annotations

import functools
import re
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from typing import Any

from posttrain.errors import RewardError, UserError
from posttrain.rewards.check.texts import FORMS, REASONING, SAMPLES
from posttrain.rewards.rubric import Rubric
from posttrain.types import Completion, Group, StopReason, Task

Probe = tuple[int, str]  # (row, completion)
_PIECE = re.compile(r"\s*\w{1,6}|\s*[^\w\s]|\s+")  # stands for a token: about as long as one
FULL = 0.02  # fraction of the range by which gold answers may miss the top: a length schedule gives its last percent to the empty text
SLACK = 0.01  # fraction of the difference between wrong and right that is tolerated
SHORT = 40  # characters of a gold answer that is right or wrong as a whole


class TooSlow(BaseException):
    """A call took too long. Not an Exception: a reward that catches everything must not catch this."""


class Bench:
    """A rubric, the rows to test it with and the form of completions. Raises UserError if it cannot score any gold
    answer."""

    def __init__(self, rubric: Rubric, rows: Sequence[dict[str, Any]] | None = None, *, form: str | None = None, patience: float = 10.0) -> None:
        self.rubric = rubric
        self.patience = patience  # seconds for one call before it is given up
        self.errors: list[tuple[str, str]] = []  # (text, what happened)
        self._tasks = _tasks(rubric, rows)
        self.golds = [str(task.columns["answer"]) for task in self._tasks]
        self.forms = _checked_forms(form)
        self.form = self._form_that_earns_most()
        self.errors = []
        self.gold = self.score(self.each(lambda row: self.write(row, self.golds[row])))
        self.plainly_wrong = self.score(self.each(lambda row: self.write(row, self.wrong_answer(row))))
        self.wrong = self._wrong_scores()
        self.is_graded = self._nearer_earns_more()

    def __len__(self) -> int:
        return len(self._tasks)

    def prompt(self, row: int) -> str:
        prompt = self._tasks[row].prompt
        return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)

    @property
    def has_reasoning(self) -> bool:
        return "{reasoning}" in self.form

    @property
    def reads_the_answer(self) -> bool:
        """Whether some wrong answer earns less than the right one."""
        return any(gold is not None and wrong is not None and wrong < gold for gold, wrong in zip(self.gold, self.plainly_wrong, strict=True))

    @property
    def is_short(self) -> bool:
        """Whether gold answers are short enough to be right or wrong as a whole; of longer ones a part may earn a part
        of the reward."""
        return all(len(gold) <= SHORT and "\n" not in gold for gold in self.golds)

    @property
    def should_read(self) -> bool:
        """Whether it says that it judges answers: it decides right or wrong, or asks for a column."""
        return self.rubric.can_decide() or bool(self.rubric.columns_needed())

    def limit(self, row: int, *, strict: bool = False) -> float:
        """What text without the answer may earn: as much as a wrong answer, plus 1 % of what separates right from
        wrong.

        Where a part of the reward can be earned (long answers, numbers that are near) it must be less than a right
        answer, unless `strict`.
        """
        right, low = self.gold[row], self.wrong[row]
        if right is None or low is None:
            return float("inf")
        earns_a_part = (self.is_graded and not strict) or not self.is_short
        return right - SLACK * (right - low) if earns_a_part else low + SLACK * (right - low)

    def write(self, row: int, answer: str, reasoning: str = REASONING) -> str:
        return self.form.replace("{reasoning}", reasoning).replace("{answer}", answer)

    def each(self, text_of: Any) -> list[Probe]:
        return [(row, text_of(row)) for row in range(len(self))]

    def wrong_answer(self, row: int) -> str:
        """Far from right: another number of another size, or other text."""
        number = as_number(self.golds[row])
        if number is not None:
            return str(int(abs(number)) * 997 + 50_021)
        other = next((gold for gold in self.golds[row + 1 :] + self.golds[:row] if gold != self.golds[row]), None)
        return other if other is not None else "".join(sorted(self.golds[row])) + "q"

    def score(self, probes: list[Probe]) -> list[float | None]:
        """The total of each; None where it was not scored, or where the reward broke, which is noted."""
        try:
            completions, broken = self._scored(probes)
        except (RewardError, UserError, TooSlow) as error:
            completions, broken = [], f"no answer after {self.patience:g} s" if isinstance(error, TooSlow) else str(error)
        if broken is None:
            return [completion.reward for completion in completions]
        if len(probes) == 1:
            self._note(probes[0][1], broken)
            return [None]
        return [score for probe in probes for score in self.score([probe])]

    def parts(self, probe: Probe) -> dict[str, float | None]:
        """The scores of the rewards, by name."""
        [completion], _ = self._scored([probe])
        return completion.scores

    def timed(self, probe: Probe) -> tuple[float | None, float]:
        """(total, seconds)."""
        started = time.perf_counter()
        [score] = self.score([probe])
        return score, time.perf_counter() - started

    def _scored(self, probes: list[Probe]) -> tuple[list[Completion], str | None]:
        """(rollouts, how a reward broke over some of them, if its policy drops those). Raises RewardError if it stops,
        and TooSlow."""
        groups = [Group(self._tasks[row], [self._rollout(text)]) for row, text in probes]
        with _deadline(self.patience):
            report = self.rubric.score(groups)
        broken = next((trace.partition("\n")[0] for trace in report.traces.values()), None)
        return [group.completions[0] for group in groups], broken

    def _rollout(self, text: str) -> Completion:
        ids = list(token_ids(text))
        messages = None if isinstance(self._tasks[0].prompt, str) else [{"role": "assistant", "content": text}]
        return Completion([0], ids, [True] * len(ids), [0.0] * len(ids), [0.0] * len(ids), StopReason.STOP, text, messages=messages)

    def _note(self, text: str, said: str) -> None:
        if (text, said) not in self.errors:
            self.errors.append((text, said))

    def _form_that_earns_most(self) -> str:
        """The first of those with the highest mean over gold answers. Where text prompts break every form, prompts
        become conversations."""
        best = self._best_form()
        if best is None and isinstance(self._tasks[0].prompt, str):
            self._tasks = [Task(task.id, [{"role": "user", "content": task.prompt}], task.columns) for task in self._tasks]
            best = self._best_form()
        if best is None:
            said = self.errors[0][1] if self.errors else "every score was None"
            raise UserError(f"no gold answer could be scored: {said}. Give rows with the columns that it reads, and the form of a good completion")
        return best

    def _best_form(self) -> str | None:
        best: tuple[float, str] | None = None
        for form in self.forms:
            self.form = form
            scores = [score for score in self.score(self.each(lambda row: self.write(row, self.golds[row]))) if score is not None]
            mean = sum(scores) / len(scores) if scores else None
            if mean is not None and (best is None or mean > best[0] + 1e-9):
                best = (mean, form)
        return None if best is None else best[1]

    def _wrong_scores(self) -> list[float | None]:
        """The better of a wrong answer and the same after many words: a reward may judge length too."""
        long_winded = "Let me think about that for a while. " * 200 + "\n"
        long = self.score(self.each(lambda row: long_winded + self.write(row, self.wrong_answer(row))))
        pairs = zip(self.plainly_wrong, long, strict=True)
        return [max((score for score in pair if score is not None), default=None) for pair in pairs]

    def _nearer_earns_more(self) -> bool:
        """Whether a wrong number beside the right one earns more than one far off."""
        self.is_graded = False
        near = [(row, self.write(row, str(int(number) + 1))) for row, gold in enumerate(self.golds) if (number := as_number(gold)) is not None]
        return any(score is not None and score > self.limit(row) for (row, _), score in zip(near, self.score(near), strict=True))


@functools.lru_cache(maxsize=4096)
def token_ids(text: str) -> tuple[int, ...]:
    """Stand-ins for a tokenizer's: equal pieces of text have equal ids."""
    return tuple(zlib.crc32(piece.encode("utf-8", "surrogatepass")) for piece in _PIECE.findall(text))


def as_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() and abs(number) < 10**30 else None


def _tasks(rubric: Rubric, rows: Sequence[dict[str, Any]] | None) -> list[Task]:
    needed = rubric.columns_needed()
    if rows is None:
        rows = next((sample for sample in SAMPLES if set(needed) <= set(sample[0])), None)
        if rows is None:
            raise UserError(f"it reads the columns {', '.join(needed)}; give rows that have them (--data), with the gold answers in `answer`")
    if not rows:
        raise UserError("the data has no rows")
    rubric.check_columns(rows[0])
    for number, row in enumerate(rows):
        if row.get("answer") is None or "prompt" not in row:
            raise UserError(f"row {number} needs `prompt` and `answer` (the gold answer); it has: {', '.join(row)}")
    return [Task(number, row["prompt"], {name: value for name, value in row.items() if name != "prompt"}) for number, row in enumerate(rows)]


def _checked_forms(form: str | None) -> tuple[str, ...]:
    if form is None:
        return FORMS
    if "{answer}" not in form:
        raise UserError(f"the form {form!r} does not say where the {{answer}} stands")
    return (form,)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raises TooSlow in the main thread of a POSIX system, also inside a regular expression; elsewhere calls are
    awaited for ever."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
