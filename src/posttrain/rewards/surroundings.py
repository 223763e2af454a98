"""What a reward changed in this process: restored where that is safe, and always named.

On the thread that trains, everything but environment variables is restored. Elsewhere rewards run beside training, and
a change may be another thread's: it is only named. What a library changes while it is imported stays. Costs 0.3 ms for
all calls of a reward in a batch.
"""

from __future__ import annotations

import locale
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


@dataclass(frozen=True)
class GlobalSetting:
    """Something global. write: restores it; None: it is only named. is_imported: importing a library changes it too."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None] | None
    is_imported: bool = False


class Surroundings:
    """Read when made; `differences` compares, and with `restore` restores. whole: this is the thread that trains."""

    def __init__(self, *, whole: bool) -> None:
        self.settings = [(setting, setting.read()) for setting in (*_everywhere(), *(_of_this_thread() if whole else ()))]
        self.modules = len(sys.modules)
        self.signals = Signals() if whole and threading.current_thread() is threading.main_thread() else None

    @property
    def was_signalled(self) -> bool:
        """Whether a signal arrived meanwhile (Ctrl-C), whose handler may have raised what the reward seems to have
        raised."""
        return self.signals is not None and bool(self.signals.arrived)

    def differences(self, *, restore: bool) -> list[str]:
        found = self.signals.close() if self.signals is not None else []
        has_imported = len(sys.modules) != self.modules
        for setting, before in self.settings:
            if (setting.is_imported and has_imported) or setting.read() == before:
                continue
            found.append(setting.name)
            if restore and setting.write is not None:
                setting.write(before)
        return found


class Signals:
    """Wraps the signal handlers to note their calls. On the main thread only, where handlers run."""

    def __init__(self) -> None:
        self.arrived: list[int] = []
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._during = dict(self._before)
        for number, handler in self._before.items():
            if callable(handler):
                self._during[number] = self._noting(handler)
                signal.signal(number, self._during[number])

    def _noting(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        def note(number: int, frame: Any) -> Any:
            self.arrived.append(number)
            return handler(number, frame)

        return note

    def close(self) -> list[str]:
        """Restores the handlers, and names those that were replaced."""
        found = []
        for number, during in self._during.items():
            now, before = signal.getsignal(number), self._before[number]
            if now is not during:
                found.append(f"the handler of {signal.Signals(number).name}")
            if now is not before and before is not None:
                signal.signal(number, before)
        return found


def _everywhere() -> list[GlobalSetting]:
    """What is the same for all threads, and cheap to read."""
    found = [
        GlobalSetting("the working directory", _directory, os.chdir),
        GlobalSetting("the locale", lambda: locale.setlocale(locale.LC_ALL), lambda value: _ignored(locale.setlocale(locale.LC_ALL, value))),
        GlobalSetting("sys.stdout", lambda: sys.stdout, lambda value: setattr(sys, "stdout", value)),
        GlobalSetting("sys.stderr", lambda: sys.stderr, lambda value: setattr(sys, "stderr", value)),
        GlobalSetting("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    ]
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "default_generator"):  # all of it, not half imported
        found += [
            GlobalSetting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
            GlobalSetting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
            GlobalSetting("torch's precision of float32 products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
            GlobalSetting(
                "torch's deterministic algorithms",
                lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
                lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
            ),
        ]
    return found


def _of_this_thread() -> list[GlobalSetting]:
    """What belongs to a thread, or what only training itself would change meanwhile."""
    found = [
        GlobalSetting("the filters of warnings", lambda: list(warnings.filters), _set_filters, is_imported=True),
        GlobalSetting("environment variables (kept)", os.environ.copy, None, is_imported=True),
        GlobalSetting("the random numbers of Python", random.getstate, _go_on_random),
    ]
    if hasattr(signal, "getitimer"):
        stop = (lambda _: _ignored(signal.setitimer(signal.ITIMER_REAL, 0)),)
        found.append(GlobalSetting("an alarm that was still set", lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0, *stop))
    if (numpy := sys.modules.get("numpy")) is not None and hasattr(numpy, "random"):
        found.append(GlobalSetting("how numpy treats errors", numpy.geterr, lambda value: _ignored(numpy.seterr(**value))))
        found.append(GlobalSetting("the random numbers of numpy", lambda: _numpy_state(numpy), lambda value: _go_on_numpy(numpy, value)))
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "default_generator"):
        found += [
            GlobalSetting("torch's gradient mode", torch.is_grad_enabled, lambda value: _ignored(torch.set_grad_enabled(value))),
            GlobalSetting("torch's inference mode (kept)", torch.is_inference_mode_enabled, None),
            GlobalSetting("torch's default device", torch.get_default_device, lambda value: _set_device(torch, value)),
            GlobalSetting("the random numbers of torch", lambda: _torch_states(torch), lambda value: _go_on_torch(torch, value)),
        ]
    return found


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return os.sep


def _ignored(_: Any) -> None:
    return None


def _set_device(torch: Any, before: Any) -> None:
    torch.set_default_device(None if before == torch.device("cpu") else before)  # one that is set makes every call of torch slower


def _set_filters(before: list[Any]) -> None:
    warnings.filters[:] = before  # type: ignore[index]
    with warnings.catch_warnings():  # leaving it tells the module that its filters are new
        pass


def _go_on_random(before: Any) -> None:
    """Seeded from the state before the reward: a reward that seeds does not make training repeat its numbers, one that
    samples does not get the same numbers in every batch, and a run still repeats and resumes bit by bit."""
    random.setstate(before)
    random.seed(random.getrandbits(64))


def _numpy_state(numpy: Any) -> tuple[Any, ...]:
    name, keys, *rest = numpy.random.get_state()
    return name, keys.tobytes(), *rest


def _go_on_numpy(numpy: Any, before: tuple[Any, ...]) -> None:
    name, keys, *rest = before
    numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
    numpy.random.seed(numpy.random.randint(0, 2**32, dtype=numpy.uint32))


def _torch_states(torch: Any) -> list[bytes]:
    """Of the processor, and of each GPU that is in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [state.numpy().tobytes() for state in (torch.get_rng_state(), *devices)]


def _go_on_torch(torch: Any, before: list[bytes]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(before[0]), dtype=torch.uint8))
    seed = int(torch.randint(2**62, ()))
    torch.default_generator.manual_seed(seed)
    for index in range(len(before) - 1):
        torch.cuda.default_generators[index].manual_seed(seed + 1 + index)
