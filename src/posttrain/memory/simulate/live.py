"""Which storages are alive, and what for: bytes on the device and on the host, the peak, and what it consisted of.

It sees every operator on its way to torch, forward and backward, and is told by a weak reference when a storage dies. A
view costs nothing, since it has the storage of what it looks at. It works with real and with fake tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REST = "rest"


class LiveStorages(TorchDispatchMode):
    """Inside, new storages are counted. `host`: the device type whose tensors are the host's; all others are the
    device's.

    With `label` a tensor's storage gets a name; what has none is the rest.
    """

    def __init__(self, host: str = "meta") -> None:
        super().__init__()
        self.host = host
        self.parts: dict[str, int] = {}  # bytes on the device by label, now
        self.host_bytes = 0
        self.peak_parts: dict[str, int] = {}  # when the device held most
        self.host_peak = 0
        self._peak = 0
        self._total = 0
        self._known: dict[int, _Storage] = {}

    @property
    def peak(self) -> int:
        """Most bytes that the device held at once."""
        return self._peak

    @property
    def device_bytes(self) -> int:
        return self._total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return out

    def label(self, tensors: Iterable[torch.Tensor], name: str) -> None:
        """From now on these tensors' storages count as `name`; those that were made outside are counted from now on."""
        for tensor in tensors:
            storage = self._note(tensor)
            if storage.on_device:
                self._count(storage.label, -storage.nbytes)
                self._count(name, storage.nbytes)
            storage.label = name

    def restart_peaks(self) -> None:
        """Forget the peaks so far."""
        self._peak, self.peak_parts, self.host_peak = self._total, dict(self.parts), self.host_bytes

    def _note(self, tensor: torch.Tensor) -> _Storage:
        untyped = tensor.untyped_storage()
        key = id(untyped)  # unique while the storage lives, and its end is heard of
        known = self._known.get(key)
        if known is not None:
            return known
        storage = self._known[key] = _Storage(untyped, tensor.device.type != self.host, lambda: self._forget(key))
        if storage.on_device:
            self._count(REST, storage.nbytes)
        else:
            self.host_bytes += storage.nbytes
            self.host_peak = max(self.host_peak, self.host_bytes)
        return storage

    def _forget(self, key: int) -> None:
        storage = self._known.pop(key)
        if storage.on_device:
            self._count(storage.label, -storage.nbytes)
        else:
            self.host_bytes -= storage.nbytes

    def _count(self, label: str, nbytes: int) -> None:
        self.parts[label] = self.parts.get(label, 0) + nbytes
        self._total += nbytes
        if self._total > self._peak:
            self._peak, self.peak_parts = self._total, dict(self.parts)


class _Storage:
    """One storage that is alive."""

    def __init__(self, untyped: torch.UntypedStorage, on_device: bool, at_end: Callable[[], None]) -> None:
        self.nbytes, self.on_device, self.label = untyped.nbytes(), on_device, REST
        self._reference = weakref.ref(untyped, lambda _: at_end())
