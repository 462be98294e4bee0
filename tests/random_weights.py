"""Gives models of several code bases random weights, to compare them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomised(model: nn.Module) -> nn.Module:
    """Gives every weight and statistic its own values, so that none can stand for another or be left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
            elif x.is_floating_point() and x.ndim > 1:
                x.normal_(0.0, x[0].numel() ** -0.5)  # large enough for attention to be far from even
            elif x.is_floating_point():
                x.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    model.eval()  # mmseg's and mmdet's return None
    return model


def images(*size: int) -> Tensor:
    """Returns the same two random images of `size` (H, W) every time, [2, 3, H, W]."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
