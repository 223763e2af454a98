"""The live view of a run: a panel that redraws itself on a terminal or in a notebook, one plain line per log anywhere
else.

A callback of transformers' Trainer, of the main process alone. It draws only between steps, from the training thread.
No text of a model or a user is ever read as markup, and none reaches the terminal with its control characters.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.characters import spelled, visible
from posttrain.tracking.advice import Advisor
from posttrain.tracking.lines import Words, by_data_set, duration, is_worth_a_line, joined, line, words
from posttrain.types import Completion

SHOWN = 400  # characters of a completion that `samples` prints


class _Output:
    """Standard output, whichever it is when it is written to. What its encoding lacks is written as escapes: it may be
    a pipe in cp1252."""

    def write(self, text: str) -> int:
        return self._now().write(spelled(text, self._now().encoding))

    def flush(self) -> None:
        self._now().flush()

    def isatty(self) -> bool:
        return self._now().isatty()

    def fileno(self) -> int:
        return self._now().fileno()

    @property
    def encoding(self) -> str:
        return self._now().encoding or "utf-8"

    @staticmethod
    def _now() -> TextIO:
        proxied: TextIO = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # a live view takes standard output over
        return proxied


def make_console() -> Console:
    return Console(file=cast(TextIO, _Output()), highlight=False)


class TerminalView(TrainerCallback):
    """Shows what the logs hold, for any trainer. `close()` gives the terminal back after training failed or was
    interrupted."""

    def __init__(self, console: Console | None = None, note: Callable[[str, str], None] | None = None) -> None:
        """`note(kind, text)` hears every warning too: the run's record."""
        self._note: Callable[[str, str], None] = note or (lambda kind, text: None)
        self.console = make_console() if console is None else console
        self._live: Live | None = None  # None: plain lines, or not training
        self._advisor = Advisor()
        self._logs: Mapping[str, float] = {}
        self._begun = (0, 0.0)  # (step, clock) when this process began to train

    def plan(self, *lines: str | None) -> None:
        """The trainer's plan, before anything is spent. None: that line has nothing to say."""
        for text in lines:
            if text is not None:
                self._print(Text(visible(text), style="bold"))

    def samples(self, prompt: str, completions: Sequence[Completion]) -> None:
        """One prompt and its completions, best first; each on one line, control characters written out."""
        self._print(Text.assemble(("prompt  ", "dim"), _cut(prompt)))
        for completion in sorted(completions, key=lambda completion: float("-inf") if completion.reward is None else completion.reward, reverse=True):
            reward = "    n/a" if completion.reward is None else f"{completion.reward:+7.2f}"
            self._print(Text.assemble((f"{reward}  ", "bold"), _cut(completion.text), ("  [cut]" if completion.is_truncated else "", "dim")))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()
        self._advisor = Advisor(args.to_dict().get("max_completion_length"))
        self._logs, self._begun = {}, (state.global_step, time.perf_counter())
        if state.is_world_process_zero and _can_redraw(self.console):
            self._live = Live(self._panel(state), console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._redraw(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        is_evaluation = any(name.startswith("eval_") for name in logs)
        if is_evaluation:
            for data_set, part in by_data_set(logs).items():
                if is_worth_a_line(part):
                    self._print(Text(line(part, f"eval{' of ' if data_set else ''}{visible(data_set)} after step {state.global_step}")))
        elif self._live is None and is_worth_a_line(logs):
            self._print(Text(line(logs, f"step {state.global_step}/{state.max_steps}", f"eta {self._eta(state)}")))
        for sentence in self._advisor.read(logs):
            self._print(Text(f"warning: {visible(sentence)}", style="yellow"))
            self._note("warning", sentence)
        if not is_evaluation and is_worth_a_line(logs):
            self._logs = logs
            self._redraw(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.close()
        step, clock = self._begun
        done = f"{state.global_step - step} steps in {duration(time.perf_counter() - clock)}"
        self._print(Text(line(self._logs, done)))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)  # above the panel, if there is one

    def _redraw(self, state: TrainerState) -> None:
        if self._live is not None:
            self._live.update(self._panel(state), refresh=True)

    def _eta(self, state: TrainerState) -> str:
        step, clock = self._begun
        done = state.global_step - step
        return duration((time.perf_counter() - clock) / done * (state.max_steps - state.global_step)) if done else "?"

    def _panel(self, state: TrainerState) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(state.max_steps, 1), completed=state.global_step, width=24)
        head.add_row(Text(f"step {state.global_step}/{state.max_steps}", style="bold"), bar, Text(f"eta {self._eta(state)}"))
        return Group(head, *_rows(words(self._logs)))


def _rows(said: Words) -> list[Text]:
    rows = [("", joined(said.metrics)), ("rewards  ", joined(said.rewards)), ("time  ", said.speed)]
    return [Text.assemble("  ", (title, "dim"), row) for title, row in rows if row]


def _can_redraw(console: Console) -> bool:
    if console.is_jupyter:  # rich redraws there through ipywidgets, and shows nothing without
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


def _cut(text: str) -> str:
    return visible(text[:SHOWN]) + (" ..." if len(text) > SHOWN else "")
