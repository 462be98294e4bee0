"""The gate: which experts a token uses, with what weight, and the losses that keep the experts in use.

Shape suffixes: T tokens, C model width, E experts, K experts per token. Inside, experts come first: a softmax over the
first of two dimensions is several times as fast on a CPU as one over a last dimension of eight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rmoe.config import GateLosses, ResidualMoEConfig


class GateSums(NamedTuple):
    """Holds what the losses need of a batch, as float32 sums over its tokens: the parts of a batch add up."""

    probability_E: Tensor
    load_E: Tensor  # smoothed number of tokens; zeros where the gate has no noise
    first_E: Tensor  # tokens whose first choice is e; no gradient
    chosen_E: Tensor  # tokens that have e among their choices, before any is dropped; no gradient
    confidence: Tensor  # the largest probability of each token; no gradient
    z: Tensor
    tokens: Tensor


class Routing(NamedTuple):
    """Holds what the gate decided for T tokens.

    Attributes:
        expert_TK: int64, the experts of each token, best first; E where the capacity dropped the choice.
        gate_TK: float32, the value with which each enters (see `ResidualMoEConfig.combine`).
        probability_TE: float32, softmax of the logits without noise, detached.
        sums: None outside training.
    """

    expert_TK: Tensor
    gate_TK: Tensor
    probability_TE: Tensor
    sums: GateSums | None


class Gate(nn.Module):
    """Routes tokens: linear without bias, in float32, softmax, top-k (V-MoE, arXiv 2106.05974, section 2)."""

    def __init__(self, width: int, config: ResidualMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.num_experts, width) * config.gate_std)

    def forward(self, x_TC: Tensor) -> Routing:
        """Routes tokens of any floating dtype; the arithmetic is float32 (float64 for float64), also under autocast."""
        config = self.config
        with torch.autocast(x_TC.device.type, enabled=False):
            dtype = torch.promote_types(x_TC.dtype, torch.float32)
            clean_ET = self.weight.to(dtype) @ x_TC.to(dtype).T
            std = config.noise / config.num_experts if self.training else 0.0
            noisy_ET = clean_ET + std * torch.randn_like(clean_ET) if std else clean_ET
            probability_ET = clean_ET.softmax(0)
            chosen_KT, expert_KT = _best(noisy_ET.softmax(0) if std else probability_ET, config.experts_per_token)
            sums = self._sums(clean_ET, noisy_ET, probability_ET, expert_KT, std) if self.training else None
            expert_TK = expert_KT.T
            if self.training and config.capacity_factor is not None:
                expert_TK = drop_over_capacity(expert_TK, chosen_KT.T, config.num_experts, config.capacity_factor)
            return Routing(expert_TK, self._gate_values(chosen_KT).T, probability_ET.detach().T, sums)

    def _gate_values(self, chosen_KT: Tensor) -> Tensor:
        if not self.config.normalises:
            return chosen_KT
        # Forward the values sum to 1, so equal experts compute what one network computes; backward they change as the
        # probabilities do (straight-through: the sum is a constant), so that the gate learns with one expert too.
        return chosen_KT / chosen_KT.sum(0).detach()

    def _sums(
        self, clean_ET: Tensor, noisy_ET: Tensor, probability_ET: Tensor, expert_KT: Tensor, std: float
    ) -> GateSums:
        losses = self.config.losses
        zeros_E = clean_ET.new_zeros(self.config.num_experts)
        load_E = zeros_E
        if losses.load:
            # The chance that fresh noise would bring an expert over the last chosen one (V-MoE, appendix A).
            threshold_1T = noisy_ET.gather(0, expert_KT[-1:]).detach()
            load_E = torch.special.ndtr((clean_ET - threshold_1T) / std).sum(1)
        first_E = count_choices(expert_KT[:1], zeros_E)
        return GateSums(
            probability_E=probability_ET.sum(1),
            load_E=load_E,
            first_E=first_E,
            chosen_E=first_E if len(expert_KT) == 1 else count_choices(expert_KT, zeros_E),
            confidence=probability_ET.detach().amax(0).sum(),
            z=clean_ET.logsumexp(0).square().sum() if losses.z else zeros_E.sum(),
            tokens=zeros_E.new_tensor(float(clean_ET.shape[1])),
        )


def count_choices(expert_KT: Tensor, zeros_E: Tensor) -> Tensor:
    """Returns how often each expert is chosen, in the dtype of `zeros_E`."""
    return zeros_E.scatter_add(0, expert_KT.flatten(), zeros_E.new_ones(()).expand(expert_KT.numel()))


def _best(x_ET: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest and which they are, [K, T] each; `topk` alone is many times as slow for k = 1."""
    if k > 1:
        return x_ET.topk(k, 0)
    values_T, which_T = x_ET.max(0)
    return values_T[None], which_T[None]


class Balance(NamedTuple):
    """Says how evenly a gate spreads its tokens: scalars, float32, without gradient.

    Attributes:
        largest_share: share of the tokens that use the busiest expert, 1/E … 1.
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
    """Returns the weighted sum of the losses of one gate; formulas and sources are at `rmoe.config.GateLosses`."""
    num_experts = len(sums.probability_E)
    loss = sums.probability_E.new_zeros(())
    if weights.importance:
        loss = loss + weights.importance * _squared_variation(sums.probability_E)
    if weights.load:
        loss = loss + weights.load * _squared_variation(sums.load_E)
    if weights.balance:
        mean_E, share_E = sums.probability_E / sums.tokens, sums.first_E / sums.tokens
        loss = loss + weights.balance * num_experts * (mean_E * share_E).sum()
    if weights.z:
        loss = loss + weights.z * sums.z / sums.tokens
    return loss


def _squared_variation(x_E: Tensor) -> Tensor:
    return x_E.var(correction=0) / x_E.mean().square()


@torch.no_grad()
def drop_over_capacity(expert_TK: Tensor, chosen_TK: Tensor, num_experts: int, factor: float) -> Tensor:
    """Replaces by E the choices beyond an expert's capacity, ⌈factor · tokens · K / E⌉ of the global batch.

    The highest gate values stay (batch prioritised routing, V-MoE section 3.3), so what is dropped depends neither on
    the order of the tokens nor on how they are spread over processes. Every process must call it.
    """
    experts, values, own = _gather_tokens(expert_TK, chosen_TK)
    capacity = math.ceil(factor * experts.numel() / num_experts)
    by_value = values.flatten().argsort(descending=True, stable=True)
    by_expert = by_value[experts.flatten()[by_value].argsort(stable=True)]
    sizes_E = torch.bincount(experts.flatten(), minlength=num_experts)
    starts_E = sizes_E.cumsum(0) - sizes_E
    place = torch.empty_like(by_expert)
    place[by_expert] = torch.arange(len(by_expert), device=place.device) - starts_E[experts.flatten()[by_expert]]
    keep = (place < capacity).view_as(experts)[own]
    return expert_TK.where(keep, num_experts)


def _gather_tokens(expert_TK: Tensor, chosen_TK: Tensor) -> tuple[Tensor, Tensor, slice]:
    """Returns the choices of all processes, in rank order, and where this process's own tokens are among them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return expert_TK, chosen_TK, slice(None)
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = [torch.empty(1, dtype=torch.int64, device=expert_TK.device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(expert_TK)], device=expert_TK.device))
    sizes = [int(count) for count in counts]
    packed = torch.stack([expert_TK.to(chosen_TK.dtype), chosen_TK], -1)
    padded = packed.new_zeros(max(sizes), *packed.shape[1:])
    padded[: len(packed)] = packed
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    everything = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    start = sum(sizes[:rank])
    return everything[..., 0].long(), everything[..., 1], slice(start, start + sizes[rank])
