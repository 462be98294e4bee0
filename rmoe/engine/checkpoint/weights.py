"""A whole model's weights to start from, read from any of the forms that they are kept in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from rmoe.backbones.load_core import read_checkpoint
from rmoe.engine.checkpoint.files import AVERAGE, WEIGHT, Tensors, damage, is_checkpoint
from rmoe.errors import UserError
from rmoe.moe.experts import WEIGHT_DTYPES, WEIGHTS
from rmoe.moe.gate import GATES_WITHOUT, absent_of_gates
from rmoe.moe.state import global_state_dict, load_global_state_dict

_LISTED = 3


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads all weights of `model`: from a `.pth` or `.safetensors` file, the work dir of a finished run, or a training
    checkpoint of any number of processes and any ep_size; their average, where the run kept one. All processes call it.

    Raises:
        UserError: no such file, one cut short or with values that are not finite, or another model's.
    """
    state = read_weights(path)
    fill(model, state, path)
    print_log(f"{len(state)} weights loaded from {path}", logger="current")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns all weights that a file, a work dir or a training checkpoint holds, see `load_weights`."""
    if is_checkpoint(path):
        return _weights(path)
    return {str(key).removeprefix("module."): value for key, value in read_checkpoint(path).items()}


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Loads all weights of `model` from a state dict of the whole model; `path` is where that comes from.

    Raises:
        UserError: they are another model's, or of another kind of number.
    """
    wanted = global_state_dict(model)
    if gates := absent_of_gates(state, wanted):
        print_log(f"{path}: {GATES_WITHOUT} {', '.join(gates)}: read as zeros", logger="current")
        state = {**state, **gates}
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    both = sorted(wanted.keys() & state.keys())
    other = [key for key in both if wanted[key].shape != state[key].shape]
    if missing or unexpected or other:
        raise UserError(
            f"{path} is another model's: {_some('missing', missing)}, {_some('unexpected', unexpected)}, "
            f"{_some('of another shape', other)}, of {len(wanted)} weights; give the checkpoint of this model"
        )
    if odd := [key for key in both if not _fits(state[key].dtype, wanted[key].dtype)]:
        raise UserError(
            f"{path} has {_some('weights of another kind of number', odd)}, such as {state[odd[0]].dtype} for "
            f"{wanted[odd[0]].dtype}; {WEIGHTS}"
        )
    load_global_state_dict(model, state)


def _fits(given: torch.dtype, wanted: torch.dtype) -> bool:
    return given == wanted or {given, wanted} <= set(WEIGHT_DTYPES)


def _some(what: str, keys: list[str]) -> str:
    return f"{len(keys)} {what}" + (
        f" ({', '.join(keys[:_LISTED])}{', …' if len(keys) > _LISTED else ''})" if keys else ""
    )


def _weights(path: Path) -> dict[str, Tensor]:
    """Returns all weights of a training checkpoint, as `global_state_dict` names them."""
    if harm := damage(path):
        raise UserError(f"{path} is {harm}; give an earlier checkpoint")
    tensors = Tensors(path)
    kind = AVERAGE if any(key.startswith(AVERAGE) for key in tensors) else WEIGHT
    state = {key.removeprefix(kind): tensors[key] for key in tensors if key.startswith(kind)}
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(f"{path} has {_some('weights that are not finite', bad)}; give an earlier checkpoint")
    return state
