"""One decoder layer on the tape: the operations of transformers' Llama, Mistral, Qwen, Phi and Gemma layers, of PEFT's
LoRA and of bitsandbytes' 4-bit linear, in their order, with what each keeps for its backward. Sizes only; the other
parts of a step are in `step.py`.

S tokens of the stream; D, F, H, Hkv, d as in `shapes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.memory.shapes import Linear, Shape
from posttrain.memory.tape import Storage, Tape, Tensor
from posttrain.sizes import ATTENTION_ROWS

Rows = Callable[[Tape, Tensor], Tensor]  # what treats every row of a tensor alike


@dataclass(frozen=True)
class Arithmetic:
    """In which precision a layer works, and by which ways. Bytes of a number each."""

    stored: int  # weights that are not quantised, and so the residual stream
    autocast: int | None  # None: no autocast
    four_bits: bool  # linear layers in NF4
    trains_weights: bool
    rank: int | None  # of LoRA adapters; None: there are none
    targets: tuple[str, ...] | None = None  # names of the linear layers that have them; None: all
    adapter: int = 4
    is_fused: bool = False  # attention by the CPU's kernel; otherwise posttrain.ops.prefix_plain, with explicit masks
    attention_work: int | None = None  # what that kernel computes in; None: what it is given
    is_bridged: bool = False  # several completions look back at one prompt; otherwise the stream is one causal run
    tile_rows: int | None = None  # of posttrain.ops.tiled; None: no tiles

    def adapts(self, layer: Linear) -> bool:
        return self.rank is not None and (self.targets is None or layer.name in self.targets)


class Layer:
    """A decoder layer for streams of `tokens` tokens. `window`: how far it sees; None: everything."""

    def __init__(self, shape: Shape, arithmetic: Arithmetic, tokens: int, window: int | None) -> None:
        self.shape, self.a, self.tokens = shape, arithmetic, tokens
        self.window = window if window is not None and window < tokens else None
        self.linears = {linear.name: linear for linear in shape.linears}

    def __call__(self, t: Tape, x: Tensor) -> Tensor:
        """x (S, D) -> (S, D)"""
        sandwich = self.shape.family.sandwich
        hidden = self.norm(t, x)
        hidden = self._attention(t, hidden)
        hidden = self.norm(t, hidden) if sandwich else hidden
        x = _add(t, x, hidden)
        hidden = self.norm(t, x)
        hidden = self._tiled(t, hidden, self._mlp, ("gate_up_proj",) if self.shape.family.is_fused else ("gate_proj", "up_proj"), "down_proj")
        hidden = self.norm(t, hidden) if sandwich else hidden
        return _add(t, x, hidden)

    def norm(self, t: Tape, x: Tensor) -> Tensor:
        return self._tiled(t, x, self._norm)

    def _linear(self, t: Tape, x: Tensor, name: str) -> Tensor:
        return self._tiled(t, x, lambda t, x: linear(t, x, self.linears[name], self.a), (name,))

    def _norm(self, t: Tape, x: Tensor) -> Tensor:
        """RMSNorm, computed in float32. Its weight is multiplied in the dtype of x, in Gemma in float32 too."""
        wide = cast(t, x, 4)
        variance = t.op(0, 4, wide, saves=(wide,), work=wide.size, back_work=3 * wide.size)
        unit = t.op(wide.elements, 4, wide, variance, saves=(wide,), back_work=wide.size)
        del wide
        if not self.shape.family.sandwich:
            unit = cast(t, unit, x.itemsize)
        trains = self.a.trains_weights
        scaled = t.op(unit.elements, unit.itemsize, unit, saves=(unit,) if trains else (), back_work=unit.size if trains else 0)
        del unit
        return cast(t, scaled, x.itemsize)

    def _attention(self, t: Tape, x: Tensor) -> Tensor:
        shape = self.shape
        if shape.family.is_fused:
            qkv = self._linear(t, x, "qkv_proj")
            q, k, v = (t.view(qkv, self.tokens * width) for width in (shape.q, shape.kv, shape.kv))
            del qkv
        else:
            q, k, v = (self._linear(t, x, name) for name in ("q_proj", "k_proj", "v_proj"))
        if shape.family.qk_norm:
            q = self.norm(t, q)
            k = self.norm(t, k)
        q, k = rope(t, q, x.itemsize), rope(t, k, x.itemsize)
        attend = fused if self.a.is_fused and self.window is None else chunked
        out = attend(t, self, q, k, v)
        return self._linear(t, out, "o_proj")  # q, k, v are held until here

    def _mlp(self, t: Tape, x: Tensor) -> Tensor:
        """down(act(gate(x)) * up(x))"""
        if self.shape.family.is_fused:
            both = linear(t, x, self.linears["gate_up_proj"], self.a)
            gate, up = t.view(both, both.elements // 2), t.view(both, both.elements // 2)
            del both
            act = t.op(gate.elements, gate.itemsize, gate, saves=(gate,))
        else:
            gate = linear(t, x, self.linears["gate_proj"], self.a)
            act = t.op(gate.elements, gate.itemsize, gate, saves=(gate,))
            del gate
            up = linear(t, x, self.linears["up_proj"], self.a)
        product = t.op(act.elements, act.itemsize, act, up, saves=(act, up))
        del act, up
        return linear(t, product, self.linears["down_proj"], self.a)

    def _tiled(self, t: Tape, x: Tensor, apply: Rows, *trained: str | tuple[str, ...]) -> Tensor:
        """posttrain.ops.tiled: keeps x only; one tile's values exist at a time. `trained`: names of the linears in
        `apply`."""
        rows = self.a.tile_rows
        if rows is None or rows >= self.tokens:
            return apply(t, x)
        width = x.elements // self.tokens
        forward, answer = _forward_peak(apply, rows * width, x.itemsize)
        backward = _backward_peak(apply, rows * width, x.itemsize)
        names = [name for group in trained for name in ((group,) if isinstance(group, str) else group)]
        weights = sum(self._trained(self.linears[name]) for name in names)
        itemsize = self.a.stored if self.a.trains_weights else self.a.adapter
        sums = weights * (4 + itemsize)  # in float32, and a tile's share
        after = weights * itemsize if itemsize != 4 else 0
        elements = answer.elements // rows * self.tokens
        back, kept = backward + sums, weights * itemsize
        return t.op(elements, answer.itemsize, x, saves=(x,), work=forward, back_work=back, after=after, weights=kept, trains=weights > 0)

    def _trained(self, layer: Linear) -> int:
        if self.a.trains_weights:
            return layer.weights
        return (self.a.rank or 0) * (layer.inputs + layer.outputs) if self.a.adapts(layer) else 0


def _forward_peak(apply: Rows, elements: int, itemsize: int) -> tuple[int, Tensor]:
    """What a tile takes beside its rows, and its answer."""
    t = Tape(recording=False)
    x = t.tensor(elements, itemsize)
    answer = apply(t, x)
    return t.memory.peak - x.size, answer


def _backward_peak(apply: Rows, elements: int, itemsize: int) -> int:
    """What computing and differentiating a tile takes beside its rows and their gradient."""
    t = Tape()
    t.casts = []  # all tiles are computed under one autocast
    x = t.tensor(elements, itemsize, wants_grad=True)
    answer = apply(t, x)
    assert answer.slot is not None
    grad = Storage(t.memory, answer.size)
    t.backward(answer.slot, grad)
    return t.memory.peak - x.size - grad.size


def rope(t: Tape, x: Tensor, itemsize: int) -> Tensor:
    """x * cos + rotated(x) * sin; `itemsize` of cos and sin."""
    wide = max(x.itemsize, itemsize)
    straight = t.op(x.elements, wide, x)
    rotated = t.op(x.elements, x.itemsize, x, work=x.size // 2, back_work=x.size)
    crossed = t.op(x.elements, wide, rotated)
    del rotated
    return t.op(x.elements, wide, straight, crossed, shares=True)


def fused(t: Tape, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """posttrain.ops.prefix_attention on a CPU: keeps q, k, v, the output and its log-sum-exp."""
    a = layer.a
    given = a.autocast or max(x.itemsize for x in (q, k, v))
    work = a.attention_work or given
    lse = Storage(t.memory, layer.tokens * layer.shape.heads * 4)
    widened = sum(x.elements * work for x in (q, k, v) if x.itemsize != work)
    result = q.elements * work
    casting = result if work != given else 0
    merging = 3 * result * max(1, 4 // work) if a.is_bridged else result
    shares = sum(x.elements * work for x in (q, k, v))
    out = Storage(t.memory, q.elements * given)  # the same tensor is the output and is kept
    backward = 2 * widened + 2 * casting + shares
    saves = (q, k, v, out, lse)
    return t.op(q.elements, given, q, k, v, saves=saves, work=widened + casting + merging, back_work=backward, into=out)


def chunked(t: Tape, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """posttrain.ops.prefix_plain: chunks of queries under explicit masks, computed again in the backward; keeps q, k
    and v."""
    shape = layer.shape
    size = layer.a.autocast or max(x.itemsize for x in (q, k, v))
    q, k, v = (cast(t, x, size) for x in (q, k, v))
    rows = min(ATTENTION_ROWS, layer.tokens)
    keys = layer.tokens if layer.window is None else min(layer.tokens, rows + layer.window)
    masks = rows * keys * (2 + (shape.heads // shape.kv_heads) * (1 + size))  # of bools, and as the kernel wants them
    queries = 3 * rows * shape.q * size
    sums = (k.elements + v.elements) * 4 if size != 4 else 0  # float32
    shares = 2 * keys * shape.kv * size
    backward = masks + 2 * queries + shares + sums
    return t.op(q.elements, size, q, k, v, saves=(q, k, v), work=masks + queries, back_work=backward)


def linear(t: Tape, x: Tensor, layer: Linear, a: Arithmetic) -> Tensor:
    """The base layer, and PEFT's adapter beside it."""
    result = _quantised(t, x, layer, a) if a.four_bits else _plain(t, x, layer, a)
    if a.rank is None or not a.adapts(layer):
        return result
    kept = result.itemsize
    given = x if a.four_bits and a.autocast else cast(t, x, a.adapter)  # PEFT casts inputs to the adapter's dtype; for 4 bits only without autocast
    operand = cast(t, given, a.autocast or a.adapter)
    rows, work = x.elements // layer.inputs, operand.itemsize
    down = t.op(
        rows * a.rank,
        work,
        operand,
        saves=(operand,),
        weight_grad=a.rank * layer.inputs * work,
        weights=a.rank * layer.inputs * a.adapter,
        trains=True,
    )
    del operand
    up = t.op(rows * layer.outputs, work, down, saves=(down,), weight_grad=a.rank * layer.outputs * work, weights=a.rank * layer.outputs * a.adapter)
    del down
    scaled = t.op(up.elements, work, up)
    del up
    result = t.op(result.elements, max(result.itemsize, work), result, scaled, shares=True)
    del scaled
    return cast(t, result, kept)


def _plain(t: Tape, x: Tensor, layer: Linear, a: Arithmetic) -> Tensor:
    size = a.autocast or x.itemsize
    operand = cast(t, x, size)
    saves: list[Tensor | Storage] = [operand] if a.trains_weights else []
    if size != a.stored:  # autocast's copy of the weight
        image = Storage(t.memory, layer.weights * size, "weight_casts")
        saves.append(image)
        if t.casts is not None and a.trains_weights:
            t.casts.append(image)
    rows = x.elements // layer.inputs
    grad = layer.weights * size if a.trains_weights else 0
    after = layer.weights * a.stored if a.trains_weights and size != a.stored else 0  # that gradient in the dtype of the weight
    kept = layer.weights * a.stored if a.trains_weights else 0
    return t.op(rows * layer.outputs, size, operand, saves=saves, weight_grad=grad, after=after, weights=kept, trains=a.trains_weights)


def _quantised(t: Tape, x: Tensor, layer: Linear, a: Arithmetic) -> Tensor:
    """bitsandbytes: dequantised for a product, in both directions; nothing is kept. PEFT clones what comes out."""
    operand = cast(t, x, 2)
    image = layer.weights * 2
    out = t.op(x.elements // layer.inputs * layer.outputs, 2, operand, work=image, back_work=image, label="weight_casts")
    del operand
    out = cast(t, out, x.itemsize)
    return t.op(out.elements, out.itemsize, out, shares=True)


def cast(t: Tape, x: Tensor, itemsize: int) -> Tensor:
    """x itself where it has that size already."""
    return x if x.itemsize == itemsize else t.op(x.elements, itemsize, x)


def _add(t: Tape, x: Tensor, y: Tensor) -> Tensor:
    return t.op(x.elements, max(x.itemsize, y.itemsize), x, y, shares=True)
