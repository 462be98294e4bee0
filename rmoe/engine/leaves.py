"""Mends what DeepSpeed's ZeRO 3 does to mixtures whose inputs have no gradient, as behind a frozen stem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe.state import moe_layers


def mend_leaves(engine: Any) -> None:
    """Gives every mixture of a DeepSpeed engine at stage 3 an input that requires a gradient, where it has one without.

    ZeRO 3 takes a mixture as one leaf, and reduces its gradients in a full backward hook. torch calls that hook when
    the gradient of the input is done or, where the input requires none, before the backward pass of the module has
    begun: its gradients would be zeros, and its weights be taken apart before they are used.
    """
    sharded = engine.zero_optimization_partition_weights()
    for layer in moe_layers(engine.module).values() if sharded else ():
        layer.register_forward_pre_hook(_with_gradient, prepend=True)


def _with_gradient(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
    (x,) = inputs
    return None if x.requires_grad or not torch.is_grad_enabled() else (x.detach().requires_grad_(),)
