"""What stands between the grouped products of `mix_networks`: rows moved and weighed, weights formed, gradients cast.

Each function is one pass over memory in passes_triton.py, which a GPU takes where Triton is installed. Here the same
is written in torch's operators: for every other device, and as what those kernels are tested against.

Shape suffixes as in grouped.py; M: O·I or O numbers of a weight or a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from rmoe.moe.triton_here import triton_runs

Dtypes = Sequence[torch.dtype | None]  # of Δ's weight and bias, of the core's weight and bias


def passes_on(device: torch.device) -> ModuleType:
    """Returns the module whose functions a device runs: this one, or passes_triton.py."""
    return import_module("rmoe.moe.passes_triton" if device.type == "cuda" and triton_runs(device) else __name__)


def sort_pairs(expert_P: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts pairs by expert; those of one expert stay in their order.

    Args:
        expert_P: int64, 0 … groups - 1.
        groups: G.

    Returns:
        place_P: pair → position among the sorted; pair_N: its inverse; end_G: int32, one past the last row of each.
    """
    # A radix sort takes as many passes as its keys have bytes.
    key_N, pair_N = expert_P.to(torch.int16 if groups < 2**15 else torch.int32).sort(stable=True)
    place_P = torch.empty_like(pair_N).scatter_(0, pair_N, torch.arange(len(pair_N), device=pair_N.device))
    every_G = torch.arange(groups, device=key_N.device, dtype=key_N.dtype)
    return place_P, pair_N, torch.searchsorted(key_N, every_G, right=True, out_int32=True)


def place_pairs(expert_P: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Returns place_P and end_G of `sort_pairs`."""
    place_P, _, end_G = sort_pairs(expert_P, groups)
    return place_P, end_G


def to_experts(x_TC: Tensor, place_P: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns rows of tokens sorted by expert beside columns of ones, x_NJ of a dtype, J = C + columns."""
    (tokens, width), rows = x_TC.shape, len(place_P)
    x_NJ = torch.ones(rows, width + columns, device=x_TC.device, dtype=dtype)
    x_PC = x_TC.to(dtype).repeat_interleave(rows // tokens, 0)
    x_NJ[:, :width].index_copy_(0, place_P, x_PC)
    return x_NJ


def from_experts(
    y_NC: Tensor,
    place_P: Tensor,
    k: int,
    dtype: torch.dtype,
    weighed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Sums sorted rows over the K choices of each token.

    Args:
        y_NC: sorted rows.
        place_P: pair → position among the sorted.
        k: K.
        dtype: of the sum.
        weighed: gate_P, bias_GC and expert_P, where what is summed is gate · (y + bias of the expert).

    Returns:
        [T, C].
    """
    y_PC = y_NC[place_P]
    if weighed is not None:
        gate_P, bias_GC, expert_P = weighed
        y_PC = (y_PC + bias_GC[expert_P]) * gate_P.to(y_PC.dtype)[:, None]
    return y_PC.to(dtype) if k == 1 else y_PC.unflatten(0, (-1, k)).sum(1, dtype=dtype)


def from_experts_backward(
    grad_TC: Tensor, y_NC: Tensor, place_P: Tensor, gate_P: Tensor, bias_GC: Tensor, expert_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of y_NC and of gate_P in `from_experts`, in their dtypes."""
    grad_PC = grad_TC.repeat_interleave(len(place_P) // len(grad_TC), 0)
    sums = torch.promote_types(grad_TC.dtype, torch.float32)
    grad_P = ((y_NC[place_P] + bias_GC[expert_P]) * grad_PC).sum(-1, dtype=sums)
    grad_PC = (grad_PC * gate_P.to(grad_PC.dtype)[:, None]).to(y_NC.dtype)
    return torch.empty_like(y_NC).index_copy_(0, place_P, grad_PC), grad_P.to(gate_P.dtype)


def weights_of(
    delta: tuple[Tensor, Tensor],
    core: tuple[Tensor, Tensor | None] | None,
    groups: int,
    columns: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Forms θ = θ0 + Δ of one linear layer, rounded once; a group beyond the experts has θ0 alone.

    Args:
        delta: Δ of weight and bias, [E, O, I] and [E, O].
        core: θ0, [O, I] and [O]; None for 0.
        groups: E, or E + 1.
        columns: how many the weight gets more than I, the first of which is the bias and the others 0.
        dtype: of θ.

    Returns:
        θ [G, O, I + columns], and the bias [G, O], with columns a view of it.
    """
    weight_EOI, bias_EO = delta
    core_weight_OI, core_bias_O = core or (None, None)
    _, outputs, inputs = weight_EOI.shape
    w_GOJ = weight_EOI.new_empty(groups, outputs, inputs + columns, dtype=dtype)
    w_GOJ[..., inputs + 1 :] = 0
    b_GO = w_GOJ[..., inputs] if columns else bias_EO.new_empty(groups, outputs, dtype=dtype)
    _add_core(core_weight_OI, weight_EOI, out=w_GOJ[..., :inputs])
    _add_core(core_bias_O, bias_EO, out=b_GO)
    return w_GOJ, b_GO


def _add_core(core_M: Tensor | None, delta_EM: Tensor, out: Tensor) -> None:
    experts = out[: len(delta_EM)]
    experts.copy_(delta_EM) if core_M is None else torch.add(delta_EM, core_M, out=experts)
    if len(out) > len(delta_EM):
        out[-1] = 0 if core_M is None else core_M


def gradients_of(
    grad_GOJ: Tensor, grad_bias_GO: Tensor, end_G: Tensor, experts: int, inputs: int, dtypes: Dtypes
) -> list[Tensor | None]:
    """Casts the gradients of one linear layer's weights, of which those of a group without rows may be anything.

    Args:
        grad_GOJ: of θ, J ≥ I.
        grad_bias_GO: of its bias.
        end_G: one past the last row of each group.
        experts: E.
        inputs: I.
        dtypes: of the gradients that are returned; None for one that is not wanted.

    Returns:
        The gradients of Δ's weight [E, O, I] and bias [E, O], 0 for an expert without rows, then those of the core's
        [O, I] and [O], each the sum of what its networks have.
    """
    empty_G = torch.diff(end_G, prepend=end_G.new_zeros(1)) == 0
    weight_GOI = grad_GOJ[..., :inputs].masked_fill(empty_G[:, None, None], 0)
    bias_GO = grad_bias_GO.masked_fill(empty_G[:, None], 0)
    of_groups = [weight_GOI, bias_GO]
    parts: list[Tensor | None] = [
        None if t is None else g[:experts].to(t) for g, t in zip(of_groups, dtypes[:2], strict=True)
    ]
    return parts + [None if t is None else g.sum(0, dtype=t) for g, t in zip(of_groups, dtypes[2:], strict=True)]
