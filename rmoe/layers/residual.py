"""The arithmetic of one layer: a feed-forward network whose weights are a core plus the residuals of a token's experts.

    θ(x) = θ0 + Σ_{e ∈ top-k(x)} g_e(x) · Δ_e          (Residual Mixture of Experts, arXiv 2204.09636)

`reference` says what is meant, token by token; `mix` computes it. Where a token has one network (one expert, or several
outputs to be weighed) it sorts the rows by expert once, pads nothing and has its own backward: the core's products run
over all rows at once, a low-rank residual adds its skinny ones in place, a full one is added to the core's weight in a
scratch buffer and so costs what a dense layer costs; no gradient is computed of a frozen core. On a GPU, in bfloat16,
the experts' products are torch's grouped GEMM, which no one has timed there yet.

Shape suffixes: T tokens, C model width, H hidden width, E experts, K experts per token, R residual rank, N rows sorted
by expert, those without one last, n and m rows of a tile and a piece of it; G experts taken together, Q = G·R; I and O
the inputs and outputs of either linear layer. An expert id of E says "no
expert": Δ = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Activation = Callable[[Tensor], Tensor]
_TILE = 1600


class Network(NamedTuple):
    """θ of a two-layer network: y = W2 act(W1 x + b1) + b2, in the layout of `torch.nn.Linear`."""

    w1_HC: Tensor
    b1_H: Tensor | None
    w2_CH: Tensor
    b2_C: Tensor | None

    def __call__(self, x_TC: Tensor, act: Activation) -> Tensor:
        """FFN(x; θ), [T, C]."""
        return F.linear(act(F.linear(x_TC, self.w1_HC, self.b1_H)), self.w2_CH, self.b2_C)


class LowRank(NamedTuple):
    """Δ_e = (B1_eᵀ A1_e, 0, B2_eᵀ A2_e, 0): no biases. B is stored rank first, as its skinny products run fastest."""

    a1_ERC: Tensor
    b1_ERH: Tensor
    a2_ERH: Tensor
    b2_ERC: Tensor

    def delta(self, e: int) -> Network:
        """Δ_e in the core's shape."""
        return Network(self.b1_ERH[e].T @ self.a1_ERC[e], None, self.b2_ERC[e].T @ self.a2_ERH[e], None)

    def first(self, x_NC: Tensor, groups: _Groups) -> Tensor:
        """ΔW1_e x of rows sorted by expert, [N, H]."""
        return groups.product(groups.product(x_NC, self.a1_ERC.mT), self.b1_ERH)

    def second(self, a_NH: Tensor, groups: _Groups) -> Tensor:
        """ΔW2_e a of rows sorted by expert, [N, C]."""
        return groups.product(groups.product(a_NH, self.a2_ERH.mT), self.b2_ERC)


class Full(NamedTuple):
    """Δ_e of the core's own shape, biases included; without a core, the network of expert e itself."""

    w1_EHC: Tensor
    b1_EH: Tensor
    w2_ECH: Tensor
    b2_EC: Tensor

    def delta(self, e: int) -> Network:
        """Δ_e in the core's shape."""
        return Network(self.w1_EHC[e], self.b1_EH[e], self.w2_ECH[e], self.b2_EC[e])

    def first(self, x_NC: Tensor, groups: _Groups) -> Tensor:
        """ΔW1_e x + Δb1_e of rows sorted by expert, [N, H]."""
        return groups.product(x_NC, self.w1_EHC.mT) + self.b1_EH.index_select(0, groups.expert_N)

    def second(self, a_NH: Tensor, groups: _Groups) -> Tensor:
        """ΔW2_e a + Δb2_e of rows sorted by expert, [N, C]."""
        return groups.product(a_NH, self.w2_ECH.mT) + self.b2_EC.index_select(0, groups.expert_N)


Residuals = LowRank | Full


def reference(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network | None,
    residuals: Residuals,
    act: Activation,
    mixes_weights: bool,
) -> Tensor:
    """What the layer means, token by token; the fast paths are compared with it. Arguments as `mix`."""
    num_experts = residuals[0].shape[0]
    core = core or nothing(residuals)
    rows = []
    for x_C, experts, gates_K in zip(x_TC, expert_TK.tolist(), gate_TK, strict=True):
        pairs = [(e, g) for e, g in zip(experts, gates_K, strict=True)]
        if mixes_weights:
            theta = core
            for e, g in pairs:
                theta = _add(theta, residuals.delta(e), g) if e < num_experts else theta
            rows.append(theta(x_C, act))
        else:
            thetas = [_add(core, residuals.delta(e), 1.0) if e < num_experts else core for e, _ in pairs]
            rows.append(sum(g * theta(x_C, act) for theta, (_, g) in zip(thetas, pairs, strict=True)))
    return torch.stack(rows) if rows else x_TC.clone()


def nothing(residuals: Residuals) -> Network:
    """The core of experts that are networks of their own: θ0 = 0."""
    return Network(*(None if d is None else torch.zeros_like(d) for d in residuals.delta(0)))  # type: ignore[arg-type]


def mix(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network | None,
    residuals: Residuals,
    act: Activation,
    mixes_weights: bool,
    ready: Callable[[], object] | None = None,
) -> Tensor:
    """Applies to every token the network of its experts.

    Args:
        x_TC: tokens, of the weights' dtype (of any under autocast, whose dtype then holds for all).
        expert_TK: int64, 0 … E-1, or E for a choice that the capacity dropped: it gets the core alone.
        gate_TK: gate values, cast to the dtype of the arithmetic.
        core: θ0; gets gradients where it requires them. None for `Full` networks of their own, where a choice that the
            capacity dropped gives zero.
        residuals: Δ of the E experts, stacked; every one gets a gradient, zero where it has no token.
        act: the network's activation, elementwise and without parameters.
        mixes_weights: y = FFN(x; θ0 + Σ g_e Δ_e) if true, y = Σ g_e FFN(x; θ0 + Δ_e) if not.
        ready: waits until the residuals have arrived, where they are still on their way from other processes; called
            after the core's first product where that is possible.

    Returns:
        y_TC.
    """
    device, k = x_TC.device.type, expert_TK.shape[1]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TC.dtype
    inside = mixes_weights and (k > 1 or isinstance(residuals, Full))
    if ready is not None and (inside or isinstance(residuals, Full) or residuals[0].dtype != dtype):
        ready()
        ready = None
    x_TC, gate_TK = x_TC.to(dtype), gate_TK.to(dtype)
    weights = (None,) * 4 if core is None else core
    core = Network(*(None if w is None else w.to(dtype) for w in weights))  # type: ignore[arg-type]
    residuals = type(residuals)(*(w.to(dtype) for w in residuals))
    if inside:
        return _mix_weights(x_TC, expert_TK, gate_TK, core, residuals, act)
    x_NC, expert_N = x_TC.repeat_interleave(k, 0) if k > 1 else x_TC, expert_TK.flatten()
    scale_N = gate_TK[:, 0] if mixes_weights else gate_TK.new_ones(len(x_NC))
    rows = None if _has_grouped_gemm(x_NC, *_widths(residuals)) else _sort_rows(expert_N, residuals[0].shape[0])
    if rows is None:
        if ready is not None:
            ready()
        y_NC = _grouped_rows(x_NC, expert_N, scale_N, core, residuals, act)
    elif isinstance(residuals, LowRank):
        y_NC = _LowRankRows.apply(x_NC, scale_N, rows, act, ready, *core, *residuals)
    else:
        y_NC = _FullRows.apply(x_NC, rows, act, *core, *residuals)
    return y_NC if mixes_weights else torch.einsum("tkc,tk->tc", y_NC.view(-1, k, x_TC.shape[1]), gate_TK)


class _Rows(NamedTuple):
    """How rows stand sorted by expert."""

    order_N: Tensor  # position among the sorted → row
    inverse_N: Tensor  # row → position among the sorted
    expert_N: Tensor  # of the sorted; those without one come last
    sizes: list[int]  # rows of each expert
    chosen: int  # how many have one

    def of_experts(self, x_NI: Tensor) -> tuple[Tensor, ...]:
        """Views of the sorted rows of each expert. One call, as slicing costs microseconds a piece."""
        return x_NI.narrow(0, 0, self.chosen).split(self.sizes)


def _sort_rows(expert_N: Tensor, num_experts: int) -> _Rows:
    sorted_N, order_N = expert_N.sort(stable=True)
    inverse_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    *sizes, dropped = torch.bincount(sorted_N, minlength=num_experts + 1).tolist()
    return _Rows(order_N, inverse_N, sorted_N, sizes, len(order_N) - dropped)


def _widths(residuals: Residuals) -> set[int]:
    """C, H and, for low rank, R."""
    return {size for delta in residuals for size in delta.shape[1:]}


class _Groups(NamedTuple):
    """Rows sorted by expert for products that autograd follows."""

    expert_N: Tensor
    end_E: Tensor  # int32: one past the last row of each expert, on the rows' device
    sizes: list[int] | None  # rows of each expert; None where a grouped GEMM needs no such answer from the device

    def product(self, x_NI: Tensor, w_EIO: Tensor) -> Tensor:
        """x w_e for the rows of each expert."""
        if self.sizes is None:
            return F.grouped_mm(x_NI, w_EIO, offs=self.end_E)
        # Empty slices are computed too: an expert without tokens needs a gradient of zeros, not none (ZeRO would mix up
        # the gradients of different experts).
        return torch.cat([x_nI @ w_IO for x_nI, w_IO in zip(x_NI.split(self.sizes), w_EIO.unbind(), strict=True)])


def _has_grouped_gemm(x: Tensor, *widths: int) -> bool:
    """Whether torch has a grouped GEMM for it: bfloat16 on a GPU, in rows of whole 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and not any(width * x.itemsize % 16 for width in widths)


def _mix_weights(
    x_TC: Tensor, expert_TK: Tensor, gate_TK: Tensor, core: Network, residuals: Residuals, act: Activation
) -> Tensor:
    """Residuals that meet inside one network, or whose weight differs from row to row and merges with no other."""
    num_experts = residuals[0].shape[0]
    gate_TK = gate_TK.where(expert_TK < num_experts, 0.0)
    expert_N, pair_N = expert_TK.clamp(max=num_experts - 1).flatten().sort(stable=True)
    grouped = _has_grouped_gemm(x_TC, *_widths(residuals))
    sizes = None if grouped else torch.bincount(expert_N, minlength=num_experts).tolist()
    every_E = torch.arange(num_experts, device=expert_N.device)
    groups = _Groups(expert_N, torch.searchsorted(expert_N, every_E, right=True).to(torch.int32), sizes)
    token_N, gate_N1 = pair_N // expert_TK.shape[1], gate_TK.flatten()[pair_N, None]
    h_TH = _of_core(x_TC, core.w1_HC, core.b1_H, residuals[1].shape[-1])
    h_TH = h_TH.index_add(0, token_N, gate_N1 * residuals.first(x_TC[token_N], groups))
    a_TH = act(h_TH)
    y_TC = _of_core(a_TH, core.w2_CH, core.b2_C, x_TC.shape[1])
    return y_TC.index_add(0, token_N, gate_N1 * residuals.second(a_TH[token_N], groups))


def _of_core(x_NI: Tensor, w_OI: Tensor | None, b_O: Tensor | None, outputs: int) -> Tensor:
    return x_NI.new_zeros(len(x_NI), outputs) if w_OI is None else F.linear(x_NI, w_OI, b_O)


def _grouped_rows(
    x_NC: Tensor, expert_N: Tensor, scale_N: Tensor, core: Network, residuals: Residuals, act: Activation
) -> Tensor:
    """Rows of one network each on a GPU: nothing there waits for how many rows an expert has. Not yet timed on one."""
    if isinstance(residuals, Full):
        # Merged with the core, which the rows without an expert have to themselves: one product where two would be.
        without = [
            torch.zeros_like(delta[:1]) if c is None else c[None] for c, delta in zip(core, residuals, strict=True)
        ]
        thetas = Full(*(torch.cat([delta + c, c]) for c, delta in zip(without, residuals, strict=True)))
        core, residuals = Network(None, None, None, None), thetas  # type: ignore[arg-type]
    return _mix_weights(x_NC, expert_N[:, None], scale_N[:, None], core, residuals, act)


class _Tile(NamedTuple):
    """A stretch of sorted rows that is computed in one go, and how its low-rank products are made.

    They are made piece by piece: for G experts at once, of which each row keeps its own.
    """

    together: int  # G
    firsts: list[int]  # the first of the G experts of each piece …
    lengths: list[int]  # … and its rows


def _tiles(rows: _Rows, dtype: torch.dtype) -> list[_Tile]:
    """Tiles of about _TILE rows: enough for the core's products, few enough for a cache to hold their activations."""
    total, sizes = len(rows.order_N), list(rows.sizes)
    sizes[-1] += total - rows.chosen  # whose gate value is 0
    tiles, length, expert = [], math.ceil(total / max(1, round(total / _TILE))), 0
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
    """Whether the low-rank products of a tile's experts are made as one, rather than each expert's own.

    In float32 and float64 many small products are the fastest. In half precision a product over a new number of rows
    costs more than it computes, since its kernel is compiled first, and experts have new numbers of rows at every step.
    """
    return dtype.itemsize < 4


class _LowRankRows(Function):
    """Rows of x through the core and one low-rank residual each, tile by tile."""

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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_NC, *saved = ctx.saved_tensors
        core, low, kept, rows = Network(*saved[:4]), LowRank(*saved[4:8]), iter(saved[8:]), ctx.rows
        wanted = zip(core, ctx.needs_input_grad[5:9], strict=True)
        grad_core = [torch.zeros_like(w) if want and w is not None else None for w, want in wanted]
        grad_low = [torch.zeros_like(w) for w in low]
        back_NC, grad_gate_N = torch.empty_like(x_NC), x_NC.new_empty(len(x_NC))
        for tile, (row_n, back_nC, grad_gate_n) in _by_tile(ctx.tiles, rows.order_N, back_NC, grad_gate_N):
            own_1n, gate_Gn, h_nH, a_nH, *of_h_and_y = islice(kept, 8)
            grad_nC = grad.index_select(0, row_n)
            _add_core_gradient_(grad_core[2:], grad_nC, a_nH)
            grad_nH = grad_nC @ core.w2_CH
            gate2_Gn = _low_rank_backward_(grad_nH, grad_nC, a_nH, of_h_and_y[2:], gate_Gn, low[2:], grad_low[2:], tile)
            grad_nH = _act_backward(ctx.act, grad_nH, h_nH)
            x_nC = x_NC.index_select(0, row_n)
            _add_core_gradient_(grad_core[:2], grad_nH, x_nC)
            torch.mm(grad_nH, core.w1_HC, out=back_nC)
            gate1_Gn = _low_rank_backward_(back_nC, grad_nH, x_nC, of_h_and_y[:2], gate_Gn, low[:2], grad_low[:2], tile)
            gate_Gn = gate1_Gn.add_(gate2_Gn)
            grad_gate_n.copy_(gate_Gn[0] if own_1n is None else gate_Gn.gather(0, own_1n)[0])
        grad_gate_N[rows.chosen :] = 0
        grad_x, grad_gate = back_NC.index_select(0, rows.inverse_N), grad_gate_N.index_select(0, rows.inverse_N)
        return grad_x, grad_gate, None, None, None, *grad_core, *grad_low


def _by_tile(tiles: list[_Tile], *rows: Tensor) -> Iterator[tuple[_Tile, tuple[Tensor, ...]]]:
    """Tiles, each with its part of sorted rows."""
    lengths = [sum(tile.lengths) for tile in tiles]
    return zip(tiles, zip(*(part.split(lengths) for part in rows), strict=True), strict=True)


def _own_expert(tile: _Tile, expert_n: Tensor, gate_n: Tensor) -> tuple[Tensor | None, Tensor]:
    """Which of G experts is a row's own, None where G = 1; and its gate value there, 0 for the others."""
    if tile.together == 1:
        return None, gate_n[None]
    own_1n = (expert_n - tile.firsts[0]).clamp_(max=tile.together - 1)[None]
    return own_1n, gate_n.new_zeros(tile.together, len(gate_n)).scatter_(0, own_1n, gate_n[None])


def _by_piece(w_ERI: Tensor, tile: _Tile) -> list[Tensor]:
    """Of stacked low-rank factors those of each piece, [G·R, I]."""
    if tile.together > 1:
        return [w_ERI.narrow(0, first, tile.together).flatten(0, 1) for first in tile.firsts]
    every = w_ERI.unbind()  # one call, as slicing costs microseconds a piece
    return [every[first] for first in tile.firsts]


def _scaled(u_Qn: Tensor, gate_Gn: Tensor) -> Tensor:
    if len(gate_Gn) == 1:
        return u_Qn * gate_Gn
    return (u_Qn.view(len(gate_Gn), -1, u_Qn.shape[1]) * gate_Gn[:, None]).view_as(u_Qn)


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
    grads: Sequence[Tensor],
    tile: _Tile,
) -> Tensor:
    """Adds the gradients of x, A and B of g B_eᵀ (A_e x) to what they are; returns that of g for each of G experts.

    `kept` is what `_add_low_rank_` returned, `factors` and `grads` are of A and B.
    """
    u_Qn, gu_Qn = kept
    (of_a, of_b), (of_grad_a, of_grad_b) = ([_by_piece(w, tile) for w in pair] for pair in (factors, grads))
    back_Qn, lengths = torch.empty_like(u_Qn), tile.lengths
    for b_QO, grad_Om, back_Qm in zip(of_b, grad_nO.T.split(lengths, 1), back_Qn.split(lengths, 1), strict=True):
        torch.mm(b_QO, grad_Om, out=back_Qm)
    for grad_b_QO, gu_Qm, grad_mO in zip(of_grad_b, gu_Qn.split(lengths, 1), grad_nO.split(lengths), strict=True):
        grad_b_QO.addmm_(gu_Qm, grad_mO)
    scaled_Qn = _scaled(back_Qn, gate_Gn)
    for grad_a_QI, scaled_Qm, x_mI in zip(of_grad_a, scaled_Qn.split(lengths, 1), x_nI.split(lengths), strict=True):
        grad_a_QI.addmm_(scaled_Qm, x_mI)
    for back_mI, scaled_mQ, a_QI in zip(back_nI.split(lengths), scaled_Qn.T.split(lengths), of_a, strict=True):
        back_mI.addmm_(scaled_mQ, a_QI)
    return (back_Qn * u_Qn).view(tile.together, -1, len(grad_nO)).sum(1)


def _linear(x_NI: Tensor, w_OI: Tensor, b_O: Tensor | None, out: Tensor) -> None:
    torch.mm(x_NI, w_OI.T, out=out) if b_O is None else torch.addmm(b_O, x_NI, w_OI.T, out=out)


def _add_core_gradient_(grads: Sequence[Tensor | None], grad_nO: Tensor, x_nI: Tensor) -> None:
    """Adds to the gradients of W and b of W x + b, where they are wanted."""
    w_OI, b_O = grads
    if w_OI is not None:
        w_OI.addmm_(grad_nO.T, x_nI)
    if b_O is not None:
        b_O += grad_nO.sum(0)


def _core_backward(grad_NO: Tensor, x_NI: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
    return grad_NO.T @ x_NI if weight else None, grad_NO.sum(0) if bias else None


class _FullRows(Function):
    """Rows of x through core + full residual of one expert each."""

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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_NC, h_NH, a_NH, *weights = ctx.saved_tensors
        core, full, rows = Network(*weights[:4]), Full(*weights[4:]), ctx.rows
        wants_residual = any(ctx.needs_input_grad[7:])
        grad_NC = grad.index_select(0, rows.order_N)
        grad_NH, grad_w2, grad_b2 = _full_backward(grad_NC, a_NH, core.w2_CH, full.w2_ECH, rows, wants_residual)
        grad_NH = _act_backward(ctx.act, grad_NH, h_NH)
        sorted_NC = x_NC.index_select(0, rows.order_N)
        back_NC, grad_w1, grad_b1 = _full_backward(grad_NH, sorted_NC, core.w1_HC, full.w1_EHC, rows, wants_residual)
        core_w1, core_b1 = _core_backward(grad_NH, sorted_NC, *ctx.needs_input_grad[3:5])
        core_w2, core_b2 = _core_backward(grad_NC, a_NH, *ctx.needs_input_grad[5:7])
        grad_core, grad_full = (core_w1, core_b1, core_w2, core_b2), (grad_w1, grad_b1, grad_w2, grad_b2)
        return back_NC.index_select(0, rows.inverse_N), None, None, *grad_core, *grad_full


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
    """Gradients of x, ΔW and Δb of `_full_linear`."""
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


def _merged(w_OI: Tensor | None, delta_OI: Tensor, buffer_OI: Tensor) -> Tensor:
    return delta_OI if w_OI is None else torch.add(w_OI, delta_OI, out=buffer_OI)


def _act_backward(act: Activation, grad: Tensor, h: Tensor) -> Tensor:
    """Gradient of the activation's input, from its output's and the input."""
    if isinstance(act, nn.GELU):
        return torch.ops.aten.gelu_backward(grad, h, approximate=act.approximate)
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        # forward: past the hooks by which the FLOP counter follows modules, which do not stand a gradient in a gradient
        return torch.autograd.grad(getattr(act, "forward", act)(h), h, grad)[0]


def _add(core: Network, delta: Network, scale: Tensor | float) -> Network:
    def add(c: Tensor | None, d: Tensor | None) -> Any:
        return c if d is None else scale * d if c is None else c + scale * d

    return Network(*map(add, core, delta))
