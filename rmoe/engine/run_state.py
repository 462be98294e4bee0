"""The state of mmengine's schedulers and message hub as plain data: what JSON holds, and tensors of what was logged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import BaseOptimWrapper
from torch import Tensor

from rmoe.engine.elastic import change_settings, settings

_PLAIN = (str, int, float, bool, type(None))
_BY_GROUP = ("base_values", "_last_value")  # of a scheduler: lists by group of the optimizer, which can tell


def collect(
    state: Mapping[str, Any], wrapper: BaseOptimWrapper, schedulers: list[Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says of a run besides its tensors.

    Args:
        state: `meta` and `message_hub`, the state of mmengine's message hub.
        wrapper: of the optimizer.
        schedulers: mmengine's.

    Returns:
        What JSON can hold, and by the name of each logged value [2, n] float64: values and their counts.
    """
    hub = state["message_hub"]
    about = {
        "meta": _plain_items(state["meta"]),
        "info": _plain_items(hub["runtime_info"]),
        "base_settings": settings(wrapper.base_param_settings) if wrapper.base_param_settings else None,
        "schedulers": [
            _plain_items({key: x for key, x in one.state_dict().items() if key not in _BY_GROUP}) for one in schedulers
        ],
    }
    history = {
        name: torch.from_numpy(np.stack([np.asarray(x, np.float64) for x in buffer.data]))
        for name, buffer in hub["log_scalars"].items()
    }
    return about, history


def restore(
    about: Mapping[str, Any], history: Mapping[str, Tensor], wrapper: BaseOptimWrapper, schedulers: list[Any]
) -> dict[str, Any]:
    """Sets `wrapper`, whose optimizer has been restored, and `schedulers`; returns what `collect` had as `state`."""
    if about["base_settings"] and wrapper.base_param_settings:
        change_settings(wrapper.base_param_settings, about["base_settings"])
    for one, saved in zip(schedulers, about["schedulers"], strict=False):
        name, groups = one.param_name, one.optimizer.param_groups
        one.load_state_dict(saved)
        one.base_values = [group[f"initial_{name}"] for group in groups]
        one._last_value = [group[name] for group in groups]
    scalars = {name: HistoryBuffer(log.numpy(), count.numpy()) for name, (log, count) in history.items()}
    again = dict.fromkeys((*scalars, *about["info"]), True)  # goes into the next checkpoint too
    hub = {"log_scalars": OrderedDict(scalars), "runtime_info": about["info"], "resumed_keys": again}
    return {"meta": about["meta"], "message_hub": hub}


def _plain_items(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that JSON can hold; what is not saved is said."""
    kept = {}
    for key, value in values.items():
        try:
            kept[key] = _plain(value)
        except TypeError:
            print_log(f"{key} is a {type(value).__name__}: a checkpoint does not keep it", logger="current")
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if not isinstance(value, _PLAIN):
        raise TypeError
    return value
