"""Finds the mixtures of a model, and calls them as the timm model does that they are in."""

from __future__ import annotations

from torch import nn

from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.state import moe_layers


def mixtures_of(model: nn.Module) -> dict[str, ResidualMoE]:
    """Returns the mixtures by path in the model.

    Raises:
        UserError: the model is dense.
    """
    layers = moe_layers(model)
    if not layers:
        raise UserError("the model is dense: there are no experts; give a run whose config has a moe")
    return layers


def mixtures_by_name(model: nn.Module) -> dict[str, ResidualMoE]:
    """Returns the mixtures by name in the timm model, such as "layers.2.blocks.1.mlp".

    Raises:
        UserError: the model is dense.
    """
    return {timm_name(path): layer for path, layer in mixtures_of(model).items()}


def timm_name(path: str) -> str:
    """Returns a module's name in the timm model, which the last wrapper calls `model`, whatever head that is in."""
    return path.rpartition("model.")[2]
