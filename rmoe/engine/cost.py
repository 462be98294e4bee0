"""What a run cost: seconds, FLOPs, parameters and memory, as `cost.json` records them."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from rmoe.engine.trained import own_experts
from rmoe.moe.state import moe_layers

_PACKAGES = ("torch", "deepspeed", "timm")
_aten = torch.ops.aten


def _grouped_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Returns the FLOPs of a grouped product of shapes [N, I] and [E, I, O], or [O, N] and [N, I]: each row has one."""
    return 2 * a[0] * a[1] * b[-1]


# What torch's own list of formulas lacks: products in place, of groups, and attention on a CPU.
_MORE_FORMULAS = {
    _aten._grouped_mm: shape_wrapper(_grouped_flops),
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model over all processes, each expert counted once.

    Attributes:
        total: all of them.
        active: those that one token uses: top-k of the experts of each layer.
        trainable: those that are not frozen.
    """

    total: int
    active: int
    trainable: int


def count_parameters(model: nn.Module) -> Parameters:
    """Counts over all processes without asking them: every process holds as many experts."""
    shares: dict[nn.Parameter, tuple[int, float]] = {}  # processes that hold other experts, part that a token uses
    for layer in moe_layers(model).values():
        used = layer.config.experts_per_token / layer.config.num_experts
        shares |= dict.fromkeys(own_experts(layer), (layer.ep_size, used))
    total = active = trainable = 0
    for parameter in model.parameters():
        processes, used = shares.get(parameter, (1, 1.0))
        size = parameter.numel() * processes
        total, active = total + size, active + round(size * used)
        trainable += size if parameter.requires_grad else 0
    return Parameters(total, active, trainable)


@contextmanager
def counted_flops(result: list[int]) -> Iterator[FlopCounterMode]:
    """Appends to `result` the floating-point operations of the matrix products and convolutions run inside, forward
    and backward, summed over all processes, which all must enter. Yields the counter, which knows this process's.
    """
    counter = FlopCounterMode(display=False)
    counter.flop_registry.update(_MORE_FORMULAS)
    with counter:
        yield counter
    total = torch.tensor(float(counter.get_total_flops()), dtype=torch.float64, device=_device())
    if dist.is_initialized():
        dist.all_reduce(total)
    result.append(int(total.item()))


def peak_memory() -> int:
    """Returns the most bytes that any process has held so far: of device memory or, on a CPU, of resident memory."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = torch.tensor(float(peak), dtype=torch.float64, device=_device())
    if dist.is_initialized():
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return int(peaks.item())


def device_kind() -> str:
    """Returns the name of the GPU, or of the CPU as the kernel gives it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def software() -> dict[str, Any]:
    """Returns the versions of what computes, and the commit where this is a git checkout (`-dirty`: with changes)."""
    found: dict[str, Any] = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        found["commit"] = answer.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = None
    return found


def _device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
