"""The gradient norm, clipping and the scale of the loss, the same at every ZeRO stage and wherever experts live.

DeepSpeed's own norm depends on ep_size at stage 0, and under float16 autocast its stages 1 to 3 clip the still scaled
gradient, keep the scale after an overflow and move it once for each group of the optimizer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import Tensor, nn

from rmoe.engine.precision import precision
from rmoe.errors import UserError


class LossScaler:
    """Scales the loss under float16 as `torch.amp.GradScaler` does, but once for each step of all processes.

    GradScaler looks for an overflow in each process and each group of the optimizer by itself: processes that hold
    different experts would get different scales. DeepSpeed calls this one both as a GradScaler and as its own
    `loss_scaler`, and divides the gradient by `cur_scale` before it clips.

    Attributes:
        cur_scale: what the loss is multiplied by.
        overflow: whether the gradient of the present step is not finite, on any process; the step is then left out.
    """

    growth_factor, backoff_factor, growth_interval = 2.0, 0.5, 2000  # GradScaler's defaults

    def __init__(self) -> None:
        self.cur_scale, self.overflow, self._good_steps = 2.0**16, False, 0

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the loss to go backward from, in float32, where the product cannot overflow."""
        return loss.float() * self.cur_scale

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Does nothing: the gradient has been divided before it was measured."""

    def update_scale(self, overflow: bool) -> None:
        """Notes what the gradient's norm said; the scale stays until the step is over, for it is still divided by."""
        self.overflow = overflow

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the optimizer's step, or leaves it out after an overflow."""
        if not self.overflow:
            optimizer.step()

    def update(self) -> None:
        """Does nothing: DeepSpeed calls it after each group, `finish` comes after all of them."""

    def finish(self) -> None:
        """Halves the scale after an overflow, and doubles it after enough steps without one."""
        self._good_steps = 0 if self.overflow else self._good_steps + 1
        if self.overflow:
            self.cur_scale *= self.backoff_factor
        elif self._good_steps == self.growth_interval:
            self.cur_scale, self._good_steps = self.cur_scale * self.growth_factor, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns what GradScaler's has."""
        return {
            "scale": self.cur_scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._good_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned, of this class or of GradScaler."""
        self.cur_scale, self._good_steps = float(state["scale"]), int(state["_growth_tracker"])


def check_precision(config: Mapping[str, Any]) -> None:
    """Checks that a gradient can be measured and scaled back in what a resolved DeepSpeed JSON asks for.

    Raises:
        UserError: float16 without a gradient norm, or with a step that is not DeepSpeed's own at its ZeRO stages.
    """
    if precision(config) != "float16":
        return
    zero = config.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer") or {}
    harmful = {
        "zero_optimization.compute_grad_norm false": zero.get("compute_grad_norm") is False,
        "zero_optimization.zenflow": bool(zero.get("zenflow")),
        "zero_optimization.offload_optimizer.super_offload": bool(offload.get("super_offload")),
    }
    if found := [name for name, asked in harmful.items() if asked]:
        raise UserError(
            f"the DeepSpeed JSON has float16 with {found[0]}, where an overflow of the gradient would go unseen; leave "
            'that out, or use "torch_autocast": {"enabled": true, "dtype": "bfloat16"}'
        )


def mend_clipping(engine: Any) -> None:
    """Makes `engine` clip by the norm of the whole model's gradient, and `get_global_grad_norm()` return it.

    DeepSpeed averages the local norms of the processes at stage 0, which is another number as soon as they hold
    different experts. Stages 1 to 3 measure the whole gradient, and need another scaler under float16 (`LossScaler`).

    Args:
        engine: what `deepspeed.initialize` returned.
    """
    take_step, scaler = engine._take_model_step, _replaced_scaler(engine)

    def measure_and_clip() -> None:
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        gradients, limit = [p.grad for p in parameters], engine.gradient_clipping()
        if scaler:
            torch._foreach_mul_(gradients, 1 / scaler.cur_scale)
        norm = global_grad_norm(parameters).cpu()
        engine._global_grad_norm = norm.item()
        if scaler and not math.isfinite(engine._global_grad_norm):
            engine._global_grad_norm = math.inf  # what the other stages say
        if scaler:
            scaler.update_scale(engine._global_grad_norm == math.inf)
        if limit > 0:
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0).item())

    def take_measured_step(lr_kwargs: dict[str, Any] | None) -> None:
        if not engine.zero_optimization():
            measure_and_clip()
        take_step(lr_kwargs)
        if scaler:
            scaler.finish()

    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed decides by the norm whether it makes the step, and so waits for the device once. It does not a
        # second time, nor does whoever asks for the norm later, behind the step, where the norm is on the CPU.
        on_the_device = engine.optimizer.scaled_global_norm
        engine.optimizer.scaled_global_norm = lambda *args, **kwargs: on_the_device(*args, **kwargs).cpu()
    engine.clip_fp32_gradients = lambda: None  # they are clipped already
    engine._take_model_step = take_measured_step


def loss_scaler(engine: Any) -> LossScaler | None:
    """Returns what scales the loss of `engine`, which `mend_clipping` has seen: None but under float16."""
    at_zero = engine.torch_autocast_z0_gradscaler
    return at_zero or getattr(engine.optimizer, "torch_autocast_gradscaler", None)


def _replaced_scaler(engine: Any) -> LossScaler | None:
    if loss_scaler(engine) is None:
        return None
    scaler = LossScaler()
    if engine.zero_optimization():
        engine.optimizer.torch_autocast_gradscaler = engine.optimizer.loss_scaler = scaler
    else:
        engine.torch_autocast_z0_gradscaler = scaler
    return scaler


def global_grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Returns the 2-norm of the whole model's gradient, a float32 scalar, the same on every process; all call it."""
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
