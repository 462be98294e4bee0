"""Low-rank residuals of all experts at once, on a GPU: no product over all tokens beyond those of the dense network.

As in masked.py no rows are sorted, and the residuals of a linear layer are one matrix. Here they stand in one matrix
with the core's weight as well, and what they are applied to stands beside the layer's input,

    [W  Bᵀ  b] [x; g ⊙ A x; 1]        forward
    [W; A]ᵀ [grad; g ⊙ B grad]        backward, of x

so that each is one product whose inner dimension is Q longer, and the bias a part of it: a product of rank Q of its own
would read and write all of [T, H] once more. Both left operands are parts of [W Bᵀ b; A · ·], in which the weights are
cast straight from their parameters; products whose result a parameter or the tokens get are made in that one's dtype.

The hidden activations lie feature first in memory, [H, T]: rows of their own are room for g ⊙ A x, and the activation
runs over whole memory.

Shape suffixes: T tokens, C model width, H hidden width, E experts, K experts per token, R residual rank; I and O the
inputs and outputs of either linear layer; Q = E·R rows of the stacked B, P those of the stacked A (E·R, or R where the
experts share one A); J = I + Q + the rows of ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rmoe.moe.experts import Activation, LowRank, Network, act_backward
from rmoe.moe.triton_here import has_triton

# Rows of ones, whose weights are b alike: each enters with 1/16, exact in any format, and sizes stay multiples of 16.
_ONES = 16
_ALIGNMENT = 16  # bytes at which each row of an operand begins


def folded_low_rank(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network,
    low: LowRank,
    act: Activation,
    dtype: torch.dtype,
    ready: Callable[[], object] | None = None,
    drops: bool = True,
) -> Tensor:
    """Computes y_TC = FFN(x; θ0 + Σ g_e Δ_e) in `dtype`, which no tensor need have.

    Other arguments are those of `rmoe.moe.mix.mix`.
    """
    return _Folded.apply(x_TC, gate_TK, expert_TK, act, dtype, ready, drops, torch.is_grad_enabled(), *core, *low)


class _Layer(NamedTuple):
    """Holds what one linear layer keeps for backward."""

    weight: Tensor  # [W Bᵀ b; A · ·]
    x_JT: Tensor
    u_PT: Tensor  # A x


class _Folded(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        gate_TK: Tensor,
        expert_TK: Tensor,
        act: Activation,
        dtype: torch.dtype,
        ready: Callable[[], object] | None,
        drops: bool,
        keep: bool,
        *weights: Tensor,
    ) -> Tensor:
        core, low = Network(*weights[:4]), LowRank(*weights[4:])
        (tokens, width), (experts, rank, hidden) = x_TC.shape, low.b1_ERH.shape
        # A choice that the capacity dropped is one of expert E.
        gate_ET = gate_TK.new_zeros(experts + drops, tokens).scatter_add_(0, expert_TK.T, gate_TK.T)[:experts]

        x_JT = _matrix(x_TC, tokens, width + experts * rank + _ONES, dtype).T
        x_JT[:width].copy_(x_TC.T)
        weight1 = _joined(core.w1_HC, core.b1_H, low.a1_ERC, low.b1_ERH, dtype, ready)
        weight2 = _joined(core.w2_CH, core.b2_C, low.a2_ERH, low.b2_ERC, dtype, None)
        first = _prepared(weight1, x_JT, low.a1_ERC, gate_ET)
        h_HT = torch.mm(weight1[:hidden], x_JT, out=_matrix(x_TC, hidden, tokens, dtype))
        a_JT = _matrix(x_TC, hidden + experts * rank + _ONES, tokens, dtype)
        _activate(act, h_HT, a_JT[:hidden])
        second = _prepared(weight2, a_JT, low.a2_ERH, gate_ET)
        y_TC = a_JT.T @ weight2[:width].T
        if keep:
            ctx.save_for_backward(expert_TK, gate_ET, h_HT, *first, *second)
            ctx.act, ctx.drops, ctx.dtypes = act, drops, [None if w is None else w.dtype for w in (x_TC, *weights)]
            ctx.shared = len(low.a1_ERC) < experts
        return y_TC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Any, ...]:
        expert_TK, gate_ET, h_HT, *layers = ctx.saved_tensors
        first, second = _Layer(*layers[:3]), _Layer(*layers[3:])
        (tokens, width), hidden, of_x, dtypes = grad_TC.shape, len(h_HT), ctx.dtypes[0], ctx.dtypes[1:]
        wants_x, wants_gate = ctx.needs_input_grad[:2]
        wanted = [d if w else None for d, w in zip(dtypes, ctx.needs_input_grad[8:], strict=True)]
        rows = len(second.weight) - width

        grad_JT = _matrix(h_HT, tokens, width + rows, h_HT.dtype).T
        grad_JT[:width].copy_(grad_TC.T)
        v2_QT = _weigh_back(grad_JT, second.weight[:, hidden : hidden + rows], gate_ET)
        back_JT = _matrix(h_HT, hidden + rows, tokens, h_HT.dtype)
        torch.mm(second.weight[:, :hidden].T, grad_JT, out=back_JT[:hidden])
        of_core2, of_low2 = _gradients(grad_JT, second.x_JT, hidden, gate_ET, wanted[2:4], wanted[6:], ctx.shared)
        grad_HT = back_JT[:hidden]
        if (found := act_backward(ctx.act, grad_HT, h_HT)) is not grad_HT:
            grad_HT.copy_(found)
        v1_QT = _weigh_back(back_JT, first.weight[:, width : width + rows], gate_ET)
        grad_x = _product(back_JT.T, first.weight[:, :width], of_x) if wants_x else None
        of_core1, of_low1 = _gradients(back_JT, first.x_JT, width, gate_ET, wanted[:2], wanted[4:6], ctx.shared)
        grad_gate = None
        if wants_gate:
            parts = [part.unflatten(0, (-1, rows // len(gate_ET))) for part in (v1_QT, first.u_PT, v2_QT, second.u_PT)]
            per_rank_ERT = (parts[0] * parts[1]).addcmul_(parts[2], parts[3])
            grad_ET = gate_ET.new_empty(len(gate_ET) + ctx.drops, tokens)
            torch.sum(per_rank_ERT, 1, dtype=grad_ET.dtype, out=grad_ET[: len(gate_ET)])
            if ctx.drops:
                grad_ET[-1] = 0
            grad_gate = grad_ET.gather(0, expert_TK.T).T
        return grad_x, grad_gate, *(None,) * 6, *of_core1, *of_core2, *of_low1, *of_low2


def _matrix(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns a matrix that is not filled, whose rows begin at whole 16 bytes."""
    step = _ALIGNMENT // dtype.itemsize
    return like.new_empty(rows, -(-columns // step) * step, dtype=dtype)[:, :columns]


def _joined(
    w_OI: Tensor,
    b_O: Tensor | None,
    a_ERI: Tensor,
    b_ERO: Tensor,
    dtype: torch.dtype,
    ready: Callable[[], object] | None,
) -> Tensor:
    """Returns [W Bᵀ b; A · ·], [O + Q, J]: what stands below Bᵀ and b is not filled."""
    (outputs, inputs), (experts, rank) = w_OI.shape, b_ERO.shape[:2]
    end = inputs + experts * rank
    joined = _matrix(w_OI, outputs + experts * rank, end + _ONES, dtype)
    factors = (a_ERI.flatten(0, 1), b_ERO.flatten(0, 1))
    if has_triton(w_OI) and dtype != torch.float64:
        from rmoe.moe.join_kernel import join

        if ready is not None:
            ready()
        join(w_OI.contiguous(), b_O, factors[0].contiguous(), factors[1].contiguous(), joined)
        return joined
    joined[:outputs, :inputs].copy_(w_OI)
    joined[:outputs, end:] = 0 if b_O is None else b_O[:, None]
    if ready is not None:
        ready()
    joined[:outputs, inputs:end].copy_(factors[1].T)
    joined[outputs:, :inputs].unflatten(0, (experts, rank)).copy_(a_ERI)
    return joined


def _prepared(weight: Tensor, x_JT: Tensor, a_ERI: Tensor, gate_ET: Tensor) -> _Layer:
    """Writes g ⊙ A x and ones below x."""
    (of_a, rank, inputs), experts = a_ERI.shape, len(gate_ET)
    rows, end = experts * rank, inputs + experts * rank
    first_row = len(weight) - rows
    u_PT = _skinny(weight[first_row : first_row + of_a * rank, :inputs], x_JT[:inputs])
    torch.mul(u_PT.unflatten(0, (of_a, rank)), gate_ET[:, None], out=x_JT[inputs:end].unflatten(0, (experts, rank)))
    x_JT[end:] = 1 / _ONES
    return _Layer(weight, x_JT, u_PT)


def _skinny(a_PI: Tensor, x_IT: Tensor) -> Tensor:
    """Returns A x, in memory tokens first if x is, so that what is written beside x is read as it is written."""
    return a_PI @ x_IT if x_IT.stride(1) == 1 else (x_IT.T @ a_PI.T).T


def _weigh_back(grad_JT: Tensor, b_OQ: Tensor, gate_ET: Tensor) -> Tensor:
    """Writes g ⊙ B grad below grad; returns B grad."""
    rows = b_OQ.shape[1]
    outputs, by_expert = len(grad_JT) - rows, (len(gate_ET), rows // len(gate_ET))
    v_QT = _skinny(b_OQ[:outputs].T, grad_JT[:outputs])
    torch.mul(v_QT.unflatten(0, by_expert), gate_ET[:, None], out=grad_JT[outputs:].unflatten(0, by_expert))
    return v_QT


def _gradients(
    grad_JT: Tensor,
    x_JT: Tensor,
    inputs: int,
    gate_ET: Tensor,
    core: list[torch.dtype | None],
    low: list[torch.dtype | None],
    shared: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Returns the gradients of W and b, and of A and B, in the dtypes that are wanted; None where none is."""
    rows, experts = len(x_JT) - inputs - _ONES, len(gate_ET)
    outputs = len(grad_JT) - rows
    grad_OT, x_IT, by_expert = grad_JT[:outputs], x_JT[:inputs], (experts, rows // experts)
    of_w = None if core[0] is None else _product(grad_OT, x_IT.T, core[0])
    of_b = of_bias = of_a = None
    if low[1] is not None or core[1] is not None:
        below = x_JT[inputs:] if core[1] is not None else x_JT[inputs : inputs + rows]
        joint = _product(below, grad_OT.T, torch.promote_types(*(d or x_JT.dtype for d in (low[1], core[1]))))
        of_b = None if low[1] is None else joint[:rows].unflatten(0, by_expert).to(low[1])
        of_bias = None if core[1] is None else (joint[rows] * _ONES).to(core[1])
    if low[0] is not None:
        of_a = _product(grad_JT[outputs:], x_IT.T, low[0]).unflatten(0, by_expert)
        of_a = of_a.sum(0, keepdim=True) if shared else of_a
    return [of_w, of_bias], [of_a, of_b]


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the matrix product in `dtype`, which on a GPU a product of half precision is rounded to once."""
    if x.is_cuda and dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, y, out_dtype=dtype)
    return (x @ y).to(dtype)


def _activate(act: Activation, h: Tensor, out: Tensor) -> None:
    if isinstance(act, nn.GELU):
        torch.ops.aten.gelu.out(h, approximate=act.approximate, out=out)
    else:
        out.copy_(act(h))
