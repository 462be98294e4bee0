"""A model of one mixture whose routing is told by its input, and images for it."""

from __future__ import annotations

import numpy as np
import torch
from timm.layers import Mlp
from torch import nn

from rmoe.config import ResidualMoEConfig
from rmoe.moe.layer import ResidualMoE


class Net(nn.Module):
    """One layer of four experts, whose name in a run's model would be `model.mlp`; a token's first entries route it."""

    def __init__(self, **moe: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.mlp = ResidualMoE(Mlp(6, 12), ResidualMoEConfig(num_experts=4, rank=2, **moe))
        self.model.mlp.gate.weight.data = 50 * torch.eye(4, 6)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.mlp(x)

    def spread(self, common: float = 0.0, own: float = 0.0) -> Net:
        """Adds the same to all experts, and noise of mean zero over them."""
        for x in self.model.mlp.residuals():
            noise = torch.randn_like(x)
            x.data += common * torch.randn_like(x[:1]) + own * (noise - noise.mean(0))
        return self


class Picture:
    """Two rows of pixels and as many tokens, each of which goes to the expert `to` says."""

    def __init__(self, to: list[int], labels: list[int]) -> None:
        self.tokens, self.labels = torch.eye(6)[to].view(1, 2, -1, 6), np.array(labels).reshape(2, -1)

    def answer(self, model: nn.Module) -> object:
        return model(self.tokens)

    @property
    def shape(self) -> tuple[int, int]:
        return (8, 4 * self.labels.shape[1])  # of stride 4
