"""A loaded model in fewer bits: weights in bfloat16, or those of linear layers as 8-bit integers, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rmoe.engine.terminal import say
from rmoe.errors import UserError, nearest
from rmoe.moe.layer import ResidualMoE

Precision = Literal["bfloat16", "int8"]


def check_precision(precision: Any, device: torch.device, dtype: torch.dtype) -> Precision | None:
    """Returns a precision that a model can be brought to on that device; None leaves it in float32.

    Raises:
        UserError: it is none, autocast is asked for as well, or 8-bit integers are and the device is no CPU.
    """
    if precision is None:
        return None
    if precision not in get_args(Precision):
        raise UserError(f"precision is {str(precision)[:80]!r}{nearest(str(precision), get_args(Precision))}")
    if dtype != torch.float32:
        raise UserError(f"precision '{precision}' and dtype '{str(dtype).removeprefix('torch.')}': give one of both")
    if precision == "int8" and device.type != "cpu":
        raise UserError(f"precision 'int8' is for CPUs, and the device is {device}; give device='cpu' (--device cpu)")
    return precision


def tell_if_slow(device: torch.device, dtype: torch.dtype) -> None:
    """Says so where bfloat16 is computed in and the device is a CPU that has no instructions for it."""
    if dtype == torch.bfloat16 and lacks_bfloat16(device):
        say(
            "this CPU has no instructions for bfloat16, so an image may take minutes: leave it out (float32), or give "
            "precision int8"
        )


def lacks_bfloat16(device: torch.device) -> bool:
    """Says whether a device is a CPU whose convolutions in bfloat16 are computed number by number."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def lowered(model: nn.Module, precision: Precision) -> nn.Module:
    """Returns `model`, changed in place, with weights of fewer bits.

    "bfloat16": the weights of linear maps and convolutions, experts and their cores included, are what autocast would
    round them to in every pass; norms, tables and gates stay float32. "int8": the weights of every `nn.Linear` outside
    of mixtures become integers, scaled row by row, and inputs do in every pass, scaled by their range (dynamic
    quantisation). Experts, cores and gates, which are read as weights and not called as layers, stay float32.
    """
    for module in list(model.modules()):
        if precision == "bfloat16" and isinstance(module, nn.Linear | _ConvNd):
            module.bfloat16()
        elif precision == "bfloat16" and isinstance(module, ResidualMoE):
            module.deepspeed_moe.bfloat16()
    if precision == "int8":
        for parent, name, linear in list(_linears(model)):
            setattr(parent, name, Int8Linear(linear))
    return model


def share_in_int8(model: nn.Module) -> float:
    """Returns the share of a model's weights that are 8-bit integers."""
    lowered = sum(module.count for module in model.modules() if isinstance(module, Int8Linear))
    return lowered / (lowered + sum(x.numel() for x in model.parameters()))


class Int8Linear(nn.Module):
    """Computes W x + b with W in 8 bits, by torch's dynamically quantised product.

    `weight` is W as it is computed with, float32, for models that read it rather than call their layer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).double()
        rounded = torch.quantize_per_channel(weight, scale, torch.zeros(len(weight)).long(), 0, torch.qint8)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.count = weight.numel()
        self._packed = torch.ops.quantized.linear_prepack(rounded, self.bias)

    @property
    def weight(self) -> Tensor:
        """Returns W, [outputs, inputs]."""
        return torch.ops.quantized.linear_unpack(self._packed)[0].dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Returns W x + b, [..., outputs], of x [..., inputs]."""
        return torch.ops.quantized.linear_dynamic(x.float(), self._packed, reduce_range=True)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yields the linear layers outside of mixtures, each with the module that it is in and its name there."""
    for name, child in model.named_children():
        if type(child) is nn.Linear:
            yield model, name, child
        elif not isinstance(child, ResidualMoE):
            yield from _linears(child)
