"""The state of mmengine's schedulers and message hub as plain data: what JSON holds, and tensors of what was logged."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import BaseOptimWrapper
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError
from torch import Tensor

from rmoe.engine.optim import change_settings, settings
from rmoe.errors import UserError

_Settings = dict[str, bool | int | FiniteFloat | str | list[Any] | dict[str, Any] | None]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Progress(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    epoch: NonNegativeInt
    iter: NonNegativeInt


class _Cost(_Strict):
    train_seconds: FiniteFloat
    steps: NonNegativeInt
    images: NonNegativeInt
    flops_per_step: FiniteFloat | None
    flops_step: NonNegativeInt | None


class _Info(BaseModel):
    """What hooks read of the message hub; others put there what they like."""

    model_config = ConfigDict(strict=True, extra="allow")
    keep_ckpt_ids: list[NonNegativeInt] = []
    cost: _Cost | None = None


class _Counters(_Strict):
    global_steps: NonNegativeInt
    global_samples: NonNegativeInt
    skipped_steps: NonNegativeInt
    micro_steps: NonNegativeInt


class _LossScale(_Strict):
    scale: Annotated[FiniteFloat, Field(gt=0)]
    growth_factor: FiniteFloat
    backoff_factor: FiniteFloat
    growth_interval: NonNegativeInt
    growth_tracker: Annotated[NonNegativeInt, Field(alias="_growth_tracker")]


class _Group(_Strict):
    parameters: list[str]
    settings: _Settings


class _Engine(_Strict):
    optimizer: str
    numbers: list[str]
    counters: _Counters
    loss_scale: _LossScale | None
    groups: list[_Group]


class _Run(_Strict):
    """What `gather_state` returns, with what `rmoe.engine.checkpoint.resharding.gather_tensors` says of the engine."""

    meta: _Progress
    info: _Info
    base_settings: _Settings | None
    schedulers: list[dict[str, Any]]
    engine: _Engine


_PLAIN = (str, int, float, bool, type(None))
_BY_GROUP = ("base_values", "_last_value")  # of a scheduler: lists by group of the optimizer, which can tell


def gather_state(
    state: Mapping[str, Any], wrapper: BaseOptimWrapper, schedulers: list[Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what a checkpoint says of a run besides its tensors.

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
        "schedulers": [_of_scheduler(one) for one in schedulers],
    }
    history = {
        name: torch.from_numpy(np.stack([np.asarray(x, np.float64) for x in buffer.data]))
        for name, buffer in hub["log_scalars"].items()
    }
    return about, history


def check(about: Mapping[str, Any], path: Path) -> None:
    """Checks that `run.json` of the checkpoint `path` has what `restore_state`, here and in resharding.py, reads of it.

    Raises:
        UserError: a key is missing or unknown, or a value of another type or not finite.
    """
    try:
        _Run.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        where, found = ".".join(map(str, first["loc"])), repr(first["input"])[:80]
        raise UserError(
            f"{path} has {where} = {found} in run.json: {first['msg']}; give an earlier checkpoint"
        ) from error


def restore_state(
    about: Mapping[str, Any], history: Mapping[str, Tensor], wrapper: BaseOptimWrapper, schedulers: list[Any]
) -> dict[str, Any]:
    """Sets `wrapper`, whose optimizer has been restored, and `schedulers`; returns what `gather_state` had as `state`.

    Raises:
        UserError: the run had other schedulers.
    """
    if about["base_settings"] and wrapper.base_param_settings:
        change_settings(wrapper.base_param_settings, about["base_settings"])
    if len(about["schedulers"]) != len(schedulers):
        raise UserError(
            f"the checkpoint's run had {len(about['schedulers'])} schedules in param_scheduler, this one has "
            f"{len(schedulers)}: resume with those of that run, or start a new run with load_from"
        )
    for one, saved in zip(schedulers, about["schedulers"], strict=True):
        _restore_scheduler(one, saved)
    scalars = {name: HistoryBuffer(log.numpy(), count.numpy()) for name, (log, count) in history.items()}
    again = dict.fromkeys((*scalars, *about["info"]), True)  # goes into the next checkpoint too
    hub = {"log_scalars": OrderedDict(scalars), "runtime_info": about["info"], "resumed_keys": again}
    return {"meta": about["meta"], "message_hub": hub}


def _of_scheduler(scheduler: Any) -> dict[str, Any]:
    return _plain_items({key: x for key, x in scheduler.state_dict().items() if key not in _BY_GROUP})


def _restore_scheduler(scheduler: Any, saved: Mapping[str, Any]) -> None:
    """Sets what has changed since the start. What is the config's, such as milestones, keeps the type it has there."""
    own, given = _of_scheduler(scheduler), _arguments(type(scheduler))
    changed = {key: value for key, value in saved.items() if own.get(key, ...) != value}
    other = sorted(own.keys() ^ saved.keys()) or sorted(changed.keys() & given)
    other = other or [key for key, x in changed.items() if not _same_kind(own[key], x)]
    if other:
        key = other[0]
        raise UserError(
            f"the checkpoint's run had a schedule with {key} {saved.get(key)}, this {type(scheduler).__name__} has "
            f"{own.get(key)}: resume with the param_scheduler of that run, or start a new run with load_from"
        )
    name, groups = scheduler.param_name, scheduler.optimizer.param_groups
    scheduler.load_state_dict(changed)
    scheduler.base_values = [group[f"initial_{name}"] for group in groups]
    scheduler._last_value = [group[name] for group in groups]


def _same_kind(own: Any, saved: Any) -> bool:
    return own is None or type(own) is type(saved) or {type(own), type(saved)} == {int, float}


def _arguments(kind: type) -> set[str]:
    """Returns the names of the arguments that a scheduler is made from."""
    makers = [cls.__init__ for cls in kind.__mro__ if "__init__" in vars(cls)]  # type: ignore[misc]
    return {name for maker in makers for name in inspect.signature(maker).parameters} - {"last_step", "verbose"}


def relocate(info: dict[str, Any], folder: Path) -> None:
    """Sets, in place, where the run's best checkpoints are: in `folder`, its work dir, whatever was noted elsewhere.

    A work dir may have been copied, and mmengine removes what is not the best any more.
    """
    for key in [key for key in info if key.startswith("best_ckpt")]:
        name = Path(str(info.pop(key))).name
        if name.startswith("best_"):
            info[key] = str(folder / name)


def _plain_items(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the values that JSON can hold, and logs which are not saved."""
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
