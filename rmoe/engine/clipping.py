"""The gradient norm with experts spread over processes, at ZeRO stage 0, where DeepSpeed's depends on ep_size."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import Tensor, nn


def mend_clipping(engine: Any) -> None:
    """Makes `engine` clip by the norm of the whole model's gradient, and `get_global_grad_norm()` return it.

    DeepSpeed averages the local norms of the processes at stage 0, which is another number as soon as they hold
    different experts. Stages 1 and 2 are right and are left alone.

    Args:
        engine: what `deepspeed.initialize` returned.
    """
    if engine.zero_optimization():
        return
    take_step = engine._take_model_step

    def measure_and_clip() -> None:
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        norm, limit = global_grad_norm(parameters), engine.gradient_clipping()
        engine._global_grad_norm = norm.item()
        if limit > 0:
            torch._foreach_mul_([p.grad for p in parameters], (limit / (norm + 1e-6)).clamp(max=1.0))

    def take_measured_step(lr_kwargs: dict[str, Any] | None) -> None:
        if engine.gradient_clipping() == 0 and not engine.torch_autocast_z0_gradscaler:
            measure_and_clip()  # DeepSpeed calls it only to clip
        take_step(lr_kwargs)

    engine.clip_fp32_gradients = measure_and_clip
    engine._take_model_step = take_measured_step


def global_grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The 2-norm of the whole model's gradient, a float32 scalar, the same on every process, which all must call."""
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        group = parameter.group_name if is_moe_param(parameter) else ""  # type: ignore[attr-defined]
        squares[group].append(parameter.grad.float().pow(2).sum())  # type: ignore[union-attr]
    total = torch.zeros((), device=parameters[0].device)
    for group in sorted(squares):
        square = torch.stack(squares[group]).sum()
        if group and groups._get_expert_parallel_world_size(group) > 1:
            dist.all_reduce(square, group=groups._get_expert_parallel_group(group))
        total = total + square
    return total.sqrt()
