"""Kinds of gates: each is one class that computes the logits; all else is `rmoe.moe.gate.Gate`'s.

A new kind is a class here, an entry of `ROUTERS`, and its name in `rmoe.config.Router`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.config import ResidualMoEConfig
from rmoe.moe.gate import Gate
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


ROUTERS: dict[str, type[Gate]] = {"linear": Gate, "cosine": CosineGate, "task": TaskGate}
