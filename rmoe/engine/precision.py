"""The number formats that a run computes in: what "auto" means on this machine, TF32, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def autocasts() -> bool:
    """Says whether this machine computes in bfloat16 by default: on a GPU that has it. A CPU computes in float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def precision(config: Mapping[str, Any]) -> str:
    """Returns the number format that matrix products are computed in, of a resolved DeepSpeed JSON: a name of torch's,
    or "tf32".
    """
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled"):
        return str(autocast["dtype"])
    return "tf32" if _takes_tf32(config) else "float32"


def set_float32_products(config: Mapping[str, Any]) -> None:
    """Sets, on a GPU, how products of float32 are computed: in TF32, with 10 bits of mantissa, unless the JSON says
    `"torch_autocast": {"enabled": false}`. What a CPU computes does not change.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if _takes_tf32(config) else "highest")
        torch.backends.cudnn.allow_tf32 = _takes_tf32(config)


def _takes_tf32(config: Mapping[str, Any]) -> bool:
    return torch.cuda.is_available() and config.get("torch_autocast", {}).get("enabled") is not False
