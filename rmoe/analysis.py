"""What a trained mixture does: which expert each token of an image went to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from rmoe.config import UserError
from rmoe.layers.moe import collect, moe_layers

_STRIDES = (4, 8, 16, 32, 64)


def routing_maps(model: nn.Module, run: Callable[[], Any], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The first choice of every token of one image.

    Args:
        model: with `ResidualMoE` layers.
        run: one evaluation of `model` on one image.
        size: the image's (height, width) in pixels.

    Returns:
        By the layer's name, experts as int64 [h, w], on the grid of that layer's tokens.

    Raises:
        UserError: the model is dense.
    """
    layers = moe_layers(model)
    if not layers:
        raise UserError("the model is dense: no token is routed; give a run with model.backbone.moe")
    with torch.no_grad(), collect() as records:
        run()
    prefix = max(getattr(module, "num_prefix_tokens", 0) for module in model.modules())
    chosen = {name: records.routing[layer].expert_TK[prefix:, 0].cpu().numpy() for name, layer in layers.items()}
    return {name: expert_T.reshape(_grid(len(expert_T), size)) for name, expert_T in chosen.items()}


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the map that has so many tokens."""
    for stride in _STRIDES:
        rows, columns = (-(-side // stride) for side in size)
        if rows * columns == tokens:
            return rows, columns
    raise AssertionError(f"{tokens} tokens fit no grid over {size} pixels")
