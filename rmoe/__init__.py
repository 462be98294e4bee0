"""Residual mixture-of-experts vision transformers on DeepSpeed (Residual Mixture of Experts, arXiv 2204.09636)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rmoe.config import Calibration, GateLosses, ResidualMoEConfig
from rmoe.errors import UserError

if TYPE_CHECKING:
    from rmoe.backbones.upcycle import upcycle
    from rmoe.inference.adapters import Core
    from rmoe.inference.load import load
    from rmoe.inference.pretrained import from_pretrained
    from rmoe.moe.calibrate import calibrate
    from rmoe.moe.layer import ResidualMoE
    from rmoe.moe.records import collect
    from rmoe.moe.state import roles
    from rmoe.moe.tasks import task

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Core",
    "GateLosses",
    "ResidualMoE",
    "ResidualMoEConfig",
    "UserError",
    "calibrate",
    "collect",
    "from_pretrained",
    "load",
    "roles",
    "task",
    "upcycle",
]

# Loaded when first used: torch and deepspeed take seconds, which `rmoe --help` should not.
_LAZY = {
    "Core": "rmoe.inference.adapters",
    "ResidualMoE": "rmoe.moe.layer",
    "calibrate": "rmoe.moe.calibrate",
    "collect": "rmoe.moe.records",
    "from_pretrained": "rmoe.inference.pretrained",
    "load": "rmoe.inference.load",
    "roles": "rmoe.moe.state",
    "task": "rmoe.moe.tasks",
    "upcycle": "rmoe.backbones.upcycle",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rmoe' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
