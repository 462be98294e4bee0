"""Says whether kernels written in Triton run on a device; where they do not, torch's operators compute the same."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor


def has_triton(x: Tensor) -> bool:
    """Says whether kernels written in Triton run on the device of x, which must be the current one."""
    return x.is_cuda and x.device.index == torch.cuda.current_device() and triton_runs(x.device)


@cache
def triton_runs(device: torch.device) -> bool:
    """Says whether Triton is installed and launches a kernel: for that it needs a C compiler and Python's headers.

    Where it is there and does not, a warning says why.
    """
    if find_spec("triton") is None:
        return False
    try:
        expert_P = torch.zeros(1, dtype=torch.int64, device=device)
        with torch.cuda.device_of(expert_P):  # Triton launches on the device that is current
            import_module("rmoe.moe.passes_triton").place_pairs(expert_P, 1)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        warnings.warn(
            f"Triton cannot run here ({type(error).__name__}: {reason}), so mixtures are slower; install a C compiler "
            "and Python's headers",
            stacklevel=2,
        )
        return False
    return True
