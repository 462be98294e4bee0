"""Low-rank residuals of all experts at once: no rows are sorted, nothing is counted, no shape depends on a decision.

All A_e stand as one matrix of E·R rows. Its product with a token is weighed by the token's gate values, zero where an
expert is not chosen, and the stacked B brings it back:

    Σ_e g_e B_eᵀ (A_e x)  =  [B_1 … B_E]ᵀ (g ⊙ [A_1 … A_E] x)

which costs the same for one expert as for all of them, weighed softly, inside one network. This is the form of a CPU,
tile by tile, so that the activations stay in cache, and of compilers and exporters; a GPU's is in folded.py.

Shape suffixes: T tokens, n tokens of a tile, C model width, H hidden width, E experts, K experts per token, R residual
rank; Q = E·R rows of the stacked B, P those of the stacked A (E·R, or R where the experts share one A).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rmoe.moe.experts import Activation, LowRank, Network, act_backward, first_order

TILE = 1600  # tokens


def masked_low_rank(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network,
    low: LowRank,
    act: Activation,
    ready: Callable[[], object] | None = None,
) -> Tensor:
    """Computes y_TC = FFN(x; θ0 + Σ g_e Δ_e); arguments as `rmoe.moe.mix.mix`, all of one dtype."""
    if torch.compiler.is_compiling():
        # Plain operations, for a compiler or an exporter to follow; it makes a backward pass of its own.
        return _forward(x_TC, by_expert(expert_TK, gate_TK, low.num_experts), core, low, act, ready)[0]
    return _Masked.apply(x_TC, gate_TK, expert_TK, act, ready, torch.is_grad_enabled(), *core, *low)


def masked_products(
    expert_TK: Tensor, gate_TK: Tensor, low: LowRank
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Returns the functions x_TI → Σ_e g_e B_eᵀ (A_e x) of the two linear layers, for autograd to follow.

    Args:
        expert_TK: E for a choice that the capacity dropped, which adds nothing.
        gate_TK: of the residuals' dtype.
    """
    gate_ET = by_expert(expert_TK, gate_TK, low.num_experts)

    def of(a_ERI: Tensor, b_ERO: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x_TI: _weighed(_rank_first(a_ERI, x_TI), gate_ET, b_ERO).T @ b_ERO.flatten(0, 1)

    return of(low.a1_ERC, low.b1_ERH), of(low.a2_ERH, low.b2_ERC)


class _Masked(Function):
    """Computes all tokens, tile by tile; of each it keeps h, a, A1 x and A2 a."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        gate_TK: Tensor,
        expert_TK: Tensor,
        act: Activation,
        ready: Callable[[], object] | None,
        keep: bool,
        *weights: Tensor,
    ) -> Tensor:
        core, low = Network(*weights[:4]), LowRank(*weights[4:])
        gate_ET = by_expert(expert_TK, gate_TK, low.num_experts)
        found, kept = list[Tensor](), list[Tensor]()
        for x_nC, gate_En in zip(*_in_tiles([x_TC], [gate_ET]), strict=True):
            y_nC, h_nH, a_nH, u1_Pn, u2_Pn = _forward(x_nC, gate_En, core, low, act, ready)
            found.append(y_nC)
            if keep:
                # An activation takes half as long as the product before it.
                kept += [h_nH, a_nH, u1_Pn, u2_Pn]
            ready = None
        ctx.save_for_backward(x_TC, gate_ET, expert_TK, *weights, *kept)
        ctx.act = act
        return found[0] if len(found) == 1 else torch.cat(found)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Any, ...]:
        x_TC, gate_ET, expert_TK, *saved = ctx.saved_tensors
        core, low, kept = Network(*saved[:4]), LowRank(*saved[4:8]), iter(saved[8:])
        wants_x, wants_gate = ctx.needs_input_grad[:2]
        of_core, of_low = ([Sum(want) for want in ctx.needs_input_grad[at : at + 4]] for at in (6, 10))
        back_nCs = list[Tensor]()
        # A choice that the capacity dropped, expert E, has gradient 0.
        grad_gate = gate_ET.new_zeros(len(gate_ET) + 1, gate_ET.shape[1]) if wants_gate else None
        for x_nC, grad_nC, gate_En, *to_gate in zip(
            *_in_tiles([x_TC, grad_TC], [gate_ET] if grad_gate is None else [gate_ET, grad_gate[:-1]]), strict=True
        ):
            h_nH, a_nH, u1_Pn, u2_Pn = islice(kept, 4)
            add_core_gradient(of_core[2:], grad_nC, a_nH)
            grad_nH = grad_nC @ core.w2_CH
            v2_ERn = _low_rank_backward(grad_nH, grad_nC, a_nH, u2_Pn, gate_En, low[2:], of_low[2:])
            grad_nH = act_backward(ctx.act, grad_nH, h_nH)
            add_core_gradient(of_core[:2], grad_nH, x_nC)
            back_nC = grad_nH @ core.w1_HC if wants_x else None
            v1_ERn = _low_rank_backward(back_nC, grad_nH, x_nC, u1_Pn, gate_En, low[:2], of_low[:2])
            if back_nC is not None:
                back_nCs.append(back_nC)
            for gate in to_gate:
                rank = v1_ERn.shape[1]
                v1_ERn.mul_(u1_Pn.unflatten(0, (-1, rank))).addcmul_(v2_ERn, u2_Pn.unflatten(0, (-1, rank)))
                torch.sum(v1_ERn, 1, out=gate)
        grad_x = None if not wants_x else back_nCs[0] if len(back_nCs) == 1 else torch.cat(back_nCs)
        if grad_gate is not None:
            grad_gate = grad_gate.gather(0, expert_TK.T).T
        grad_weights = (one.rounded(w) for one, w in zip([*of_core, *of_low], saved, strict=False))
        return grad_x, grad_gate, None, None, None, None, *grad_weights


class Sum:
    """Adds up the parts of a gradient, if it is wanted; in float32 those of half precision, of many tiles of tokens."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.total: Tensor | None = None

    def add_product(self, x: Tensor, y: Tensor) -> None:
        """Adds the matrix product x y."""
        if self.wanted and self.total is None:
            self.total = x @ y
        elif self.total is not None:
            add_product_(self._in_float32(self.total), x, y)

    def add_columns(self, x: Tensor) -> None:
        """Adds the sums over the rows of x."""
        if self.wanted and self.total is None:
            self.total = x.sum(0)
        elif self.total is not None:
            self._in_float32(self.total).add_(x.sum(0))

    def _in_float32(self, total: Tensor) -> Tensor:
        self.total = total.to(torch.promote_types(total.dtype, torch.float32))
        return self.total

    def rounded(self, weight: Tensor | None) -> Tensor | None:
        """Returns the gradient of `weight`, None where it is not wanted."""
        return None if weight is None or self.total is None else self.total.to(weight.dtype).view_as(weight)


def add_product_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds the matrix product x y, which is rounded to its own dtype first where `total` has more bits."""
    total.addmm_(x, y) if total.dtype == x.dtype else total.add_(x @ y)


def by_expert(expert_TK: Tensor, gate_TK: Tensor, num_experts: int, drops: bool = True) -> Tensor:
    """Returns gate values as gate_ET, 0 where an expert is not chosen; `drops` says whether one may be E."""
    zeros = gate_TK.new_zeros(num_experts + drops, gate_TK.shape[0])
    return zeros.scatter_add_(0, expert_TK.T, gate_TK.T)[:num_experts]


def _in_tiles(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Returns of each matrix its pieces, one a tile: tokens are the rows of `rows` and the columns of `columns`."""
    return [x.split(TILE) for x in rows] + [x.split(TILE, 1) for x in columns]


def _forward(
    x_nC: Tensor, gate_En: Tensor, core: Network, low: LowRank, act: Activation, ready: Callable[[], object] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y, h, a, A1 x and A2 a."""
    h_nH = F.linear(x_nC, core.w1_HC, core.b1_H)
    if ready is not None:
        ready()
    u1_Pn = _rank_first(low.a1_ERC, x_nC)
    h_nH.addmm_(_weighed(u1_Pn, gate_En, low.b1_ERH).T, low.b1_ERH.flatten(0, 1))
    a_nH = act(h_nH)
    y_nC = F.linear(a_nH, core.w2_CH, core.b2_C)
    u2_Pn = _rank_first(low.a2_ERH, a_nH)
    y_nC.addmm_(_weighed(u2_Pn, gate_En, low.b2_ERC).T, low.b2_ERC.flatten(0, 1))
    return y_nC, h_nH, a_nH, u1_Pn, u2_Pn


def _rank_first(a_ERI: Tensor, x_nI: Tensor) -> Tensor:
    """Returns A x, [P, n]. In memory rows are ranks, which a CPU weighs three times as fast as rows of tokens. Of a
    number of tokens that is not known, torch can prove what an exporter asks for the latter only.
    """
    a_PI = a_ERI.flatten(0, 1)
    return (x_nI @ a_PI.T).T if torch.compiler.is_compiling() else a_PI @ x_nI.T


def _weighed(u_Pn: Tensor, gate_En: Tensor, b_ERO: Tensor) -> Tensor:
    """Returns g ⊙ A x, [Q, n]."""
    return times_gates(u_Pn.unflatten(0, (-1, b_ERO.shape[1])), gate_En).flatten(0, 1)


def times_gates(u_ERn: Tensor, gate_En: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns g ⊙ u, [E, R, n]; 0 where g is 0, also of a u that is larger than float16 holds: 0 · ∞ is no number."""
    found = torch.mul(u_ERn, gate_En[:, None], out=out)
    return found.masked_fill_(gate_En[:, None] == 0, 0) if u_ERn.dtype == torch.float16 else found


def _low_rank_backward(
    back_nI: Tensor | None,
    grad_nO: Tensor,
    x_nI: Tensor,
    u_Pn: Tensor,
    gate_En: Tensor,
    factors: Sequence[Tensor],
    sums: Sequence[Sum],
) -> Tensor:
    """Adds to the gradients of x (`back_nI`), A and B of Σ g_e B_eᵀ (A_e x); returns B · grad, [E, R, n]."""
    a_PI, b_QO = (w.flatten(0, 1) for w in factors)
    sums[1].add_product(_weighed(u_Pn, gate_En, factors[1]), grad_nO)
    v_ERn = (b_QO @ grad_nO.T).unflatten(0, factors[1].shape[:2])
    weighed_ERn = times_gates(v_ERn, gate_En)
    weighed_Pn = weighed_ERn.flatten(0, 1) if len(a_PI) == len(b_QO) else weighed_ERn.sum(0)
    sums[0].add_product(weighed_Pn, x_nI)
    if back_nI is not None:
        back_nI.addmm_(weighed_Pn.T, a_PI)
    return v_ERn


def add_core_gradient(sums: Sequence[Sum], grad_nO: Tensor, x_nI: Tensor) -> None:
    """Adds to the gradients of W and b of W x + b."""
    sums[0].add_product(grad_nO.T, x_nI)
    sums[1].add_columns(grad_nO)
