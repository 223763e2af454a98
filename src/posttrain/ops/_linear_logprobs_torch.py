"""The passes of `linear_logprobs` in plain torch, tile by tile. No autograd: the caller owns that.

- `forward` makes statistics of the logits. Where only hidden states want a gradient, it gathers the direction of that gradient in the same
  pass, as attention gathers values: the head is attention whose keys and values are both its weight. Backward then has no logits to make.
- `backward` makes each tile of logits again and gathers all gradients.
- `in_one_pass` makes both in one pass, where the caller knows what log-probs will be multiplied with.

The vocabulary is the outer loop of the first two, so each slice of the weight is converted once per pass and its
gradient is finished before the next slice begins. No tensor here is larger than the inputs or a tile of logits, whose
size depends on neither N nor, but for `in_one_pass`, V.
"""

# N rows, D hidden, V vocabulary; R rows and C columns of one tile

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.ops.precision import kind_of, multiplies_natively
from posttrain.sizes import LOGIT_ELEMENTS, LOGIT_ROWS, WHOLE_ROWS

FLOOR = -1e4  # exp(FLOOR) is 0 in every dtype, and unlike -inf it may be multiplied by that 0


@dataclass(frozen=True)
class Head:
    """How hidden states become logits, and in which dtypes."""

    temperature: float
    softcap: float | None
    scale: float
    rounding: torch.dtype  # what the operands of a matmul are rounded to: autocast's dtype, or their own
    gemm: torch.dtype  # what they are multiplied in
    stats: torch.dtype  # logits, sums and gradients in the making: float32, or float64 for float64 inputs

    @classmethod
    def of(cls, hidden: Tensor, temperature: float, softcap: float | None, scale: float) -> Head:
        """For these hidden states, under the autocast that is active now."""
        kind, dtype = hidden.device.type, hidden.dtype
        if dtype is torch.float64:  # autocast leaves float64 alone
            return cls(temperature, softcap, scale, dtype, dtype, dtype)
        rounding = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        gemm = rounding if multiplies_natively(rounding, kind) else torch.float32
        return cls(temperature, softcap, scale, rounding, gemm, torch.float32)

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.rounding).to(self.gemm)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """hidden (R, D), weight (C, D), bias (C,) -> out (R, C), overwritten."""
        product(hidden, weight.T, out, add=False)
        if bias is not None:
            out.add_(bias)
        if self.softcap is not None:
            out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.scale != self.temperature:
            out.mul_(self.scale / self.temperature)
        return out

    def slope(self, logits: Tensor) -> Tensor | None:
        """The derivative of the softcap at these logits, (R, C), in units of scale / temperature; None where it is
        1."""
        if self.softcap is None:
            return None
        return 1 - (logits * (self.temperature / self.softcap)).square_()


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b, without rounding the sums to the operands' dtype where the device can do that."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=1 if add else 0)
        return
    c = torch.mm(a, b, out_dtype=out.dtype) if a.is_cuda else torch.mm(a, b)
    out.add_(c) if add else out.copy_(c)


def slices(stop: int, size: int, start: int = 0) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _kind(device: torch.device) -> str:
    return kind_of(device) if kind_of(device) in LOGIT_ROWS else "cuda"


def tile_size(device: torch.device, n: int, v: int) -> tuple[int, int]:
    """R, C: few rows make wide tiles."""
    kind = _kind(device)
    rows = max(1, min(n, LOGIT_ROWS[kind]))
    return rows, min(v, max(64, LOGIT_ELEMENTS[kind] // rows // 64 * 64))


def target_in(columns: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """targets (R,) -> which of them lie in these columns, and where (a valid place for the others too), (R, 1)."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, (targets - columns.start).clamp_(0, columns.stop - columns.start - 1)[:, None]


class Statistics:
    """Online softmax statistics of N rows. All sums are relative to the running maximum, so that huge logits stay
    finite."""

    direction: Tensor | None = None  # (N, D) the gradient of each row's log-prob, in units of scale / temperature. None: not asked for

    def __init__(self, n: int, head: Head, device: torch.device, want_argmax: bool, want_sum_p2: bool) -> None:
        def rows(value: float, dtype: torch.dtype = head.stats) -> Tensor:
            return torch.full((n,), value, dtype=dtype, device=device)

        self.maximum = rows(torch.finfo(head.stats).min)
        self.sum_e = rows(0)  # of e = exp(z - maximum)
        self.sum_ez = rows(0)  # of e * (z - maximum)
        self.sum_e2 = rows(0) if want_sum_p2 else None
        self.argmax = rows(0, torch.long) if want_argmax else None
        self.target = rows(float("nan"))  # stays NaN for a target outside the vocabulary: loud

    @property
    def log_sum(self) -> Tensor:
        return self.sum_e.log()

    @property
    def lse(self) -> Tensor:
        return self.maximum + self.log_sum

    @property
    def logps(self) -> Tensor:
        return self.target - self.maximum - self.log_sum

    @property
    def entropy(self) -> Tensor:
        return self.log_sum - self.sum_ez / self.sum_e

    @property
    def sum_p2(self) -> Tensor | None:
        return None if self.sum_e2 is None else self.sum_e2 / self.sum_e.square()

    def add(self, rows: slice, columns: slice, targets: Tensor, z: Tensor, e: Tensor) -> Tensor:
        """Takes in the logits z (R, C). z is overwritten; the tile e becomes exp(z - maximum). -> (R,) what older sums
        were multiplied with."""
        inside, place = target_in(columns, targets)
        self.target[rows] = torch.where(inside, z.gather(1, place).squeeze(1), self.target[rows])
        old = self.maximum[rows]
        if self.argmax is None:
            top = z.amax(1)
        else:
            top, where = z.max(1)
            self.argmax[rows] = torch.where(top > old, where + columns.start, self.argmax[rows])
        new = torch.maximum(old, top)
        shift = (old - new).clamp_min_(FLOOR)
        decay = shift.exp()
        self.maximum[rows] = new

        z.sub_(new[:, None]).clamp_min_(FLOOR)
        torch.exp(z, out=e)
        self.sum_ez[rows] = decay * (self.sum_ez[rows] + shift * self.sum_e[rows]) + z.mul_(e).sum(1)
        self.sum_e[rows] = decay * self.sum_e[rows] + e.sum(1)
        if self.sum_e2 is not None:
            self.sum_e2[rows] = decay.square() * self.sum_e2[rows] + torch.square(e, out=z).sum(1)
        return decay


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    head: Head

    def tiles(self) -> tuple[list[slice], list[slice], Tensor, Tensor]:
        """The slices of N, the slices of V, and two buffers that hold a tile each."""
        n, v = self.hidden.shape[0], self.weight.shape[0]
        r, c = tile_size(self.hidden.device, n, v)
        first, second = self.hidden.new_empty(2, r * c, dtype=self.head.stats)
        return slices(n, r), slices(v, c), first, second

    def columns(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Weight (C, D) and bias (C,) as the matmul wants them."""
        return self.head.operand(self.weight[columns]), None if self.bias is None else self.bias[columns].to(self.head.stats)


def view(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    r, c = rows.stop - rows.start, columns.stop - columns.start
    return buffer[: r * c].view(r, c)


def forward(inputs: Inputs, *, want_argmax: bool, want_sum_p2: bool, want_direction: bool = False) -> Statistics:
    """One pass over the vocabulary."""
    head, targets = inputs.head, inputs.targets
    hidden = head.operand(inputs.hidden)
    stats = Statistics(hidden.shape[0], head, hidden.device, want_argmax, want_sum_p2)
    others = torch.zeros_like(hidden, dtype=head.stats) if want_direction else None  # (N, D) sum of e_j W_j over all j but the target
    all_rows, all_columns, z_buffer, e_buffer = inputs.tiles()
    for columns in all_columns:
        w, b = inputs.columns(columns)
        for rows in all_rows:
            z = head.logits(hidden[rows], w, b, view(z_buffer, rows, columns))
            e = view(e_buffer, rows, columns)
            slope = None if others is None else head.slope(z)
            decay = stats.add(rows, columns, targets[rows], z, e)
            if others is not None:
                inside, place = target_in(columns, targets[rows])
                e.scatter_(1, place, e.gather(1, place) * ~inside[:, None])
                if slope is not None:
                    e.mul_(slope)
                product(e.to(head.gemm), w, others[rows].mul_(decay[:, None]), add=True)
    if others is not None:
        stats.direction = _direction(inputs, stats, others, all_rows)
    return stats


def _direction(inputs: Inputs, stats: Statistics, others: Tensor, all_rows: list[slice]) -> Tensor:
    """(1 - p) W of the target less the sum of p_j W_j over `others`, which is overwritten: as a difference of two means
    it would drown a confident token's gradient in the rounding of bf16."""
    head = inputs.head
    slope = head.slope(stats.target)
    rest = -stats.logps.expm1()  # 1 - p of the target
    rest = rest if slope is None else rest * slope
    places = inputs.targets.clamp(0, inputs.weight.shape[0] - 1)
    rest = torch.where(places == inputs.targets, rest, 0.0)  # a target outside of the vocabulary has a log-prob of NaN, and all tokens are others
    for rows in all_rows:
        own = head.operand(inputs.weight[places[rows]]).to(head.stats)  # (R, D)
        others[rows].div_(-stats.sum_e[rows, None]).addcmul_(own, rest[rows, None])
    return others.to(inputs.hidden.dtype)


@dataclass
class Incoming:
    """What backward needs to know of each row, (N,)."""

    lse: Tensor
    entropy: Tensor
    g_logps: Tensor  # gradients of the two outputs, in units of scale / temperature
    g_entropy: Tensor | None

    @property
    def factor(self) -> Tensor:
        """What `d_logits` leaves out of its rows: without an entropy gradient it is -g_logps, cheaper to apply to (N,
        D) than to (N, V)."""
        return -self.g_logps if self.g_entropy is None else torch.ones_like(self.g_logps)

    def d_logits(self, rows: slice, z: Tensor, spare: Tensor, inside: Tensor, place: Tensor) -> Tensor:
        """Turns logits z (R, C) into their gradient, in place; `spare` is overwritten.

        With l = log p: dL/dz_j = g_logps (1[j = target] - p_j) - g_entropy p_j (l_j + entropy).
        """
        z.sub_(self.lse[rows, None])  # l
        if self.g_entropy is None:
            return z.exp_().scatter_add_(1, place, -inside.to(z.dtype)[:, None])
        p = torch.exp(z.clamp_min_(FLOOR), out=spare)
        g_logps, g_entropy = self.g_logps[rows, None], self.g_entropy[rows, None]
        z.mul_(g_entropy).add_(g_entropy * self.entropy[rows, None] + g_logps).mul_(p).neg_()
        return z.scatter_add_(1, place, g_logps * inside[:, None])


@dataclass
class Gradients:
    """None where nobody asked, and then never allocated."""

    hidden: Tensor | None  # (N, D), in the statistics' dtype
    weight: Tensor | None  # (V, D), in the weight's dtype
    bias: Tensor | None  # (V,), in the statistics' dtype


def backward(inputs: Inputs, incoming: Incoming, wanted: tuple[bool, bool, bool]) -> Gradients:
    """Recomputes each tile of logits and multiplies its gradient into those of hidden, weight and bias."""
    head, targets = inputs.head, inputs.targets
    factor = incoming.factor
    hidden = head.operand(inputs.hidden)
    scaled = hidden if incoming.g_entropy is not None else (hidden.to(head.stats) * factor[:, None]).to(head.gemm)
    d_hidden = torch.zeros_like(hidden, dtype=head.stats) if wanted[0] else None
    d_weight = torch.zeros_like(inputs.weight) if wanted[1] else None
    d_bias = hidden.new_zeros(inputs.weight.shape[0], dtype=head.stats) if wanted[2] else None

    all_rows, all_columns, z_buffer, spare = inputs.tiles()
    for columns in all_columns:
        w, b = inputs.columns(columns)
        d_w = None if d_weight is None else d_weight[columns].to(head.stats)  # (C, D); a view when the dtypes agree
        for rows in all_rows:
            z = head.logits(hidden[rows], w, b, view(z_buffer, rows, columns))
            slope = head.slope(z)
            d_z = incoming.d_logits(rows, z, view(spare, rows, columns), *target_in(columns, targets[rows]))
            if slope is not None:
                d_z.mul_(slope)
            if d_bias is not None:
                d_bias[columns].addmv_(d_z.T, factor[rows])
            d_z = d_z.to(head.gemm)
            if d_hidden is not None:
                product(d_z, w, d_hidden[rows], add=True)
            if d_w is not None:
                product(d_z.T, scaled[rows], d_w, add=True)
        if d_weight is not None and d_w is not None and d_weight.dtype != head.stats:
            d_weight[columns] = d_w
    return Gradients(None if d_hidden is None else d_hidden.mul_(factor[:, None]), d_weight, d_bias)


def fits_one_pass(inputs: Inputs) -> bool:
    """Whether `in_one_pass` takes these: the weight is used as it is stored, and its gradient is kept in the precision
    of sums."""
    return inputs.hidden.dtype is inputs.weight.dtype is inputs.head.rounding is inputs.head.gemm is inputs.head.stats


def in_one_pass(
    inputs: Inputs, g_logps: Tensor, wanted: tuple[bool, bool, bool], *, want_argmax: bool, want_sum_p2: bool
) -> tuple[Statistics, Gradients]:
    """Statistics, and the gradients of sum(g_logps * logps); g_logps (N,) in units of scale / temperature. A tile has
    all of the vocabulary, so that the probabilities of its rows are known before it goes."""
    head, hidden, weight = inputs.head, inputs.hidden, inputs.weight
    n, v = hidden.shape[0], weight.shape[0]
    stats = Statistics(n, head, hidden.device, want_argmax, want_sum_p2)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.zeros_like(weight) if wanted[1] else None
    d_bias = hidden.new_zeros(v) if wanted[2] else None
    columns = slice(0, v)
    w, b = inputs.columns(columns)
    in_cache = max(1, min(n, LOGIT_ELEMENTS[_kind(hidden.device)] // v))  # rows whose logits a softmax can pass over again and again
    at_once = max(in_cache, min(n, WHOLE_ROWS))
    z_buffer, e_buffer = hidden.new_empty(at_once * v), hidden.new_empty(in_cache * v)
    for rows in slices(n, at_once):
        tile = head.logits(hidden[rows], w, b, view(z_buffer, rows, columns))  # which becomes the negative of its gradient
        for some, z in zip(slices(rows.stop, in_cache, rows.start), tile.split(in_cache), strict=True):
            slope = head.slope(z)
            e = view(e_buffer, some, columns)
            stats.add(some, columns, inputs.targets[some], z, e)
            inside, place = target_in(columns, inputs.targets[some])
            g = g_logps[some]
            torch.mul(e, (g / stats.sum_e[some])[:, None], out=z).scatter_add_(1, place, -(g * inside)[:, None])
            if slope is not None:
                z.mul_(slope)
        if d_hidden is not None:
            torch.mm(tile, w, out=d_hidden[rows]).neg_()
        if d_weight is not None:
            d_weight.addmm_(tile.T, hidden[rows], alpha=-1)
        if d_bias is not None:
            d_bias.sub_(tile.sum(0))
    return stats, Gradients(d_hidden, d_weight, d_bias)
