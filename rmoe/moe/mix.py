"""Which arithmetic computes a mixture: by device, number format and sizes. `reference` in experts.py is its meaning.

Shape suffixes: T tokens, C model width, K experts per token, N pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rmoe.moe.cpu_kernels import rows_of_one_expert
from rmoe.moe.experts import Activation, Full, LowRank, Network, Residuals
from rmoe.moe.folded import folded_low_rank
from rmoe.moe.grouped import grouped_rows, has_grouped_gemm, mix_networks, mix_weights, sorted_products
from rmoe.moe.masked import masked_low_rank, masked_products
from rmoe.moe.unsorted import unsorted_networks, unsorted_products

# Rows E·R of all experts' A beyond which the products of those that are not chosen cost more than sorting does.
_MOST_ROWS = 512
# In half precision a CPU is faster without sorting too where both are few: of 8 experts of rank 8 it was at 6272 tokens
# of any width, and was not at 25088; more rows were not tried.
_FEW_TOKENS, _FEW_ROWS = 8192, 64


def mix(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network | None,
    residuals: Residuals,
    act: Activation,
    mixes_weights: bool,
    ready: Callable[[], object] | None = None,
    drops: bool = True,
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
        drops: whether `expert_TK` may hold E; False where the caller knows that it does not saves a product a group.

    Returns:
        y_TC.
    """
    dtype, k = compute_dtype(x_TC), expert_TK.shape[1]
    masked = not residuals.merges and _masks(x_TC, dtype, k if mixes_weights else 1, residuals)
    inside = mixes_weights and (k > 1 or residuals.merges)
    folded = masked and _is_on_gpu(x_TC) and not torch.compiler.is_compiling()
    if ready is not None and (residuals.merges or (inside and not masked) or residuals[0].dtype != dtype):
        ready()
        ready = None
    if isinstance(residuals, Full) and not inside and has_grouped_gemm(x_TC, residuals, dtype):
        return mix_networks(x_TC, expert_TK, gate_TK, core, residuals, act, drops, dtype)
    theta: Any = core
    low_rank: Callable[..., Tensor] = masked_low_rank
    if folded:  # casts what it is given into its own matrices
        low_rank = partial(folded_low_rank, dtype=dtype, drops=drops)
    else:
        x_TC, gate_TK = x_TC.to(dtype), gate_TK.to(dtype)
        weights = (None,) * 4 if core is None else core
        theta = Network(*(None if w is None else w.to(dtype) for w in weights))  # type: ignore[arg-type]
        residuals = type(residuals)(*(w.to(dtype) for w in residuals))
    if not masked or torch.compiler.is_compiling():  # an exporter cannot tell how often a shared A counts
        residuals = residuals.spread()
    if isinstance(residuals, Full) and not drops and torch.compiler.is_exporting():
        return unsorted_networks(x_TC, expert_TK, gate_TK, theta, residuals, act, mixes_weights)
    if mixes_weights and masked:
        return low_rank(x_TC, expert_TK, gate_TK, theta, residuals, act, ready=ready)
    if inside:
        return mix_weights(x_TC, expert_TK, gate_TK, theta, residuals, act)
    x_NC, expert_N = x_TC.repeat_interleave(k, 0) if k > 1 else x_TC, expert_TK.flatten()
    scale_N = gate_TK[:, 0] if mixes_weights else gate_TK.new_ones(x_NC.shape[0])
    if masked:
        y_NC = low_rank(x_NC, expert_N[:, None], scale_N[:, None], theta, residuals, act, ready=ready)
    elif has_grouped_gemm(x_NC, residuals, dtype):
        if ready is not None:
            ready()
        y_NC = grouped_rows(x_NC, expert_N, scale_N, theta, residuals, act)
    else:
        y_NC = rows_of_one_expert(x_NC, expert_N, scale_N, theta, residuals, act, ready)
    return y_NC if mixes_weights else torch.einsum("tkc,tk->tc", y_NC.view(-1, k, x_TC.shape[1]), gate_TK.to(dtype))


def residual_products(
    expert_TK: Tensor, gate_TK: Tensor, residuals: Residuals
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Returns the functions x_TI → Σ_k g_k Δ_e x of the two linear layers of a network; autograd follows them.

    Args:
        expert_TK: as in `mix`.
        gate_TK: of the residuals' dtype.
    """
    if torch.compiler.is_compiling():
        residuals = residuals.spread()
    if isinstance(residuals, LowRank):
        return masked_products(expert_TK, gate_TK, residuals)
    if torch.compiler.is_compiling():
        return unsorted_products(expert_TK, gate_TK, residuals)
    return sorted_products(expert_TK, gate_TK, residuals, has_grouped_gemm(gate_TK, residuals, gate_TK.dtype))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns what a mixture computes in for tokens x: autocast's format inside of it, but for float64, as torch's own
    linear layers; else that of the tokens.
    """
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _masks(x_TC: Tensor, dtype: torch.dtype, together: int, low: Residuals) -> bool:
    """Says whether low-rank residuals are computed for all experts at once, rather than for rows sorted by expert.

    Args:
        dtype: of the arithmetic.
        together: experts of a token that meet in one network.
    """
    if torch.compiler.is_compiling():
        return True  # no shape in it depends on a decision
    rank = low[1].shape[1]
    rows = low.num_experts * rank
    if rows > max(_MOST_ROWS, together * rank):
        return False
    few = dtype.itemsize < 4 and len(x_TC) <= _FEW_TOKENS and rows <= _FEW_ROWS
    return x_TC.device.type != "cpu" or together > 1 or few
