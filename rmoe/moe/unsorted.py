"""Networks of all experts at once, for a graph that is exported: no rows are sorted, no shape depends on a decision.

Every token goes through the network of every expert, and its gate values, zero where an expert is not chosen, weigh
what comes out: E times the products of the dense network, whatever top_k is (E + 1 times where residuals meet inside
one network). A form that sorts tokens costs less and has shapes which depend on their values; not every exporter and
program that runs graphs takes those.

Shape suffixes: T tokens, C model width, H hidden width, E experts, K experts per token, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rmoe.moe.experts import Activation, Full, Network
from rmoe.moe.masked import by_expert


def unsorted_networks(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network,
    residuals: Full,
    act: Activation,
    mixes_weights: bool,
) -> Tensor:
    """Computes y_TC; arguments as `rmoe.moe.mix.mix`, all of one dtype; without a core its weights are None.

    No choice is dropped, as in evaluation.
    """
    gate_TE1 = by_expert(expert_TK, gate_TK, residuals.num_experts).T.unsqueeze(2)
    if mixes_weights:
        a_TH = act(_inside(x_TC, gate_TE1, core[:2], residuals[:2]))
        return _inside(a_TH, gate_TE1, core[2:], residuals[2:])
    w1_EHC, b1_EH, w2_ECH, b2_EC = residuals
    if core.w1_HC is not None:
        zero = x_TC.new_zeros(())
        w1_EHC, b1_EH = core.w1_HC + w1_EHC, (zero if core.b1_H is None else core.b1_H) + b1_EH
        w2_ECH, b2_EC = core.w2_CH + w2_ECH, (zero if core.b2_C is None else core.b2_C) + b2_EC
    a_TEH = act(_of_every_expert(x_TC, w1_EHC, b1_EH))
    return (gate_TE1 * a_TEH).flatten(1) @ w2_ECH.mT.flatten(0, 1) + gate_TE1.flatten(1) @ b2_EC


def unsorted_products(
    expert_TK: Tensor, gate_TK: Tensor, residuals: Full
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Returns the functions x_TI → Σ_k g_k Δ_e x of the two linear layers; arguments as `rmoe.moe.mix.mix`."""
    gate_TE1 = by_expert(expert_TK, gate_TK, residuals.num_experts).T.unsqueeze(2)
    of_layers = (residuals[:2], residuals[2:])
    first, second = ((lambda x_TI, of=of: (gate_TE1 * _of_every_expert(x_TI, *of)).sum(1)) for of in of_layers)
    return first, second


def _inside(x_TI: Tensor, gate_TE1: Tensor, core: tuple[Tensor, Tensor | None], delta: tuple[Tensor, Tensor]) -> Tensor:
    """Returns (W + Σ g_e ΔW_e) x + b + Σ g_e Δb_e."""
    added_TO = (gate_TE1 * _of_every_expert(x_TI, *delta)).sum(1)
    return added_TO if core[0] is None else F.linear(x_TI, *core) + added_TO


def _of_every_expert(x_TI: Tensor, w_EOI: Tensor, b_EO: Tensor) -> Tensor:
    """Returns W_e x + b_e, [T, E, O]."""
    return F.linear(x_TI, w_EOI.flatten(0, 1), b_EO.flatten()).unflatten(1, b_EO.shape)
