"""Rows sorted by expert through products that autograd follows: on a GPU torch's grouped GEMM, elsewhere a loop.

It is for bfloat16 on a GPU, which no one has timed yet, and for residuals of several experts that meet inside one
network.

Shape suffixes: T tokens, C model width, H hidden width, E experts, K experts per token, N pairs of a token and one of
its experts, sorted by expert; I and O the inputs and outputs of either linear layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rmoe.moe.experts import Activation, Full, Network, Residuals


class Groups(NamedTuple):
    """Says how rows are sorted by expert, for products that autograd follows."""

    expert_N: Tensor
    end_E: Tensor  # int32: one past the last row of each expert, on the rows' device
    sizes: list[int] | None  # rows of each expert; None where a grouped GEMM needs no such answer from the device

    def product(self, x_NI: Tensor, w_EIO: Tensor) -> Tensor:
        """Returns x w_e for the rows of each expert."""
        if self.sizes is None:
            return F.grouped_mm(x_NI, w_EIO, offs=self.end_E)
        # Empty slices are computed too: an expert without tokens needs a gradient of zeros, not none (ZeRO would mix up
        # the gradients of different experts).
        return torch.cat([x_nI @ w_IO for x_nI, w_IO in zip(x_NI.split(self.sizes), w_EIO.unbind(), strict=True)])


def has_grouped_gemm(x: Tensor, residuals: Residuals) -> bool:
    """Says whether torch has a grouped GEMM for it: bfloat16 on a GPU, in rows of whole 16 bytes."""
    widths = {size for delta in residuals for size in delta.shape[1:]}  # C, H and, for low rank, R
    return x.is_cuda and x.dtype == torch.bfloat16 and not any(width * x.itemsize % 16 for width in widths)


def mix_weights(
    x_TC: Tensor, expert_TK: Tensor, gate_TK: Tensor, core: Network, residuals: Residuals, act: Activation
) -> Tensor:
    """Computes residuals that meet inside one network, or whose weight differs from row to row."""
    num_experts = residuals[0].shape[0]
    gate_TK = gate_TK.where(expert_TK < num_experts, 0.0)
    expert_N, pair_N = expert_TK.clamp(max=num_experts - 1).flatten().sort(stable=True)
    grouped = has_grouped_gemm(x_TC, residuals)
    sizes = None if grouped else torch.bincount(expert_N, minlength=num_experts).tolist()
    every_E = torch.arange(num_experts, device=expert_N.device)
    groups = Groups(expert_N, torch.searchsorted(expert_N, every_E, right=True).to(torch.int32), sizes)
    token_N, gate_N1 = pair_N // expert_TK.shape[1], gate_TK.flatten()[pair_N, None]
    h_TH = _of_core(x_TC, core.w1_HC, core.b1_H, residuals[1].shape[-1])
    h_TH = h_TH.index_add(0, token_N, gate_N1 * residuals.first(x_TC[token_N], groups))
    a_TH = act(h_TH)
    y_TC = _of_core(a_TH, core.w2_CH, core.b2_C, x_TC.shape[1])
    return y_TC.index_add(0, token_N, gate_N1 * residuals.second(a_TH[token_N], groups))


def _of_core(x_NI: Tensor, w_OI: Tensor | None, b_O: Tensor | None, outputs: int) -> Tensor:
    return x_NI.new_zeros(len(x_NI), outputs) if w_OI is None else F.linear(x_NI, w_OI, b_O)


def grouped_rows(
    x_NC: Tensor, expert_N: Tensor, scale_N: Tensor, core: Network, residuals: Residuals, act: Activation
) -> Tensor:
    """Computes rows of one network each on a GPU, where nothing waits for how many rows an expert has."""
    if residuals.merges:
        # Merged with the core, which the rows without an expert have to themselves: one product where two would be.
        without = [
            torch.zeros_like(delta[:1]) if c is None else c[None] for c, delta in zip(core, residuals, strict=True)
        ]
        thetas = Full(*(torch.cat([delta + c, c]) for c, delta in zip(without, residuals, strict=True)))
        core, residuals = Network(None, None, None, None), thetas  # type: ignore[arg-type]
    return mix_weights(x_NC, expert_N[:, None], scale_N[:, None], core, residuals, act)
