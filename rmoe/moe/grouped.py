"""Rows sorted by expert through torch's grouped GEMM, where nothing waits for how many rows an expert has.

`mix_networks` is for experts of the core's own shape: θ_e = θ0 + Δ_e is formed once in a forward pass, in the dtype of
the arithmetic, and one product over all rows follows for each linear layer, which is as many FLOPs as a dense layer
has. The bias of the first layer is a column of its weight beside a column of ones of x, so that neither it nor its
gradient is a pass over [N, H]; moving rows is a gather forward and a gather back. `mix_weights` is for residuals that
meet inside one network; autograd follows it.

Shape suffixes: T tokens, C model width, H hidden width, E experts, K experts per token, P = T·K pairs of a token and
one of its experts, N the same pairs sorted by expert, G groups: the experts, and where choices are dropped one more for
those; J = C + the columns of ones; I and O the inputs and outputs of either linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rmoe.moe.experts import Activation, Full, Network, Residuals, act_backward, first_order
from rmoe.moe.passes import passes_on, sort_pairs

_ALIGNMENT = 16  # bytes at which each row of an operand begins


def has_grouped_gemm(x: Tensor, residuals: Residuals, dtype: torch.dtype) -> bool:
    """Says whether torch has a grouped GEMM that waits for nothing: bfloat16 on Hopper, in rows of whole 16 bytes.

    Elsewhere `torch.nn.functional.grouped_mm` brings the number of rows of each expert to the host at every call, or,
    on Blackwell, leaves the gradients of experts without rows as memory was (torch 2.11).

    Args:
        x: what the rows are taken from, in any dtype; no rows at all are a product that is refused.
        residuals: of the experts, in any dtype.
        dtype: of the arithmetic.
    """
    if not (x.is_cuda and dtype == torch.bfloat16 and len(x) and _is_hopper(x.device)):
        return False
    widths = {size for delta in residuals for size in delta.shape[1:]}  # C, H and, for low rank, R
    return not any(width * dtype.itemsize % _ALIGNMENT for width in widths)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


class _Order(NamedTuple):
    """Says how pairs of a token and one of its experts stand sorted by expert; on the device."""

    pair_N: Tensor  # position among the sorted → pair
    token_N: Tensor  # position among the sorted → token
    place_P: Tensor  # pair → position among the sorted
    end_G: Tensor  # int32: one past the last row of each group


def _sort_pairs(expert_TK: Tensor, groups: int) -> _Order:
    place_P, pair_N, end_G = sort_pairs(expert_TK.flatten(), groups)
    k = expert_TK.shape[1]
    return _Order(pair_N, pair_N // k if k > 1 else pair_N, place_P, end_G)


def mix_networks(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network | None,
    experts: Residuals,
    act: Activation,
    drops: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Computes Σ g_e FFN(x; θ0 + Δ_e), [T, C] of a dtype; other arguments as `rmoe.moe.mix.mix`.

    Tokens, the core's weights and Δ may be of any dtype: x and θ, the sum of core and Δ, are rounded once.
    """
    weights = (None,) * 4 if core is None else core
    return _Networks.apply(x_TC, expert_TK, gate_TK, act, drops, dtype, *weights, *experts)


class _Networks(Function):
    """Computes tokens through the networks of their experts, weighed by their gate values."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        expert_TK: Tensor,
        gate_TK: Tensor,
        act: Activation,
        drops: bool,
        dtype: torch.dtype,
        *weights: Tensor,
    ) -> Tensor:
        core, experts = Network(*weights[:4]), Full(*weights[4:])
        groups, k, columns = len(experts.w1_EHC) + drops, expert_TK.shape[1], _ALIGNMENT // dtype.itemsize
        passes = passes_on(x_TC.device)
        expert_P, gate_P = expert_TK.reshape(-1), gate_TK.reshape(-1)
        with torch.cuda.device_of(x_TC):  # Triton launches on the device that is current
            place_P, end_G = passes.place_pairs(expert_P, groups)
            x_NJ = passes.to_experts(x_TC, place_P, columns, dtype)
            first, second = (None, None) if weights[0] is None else (core[:2], core[2:])
            w1_GHJ, _ = passes.weights_of(experts[:2], first, groups, columns, dtype)
            w2_GCH, b2_GC = passes.weights_of(experts[2:], second, groups, 0, dtype)
            h_NH = F.grouped_mm(x_NJ, w1_GHJ.mT, offs=end_G)
            a_NH = act(h_NH)
            y_NC = F.grouped_mm(a_NH, w2_GCH.mT, offs=end_G)
            y_TC = passes.from_experts(y_NC, place_P, k, dtype, (gate_P, b2_GC, expert_P))
        ctx.save_for_backward(x_NJ, h_NH, a_NH, y_NC, gate_P, expert_P, w1_GHJ, w2_GCH, b2_GC, place_P, end_G)
        ctx.act, ctx.k, ctx.x_dtype, ctx.passes = act, k, x_TC.dtype, passes
        ctx.experts, ctx.dtypes = len(experts.w1_EHC), [None if w is None else w.dtype for w in weights]
        return y_TC

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Any, ...]:
        x_NJ, h_NH, a_NH, y_NC, gate_P, expert_P, w1_GHJ, w2_GCH, b2_GC, place_P, end_G = ctx.saved_tensors
        passes, width = ctx.passes, grad_TC.shape[1]
        grad_NC, grad_P = passes.from_experts_backward(grad_TC, y_NC, place_P, gate_P, b2_GC, expert_P)
        grad_gate_TK = grad_P.view(-1, ctx.k)
        grad_NH = F.grouped_mm(grad_NC, w2_GCH, offs=end_G)
        grad_NH = act_backward(ctx.act, grad_NH, h_NH)
        back_NC = F.grouped_mm(grad_NH, w1_GHJ[..., :width], offs=end_G)
        grad_x_TC = passes.from_experts(back_NC, place_P, ctx.k, ctx.x_dtype)
        wanted = ctx.needs_input_grad[6:]
        if not any(wanted):
            return grad_x_TC, None, grad_gate_TK, None, None, None, *(None for _ in wanted)
        dtypes = [dtype if want else None for dtype, want in zip(ctx.dtypes, wanted, strict=True)]
        grad_GHJ = F.grouped_mm(grad_NH.mT, x_NJ, offs=end_G)
        of_first = (grad_GHJ, grad_GHJ[..., width], end_G, ctx.experts, width)
        w1_EHC, b1_EH, w1_HC, b1_H = passes.gradients_of(*of_first, [*dtypes[4:6], *dtypes[:2]])
        del grad_GHJ, of_first
        grad_GCH = F.grouped_mm(grad_NC.mT, a_NH, offs=end_G)
        grad_GJC = F.grouped_mm(x_NJ[:, width:].mT, grad_NC, offs=end_G)  # J: the columns of ones, all alike
        of_second = (grad_GCH, grad_GJC[:, 0], end_G, ctx.experts, h_NH.shape[1])
        w2_ECH, b2_EC, w2_CH, b2_C = passes.gradients_of(*of_second, [*dtypes[6:], *dtypes[2:4]])
        grads = (w1_HC, b1_H, w2_CH, b2_C, w1_EHC, b1_EH, w2_ECH, b2_EC)
        return grad_x_TC, None, grad_gate_TK, None, None, None, *grads


def _sum_of_choices(x_PC: Tensor, k: int) -> Tensor:
    return x_PC if k == 1 else x_PC.unflatten(0, (-1, k)).sum(1, dtype=x_PC.dtype)


def _grouped_outer(grad_NO: Tensor, x_NI: Tensor, end_G: Tensor, empty_G: Tensor) -> Tensor:
    """Returns the gradient of the weights, Σ grad xᵀ over the rows of each group, [G, O, I]; 0 where it has none."""
    grad_GOI = F.grouped_mm(grad_NO.mT, x_NI, offs=end_G)
    return grad_GOI.masked_fill_(empty_G[:, None, None], 0)  # the kernel may leave them as memory was


class Groups(NamedTuple):
    """Says how rows are sorted by expert, for products that autograd follows."""

    expert_N: Tensor
    end_E: Tensor  # int32: one past the last row of each expert, on the rows' device
    sizes: list[int] | None  # rows of each expert; None where a grouped GEMM needs no such answer from the device

    def product(self, x_NI: Tensor, w_EIO: Tensor) -> Tensor:
        """Returns x w_e for the rows of each expert."""
        if self.sizes is None:
            return _GroupedProduct.apply(x_NI, w_EIO, self.end_E)
        # Empty slices are computed too: an expert without tokens needs a gradient of zeros, not none (ZeRO would mix up
        # the gradients of different experts).
        return torch.cat([x_nI @ w_IO for x_nI, w_IO in zip(x_NI.split(self.sizes), w_EIO.unbind(), strict=True)])


def grouped_rows(
    x_NC: Tensor, expert_N: Tensor, scale_N: Tensor, core: Network, low: Residuals, act: Activation
) -> Tensor:
    """Computes rows of one low-rank residual each, whose weight in the network is `scale_N`."""
    return mix_weights(x_NC, expert_N[:, None], scale_N[:, None], core, low, act)


def mix_weights(
    x_TC: Tensor, expert_TK: Tensor, gate_TK: Tensor, core: Network, residuals: Residuals, act: Activation
) -> Tensor:
    """Computes residuals that meet inside one network, or whose weight differs from row to row."""
    first, second = sorted_products(expert_TK, gate_TK, residuals, has_grouped_gemm(x_TC, residuals, x_TC.dtype))

    def linear(x_TI: Tensor, w_OI: Tensor | None, b_O: Tensor | None, product: Callable[[Tensor], Tensor]) -> Tensor:
        y_TO = product(x_TI)
        return y_TO if w_OI is None else F.linear(x_TI, w_OI, b_O) + y_TO

    a_TH = act(linear(x_TC, core.w1_HC, core.b1_H, first))
    return linear(a_TH, core.w2_CH, core.b2_C, second)


def sorted_products(
    expert_TK: Tensor, gate_TK: Tensor, residuals: Residuals, grouped: bool
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Returns the functions x_TI → Σ_k g_k Δ_e x of the two linear layers, over rows sorted by expert.

    Args:
        expert_TK: E for a choice that the capacity dropped, which adds nothing.
        gate_TK: of the residuals' dtype.
        grouped: whether `has_grouped_gemm`.
    """
    num_experts, k = residuals.num_experts, expert_TK.shape[1]
    gate_TK = gate_TK.where(expert_TK < num_experts, 0.0)
    expert_TK = expert_TK.clamp(max=num_experts - 1)
    order = _sort_pairs(expert_TK, num_experts)
    expert_N, gate_N1 = expert_TK.flatten()[order.pair_N], gate_TK.reshape(-1, 1)[order.pair_N]
    sizes = None if grouped else torch.bincount(expert_N, minlength=num_experts).tolist()
    groups = Groups(expert_N, order.end_G, sizes)

    def of(residual: Callable[[Tensor, Groups], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x_TI: _FromExperts.apply(gate_N1 * residual(_ToExperts.apply(x_TI, order, k), groups), order, k)

    return of(residuals.first), of(residuals.second)


class _ToExperts(Function):
    """Gathers the rows of tokens, sorted by expert; backward gathers them back and sums those of one token."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, order: _Order, k: int) -> Tensor:
        ctx.order, ctx.k = order, k
        return x_TC[order.token_N]

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, None, None]:
        return _FromExperts.apply(grad_NC, ctx.order, ctx.k), None, None


class _FromExperts(Function):
    """Sums the sorted rows of each token: the transpose of `_ToExperts`."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, order: _Order, k: int) -> Tensor:
        ctx.order, ctx.k = order, k
        return _sum_of_choices(x_NC[order.place_P], k)

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, None, None]:
        return _ToExperts.apply(grad_TC, ctx.order, ctx.k), None, None


class _GroupedProduct(Function):
    """Computes x w_e for the rows of each expert; every expert has a gradient, zeros included."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_EIO: Tensor, end_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, w_EIO, end_E)
        return F.grouped_mm(x_NI, w_EIO, offs=end_E)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NI, w_EIO, end_E = ctx.saved_tensors
        empty_E = torch.diff(end_E, prepend=end_E.new_zeros(1)) == 0
        return F.grouped_mm(grad_NO, w_EIO.mT, offs=end_E), _grouped_outer(x_NI, grad_NO, end_E, empty_E), None
