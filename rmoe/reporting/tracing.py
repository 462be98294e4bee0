"""A step that is traced on the CPU: its FLOPs and the bytes that are alive, with tensors that need not have values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmoe.engine.cost import counted_flops
from rmoe.moe.records import collect

Precision = Literal["float32", "bfloat16", "float16"]


def training_loss(model: Any, images: Mapping[str, Any]) -> Tensor:
    """Returns what training minimises: the sum of the model's losses and its gates'.

    Args:
        model: of mmengine's protocol, or a DeepSpeed engine around it.
        images: as the model's preprocessor gives them.
    """
    with collect() as records:
        losses = model(**images, mode="loss")
    return model.parse_losses(records.join(losses))[0]


class Trace(NamedTuple):
    """What was counted while a step ran: FLOPs; the peak of live bytes beside parameters and their gradients; and the
    bytes of gradients and of the rest at the peak of both together."""

    flops: int
    activations: int
    together: tuple[int, int]


def trace(model: nn.Module, loss: Callable[[], Tensor], precision: Precision = "float32") -> Trace:
    """Runs `loss` forward and backward and counts; on tensors with values or, within FakeTensorMode, without."""
    flops: list[int] = []
    live = _LiveBytes(model)
    with counted_flops(flops), live:
        with torch.autocast("cpu", getattr(torch, precision), enabled=precision != "float32"):
            value = loss()
        value.backward()
    del value
    return Trace(flops[0], *live.peaks(parameter.grad for parameter in model.parameters()))


class _LiveBytes(TorchDispatchMode):
    """Keeps book of tensors that are made and freed, those of `model` aside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []  # (number of the storage, bytes; negative where it is freed)
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for x in (*model.parameters(), *model.buffers()):
            self._numbers[x.untyped_storage()] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        if storage not in self._numbers:
            number, size = len(self._events), storage.nbytes()
            self._numbers[storage] = number
            self._events.append((number, size))
            weakref.finalize(storage, self._events.append, (number, -size))

    def peaks(self, gradients: Iterable[Tensor | None]) -> tuple[int, tuple[int, int]]:
        """Returns the most bytes of others than `gradients` at once, and those of both at their common peak."""
        theirs = {self._numbers.get(x.untyped_storage()) for x in gradients if x is not None}
        now, highest, together = [0, 0], 0, (0, 0)  # gradients, others
        for number, size in self._events:
            now[number not in theirs] += size
            highest = max(highest, now[1])
            together = max(together, (now[0], now[1]), key=sum)
        return highest, together


@contextmanager
def without_values() -> Iterator[None]:
    """Takes the values off tensors inside the block; what only values can tell is even: masks keep all, and experts
    are equally full."""
    even = _Even()
    # FakeTensor's own would ask for values before any mode sees it.
    tolist = mock.patch.object(FakeTensor, "tolist", lambda x: even.shares(len(x)))
    with FakeTensorMode(allow_non_fake_inputs=True), even, tolist:
        yield


class _Even(TorchDispatchMode):
    _counted = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bincount.default:
            self._counted = args[0].numel()
            return args[0].new_empty((kwargs or {}).get("minlength", args[-1]))
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _all_kept(args[1]))
        return func(*args, **(kwargs or {}))

    def shares(self, parts: int) -> list[int]:
        """Returns the last `bincount`, with its elements spread evenly over `parts` places."""
        return [self._counted // parts + (part < self._counted % parts) for part in range(parts)]


def _all_kept(index: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns an index in which every mask is replaced by as many positions as it has elements."""
    found: list[Tensor | None] = []
    for part in index:
        if part is not None and part.dtype == torch.bool:
            found += [part.new_empty(part.numel(), dtype=torch.int64) for _ in range(part.ndim)]
        else:
            found.append(part)
    return found
