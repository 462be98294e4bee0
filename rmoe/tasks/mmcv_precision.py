"""Makes mmcv's operations that lack autocast's formats compute in float32, in training and in evaluation."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.ops.focal_loss import SigmoidFocalLossFunction
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmcv.ops.nms import NMSop
from mmcv.ops.roi_align import RoIAlignFunction
from torch import Tensor


def _compute_in_float32(function: type[torch.autograd.Function]) -> None:
    """Makes an operation of mmcv that lacks autocast's format compute in float32 and return that format."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain_forward = torch.amp.custom_fwd(function.forward, device_type=device, cast_inputs=torch.float32)
    plain_backward = function.backward

    def forward(ctx: Any, first: Tensor, *rest: Any) -> Tensor:
        result = plain_forward(ctx, first, *rest)
        return result.to(first.dtype) if result.is_floating_point() else result

    def backward(ctx: Any, gradient: Tensor) -> Any:
        return plain_backward(ctx, gradient.float())

    function.forward, function.backward = staticmethod(forward), staticmethod(backward)  # type: ignore[method-assign]


for _function in (
    NMSop,
    RoIAlignFunction,
    ModulatedDeformConv2dFunction,
    SigmoidFocalLossFunction,
    MultiScaleDeformableAttnFunction,
):
    _compute_in_float32(_function)
