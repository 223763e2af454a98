"""Ctrl-C, SIGTERM (a cluster takes its machine back) and SIGHUP (the terminal is gone): the step in progress is
finished and saved, then training ends.

Of several processes any may have been told: whether to stop is agreed on by all after each step. A second signal stops
at once; one that follows within a second is the same one, since launchers pass on to their processes what the terminal
sent them already.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl

from posttrain.trainers.core.ranks import highest

_SAME = 1.0  # seconds within which a second signal is an echo of the first
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Interrupt(TrainerCallback):
    def __init__(self) -> None:
        self.asked = 0  # the number of the signal that this process got. 0: none
        self.agreed = 0  # the same for all processes
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self.asked = self.agreed = 0
        if threading.current_thread() is not threading.main_thread():
            return
        self.restore()
        for number in [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue  # by nohup, or by a script's `&`: whoever started this wants it to go on
            self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._asked_at < _SAME:
            return
        if self.asked:
            raise ending(number)
        self.asked, self._asked_at = number, time.monotonic()
        again = "Ctrl-C again" if number == signal.SIGINT else "a second one"
        told = "interrupted" if number == signal.SIGINT else signal.Signals(number).name
        sentence = f"\n{told}: finishing this step and saving ({again} stops at once)"
        try:
            print(sentence, flush=True)
        except OSError:
            _write_to_nobody()  # the terminal is gone, and no line of a later step may end the training
        except RuntimeError:  # the signal came while a line was being printed
            os.write(1, f"{sentence}\n".encode())

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> TrainerControl:
        if self.agree(args.device):
            control.should_save = True
            control.should_training_stop = True
        return control

    def agree(self, device: torch.device) -> int:
        """The signal that any process got, 0 for none. Every process must call this as often as the others."""
        self.agreed = self.agreed or highest(self.asked, device)
        return self.agreed

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def leave(self) -> None:
        """After training: end as the signal asked for. One that came too late to be agreed on is sent again, now that
        it is not ours."""
        if self.agreed:
            raise ending(self.agreed)
        if self.asked:
            signal.raise_signal(self.asked)


def ending(number: int) -> BaseException:
    """Exit codes are 128 and the signal's number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _write_to_nobody() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            os.dup2(nothing, stream.fileno())
    os.close(nothing)
