"""Rows of one expert each on a CPU: sorted by expert once, nothing padded, a backward pass of their own.

The core's products run over all rows at once. A low-rank residual adds its skinny products in place, tile by tile,
while the activations are in cache; a residual of the core's shape is added to the core's weight in a scratch buffer and
so costs what a dense layer costs. No gradient is computed of a core or of residuals that are frozen.

Shape suffixes: T tokens, C model width, H hidden width, E experts, R residual rank, N rows sorted by expert, those
without one last, n and m rows of a tile and a piece of it; G experts taken together, Q = G·R; I and O the inputs and
outputs of either linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rmoe.moe.experts import Activation, Full, LowRank, Network, Residuals, act_backward, first_order
from rmoe.moe.masked import TILE, Sum, add_core_gradient, add_product_, times_gates
from rmoe.moe.passes import sort_pairs


def rows_of_one_expert(
    x_NC: Tensor,
    expert_N: Tensor,
    gate_N: Tensor,
    core: Network,
    residuals: Residuals,
    act: Activation,
    ready: Callable[[], object] | None,
) -> Tensor:
    """Computes rows of one expert each, y_NC; arguments as `rmoe.moe.mix.mix`.

    Args:
        gate_N: gate values inside the network; those of residuals that merge with the core are 1.
    """
    rows = _sort_rows(expert_N, residuals[0].shape[0])
    if residuals.merges:
        return _FullRows.apply(x_NC, rows, act, *core, *residuals)
    return _LowRankRows.apply(x_NC, gate_N, rows, act, ready, *core, *residuals)


class _Rows(NamedTuple):
    """Says how rows stand sorted by expert."""

    order_N: Tensor  # position among the sorted → row
    inverse_N: Tensor  # row → position among the sorted
    expert_N: Tensor  # of the sorted; those without one come last
    sizes: list[int]  # rows of each expert
    chosen: int  # how many have one

    def of_experts(self, x_NI: Tensor) -> tuple[Tensor, ...]:
        """Returns views of the sorted rows of each expert, by one call: slicing costs microseconds a piece."""
        return x_NI.narrow(0, 0, self.chosen).split(self.sizes)


def _sort_rows(expert_N: Tensor, num_experts: int) -> _Rows:
    inverse_N, order_N, _ = sort_pairs(expert_N, num_experts + 1)
    *sizes, dropped = torch.bincount(expert_N, minlength=num_experts + 1).tolist()
    return _Rows(order_N, inverse_N, expert_N.index_select(0, order_N), sizes, len(order_N) - dropped)


class _Tile(NamedTuple):
    """Describes a stretch of sorted rows that is computed in one go, and how its low-rank products are made.

    They are made piece by piece: for G experts at once, of which each row keeps its own.
    """

    together: int  # G
    firsts: list[int]  # the first of the G experts of each piece …
    lengths: list[int]  # … and its rows


def _tiles(rows: _Rows, dtype: torch.dtype) -> list[_Tile]:
    """Cuts the rows into tiles of about TILE: enough for the core's products, few enough for a cache to hold them."""
    total, sizes = len(rows.order_N), list(rows.sizes)
    sizes[-1] += total - rows.chosen  # whose gate value is 0
    tiles, length, expert = [], math.ceil(total / max(1, round(total / TILE))), 0
    for start in range(0, total, max(1, length)):
        free, firsts, lengths = min(length, total - start), [], []
        while free:
            if taken := min(free, sizes[expert]):
                firsts.append(expert)
                lengths.append(taken)
            free, sizes[expert] = free - taken, sizes[expert] - taken
            expert += not sizes[expert]
        if _joins_experts(dtype):
            tiles.append(_Tile(firsts[-1] + 1 - firsts[0], firsts[:1], [sum(lengths)]))
        else:
            tiles.append(_Tile(1, firsts, lengths))
    return tiles


def _joins_experts(dtype: torch.dtype) -> bool:
    """Says whether the low-rank products of a tile's experts are made as one, rather than each expert's own.

    In float32 and float64 many small products are the fastest. In half precision a product over a new number of rows
    costs more than it computes, since its kernel is compiled first, and experts have new numbers of rows at every step.
    """
    return dtype.itemsize < 4


class _LowRankRows(Function):
    """Computes rows of x through the core and one low-rank residual each, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        gate_N: Tensor,
        rows: _Rows,
        act: Activation,
        ready: Callable[[], object] | None,
        *weights: Tensor,
    ) -> Tensor:
        core, low = Network(*weights[:4]), LowRank(*weights[4:])
        tiles, y_NC, kept = _tiles(rows, x_NC.dtype), torch.empty_like(x_NC), list[Tensor | None]()
        gate_N = gate_N.index_select(0, rows.order_N)
        gate_N[rows.chosen :] = 0
        for tile, (row_n, expert_n, gate_n, y_nC) in _by_tile(tiles, rows.order_N, rows.expert_N, gate_N, y_NC):
            own_1n, gate_Gn = _own_expert(tile, expert_n, gate_n)
            x_nC = x_NC.index_select(0, row_n)
            h_nH = F.linear(x_nC, core.w1_HC, core.b1_H)
            if ready is not None:
                ready()
                ready = None
            of_h = _add_low_rank_(h_nH, x_nC, gate_Gn, low.a1_ERC, low.b1_ERH, tile)
            a_nH = act(h_nH)
            _linear(a_nH, core.w2_CH, core.b2_C, out=y_nC)
            of_y = _add_low_rank_(y_nC, a_nH, gate_Gn, low.a2_ERH, low.b2_ERC, tile)
            kept += [own_1n, gate_Gn, h_nH, a_nH, *of_h, *of_y]
        if ready is not None:
            ready()
        # x is kept as it came, since its maker keeps it too; sorting it again is cheaper than a second copy.
        ctx.save_for_backward(x_NC, *weights, *kept)
        ctx.rows, ctx.tiles, ctx.act = rows, tiles, act
        return y_NC.index_select(0, rows.inverse_N)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_NC, *saved = ctx.saved_tensors
        core, low, kept, rows = Network(*saved[:4]), LowRank(*saved[4:8]), iter(saved[8:]), ctx.rows
        of_core = [Sum(want) for want in ctx.needs_input_grad[5:9]]
        # Sums over many tiles: in float32, if they are of half precision.
        grad_low = [
            torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) if want else None
            for w, want in zip(low, ctx.needs_input_grad[9:], strict=True)
        ]
        back_NC, grad_gate_N = torch.empty_like(x_NC), x_NC.new_empty(len(x_NC))
        for tile, (row_n, back_nC, grad_gate_n) in _by_tile(ctx.tiles, rows.order_N, back_NC, grad_gate_N):
            own_1n, gate_Gn, h_nH, a_nH, *of_h_and_y = islice(kept, 8)
            grad_nC = grad.index_select(0, row_n)
            add_core_gradient(of_core[2:], grad_nC, a_nH)
            grad_nH = grad_nC @ core.w2_CH
            gate2_Gn = _low_rank_backward_(grad_nH, grad_nC, a_nH, of_h_and_y[2:], gate_Gn, low[2:], grad_low[2:], tile)
            grad_nH = act_backward(ctx.act, grad_nH, h_nH)
            x_nC = x_NC.index_select(0, row_n)
            add_core_gradient(of_core[:2], grad_nH, x_nC)
            torch.mm(grad_nH, core.w1_HC, out=back_nC)
            gate1_Gn = _low_rank_backward_(back_nC, grad_nH, x_nC, of_h_and_y[:2], gate_Gn, low[:2], grad_low[:2], tile)
            gate_Gn = gate1_Gn.add_(gate2_Gn)
            grad_gate_n.copy_(gate_Gn[0] if own_1n is None else gate_Gn.gather(0, own_1n)[0])
        grad_gate_N[rows.chosen :] = 0
        grad_x, grad_gate = back_NC.index_select(0, rows.inverse_N), grad_gate_N.index_select(0, rows.inverse_N)
        grad_core = (one.rounded(w) for one, w in zip(of_core, core, strict=True))
        rounded = (None if total is None else total.to(w.dtype) for total, w in zip(grad_low, low, strict=True))
        return grad_x, grad_gate, None, None, None, *grad_core, *rounded


def _by_tile(tiles: list[_Tile], *rows: Tensor) -> Iterator[tuple[_Tile, tuple[Tensor, ...]]]:
    """Yields the tiles, each with its part of sorted rows."""
    lengths = [sum(tile.lengths) for tile in tiles]
    return zip(tiles, zip(*(part.split(lengths) for part in rows), strict=True), strict=True)


def _own_expert(tile: _Tile, expert_n: Tensor, gate_n: Tensor) -> tuple[Tensor | None, Tensor]:
    """Returns which of G experts is a row's own, None where G = 1; and its gate value there, 0 for the others."""
    if tile.together == 1:
        return None, gate_n[None]
    own_1n = (expert_n - tile.firsts[0]).clamp_(max=tile.together - 1)[None]
    return own_1n, gate_n.new_zeros(tile.together, len(gate_n)).scatter_(0, own_1n, gate_n[None])


def _by_piece(w_ERI: Tensor, tile: _Tile) -> list[Tensor]:
    """Returns those of the stacked low-rank factors that each piece needs, [G·R, I]."""
    if tile.together > 1:
        return [w_ERI.narrow(0, first, tile.together).flatten(0, 1) for first in tile.firsts]
    every = w_ERI.unbind()  # one call, as slicing costs microseconds a piece
    return [every[first] for first in tile.firsts]


def _scaled(u_Qn: Tensor, gate_Gn: Tensor) -> Tensor:
    return times_gates(u_Qn.view(len(gate_Gn), -1, u_Qn.shape[1]), gate_Gn).view_as(u_Qn)


def _add_low_rank_(
    y_nO: Tensor, x_nI: Tensor, gate_Gn: Tensor, a_ERI: Tensor, b_ERO: Tensor, tile: _Tile
) -> tuple[Tensor, Tensor]:
    """Adds g B_eᵀ (A_e x) to y in place and returns A_e x and g A_e x for each of G experts, Q = G·R, for backward."""
    u_Qn = x_nI.new_empty(tile.together * a_ERI.shape[1], len(x_nI))
    of_x, of_u = x_nI.T.split(tile.lengths, 1), u_Qn.split(tile.lengths, 1)
    for a_QI, x_Im, u_Qm in zip(_by_piece(a_ERI, tile), of_x, of_u, strict=True):
        torch.mm(a_QI, x_Im, out=u_Qm)
    gu_Qn = _scaled(u_Qn, gate_Gn)
    of_y, of_gu = y_nO.split(tile.lengths), gu_Qn.T.split(tile.lengths)
    for b_QO, y_mO, gu_mQ in zip(_by_piece(b_ERO, tile), of_y, of_gu, strict=True):
        y_mO.addmm_(gu_mQ, b_QO)
    return u_Qn, gu_Qn


def _low_rank_backward_(
    back_nI: Tensor,
    grad_nO: Tensor,
    x_nI: Tensor,
    kept: Sequence[Tensor],
    gate_Gn: Tensor,
    factors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    tile: _Tile,
) -> Tensor:
    """Adds the gradients of x, A and B of g B_eᵀ (A_e x) to what they are; returns that of g for each of G experts.

    `kept` is what `_add_low_rank_` returned, `factors` and `grads` are of A and B; None for a gradient that is not
    wanted.
    """
    u_Qn, gu_Qn = kept
    of_a, of_b = (_by_piece(w, tile) for w in factors)
    back_Qn, lengths = torch.empty_like(u_Qn), tile.lengths
    for b_QO, grad_Om, back_Qm in zip(of_b, grad_nO.T.split(lengths, 1), back_Qn.split(lengths, 1), strict=True):
        torch.mm(b_QO, grad_Om, out=back_Qm)
    scaled_Qn = _scaled(back_Qn, gate_Gn)
    _add_factor_gradient(grads[1], gu_Qn, grad_nO, tile)
    _add_factor_gradient(grads[0], scaled_Qn, x_nI, tile)
    for back_mI, scaled_mQ, a_QI in zip(back_nI.split(lengths), scaled_Qn.T.split(lengths), of_a, strict=True):
        back_mI.addmm_(scaled_mQ, a_QI)
    return (back_Qn * u_Qn).view(tile.together, -1, len(grad_nO)).sum(1)


def _add_factor_gradient(total_ERI: Tensor | None, u_Qn: Tensor, x_nI: Tensor, tile: _Tile) -> None:
    if total_ERI is None:
        return
    of_total, of_u, of_x = _by_piece(total_ERI, tile), u_Qn.split(tile.lengths, 1), x_nI.split(tile.lengths)
    for total_QI, u_Qm, x_mI in zip(of_total, of_u, of_x, strict=True):
        add_product_(total_QI, u_Qm, x_mI)


def _linear(x_NI: Tensor, w_OI: Tensor, b_O: Tensor | None, out: Tensor) -> None:
    torch.mm(x_NI, w_OI.T, out=out) if b_O is None else torch.addmm(b_O, x_NI, w_OI.T, out=out)


class _FullRows(Function):
    """Computes rows of x through core + full residual of one expert each."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, rows: _Rows, act: Activation, *weights: Tensor) -> Tensor:
        core, full = Network(*weights[:4]), Full(*weights[4:])
        sorted_NC = x_NC.index_select(0, rows.order_N)
        h_NH = _full_linear(sorted_NC, core.w1_HC, core.b1_H, full.w1_EHC, full.b1_EH, rows)
        a_NH = act(h_NH)
        y_NC = _full_linear(a_NH, core.w2_CH, core.b2_C, full.w2_ECH, full.b2_EC, rows)
        ctx.save_for_backward(x_NC, h_NH, a_NH, *weights)
        ctx.rows, ctx.act = rows, act
        return y_NC.index_select(0, rows.inverse_N)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_NC, h_NH, a_NH, *weights = ctx.saved_tensors
        core, full, rows = Network(*weights[:4]), Full(*weights[4:]), ctx.rows
        wants_residual = any(ctx.needs_input_grad[7:])
        grad_NC = grad.index_select(0, rows.order_N)
        grad_NH, *second = _full_backward(grad_NC, a_NH, core.w2_CH, full.w2_ECH, rows, wants_residual)
        core_second = _core_backward(grad_NC, a_NH, second, rows, *ctx.needs_input_grad[5:7])
        grad_NH = act_backward(ctx.act, grad_NH, h_NH)
        sorted_NC = x_NC.index_select(0, rows.order_N)
        back_NC, *first = _full_backward(grad_NH, sorted_NC, core.w1_HC, full.w1_EHC, rows, wants_residual)
        core_first = _core_backward(grad_NH, sorted_NC, first, rows, *ctx.needs_input_grad[3:5])
        return back_NC.index_select(0, rows.inverse_N), None, None, *core_first, *core_second, *first, *second


def _full_linear(
    x_NI: Tensor, w_OI: Tensor | None, b_O: Tensor | None, w_EOI: Tensor, b_EO: Tensor, rows: _Rows
) -> Tensor:
    y_NO, merged_OI = x_NI.new_empty(len(x_NI), b_EO.shape[1]), torch.empty_like(w_EOI[0])
    bias_EO = b_EO if b_O is None else b_O + b_EO
    of_x, of_y, of_w, of_bias = rows.of_experts(x_NI), rows.of_experts(y_NO), w_EOI.unbind(), bias_EO.unbind()
    for x_nI, y_nO, delta_OI, bias_O in zip(of_x, of_y, of_w, of_bias, strict=True):
        torch.addmm(bias_O, x_nI, _merged(w_OI, delta_OI, merged_OI).T, out=y_nO)
    rest = slice(rows.chosen, None)
    y_NO[rest] = 0 if w_OI is None else F.linear(x_NI[rest], w_OI, b_O)
    return y_NO


def _full_backward(
    grad_NO: Tensor, x_NI: Tensor, w_OI: Tensor | None, w_EOI: Tensor, rows: _Rows, wants_residual: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of x, ΔW and Δb of `_full_linear`."""
    grad_NI, merged_OI = torch.empty_like(x_NI), torch.empty_like(w_EOI[0])
    of_grad, of_x, of_grad_x = rows.of_experts(grad_NO), rows.of_experts(x_NI), rows.of_experts(grad_NI)
    for grad_nO, grad_nI, delta_OI in zip(of_grad, of_grad_x, w_EOI.unbind(), strict=True):
        torch.mm(grad_nO, _merged(w_OI, delta_OI, merged_OI), out=grad_nI)
    grad_w = grad_b = None
    if wants_residual:
        grad_w, grad_b = torch.empty_like(w_EOI), w_EOI.new_empty(w_EOI.shape[:2])
        for grad_nO, x_nI, out_OI, out_O in zip(of_grad, of_x, grad_w.unbind(), grad_b.unbind(), strict=True):
            torch.mm(grad_nO.T, x_nI, out=out_OI)
            torch.sum(grad_nO, 0, out=out_O)
    rest = slice(rows.chosen, None)
    grad_NI[rest] = 0 if w_OI is None else grad_NO[rest] @ w_OI
    return grad_NI, grad_w, grad_b


def _core_backward(
    grad_NO: Tensor, x_NI: Tensor, residual: Sequence[Tensor | None], rows: _Rows, weight: bool, bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of the core's W and b where they are wanted; `residual` are those of ΔW and Δb.

    A row has the core's weights added to its expert's: the sum over the experts is the core's gradient, but for the
    rows without an expert. That takes no product over all rows a second time.
    """
    w_EOI, b_EO = residual
    if w_EOI is None or b_EO is None:
        return grad_NO.T @ x_NI if weight else None, grad_NO.sum(0) if bias else None
    rest = slice(rows.chosen, None)
    grad_w = w_EOI.sum(0).addmm_(grad_NO[rest].T, x_NI[rest]) if weight else None
    return grad_w, b_EO.sum(0).add_(grad_NO[rest].sum(0)) if bias else None


def _merged(w_OI: Tensor | None, delta_OI: Tensor, buffer_OI: Tensor) -> Tensor:
    return delta_OI if w_OI is None else torch.add(w_OI, delta_OI, out=buffer_OI)
