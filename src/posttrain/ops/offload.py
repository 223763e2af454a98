"""Activation checkpoints in host memory: what the forward saves for the backward leaves the device and comes back just
before it is needed.

It hooks saved tensors, not layers. On CUDA the copies run beside the computation on a stream of their own, into pinned
memory. At most `KEPT` tensors wait on the device (the last ones never leave: backward needs them at once), one is on
its way out, and one on its way back.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from posttrain.sizes import OFFLOAD_SMALLEST

KEPT = 1


def offloading(device: torch.device) -> AbstractContextManager[object]:
    """For a forward on `device`: what its backward needs waits on the host. Leave it before the backward, which may
    save tensors of its own.

    On a CPU nothing happens: the host is the device.
    """
    return nullcontext() if device.type == "cpu" else ActivationOffload()


class ActivationOffload(torch.autograd.graph.saved_tensors_hooks):
    """The hooks. For one forward; the backward may come later, once. `host` is the device that plays the host."""

    def __init__(self, *, host: str = "cpu", smallest: int = OFFLOAD_SMALLEST) -> None:
        super().__init__(self.pack, self.unpack)
        self.host, self.smallest = host, smallest
        self.offloaded_bytes = 0
        self._waiting: deque[_Saved] = deque()  # on the device, oldest first
        self._leaving: _Saved | None = None  # its copy was begun last
        self._known: dict[tuple[Any, ...], weakref.ref[_Saved]] = {}
        self._order: list[weakref.ref[_Saved]] = []  # as they were saved
        self._side: torch.cuda.Stream | None = None  # None: no CUDA tensor was seen, copies are synchronous

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps in the place of `tensor`: itself, or a record of where it is."""
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if is_weight or tensor.nbytes < self.smallest or tensor.layout is not torch.strided:
            return tensor
        key = (id(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        before = self._known[key]() if key in self._known else None
        if before is not None and before.is_of(tensor):
            return before  # several operators keep the same tensor
        if tensor.is_cuda and self._side is None:
            self._side = torch.cuda.Stream(tensor.device)
        saved = _Saved(tensor, len(self._order))
        self._known[key] = weakref.ref(saved)
        self._order.append(self._known[key])
        self._waiting.append(saved)
        while len(self._waiting) > KEPT:
            self._send(self._waiting.popleft())
        return saved

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor on its device again; the one that was saved before it is sent for."""
        if not isinstance(packed, _Saved):
            assert isinstance(packed, torch.Tensor)  # small ones stay as they are
            return packed
        tensor = self._fetched(packed)
        if self._side is not None and packed.arrival is not None:
            torch.cuda.current_stream(tensor.device).wait_event(packed.arrival)
        packed.again = weakref.ref(tensor)  # another operator may want it while it is there
        packed.fetched = None
        self._leaving = None
        for reference in reversed(self._order[: packed.number]):
            earlier = reference()
            if earlier is not None and earlier.there is None:
                earlier.fetched = self._fetched(earlier)
                break
        return tensor

    def _send(self, saved: _Saved) -> None:
        """Begin the copy to the host; the one before it, whose copy had all this time, is let go."""
        self._let_go()
        tensor = saved.on_device()
        if self._side is None:
            saved.on_host = tensor.to(self.host, copy=True)
        else:
            saved.on_host = torch.empty_like(tensor, device=self.host, pin_memory=True)
            self._side.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self._side):
                saved.on_host.copy_(tensor, non_blocking=True)
                saved.departure = self._side.record_event()
        self.offloaded_bytes += tensor.nbytes
        self._leaving = saved

    def _let_go(self) -> None:
        leaving, self._leaving = self._leaving, None
        if leaving is None:
            return
        if leaving.departure is not None:  # the computation may not write where the copy still reads
            torch.cuda.current_stream(leaving.device).wait_event(leaving.departure)
        leaving.there = None

    def _fetched(self, saved: _Saved) -> torch.Tensor:
        """On the device, or on its way there."""
        tensor = saved.present
        if tensor is not None:
            return tensor
        assert saved.on_host is not None
        if self._side is None:
            return saved.on_host.to(saved.device, copy=True)
        tensor = torch.empty_like(saved.on_host, device=saved.device)
        self._side.wait_stream(torch.cuda.current_stream(saved.device))  # the memory may have been another tensor's until now
        with torch.cuda.stream(self._side):
            tensor.copy_(saved.on_host, non_blocking=True)
            saved.arrival = self._side.record_event()
        return tensor


class _Saved:
    """One saved tensor: on the device, on the host, or on both for a while."""

    def __init__(self, tensor: torch.Tensor, number: int) -> None:
        self.number, self.device, self._version = number, tensor.device, tensor._version
        self._storage = weakref.ref(tensor.untyped_storage())
        self.there: torch.Tensor | None = tensor.detach()  # None: it has left
        self.on_host: torch.Tensor | None = None  # None: it never left
        self.fetched: torch.Tensor | None = None  # sent for, not yet asked for. None: not sent for
        self.again: weakref.ref[torch.Tensor] | None = None  # what it was last unpacked to. None: it was not
        self.departure: torch.cuda.Event | None = None  # None: copied synchronously, or not at all
        self.arrival: torch.cuda.Event | None = None

    @property
    def present(self) -> torch.Tensor | None:
        """The tensor if it is on the device, or will be."""
        if self.there is not None:
            return self.on_device()
        return self.fetched if self.fetched is not None else self.again() if self.again is not None else None

    def is_of(self, tensor: torch.Tensor) -> bool:
        return self._storage() is tensor.untyped_storage()  # its address alone may be another's by now

    def on_device(self) -> torch.Tensor:
        assert self.there is not None
        if self.there._version != self._version:
            raise RuntimeError("a tensor that backward needs was changed in place after it was saved")
        return self.there
