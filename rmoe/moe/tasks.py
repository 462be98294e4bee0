"""Which task a forward pass is of, for gates that know several; and what experts tell about tasks.

    with rmoe.task(1):
        loss = criterion(model(images), labels)

Shape suffixes: M tasks, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rmoe.errors import UserError

_TASK: ContextVar[int | None] = ContextVar("rmoe_task", default=None)
_REPLAYED = local()  # of each thread of autograd: the task whose forward pass its backward pass has last read from


@contextmanager
def task(number: int, *, recomputes: bool = True) -> Iterator[None]:
    """Makes the forward passes inside the block, in this thread, those of one task.

    Activation checkpointing runs layers again in the backward pass, outside of any block and perhaps in another thread.
    What it saved inside of this one remembers the task, and says so where it is read.

    Args:
        number: of the task, from 0.
        recomputes: whether activations may be checkpointed inside; False saves a call for each tensor that is kept.

    Raises:
        UserError: `number` is no whole number, or negative.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise UserError(f"the task is {number!r}; it is the number of a task, from 0")

    def kept(x: Tensor) -> tuple[int, Tensor]:
        return number, x

    token = _TASK.set(number)
    try:
        with saved_tensors_hooks(kept, _read) if recomputes and torch.is_grad_enabled() else nullcontext():
            yield
    finally:
        _TASK.reset(token)


def _read(saved: tuple[int, Tensor]) -> Tensor:
    _REPLAYED.task, x = saved
    return x


def current_task() -> int | None:
    """Returns the number of the task whose forward pass runs, or runs again; None outside of `task`."""
    if torch._C._current_graph_task_id() != -1:
        found: Any = getattr(_REPLAYED, "task", None)
        return found
    return _TASK.get()


def task_of(tasks: int) -> int:
    """Returns the number of the present task for a gate that knows so many.

    Raises:
        UserError: there is none, or the gate does not know it.
    """
    number = current_task()
    if number is None or number >= tasks:
        which = "of no task" if number is None else f"of the task {number}"
        raise UserError(
            f"a gate with tasks={tasks} ran in a forward pass {which}: run the model inside of rmoe.task(N), N from 0 "
            f"to {tasks - 1}"
        )
    return number


def task_information(share_ME: Tensor) -> Tensor:
    """Returns the mutual information of task and expert in nats, I(T; E) = Σ_m,e P(m, e) log (P(m, e) / P(m) P(e)).

    Tasks count alike, P(m) = 1/M, however many tokens they have (Mod-Squad, arXiv 2212.08066, section 3). It is 0 where
    all tasks use experts alike, and log M where no two tasks share one.

    Args:
        share_ME: mean gate probability of each expert over the tokens of each task, [..., M, E].
    """
    share_ME = share_ME.clamp_min(torch.finfo(share_ME.dtype).tiny)  # the gradient at 0 is not finite
    return torch.special.entr(share_ME.mean(-2)).sum(-1) - torch.special.entr(share_ME).sum(-1).mean(-1)
