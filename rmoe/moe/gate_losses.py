"""What the gates' losses and reports are made of: sums over the tokens of a batch, and what they come to.

Shape suffixes: E experts; rows of several gates may be stacked before it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from rmoe.config import GateLosses
from rmoe.moe.experts import first_order
from rmoe.moe.triton_here import has_triton


class GateSums(NamedTuple):
    """Holds what the losses need of a batch, as float32 sums over its tokens: the parts of a batch add up."""

    probability_E: Tensor
    load_E: Tensor  # smoothed number of tokens; of no meaning where the loss is off
    first_E: Tensor  # tokens whose first choice is e; no gradient; of no meaning where the loss `balance` is off
    chosen_E: Tensor  # tokens that have e among their choices, before any is dropped; no gradient
    confidence: Tensor  # the largest probability of each token; no gradient
    z: Tensor
    tokens: Tensor


class Balance(NamedTuple):
    """Says how evenly a gate spreads its tokens: scalars, float32, without gradient.

    Attributes:
        largest_share: share of the tokens that use the busiest expert, 1/E … 1; where all are used, its mean
            probability.
        entropy: of the choices over the experts, relative to an even spread: 1 is even, 0 is one expert alone.
        confidence: mean over the tokens of the largest probability, 1/E … 1.
    """

    largest_share: Tensor
    entropy: Tensor
    confidence: Tensor


def gate_load(sums: GateSums) -> Tensor:
    """Returns the share of a batch's tokens that use each expert, [E], float32, without gradient. Where every token
    uses all experts, they are counted by their probabilities.
    """
    return sums.chosen_E.where(sums.chosen_E.min() < sums.tokens, sums.probability_E.detach()) / sums.tokens


def gate_balance(sums: GateSums) -> Balance:
    """Returns the balance of a batch, see `gate_load`."""
    num_experts, load_E = len(sums.chosen_E), gate_load(sums)
    share_E = load_E / load_E.sum()
    entropy = torch.special.entr(share_E).sum() / math.log(num_experts) if num_experts > 1 else torch.ones_like(sums.z)
    return Balance(load_E.max(), entropy, sums.confidence / sums.tokens)


def gate_loss(sums: GateSums, weights: GateLosses) -> Tensor:
    """Returns the weighted sum of the losses of one gate, that of tasks aside (`rmoe.moe.tasks.task_information`);
    formulas and sources are at `rmoe.config.GateLosses`.

    Of several gates, whose sums are stacked along a first dimension, it returns a loss each.
    """
    num_experts, terms = sums.probability_E.shape[-1], list[Tensor]()
    if weights.importance:
        terms.append(_SquaredVariation.apply(sums.probability_E, weights.importance))
    if weights.load:
        terms.append(_SquaredVariation.apply(sums.load_E, weights.load))
    if weights.balance:
        mean_E, share_E = (part_E / sums.tokens[..., None] for part_E in (sums.probability_E, sums.first_E))
        terms.append(weights.balance * num_experts * (mean_E * share_E).sum(-1))
    if weights.z:
        terms.append(weights.z * sums.z / sums.tokens)
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(sums.tokens)


class _SquaredVariation(Function):
    """Computes weight · variance / mean² over the last dimension, and its gradient with it."""

    @staticmethod
    def forward(ctx: Any, x_E: Tensor, weight: float) -> Tensor:
        if has_triton(x_E) and x_E.dtype == torch.float32:
            from rmoe.moe.gate_kernel import squared_variation

            found_L, slope_LE = squared_variation(x_E.reshape(-1, x_E.shape[-1]), weight)
            found, slope_E = found_L.view(x_E.shape[:-1]), slope_LE.view(x_E.shape)
        else:
            mean = x_E.mean(-1, keepdim=True)
            off_E = x_E / mean - 1
            found = off_E.square().mean(-1)
            slope_E = (off_E - found[..., None]) * ((2 * weight / off_E.shape[-1]) / mean)
            found = weight * found
        ctx.save_for_backward(slope_E)
        return found

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope_E,) = ctx.saved_tensors
        return grad[..., None] * slope_E, None
