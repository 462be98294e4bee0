"""What guards the building of a run: foreign weights are only weights, and what others raise becomes one line."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.runner import checkpoint

from rmoe.engine.faults import Fault, Preempted, of_a_collective
from rmoe.errors import UserError

_LONGEST = 600  # characters of another package's message
_ALLOWED = getattr(checkpoint, "get_torch_safe_globals", list)  # what mmengine's own checkpoints hold besides tensors


def read_weights_only() -> None:
    """Makes every reader of weights in this process, and in those that it starts, refuse what is not a weight.

    torch's own switch wins over any caller's `weights_only=False`; mmengine falls back to that one.
    """
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    checkpoint._safe_torch_load = _load


def _load(file: Any, map_location: Any = None, weights_only: Any = None) -> Any:
    """Loads a checkpoint as mmengine does, without its fallback."""
    try:
        with torch.serialization.safe_globals(_ALLOWED()):
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is not a checkpoint, or holds Python objects besides tensors, which are not loaded; save its "
            "state dict alone"
        ) from error


@contextmanager
def user_errors(where: str) -> Iterator[None]:
    """Turns whatever is raised while something is built from the user's files into a `UserError`.

    Args:
        where: the key or section of the user's that is being read.
    """
    try:
        yield
    except (UserError, Fault, Preempted):
        raise
    except Exception as error:
        if of_a_collective(error):
            raise
        raise UserError(f"{where}: {described(error)}; change it (--debug shows where this comes from)") from error


def described(error: BaseException) -> str:
    """Returns one line that says what `error` is: its kind, unless the text speaks for itself, and its text."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, pickle.UnpicklingError):
        text = "a checkpoint holds Python objects besides tensors, which are not loaded"
    if isinstance(error, KeyError) and text.isidentifier():
        return f"the key '{text}' is missing"
    return f"{type(error).__name__}: {text[:_LONGEST]}" if text else type(error).__name__


read_weights_only()
