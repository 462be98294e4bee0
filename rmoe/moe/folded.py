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
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rmoe.moe.experts import Activation, LowRank, Network, act_backward, first_order
from rmoe.moe.folded_passes import ONES, Gates, Linear, matrix, passes_for


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
        passes, rows = passes_for(x_TC, dtype), experts * rank
        gates = passes.gates_of(expert_TK, gate_TK, experts, rank, drops)

        x_JT = matrix(x_TC, tokens, width + rows + ONES, dtype).T
        x_JT[:width].copy_(x_TC.T)
        layers = (Linear(*core[:2], *low[:2]), Linear(*core[2:], *low[2:]))
        weight1, weight2 = passes.join(layers, dtype, ready)
        first = _prepared(passes, weight1, x_JT, width, len(low.a1_ERC) * rank, gates)
        h_HT = torch.mm(weight1[:hidden], x_JT, out=matrix(x_TC, hidden, tokens, dtype))
        a_JT = matrix(x_TC, hidden + rows + ONES, tokens, dtype)
        _activate(act, h_HT, a_JT[:hidden])
        second = _prepared(passes, weight2, a_JT, hidden, len(low.a2_ERH) * rank, gates)
        y_TC = a_JT.T @ weight2[:width].T
        if keep:
            ctx.save_for_backward(*gates[:3], h_HT, *first, *second)
            ctx.act, ctx.dtypes = act, [None if w is None else w.dtype for w in (x_TC, *weights)]
            ctx.sizes, ctx.passes, ctx.shared = (experts, rank), passes, len(low.a1_ERC) < experts
        return y_TC

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Any, ...]:
        *of_gates, h_HT = ctx.saved_tensors[:4]
        first, second = (_Layer(*ctx.saved_tensors[at : at + 3]) for at in (4, 7))
        gates, passes = Gates(*of_gates, *ctx.sizes), ctx.passes
        (tokens, width), hidden, of_x, dtypes = grad_TC.shape, len(h_HT), ctx.dtypes[0], ctx.dtypes[1:]
        wants_x, wants_gate = ctx.needs_input_grad[:2]
        wanted = [d if w else None for d, w in zip(dtypes, ctx.needs_input_grad[8:], strict=True)]

        grad_JT = matrix(h_HT, tokens, width + gates.rows, h_HT.dtype).T
        grad_JT[:width].copy_(grad_TC.T)
        v2_QT = _weigh_back(passes, grad_JT, second.weight, hidden, gates)
        back_JT = matrix(h_HT, hidden + gates.rows, tokens, h_HT.dtype)
        torch.mm(second.weight[:, :hidden].T, grad_JT, out=back_JT[:hidden])
        of_core2, of_low2 = _gradients(grad_JT, second.x_JT, hidden, gates, wanted[2:4], wanted[6:], ctx.shared)
        grad_HT = back_JT[:hidden]
        if (found := act_backward(ctx.act, grad_HT, h_HT)) is not grad_HT:
            grad_HT.copy_(found)
        v1_QT = _weigh_back(passes, back_JT, first.weight, width, gates)
        grad_x = _product(back_JT.T, first.weight[:, :width], of_x) if wants_x else None
        of_core1, of_low1 = _gradients(back_JT, first.x_JT, width, gates, wanted[:2], wanted[4:6], ctx.shared)
        grad_gate = passes.gate_gradient((v1_QT, v2_QT), (first.u_PT, second.u_PT), gates) if wants_gate else None
        return grad_x, grad_gate, *(None,) * 6, *of_core1, *of_core2, *of_low1, *of_low2


def _prepared(passes: ModuleType, weight: Tensor, x_JT: Tensor, inputs: int, rows_a: int, gates: Gates) -> _Layer:
    """Writes g ⊙ A x and ones below x."""
    a_PI = weight[len(weight) - gates.rows :, :inputs][:rows_a]
    u_PT = _skinny(a_PI, x_JT[:inputs])
    passes.weigh(u_PT, gates, x_JT[inputs:])
    return _Layer(weight, x_JT, u_PT)


def _skinny(a_PI: Tensor, x_IT: Tensor) -> Tensor:
    """Returns A x, in memory tokens first if x is, so that what is written beside x is read as it is written."""
    return a_PI @ x_IT if x_IT.stride(1) == 1 else (x_IT.T @ a_PI.T).T


def _weigh_back(passes: ModuleType, grad_JT: Tensor, weight: Tensor, inputs: int, gates: Gates) -> Tensor:
    """Writes g ⊙ B grad below grad; returns B grad."""
    outputs = len(grad_JT) - gates.rows
    v_QT = _skinny(weight[:outputs, inputs : inputs + gates.rows].T, grad_JT[:outputs])
    passes.weigh(v_QT, gates, grad_JT[outputs:])
    return v_QT


def _gradients(
    grad_JT: Tensor,
    x_JT: Tensor,
    inputs: int,
    gates: Gates,
    core: list[torch.dtype | None],
    low: list[torch.dtype | None],
    shared: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Returns the gradients of W and b, and of A and B, in the dtypes that are wanted; None where none is."""
    rows, by_expert = gates.rows, (gates.experts, gates.rank)
    outputs = len(grad_JT) - rows
    grad_OT, x_IT = grad_JT[:outputs], x_JT[:inputs]
    of_w = None if core[0] is None else _product(grad_OT, x_IT.T, core[0])
    of_b = of_bias = of_a = None
    if low[1] is not None or core[1] is not None:
        below = x_JT[inputs:] if core[1] is not None else x_JT[inputs : inputs + rows]
        joint = _product(below, grad_OT.T, torch.promote_types(*(d or x_JT.dtype for d in (low[1], core[1]))))
        of_b = None if low[1] is None else joint[:rows].unflatten(0, by_expert).to(low[1])
        of_bias = None if core[1] is None else (joint[rows] * ONES).to(core[1])
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
    if type(act) is nn.GELU:
        torch.ops.aten.gelu.out(h, approximate=act.approximate, out=out)
    else:
        out.copy_(act(h))
