"""Kinds of gates: each is one class that computes the logits; all else is `rmoe.moe.gate.Gate`'s.

A new kind is a class here, an entry of `ROUTERS`, and its name in `rmoe.config.Router`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.config import ResidualMoEConfig
from rmoe.moe.gate import Gate, check_images
from rmoe.moe.gate_losses import GateSums
from rmoe.moe.tasks import task_of

_FIRST, _LARGEST = 10.0, 100.0  # factor of the cosines


class CosineGate(Gate):
    """Compares directions: the logits are s · cos(w_e, x) + b_e, whatever the lengths of x and of the router's rows.

    Experts that differ in direction alone collapse less (X-MoE, arXiv 2204.09179, section 3); Swin-MoE (Tutel, arXiv
    2206.03382) offers such a router. Both project x to fewer dimensions first, which this one does not.

    Attributes:
        log_scale: [1], logarithm of s, which is learnt and at most 100.
    """

    def __init__(self, width: int, config: ResidualMoEConfig) -> None:
        super().__init__(width, config)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(_FIRST)))

    def logits(self, x_DC: Tensor) -> Tensor:
        """Returns the logits of what the gate reads, without noise, [E, D]."""
        scale = self.log_scale.to(x_DC.dtype).clamp(max=math.log(_LARGEST)).exp() / self.temperature
        weight_EC, bias_E = F.normalize(self.weight.to(x_DC.dtype)), self.whole_bias().to(x_DC.dtype)
        return torch.addmm(bias_E[:, None] / self.temperature, scale * weight_EC, F.normalize(x_DC).T)


class MLPGate(Gate):
    """Decides by a network of one hidden layer: the logits are w_e · relu(V x) + b_e (ModuleFormer, arXiv 2306.04640).

    Attributes:
        weight: [E, J], of J = C/8 hidden units, but no fewer than E.
        hidden: V, [J, C].
    """

    def __init__(self, width: int, config: ResidualMoEConfig) -> None:
        super().__init__(width, config)
        units = max(config.num_experts, width // 8)
        self.weight = nn.Parameter(torch.randn(config.num_experts, units) * config.gate_std)
        self.hidden = nn.Parameter(torch.randn(units, width) / width**0.5)

    def logits(self, x_DC: Tensor) -> Tensor:
        """Returns the logits of what the gate reads, without noise, [E, D]."""
        return super().logits(F.relu(x_DC @ self.hidden.to(x_DC.dtype).T))


class ExpertChoice(Gate):
    """Lets each expert choose: of the n tokens of an image it takes the ⌈K n / E⌉ that it is the most probable for.

    This is expert choice (arXiv 2202.09368) within an image, instead of within a batch: an answer does not depend on
    batchmates. A token has from none to all of the experts, K on average, and θ(x) = θ0 + Σ p_e Δ_e over them. In a
    `Routing` it has all of them, best first, with a gate value of 0 where it was not taken.
    """

    def _choose(self, score_ED: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        check_images(shape, "router='expert_choice'", "router='linear'")
        tokens = math.prod(shape[1:-1])
        score_EBn = score_ED.unflatten(1, (shape[0], tokens))
        count = math.ceil(self.config.experts_per_token * tokens / self.config.num_experts)
        taken_EBn = torch.zeros_like(score_EBn).scatter(-1, score_EBn.detach().topk(count, -1).indices, 1.0)
        return (score_EBn * taken_EBn).flatten(1).sort(0, descending=True)

    def _sums(self, clean_ED: Tensor, noisy_ED: Tensor, probability_ED: Tensor, *args: Any) -> GateSums:
        first_1D = probability_ED.argmax(0, keepdim=True)
        return super()._sums(clean_ED, noisy_ED, probability_ED, first_1D, *args[1:])

    def _chosen(self, expert_KD: Tensor, zeros_E: Tensor) -> Tensor:
        """Returns as many for each expert, but for rounding up."""
        return zeros_E + expert_KD.shape[1] * self.config.experts_per_token / self.config.num_experts

    @property
    def is_constant(self) -> bool:
        """Says that it never is: of equal tokens an expert takes some."""
        return False


class TaskGate(Gate):
    """Gives all tokens of task t to expert t, with a gate value of 1: one core, and one set of residuals for each task.

    It has a gate's weight and biases, which are zeros, read nothing and do not train.
    """

    def __init__(self, width: int, config: ResidualMoEConfig) -> None:
        super().__init__(width, config)
        for parameter in self.parameters():
            nn.init.zeros_(parameter.requires_grad_(False))

    def logits(self, x_DC: Tensor) -> Tensor:
        """Returns 0 for the task's expert and -∞ for the others, [E, D]."""
        own_E = torch.arange(self.config.num_experts, device=x_DC.device) == task_of(self.config.tasks)
        return x_DC.new_zeros(len(own_E), len(x_DC)).masked_fill(~own_E[:, None], -math.inf)

    def _std(self) -> float:
        return 0.0


ROUTERS: dict[str, type[Gate]] = {
    "linear": Gate,
    "cosine": CosineGate,
    "mlp": MLPGate,
    "expert_choice": ExpertChoice,
    "task": TaskGate,
}
