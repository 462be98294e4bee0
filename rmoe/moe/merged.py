"""One dense network in place of a mixture: exactly, where every token gets the same network, or on average.

Shape suffixes: C model width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmoe.errors import UserError
from rmoe.moe.experts import Network
from rmoe.moe.layer import ResidualMoE


@torch.no_grad()
def exact_network(layer: ResidualMoE) -> Network:
    """Returns the one network that a layer computes with in evaluation.

    There is one where the layer has one expert, or its gate is constant, as one whose weights are all zero.

    Raises:
        UserError: tokens get different networks, or the outputs of several are added up.
    """
    many, alike = layer.num_experts, layer.gate.is_constant
    if many > 1 and not alike:
        raise UserError(f"its gate decides for each token among {many} experts, which no one network does")
    value_E = constant_values(layer)
    several = int(value_E.count_nonzero())
    if several > 1 and not layer.config.mixes_weights:
        raise UserError(f"it adds up the outputs of {several} experts, which no one network of its width does")
    return mixed_network(layer, value_E)


@torch.no_grad()
def average_network(layer: ResidualMoE, value_E: Tensor | None = None) -> Network:
    """Returns the network of the mean expert: an approximation of what the layer computes.

    Args:
        layer: with all experts in this process.
        value_E: mean gate values over the tokens, 0 where an expert is not chosen; by default every expert counts as
            one of E.

    Raises:
        UserError: gate values scale the outputs (combine="softmax"), and how much is not known without `value_E`.
    """
    if value_E is None:
        if layer.config.combined == "softmax" and layer.config.chooses:
            raise UserError("its outputs are multiplied by gate values, which must be measured: give --images")
        value_E = torch.full((layer.num_experts,), 1 / layer.num_experts)
    return mixed_network(layer, value_E)


@torch.no_grad()
def constant_values(layer: ResidualMoE) -> Tensor:
    """Returns the gate values, [E], that a token of zeros gets in evaluation, 0 for experts that are not chosen."""
    training = layer.gate.training
    routing = layer.gate.eval()(layer.gate.weight.new_zeros(1, 1, layer.gate.width))
    layer.gate.train(training)
    return mean_values(routing.expert_TK, routing.gate_TK, layer.num_experts)


def mean_values(expert_TK: Tensor, gate_TK: Tensor, num_experts: int) -> Tensor:
    """Returns the mean over the tokens of the value with which each expert enters, [E], on the CPU."""
    zeros_E = gate_TK.new_zeros(num_experts)
    return (zeros_E.scatter_add(0, expert_TK.flatten(), gate_TK.flatten()) / expert_TK.shape[0]).cpu()


def mixed_network(layer: ResidualMoE, value_E: Tensor) -> Network:
    """Returns θ0 + Σ v_e Δ_e, on the CPU in the dtype of the layer's experts; arithmetic is float64.

    Where gate values weigh outputs instead of residuals, it is the mean of the experts by these weights, and what the
    second linear map gives is multiplied by their sum.
    """
    residuals = layer.residuals()
    dtype, value_E = residuals[0].dtype, value_E.double()
    inside = layer.config.mixes_weights
    total = value_E.sum()
    share_E = value_E if inside else value_E / total
    local = type(residuals)(*(x.detach().double().cpu() for x in residuals))
    deltas = [local.delta(e) for e in range(layer.num_experts)]
    mixed = []
    for field, core in zip(Network._fields, layer.theta() or (None,) * 4, strict=True):
        parts = [getattr(one, field) for one in deltas]
        found = None if core is None else core.detach().double().cpu()
        if parts[0] is not None:
            mean = sum(share * part for share, part in zip(share_E, parts, strict=True))
            found = mean if found is None else found + mean
        if found is not None and not inside and field in ("w2_CH", "b2_C"):
            found = total * found
        mixed.append(None if found is None else found.to(dtype))
    return Network(*mixed)  # type: ignore[arg-type]
