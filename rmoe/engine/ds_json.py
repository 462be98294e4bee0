"""The JSON file of DeepSpeed's own keys: read, checked, and its "auto" replaced by what the config says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from rmoe.errors import UserError, nearest

AUTO = "auto"
_MICRO, _ACCUMULATION, _GLOBAL = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"


def read_json(path: Path) -> dict[str, Any]:
    """The content of a DeepSpeed JSON file.

    Raises:
        UserError: no such file, no JSON object, a top-level key that DeepSpeed does not read, or a section that this
            project does not leave to it.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"there is no DeepSpeed JSON file {path} ({error.strerror}); see ds_configs/") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}; see ds_configs/ for examples") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must hold a JSON object, see ds_configs/")
    known = top_level_keys()
    for key in content:
        if key not in known:
            raise UserError(f"{path}: DeepSpeed has no key '{key}'{nearest(key, known)}")
    for key in ("optimizer", "scheduler"):
        if key in content:
            raise UserError(f"{path} has the key '{key}'; say it in the config: optim_wrapper, param_scheduler")
    for key in ("fp16", "bf16", "bfloat16"):
        if isinstance(content.get(key), dict) and content[key].get("enabled"):
            dtype = "float16" if key == "fp16" else "bfloat16"
            raise UserError(
                f"{path} enables '{key}', which casts weights but neither inputs nor buffers, and fails in a Swin; use "
                f'"torch_autocast": {{"enabled": true, "dtype": "{dtype}"}}'
            )
    return content


def top_level_keys() -> set[str]:
    """The top-level keys that the installed DeepSpeed reads: those that it asks for in an empty file."""
    asked = _Asked()
    DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params(asked)
    return asked.keys_asked_for


class _Asked(dict[str, Any]):
    """An empty dict that remembers which keys it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_asked_for: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked_for.add(key)
        return default

    def __contains__(self, key: object) -> bool:
        self.keys_asked_for.add(str(key))
        return False

    def keys(self) -> Any:
        return self


def resolve(
    content: Mapping[str, Any], *, batch_size: int, accumulation: int, max_norm: float, processes: int
) -> dict[str, Any]:
    """The file's content with numbers for every "auto": batch sizes, accumulation and clipping are always explicit.

    Args:
        content: what `read_json` returned.
        batch_size: of the config's train_dataloader, samples of one process.
        accumulation: of the config, iterations for one step.
        max_norm: of the config's clipping; 0 does not clip.
        processes: number of processes.

    Raises:
        UserError: batch sizes that do not fit together, or a section that DeepSpeed refuses.
    """
    given = {key: content.get(key, AUTO) for key in (_MICRO, _ACCUMULATION, _GLOBAL)}
    for key, value in given.items():
        if value != AUTO and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f'{key} is {value!r} in the DeepSpeed JSON; it is a positive number or "auto"')
    micro, steps, total = given.values()
    if total == AUTO:
        micro = batch_size if micro == AUTO else micro
        steps = accumulation if steps == AUTO else steps
        total = micro * steps * processes
    elif steps == AUTO:
        micro = batch_size if micro == AUTO else micro
        steps = total // (micro * processes)
    elif micro == AUTO:
        micro = total // (steps * processes)
    if total != micro * steps * processes or not total:
        raise UserError(
            f"{_GLOBAL} {given[_GLOBAL]} is not {_MICRO} {micro} × {_ACCUMULATION} {steps} × {processes} processes; "
            'change one of them, or leave it "auto"'
        )
    clipping = content.get("gradient_clipping", AUTO)
    resolved = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **content}
    resolved |= {_MICRO: micro, _ACCUMULATION: steps, _GLOBAL: total}
    resolved |= {"gradient_clipping": float(max_norm if clipping == AUTO else clipping)}
    try:
        DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params(resolved)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"DeepSpeed refuses {where} = {first.get('input')!r}: {first['msg']}") from error
    return resolved


def zero_stage(content: Mapping[str, Any]) -> int:
    """ZeRO stage that a DeepSpeed JSON asks for."""
    return int(content.get("zero_optimization", {}).get("stage", 0))


def precision(content: Mapping[str, Any]) -> str:
    """Number format that matrix products are computed in."""
    autocast = content.get("torch_autocast", {})
    return str(autocast.get("dtype", "bfloat16")) if autocast.get("enabled") else "float32"
