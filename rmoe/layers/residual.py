"""The arithmetic of one layer: a feed-forward network whose weights are a core plus the residuals of a token's experts.

    θ(x) = θ0 + Σ_{e ∈ top-k(x)} g_e(x) · Δ_e          (Residual Mixture of Experts, arXiv 2204.09636)

Shape suffixes: T tokens, C model width, H hidden width, E experts, K experts per token, R residual rank, N pairs of a
token and one of its experts, sorted by expert. An expert id of E says "no expert": the pair computes with Δ = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


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
    """Δ_e = (B1_e A1_e, 0, B2_e A2_e, 0): no biases."""

    a1_ERC: Tensor
    b1_EHR: Tensor
    a2_ERH: Tensor
    b2_ECR: Tensor

    def delta(self, e: int) -> Network:
        """Δ_e in the core's shape."""
        return Network(self.b1_EHR[e] @ self.a1_ERC[e], None, self.b2_ECR[e] @ self.a2_ERH[e], None)

    def first(self, x_NC: Tensor, sizes: list[int]) -> Tensor:
        """ΔW1_e x of rows sorted by expert, [N, H]."""
        return _by_slice(x_NC, sizes, lambda x, e: F.linear(F.linear(x, self.a1_ERC[e]), self.b1_EHR[e]))

    def second(self, a_NH: Tensor, sizes: list[int]) -> Tensor:
        """ΔW2_e a of rows sorted by expert, [N, C]."""
        return _by_slice(a_NH, sizes, lambda a, e: F.linear(F.linear(a, self.a2_ERH[e]), self.b2_ECR[e]))


class Full(NamedTuple):
    """Δ_e of the core's own shape, biases included."""

    w1_EHC: Tensor
    b1_EH: Tensor
    w2_ECH: Tensor
    b2_EC: Tensor

    def delta(self, e: int) -> Network:
        """Δ_e in the core's shape."""
        return Network(self.w1_EHC[e], self.b1_EH[e], self.w2_ECH[e], self.b2_EC[e])

    def first(self, x_NC: Tensor, sizes: list[int]) -> Tensor:
        """ΔW1_e x + Δb1_e of rows sorted by expert, [N, H]."""
        return _by_slice(x_NC, sizes, lambda x, e: F.linear(x, self.w1_EHC[e], self.b1_EH[e]))

    def second(self, a_NH: Tensor, sizes: list[int]) -> Tensor:
        """ΔW2_e a + Δb2_e of rows sorted by expert, [N, C]."""
        return _by_slice(a_NH, sizes, lambda a, e: F.linear(a, self.w2_ECH[e], self.b2_EC[e]))


Residuals = LowRank | Full


def reference(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network,
    residuals: Residuals,
    act: Activation,
    mixes_weights: bool,
) -> Tensor:
    """What the layer means, token by token; the fast paths are compared with it. Arguments as `mix`."""
    num_experts = residuals[0].shape[0]
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


def mix(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network,
    residuals: Residuals,
    act: Activation,
    mixes_weights: bool,
) -> Tensor:
    """Applies to every token the network of its experts.

    Args:
        x_TC: tokens, of the weights' dtype (or any under autocast).
        expert_TK: int64, 0 … E-1, or E for a pair that the capacity dropped: it gets the core alone.
        gate_TK: gate values, cast to the dtype of `x_TC`.
        core: θ0.
        residuals: Δ of the E experts, stacked; every one gets a gradient, zero where it has no token.
        act: the network's activation.
        mixes_weights: y = FFN(x; θ0 + Σ g_e Δ_e) if true, y = Σ g_e FFN(x; θ0 + Δ_e) if not.

    Returns:
        y_TC, of the dtype that the core's network gives.
    """
    pairs = _sort_pairs(expert_TK, gate_TK.to(x_TC.dtype), residuals[0].shape[0])
    return (_mix_weights if mixes_weights else _mix_outputs)(x_TC, pairs, core, residuals, act)


class _Pairs(NamedTuple):
    """(token, expert) pairs sorted by expert, the pairs without an expert last."""

    token_N: Tensor
    gate_N1: Tensor
    sizes: list[int]  # pairs of each expert
    rest: int  # pairs without an expert


def _sort_pairs(expert_TK: Tensor, gate_TK: Tensor, num_experts: int) -> _Pairs:
    expert_N, order_N = expert_TK.flatten().sort(stable=True)
    *sizes, rest = torch.bincount(expert_N, minlength=num_experts + 1).tolist()
    return _Pairs(order_N // expert_TK.shape[1], gate_TK.flatten()[order_N, None], sizes, rest)


def _mix_weights(x_TC: Tensor, pairs: _Pairs, core: Network, residuals: Residuals, act: Activation) -> Tensor:
    chosen = sum(pairs.sizes)  # a pair without an expert adds nothing to the core
    token_N, gate_N1 = pairs.token_N[:chosen], pairs.gate_N1[:chosen]
    h_TH = F.linear(x_TC, core.w1_HC, core.b1_H)
    h_TH = h_TH.index_add(0, token_N, (gate_N1 * residuals.first(x_TC[token_N], pairs.sizes)).to(h_TH.dtype))
    a_TH = act(h_TH)
    y_TC = F.linear(a_TH, core.w2_CH, core.b2_C)
    return y_TC.index_add(0, token_N, (gate_N1 * residuals.second(a_TH[token_N], pairs.sizes)).to(y_TC.dtype))


def _mix_outputs(x_TC: Tensor, pairs: _Pairs, core: Network, residuals: Residuals, act: Activation) -> Tensor:
    x_NC = x_TC[pairs.token_N]
    parts = x_NC.split([*pairs.sizes, pairs.rest])
    experts = [_add(core, residuals.delta(e), 1.0)(x, act) for e, x in enumerate(parts[:-1])]
    y_NC = torch.cat([*experts, core(parts[-1], act)]) * pairs.gate_N1
    return y_NC.new_zeros(x_TC.shape).index_add(0, pairs.token_N, y_NC)


def _by_slice(x_NC: Tensor, sizes: list[int], apply: Callable[[Tensor, int], Tensor]) -> Tensor:
    # Empty slices are computed too: an expert without tokens needs a gradient of zeros, not none (ZeRO would mix up
    # the gradients of different experts).
    return torch.cat([apply(x, e) for e, x in enumerate(x_NC.split(sizes))])


def _add(core: Network, delta: Network, scale: Tensor | float) -> Network:
    return Network(
        *(c if d is None else scale * d if c is None else c + scale * d for c, d in zip(core, delta, strict=True))
    )
