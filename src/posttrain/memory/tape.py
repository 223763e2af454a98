"""Autograd without numbers: tensors that only have a size, what each operation keeps for its backward, and the most
that was ever live.

A tensor's memory is given back when the last Python name for it goes, as torch does it; so a layer written with these
(`layer.py`) has the peak of the real one, in microseconds and without torch. Bytes throughout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from posttrain.sizes import OFFLOAD_SMALLEST

REST, GRADIENTS = "activations", "gradients"


class LiveBytes:
    """How much is live under which label, and the most that ever was."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.parts: dict[str, int] = {}
        self.peak_parts: dict[str, int] = {}  # complete once something was given back after the peak

    def take(self, size: int, label: str) -> None:
        if size < 0 and self.live == self.peak:
            self.peak_parts = dict(self.parts)
        self.live += size
        self.parts[label] = self.parts.get(label, 0) + size
        self.peak = max(self.peak, self.live)

    def passing(self, size: int, label: str = REST) -> None:
        """Taken and given back at once."""
        if self.live + size > self.peak:
            self.take(size, label)
            self.take(-size, label)


class Storage:
    """Some bytes of a memory, for as long as somebody holds this object."""

    __slots__ = ("_label", "_memory", "away", "size")

    def __init__(self, memory: LiveBytes, size: int, label: str = REST) -> None:
        self._memory, self.size, self._label = memory, size, label
        self.away: Away | None = None  # None: it was not offloaded
        memory.take(size, label)

    def __del__(self) -> None:
        self._memory.take(-self.size, self._label)

    def relabel(self, label: str) -> None:
        self._memory.take(-self.size, self._label)
        self._label = label
        self._memory.take(self.size, label)


class Away:
    """Something that was offloaded to the host."""

    __slots__ = ("back", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.back: Storage | None = None  # None: it is not on the device again


class Slot:
    """Where the gradient of a tensor gathers."""

    __slots__ = ("grad", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.grad: _Grad | None = None


class _Grad:
    """A gradient and how many slots hold it: what an addition hands to both of its inputs may not be added to in
    place."""

    __slots__ = ("holders", "storage")

    def __init__(self, storage: Storage) -> None:
        self.storage, self.holders = storage, 0


class Tensor:
    """`elements` numbers of `itemsize` bytes. `slot` is None where no gradient is wanted."""

    __slots__ = ("elements", "itemsize", "slot", "storage")

    def __init__(self, elements: int, itemsize: int, storage: Storage, slot: Slot | None) -> None:
        self.elements, self.itemsize, self.storage, self.slot = elements, itemsize, storage, slot

    @property
    def size(self) -> int:
        return self.elements * self.itemsize


class _Node:
    __slots__ = ("after", "inputs", "is_tied", "label", "out", "saved", "shares", "weight_grad", "weights", "work")

    def __init__(self, out: Slot, inputs: list[Slot], saved: list[Storage | Away], shares: bool, label: str) -> None:
        self.out, self.inputs, self.saved, self.shares, self.label = out, inputs, saved, shares, label
        self.work = self.after = self.weight_grad = self.weights = 0
        self.is_tied = False


class Tape:
    """Records operations while `recording`, and plays them backwards.

    offloads: what is kept for the backward waits on the host. is_first: weights have no gradients yet; those that are
    made stay.
    """

    def __init__(self, *, recording: bool = True, offloads: bool = False, is_first: bool = False) -> None:
        self.memory = LiveBytes()
        self.recording, self.offloads, self.is_first = recording, offloads, is_first
        self._gradients: list[Storage] = []
        self.host = 0  # bytes that were offloaded
        self.casts: list[Storage] | None = None  # autocast's copies of weights, for as long as it keeps them. None: it keeps none
        self._nodes: list[_Node] = []
        self._staying: deque[Storage] = deque(maxlen=2)  # the latest tensor waits, the one before it is leaving; neither is let go before the end
        self._order: list[Away] = []
        self._tied: Storage | None = None  # half of the gradient of a weight with two uses. None: neither was come by

    def tensor(self, elements: int, itemsize: int, *, wants_grad: bool = False, label: str = REST) -> Tensor:
        """One that comes from outside."""
        size = elements * itemsize
        return Tensor(elements, itemsize, Storage(self.memory, size, label), Slot(size) if wants_grad and self.recording else None)

    def view(self, x: Tensor, elements: int) -> Tensor:
        """A slice of x. Its backward makes a gradient of the whole of x."""
        return self.op(elements, x.itemsize, x, into=x.storage)

    def op(
        self,
        elements: int,
        itemsize: int,
        *inputs: Tensor,
        saves: Iterable[Tensor | Storage] = (),
        work: int = 0,
        back_work: int = 0,
        after: int = 0,
        weight_grad: int = 0,
        weights: int = 0,
        shares: bool = False,
        trains: bool = False,
        is_tied: bool = False,
        into: Storage | None = None,
        label: str = REST,
    ) -> Tensor:
        """A new tensor from `inputs`.

        saves: kept for the backward. work, back_work: scratch of the two directions, under `label`. after: scratch once
        the gradients are made. weight_grad: the gradient of a weight as it is made beside that of the inputs; weights:
        as it is kept. shares: the inputs get the output's gradient itself, where it is as large. trains: the output
        wants a gradient even if no input does. is_tied: the weight has two uses, whose gradients wait for each other.
        into: the memory of the output, if it has some already.
        """
        size = elements * itemsize
        storage = Storage(self.memory, size) if into is None else into
        self.memory.passing(work, label)
        slots = [tensor.slot for tensor in inputs if tensor.slot is not None]
        if not self.recording or not (slots or trains):
            return Tensor(elements, itemsize, storage, None)
        out = Slot(size)
        kept = [self._kept(item.storage if isinstance(item, Tensor) else item) for item in saves]
        node = _Node(out, slots, kept, shares, label)
        node.work, node.after, node.weight_grad, node.weights = back_work, after, weight_grad, weights
        node.is_tied = is_tied
        self._nodes.append(node)
        return Tensor(elements, itemsize, storage, out)

    def _kept(self, storage: Storage) -> Storage | Away:
        if not self.offloads or storage.size < OFFLOAD_SMALLEST:
            return storage
        if storage.away is None:
            storage.away = Away(storage.size)
            self._order.append(storage.away)
            if self._staying:
                self.host += self._staying[-1].size
            self._staying.append(storage)
        return storage.away

    def backward(self, slot: Slot, grad: Storage) -> None:
        """From the gradient of one tensor back to all that wanted one. What was recorded is gone afterwards."""
        _put(slot, _Grad(grad), self.memory)
        del grad
        while self._nodes:
            node = self._nodes.pop()
            if node.out.grad is not None:  # something came back to it
                self._run(node)

    def _run(self, node: _Node) -> None:
        incoming = node.out.grad
        assert incoming is not None
        node.out.grad = None
        incoming.holders -= 1
        self._fetch([kept for kept in node.saved if isinstance(kept, Away)])
        scratch = Storage(self.memory, node.work, node.label) if node.work else None
        weight = Storage(self.memory, node.weight_grad) if node.weight_grad else None
        outgoing = [
            incoming if node.shares and slot.size == incoming.storage.size else _Grad(Storage(self.memory, slot.size)) for slot in node.inputs
        ]
        self.memory.passing(node.after, node.label)
        del scratch
        if node.is_tied:
            self._tied = weight if self._tied is None else None
        node.saved.clear()
        del incoming, weight
        if self.is_first and node.weights:
            self._gradients.append(Storage(self.memory, node.weights, GRADIENTS))
        for slot in node.inputs:
            _put(slot, outgoing.pop(0), self.memory)

    def _fetch(self, wanted: list[Away]) -> None:
        """Back from the host, and the one that was saved before them is sent for. Those that nothing earlier wants are
        let go."""
        if not wanted:
            return
        while self._order and self._order[-1] not in wanted:
            self._order.pop().back = None
        for away in [*wanted, *self._order[-1 - len(wanted) : -len(wanted)]]:
            if away.back is None and not any(storage.away is away for storage in self._staying):
                away.back = Storage(self.memory, away.size, "checkpoints")


def _put(slot: Slot, grad: _Grad, memory: LiveBytes) -> None:
    """Into the slot, or onto what is there: in place if nobody else holds that."""
    held = slot.grad
    if held is None:
        slot.grad = grad
        grad.holders += 1
    elif held.holders > 1:
        held.holders -= 1
        slot.grad = _Grad(Storage(memory, slot.size))
        slot.grad.holders = 1
