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

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rmoe.moe.experts import Activation, Full, Network, Residuals, act_backward

_ALIGNMENT = 16  # bytes at which each row of an operand begins


def has_grouped_gemm(x: Tensor, residuals: Residuals) -> bool:
    """Says whether torch has a grouped GEMM that waits for nothing: bfloat16 on Hopper, in rows of whole 16 bytes.

    Elsewhere `torch.nn.functional.grouped_mm` brings the number of rows of each expert to the host at every call, or,
    on Blackwell, leaves the gradients of experts without rows as memory was (torch 2.11).

    Args:
        x: what the rows are taken from, in the dtype of the arithmetic; no rows at all are a product that is refused.
        residuals: of the experts, in any dtype.
    """
    if not (x.is_cuda and x.dtype == torch.bfloat16 and len(x) and _is_hopper(x.device)):
        return False
    widths = {size for delta in residuals for size in delta.shape[1:]}  # C, H and, for low rank, R
    return not any(width * x.itemsize % _ALIGNMENT for width in widths)


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
    # A radix sort takes as many passes as its keys have bytes.
    key_P = expert_TK.flatten().to(torch.int16 if groups < 2**15 else torch.int32)
    key_N, pair_N = key_P.sort(stable=True)
    place_P = torch.empty_like(pair_N).scatter_(0, pair_N, torch.arange(len(pair_N), device=pair_N.device))
    every_G = torch.arange(groups, device=key_N.device, dtype=key_N.dtype)
    k = expert_TK.shape[1]
    end_G = torch.searchsorted(key_N, every_G, right=True, out_int32=True)
    return _Order(pair_N, pair_N // k if k > 1 else pair_N, place_P, end_G)


def mix_networks(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network | None,
    experts: Residuals,
    act: Activation,
    drops: bool,
) -> Tensor:
    """Computes Σ g_e FFN(x; θ0 + Δ_e), [T, C] in the dtype of x; arguments as `rmoe.moe.mix.mix`.

    The core's weights and Δ may be of any dtype: θ is their sum, rounded once to the dtype of x.
    """
    weights = (None,) * 4 if core is None else core
    return _Networks.apply(x_TC, expert_TK, gate_TK, act, drops, *weights, *experts)


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
        *weights: Tensor,
    ) -> Tensor:
        core, experts = Network(*weights[:4]), Full(*weights[4:])
        (_, hidden, width), (tokens, k) = experts.w1_EHC.shape, expert_TK.shape
        groups = len(experts.w1_EHC) + drops
        order = _sort_pairs(expert_TK, groups)
        columns = _ALIGNMENT // x_TC.element_size()
        x_NJ = x_TC.new_empty(tokens * k, width + columns)
        x_NJ[:, width:] = 1
        torch.ops.aten.index.Tensor_out(x_TC, [order.token_N], out=x_NJ[:, :width])
        w1_GHJ = x_TC.new_empty(groups, hidden, width + columns)
        w1_GHJ[..., width + 1 :] = 0
        _add_core(core.w1_HC, experts.w1_EHC, out=w1_GHJ[..., :width])
        _add_core(core.b1_H, experts.b1_EH, out=w1_GHJ[..., width])
        w2_GCH = _add_core(core.w2_CH, experts.w2_ECH, out=x_TC.new_empty(groups, width, hidden))
        b2_GC = _add_core(core.b2_C, experts.b2_EC, out=x_TC.new_empty(groups, width))
        h_NH = F.grouped_mm(x_NJ, w1_GHJ.mT, offs=order.end_G)
        a_NH = act(h_NH)
        y_PC = F.grouped_mm(a_NH, w2_GCH.mT, offs=order.end_G)[order.place_P]
        y_PC += b2_GC[expert_TK.flatten()]
        gate_P1 = gate_TK.to(x_TC.dtype).reshape(-1, 1)
        ctx.save_for_backward(x_NJ, h_NH, a_NH, y_PC, gate_P1, w1_GHJ, w2_GCH, *order)
        ctx.act, ctx.k, ctx.experts = act, k, len(experts.w1_EHC)
        ctx.core_dtypes = [None if w is None else w.dtype for w in core]
        return _sum_of_choices(y_PC * gate_P1, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Any, ...]:
        x_NJ, h_NH, a_NH, y_PC, gate_P1, w1_GHJ, w2_GCH, *order = ctx.saved_tensors
        pair_N, token_N, place_P, end_G = order
        width, empty_G = grad_TC.shape[1], torch.diff(end_G, prepend=end_G.new_zeros(1)) == 0
        sums = torch.promote_types(grad_TC.dtype, torch.float32)
        grad_gate_TK = (y_PC.unflatten(0, (-1, ctx.k)) * grad_TC[:, None]).sum(-1, dtype=sums)
        grad_NC = grad_TC[token_N].mul_(gate_P1[pair_N])
        grad_NH = F.grouped_mm(grad_NC, w2_GCH, offs=end_G)
        grad_NH = act_backward(ctx.act, grad_NH, h_NH)
        back_NC = F.grouped_mm(grad_NH, w1_GHJ[..., :width], offs=end_G)
        grad_x_TC = _sum_of_choices(back_NC[place_P], ctx.k)
        wanted = ctx.needs_input_grad[5:]
        if not any(wanted):
            return grad_x_TC, None, grad_gate_TK, None, None, *(None for _ in wanted)
        grad_GHJ = _grouped_outer(grad_NH, x_NJ, end_G, empty_G)
        grad_GCH = _grouped_outer(grad_NC, a_NH, end_G, empty_G)
        grad_GJC = _grouped_outer(x_NJ[:, width:], grad_NC, end_G, empty_G)  # J: the columns of ones, all alike
        of_groups = (grad_GHJ[..., :width], grad_GHJ[..., width], grad_GCH, grad_GJC[:, 0])
        # θ_e = θ0 + Δ_e: the core's gradient is the sum of what its networks have.
        grads = [
            g.sum(0, dtype=dtype) if want else None
            for g, want, dtype in zip(of_groups, wanted[:4], ctx.core_dtypes, strict=True)
        ]
        grads += [g[: ctx.experts] if want else None for g, want in zip(of_groups, wanted[4:], strict=True)]
        return grad_x_TC, None, grad_gate_TK, None, None, *grads


def _add_core(core: Tensor | None, delta_E: Tensor, out: Tensor) -> Tensor:
    """Writes θ0 + Δ_e, and θ0 into the group of those without an expert if there is one, in the dtype of `out`."""
    experts = out[: len(delta_E)]
    experts.copy_(delta_E) if core is None else torch.add(delta_E, core, out=experts)
    if len(out) > len(delta_E):
        out[-1] = 0 if core is None else core
    return out


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
    num_experts, k = residuals[0].shape[0], expert_TK.shape[1]
    gate_TK = gate_TK.where(expert_TK < num_experts, 0.0)
    expert_TK = expert_TK.clamp(max=num_experts - 1)
    order = _sort_pairs(expert_TK, num_experts)
    expert_N, gate_N1 = expert_TK.flatten()[order.pair_N], gate_TK.reshape(-1, 1)[order.pair_N]
    grouped = has_grouped_gemm(x_TC, residuals)
    sizes = None if grouped else torch.bincount(expert_N, minlength=num_experts).tolist()
    groups = Groups(expert_N, order.end_G, sizes)

    def linear(x_TI: Tensor, w_OI: Tensor | None, b_O: Tensor | None, residual: Any) -> Tensor:
        y_NO = gate_N1 * residual(_ToExperts.apply(x_TI, order, k), groups)
        y_TO = _FromExperts.apply(y_NO, order, k)
        return y_TO if w_OI is None else F.linear(x_TI, w_OI, b_O) + y_TO

    a_TH = act(linear(x_TC, core.w1_HC, core.b1_H, residuals.first))
    return linear(a_TH, core.w2_CH, core.b2_C, residuals.second)


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
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NI, w_EIO, end_E = ctx.saved_tensors
        empty_E = torch.diff(end_E, prepend=end_E.new_zeros(1)) == 0
        return F.grouped_mm(grad_NO, w_EIO.mT, offs=end_E), _grouped_outer(x_NI, grad_NO, end_E, empty_E), None
