"""The gate: which experts a token uses, with what weight. Its losses are in gate_losses.py.

Shape suffixes: T tokens, D decisions (one for each token, or for each image), C model width, E experts, K experts per
token. Inside, experts come first: a softmax over the first of two dimensions is several times as fast on a CPU as one
over a last dimension of eight.

Nothing here waits for the device: no shape and no branch depends on a tensor's values. The one exception is how many
tokens each of several processes has, where a capacity is set (`drop_over_capacity`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.gate_losses import GateSums
from rmoe.moe.tasks import task_of
from rmoe.moe.triton_here import has_triton

OPTIONAL = ("bias", "choice_bias", "task_bias")  # of a gate's state: zeros where a checkpoint lacks them


class Routing(NamedTuple):
    """Holds what the gate decided for T tokens.

    Attributes:
        expert_TK: int64, the experts of each token, best first; E where the capacity dropped the choice. Where a token
            uses every expert, 0 … E-1 in this order.
        gate_TK: float32 (float64 for float64 tokens), the value with which each enters: `ResidualMoEConfig.combine`.
        probability_TE: likewise, softmax of the logits without noise, detached.
        sums: None outside training.
    """

    expert_TK: Tensor
    gate_TK: Tensor
    probability_TE: Tensor
    sums: GateSums | None


class Gate(nn.Module):
    """Routes tokens: linear, in float32, softmax, top-k (V-MoE, arXiv 2106.05974, section 2). Other kinds of routers
    are in `rmoe.moe.routers`.

    Attributes:
        weight: [E, C]. bias: [E], zeros at the start.
        choice_bias: [E], added to the probabilities where experts are chosen and nowhere else (loss-free balancing,
            arXiv 2408.15664); None without `balance_rate`. `Records.balance_experts` moves it.
        width: C.
        task_bias: [tasks, E], zeros at the start, added to `bias` in passes of each task; None without `tasks`.
        heat: a factor of the temperature that training may change (`rmoe.TemperatureHook`); 1, and not saved.
    """

    choice_bias: Tensor | None
    task_bias: nn.Parameter | None

    def __init__(self, width: int, config: ResidualMoEConfig) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.weight = nn.Parameter(torch.randn(config.num_experts, width) * config.gate_std)
        self.bias = nn.Parameter(torch.zeros(config.num_experts))
        several = nn.Parameter(torch.zeros(config.tasks, config.num_experts)) if config.tasks > 1 else None
        self.register_parameter("task_bias", several)
        self.register_buffer("choice_bias", torch.zeros(config.num_experts) if config.balance_rate else None)
        self.heat = 1.0
        # Tokens of each expert since the optimizer's last step; checkpoints are made between steps.
        self._counted_E: Tensor | None = None

    def forward(self, x: Tensor) -> Routing:
        """Routes the tokens of x [..., C], of any floating dtype; with gate_input="image" those of x [images, ..., C].

        The arithmetic is float32 (float64 for float64), also under autocast.

        Raises:
            UserError: the gate reads images, and x is [T, C].
        """
        config, tokens = self.config, math.prod(x.shape[:-1])  # `numel` would fix it for an exporter
        if _has_kernel(x, config, self.training):
            return self._route_by_kernel(x.reshape(-1, x.shape[-1]))
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            clean_ED = self.logits(gate_inputs(x, config, dtype))
            std = self._std()
            noisy_ED = clean_ED + std * torch.randn_like(clean_ED) if std else clean_ED
            noisy_ED = self._without_some(noisy_ED)
            probability_ED = clean_ED.softmax(0)
            score_ED = probability_ED if noisy_ED is clean_ED else noisy_ED.softmax(0)
            value_KD, expert_KD = self._choose(score_ED, x.shape)
            sums = None
            if self.training:
                sums = self._sums(clean_ED, noisy_ED, probability_ED, expert_KD, std, tokens)
            if self.training and config.capacity_factor is not None:
                expert_KD = drop_over_capacity(expert_KD.T, value_KD.T, config.num_experts, config.capacity_factor).T
            decided = (expert_KD, self._gate_values(value_KD), probability_ED.detach())
            expert_TK, gate_TK, probability_TE = (_for_each_token(part, tokens) for part in decided)
            return Routing(expert_TK, gate_TK, probability_TE, sums)

    def _route_by_kernel(self, x_TC: Tensor) -> Routing:
        from rmoe.moe.gate_kernel import route

        config, std, noise_ET = self.config, self._std(), None
        with torch.autocast(x_TC.device.type, enabled=False):
            if std:
                noise_ET = torch.empty(config.num_experts, len(x_TC), device=x_TC.device).normal_(std=std)
            linear = self.weight.float(), self.whole_bias().float()
            found = route(
                x_TC, *linear, noise_ET, self.choice_bias, self.temperature, config.chooses, config.normalises
            )
        sums = None
        if self.training:
            sums = GateSums(
                probability_E=found.probability_E,
                load_E=found.first_E,  # means nothing: gates with a load loss take torch's operators
                first_E=found.first_E,
                chosen_E=found.chosen_E,
                confidence=found.confidence,
                z=found.z,
                tokens=found.tokens,
            )
        return Routing(found.expert_TK, found.gate_TK, found.probability_TE, sums)

    def _std(self) -> float:
        """Returns the standard deviation of the noise that is added to the logits."""
        return self.config.noise / self.config.num_experts if self.training and self.config.chooses else 0.0

    @property
    def temperature(self) -> float:
        """Returns what the logits are divided by."""
        return self.config.temperature * self.heat

    def _without_some(self, logits_ED: Tensor) -> Tensor:
        """Returns the logits with those of experts that are dropped for this batch at -∞."""
        if not (self.training and self.config.expert_drop):
            return logits_ED
        chance_E = torch.rand(len(logits_ED), device=logits_ED.device)
        stays_E = chance_E >= self.config.expert_drop
        stays_E = stays_E | (chance_E >= chance_E.topk(self.config.experts_per_token).values[-1])
        return logits_ED.masked_fill(~stays_E[:, None], -math.inf)

    def logits(self, x_DC: Tensor) -> Tensor:
        """Returns the logits of what the gate reads, without noise, [E, D]."""
        weight_EC, bias_E = self.weight.to(x_DC.dtype), self.whole_bias().to(x_DC.dtype)
        if self.temperature != 1:
            weight_EC, bias_E = weight_EC / self.temperature, bias_E / self.temperature
        return torch.addmm(bias_E[:, None], weight_EC, x_DC.T)

    def whole_bias(self) -> Tensor:
        """Returns the bias [E] of the present pass, that of its task included.

        Raises:
            UserError: the gate knows tasks, and the pass is of none of them.
        """
        return self.bias if self.task_bias is None else self.bias + self.task_bias[task_of(len(self.task_bias))]

    def _choose(self, score_ED: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Returns the scores of the chosen experts and which they are, [K, D] each, of an input of a `shape`."""
        if not self.config.chooses:
            return score_ED, torch.arange(len(score_ED), device=score_ED.device)[:, None].expand_as(score_ED)
        if self.choice_bias is None:
            return _best(score_ED, self.config.experts_per_token)
        # An expert of probability 0, as one that is dropped for this batch, is not chosen for its bias.
        by_ED = (score_ED.detach() + self.choice_bias[:, None]).masked_fill(score_ED == 0, -math.inf)
        _, expert_KD = _best(by_ED, self.config.experts_per_token)
        return score_ED.gather(0, expert_KD), expert_KD

    def _gate_values(self, value_KD: Tensor) -> Tensor:
        if not self.config.normalises or not self.config.chooses:
            return value_KD
        # Forward the values sum to 1, so equal experts compute what one network computes; backward they change as the
        # probabilities do (straight-through: the sum is a constant), so that the gate learns with one expert too.
        return value_KD / value_KD.sum(0).detach()

    def _sums(
        self, clean_ED: Tensor, noisy_ED: Tensor, probability_ED: Tensor, expert_KD: Tensor, std: float, tokens: int
    ) -> GateSums:
        losses, decisions = self.config.losses, clean_ED.shape[1]
        zeros_E = clean_ED.new_zeros(self.config.num_experts)
        load_E = zeros_E
        if losses.load:
            # The chance that fresh noise would bring an expert over the last chosen one (V-MoE, appendix A).
            threshold_1D = noisy_ED.gather(0, expert_KD[-1:]).detach()
            load_E = torch.special.ndtr((clean_ED - threshold_1D) / std).sum(1)
        first_1D = expert_KD[:1] if self.config.chooses else probability_ED.argmax(0, keepdim=True)
        sums = GateSums(
            probability_E=probability_ED.sum(1),
            load_E=load_E,
            first_E=count_choices(first_1D, zeros_E) if losses.balance else zeros_E,
            chosen_E=self._chosen(expert_KD, zeros_E),
            confidence=probability_ED.detach().amax(0).sum(),
            z=clean_ED.logsumexp(0).square().sum() if losses.z else zeros_E.sum(),
            tokens=zeros_E.new_full((), decisions),
        )
        # A decision counts as often as it has tokens: images need not be of one size.
        return sums if decisions == tokens else GateSums(*(part * (tokens // decisions) for part in sums))

    def _chosen(self, expert_KD: Tensor, zeros_E: Tensor) -> Tensor:
        """Returns how many decisions have each expert among their choices."""
        return count_choices(expert_KD, zeros_E) if self.config.chooses else zeros_E + expert_KD.shape[1]

    @property
    def is_constant(self) -> bool:
        """Says whether every token gets the same experts with the same gate values, whatever it is."""
        return not self.weight.any()

    @torch.no_grad()
    def balance(self, chosen_E: Tensor, step: bool) -> None:
        """Counts the tokens of each expert and, at the end of a step, moves `choice_bias` against their imbalance.

        b_e += rate · sign(mean count - count of e) (arXiv 2408.15664, algorithm 1).

        Args:
            chosen_E: tokens of the global batch, or of one part of it.
            step: whether it was the last part.
        """
        if self.choice_bias is None:
            return
        counted_E = chosen_E if self._counted_E is None else self._counted_E + chosen_E
        if step:
            self.choice_bias += self.config.balance_rate * (counted_E.mean() - counted_E).sign()
        self._counted_E = None if step else counted_E

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """Keeps the choice's bias in its format: half precision would round its small moves away."""
        before = self.choice_bias
        super()._apply(fn, recurse)
        if before is not None and self.choice_bias is not None and self.choice_bias.dtype != before.dtype:
            self.choice_bias = before.to(self.choice_bias.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        here = {key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)}
        zeros = {prefix + name: x for name, x in absent_of_gates(here, self.state_dict()).items()}
        if zeros:
            warnings.warn(f"{GATES_WITHOUT} {', '.join(zeros)}: read as zeros", stacklevel=2)
        state_dict |= zeros
        super()._load_from_state_dict(state_dict, prefix, *args)


GATES_WITHOUT = "the checkpoint has gates, of an earlier version or of a run without balance_rate or tasks, without"


def absent_of_gates(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns zeros, by key, for what the gates of `own` have and those of `state` lack: the biases of OPTIONAL.

    Args:
        state: of a checkpoint; a gate whose weight it lacks as well is not looked at.
        own: of a model, or of a gate alone. Another layer may be called `gate`, too: a mixture's stands beside experts.
    """
    zeros = {}
    gates = {"", *(f"{mixture}gate" for mixture, found, _ in (key.partition("deepspeed_moe.") for key in own) if found)}
    for key, x in own.items():
        gate, _, name = key.rpartition(".")
        weight = state.get(f"{gate}.weight".removeprefix("."))
        if name in OPTIONAL and gate in gates and key not in state and weight is not None:
            zeros[key] = weight.new_zeros(x.shape)
    return zeros


def _has_kernel(x: Tensor, config: ResidualMoEConfig, training: bool) -> bool:
    """Says whether the kernels of `rmoe.moe.gate_kernel` compute this gate for the tokens x."""
    if not (has_triton(x) and x.numel() and x.dtype in (torch.float32, torch.bfloat16, torch.float16)):
        return False
    if torch.compiler.is_compiling():
        return False
    one_or_all = config.experts_per_token == 1 or not config.chooses
    plain = config.gate_input == "token" and config.router == "linear"
    plain = plain and not (config.losses.load or config.expert_drop)
    return one_or_all and plain and config.num_experts <= 64 and not (training and config.capacity_factor is not None)


def gate_inputs(x: Tensor, config: ResidualMoEConfig, dtype: torch.dtype) -> Tensor:
    """Returns what the gate of a layer reads of its input x [..., C], in `dtype`: [D, C].

    Raises:
        UserError: see `Gate.forward`.
    """
    if config.gate_input == "token":
        return x.reshape(-1, x.shape[-1]).to(dtype)
    check_images(x.shape, "gate_input='image'", "gate_input='token'")
    return x.flatten(1, -2).mean(1, dtype=dtype)


def check_images(shape: torch.Size, key: str, instead: str) -> None:
    """Checks that the tokens of an input of a `shape` belong to images, as a `key` of the configuration asks.

    Raises:
        UserError: they do not.
    """
    if len(shape) < 3:
        raise UserError(
            f"{key} got an input of shape {tuple(shape)}, whose tokens belong to no image; the layer's input is "
            f"[images, …, width] there: use {instead}"
        )


def _for_each_token(part_XD: Tensor, tokens: int) -> Tensor:
    """Returns [T, X] of [X, D]: tokens of one image stand together."""
    decisions = part_XD.shape[1]
    if decisions == tokens:
        # A compiler mistakes the shapes of several views of one tensor (torch 2.11).
        return part_XD.T.clone() if torch.compiler.is_compiling() else part_XD.T
    return part_XD.T[:, None].expand(-1, tokens // decisions, -1).flatten(0, 1)


def count_choices(expert: Tensor, zeros_E: Tensor) -> Tensor:
    """Returns how often each expert is chosen, in the dtype of `zeros_E`."""
    return zeros_E.scatter_add(0, expert.flatten(), zeros_E.new_ones(()).expand(expert.numel()))


def _best(x_ET: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest and which they are, [K, T] each; `topk` alone is many times as slow for k = 1."""
    if k > 1:
        return x_ET.topk(k, 0)
    values_T, which_T = x_ET.max(0)
    return values_T[None], which_T[None]


@torch.no_grad()
def drop_over_capacity(expert_TK: Tensor, chosen_TK: Tensor, num_experts: int, factor: float) -> Tensor:
    """Replaces by E the choices beyond an expert's capacity, ⌈factor · tokens · K / E⌉ of the global batch.

    The highest gate values stay (batch prioritised routing, V-MoE section 3.3), so what is dropped depends neither on
    the order of the tokens nor on how they are spread over processes. Every process must call it. Several processes
    tell each other how many tokens they have, which images of different sizes leave open, and wait for it once.
    """
    experts, values, own = _gather_tokens(expert_TK, chosen_TK)
    capacity = math.ceil(factor * experts.numel() / num_experts)
    expert_N = experts.flatten()
    by_value_N = values.flatten().argsort(descending=True, stable=True)
    by_expert_N = by_value_N.gather(0, expert_N.gather(0, by_value_N).argsort(stable=True))
    sizes_E = count_choices(expert_N, expert_N.new_zeros(num_experts))
    starts_E = sizes_E.cumsum(0) - sizes_E
    place_N = torch.arange(len(expert_N), device=expert_N.device) - starts_E.gather(0, expert_N.gather(0, by_expert_N))
    place = torch.empty_like(place_N).scatter(0, by_expert_N, place_N)
    keep = (place < capacity).view_as(experts)[own]
    return expert_TK.where(keep, num_experts)


def _gather_tokens(expert_TK: Tensor, chosen_TK: Tensor) -> tuple[Tensor, Tensor, slice]:
    """Returns the choices of all processes, in rank order, and where this process's own tokens are among them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return expert_TK, chosen_TK, slice(None)
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = expert_TK.new_empty(world)
    dist.all_gather_into_tensor(counts, counts.new_full((1,), len(expert_TK)))
    sizes = counts.tolist()
    packed = torch.stack([expert_TK.to(chosen_TK.dtype), chosen_TK], -1)
    padded = packed.new_zeros(max(sizes), *packed.shape[1:])
    padded[: len(packed)] = packed
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    everything = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    start = sum(sizes[:rank])
    return everything[..., 0].long(), everything[..., 1], slice(start, start + sizes[rank])
