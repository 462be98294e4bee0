"""A step that is traced on the CPU: its FLOPs and the bytes that are alive, with tensors that need not have values."""

from __future__ import annotations

import weakref
from collections import Counter
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
_aten = torch.ops.aten
_CASTS = {_aten._to_copy.default}
_MOVE_NOTHING = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_MOVE_NOTHING |= {_aten._unsafe_view, _aten._local_scalar_dense, _aten.lift_fresh}


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
    """Holds what was counted while a step ran.

    Attributes:
        flops: of matrix products and convolutions.
        operators: (FLOPs, bytes) of an operator, and how often it ran. The bytes are those of all tensors that it reads
            or writes, the model's own weights aside: a step reads them a few times, whatever the number of images, but
            an operator on a CPU may be one tile of many, and each reads them from its cache.
        activations: the peak of live bytes beside parameters and their gradients.
        together: bytes of gradients and of the rest at the peak of both together.
    """

    flops: int
    operators: Counter[tuple[int, int]]
    activations: int
    together: tuple[int, int]


def trace(model: nn.Module, loss: Callable[[], Tensor], precision: Precision = "float32") -> Trace:
    """Runs `loss` forward and backward and counts; on tensors with values or, within FakeTensorMode, without."""
    flops: list[int] = []
    with counted_flops(flops) as counter, _LiveBytes(model, counter.get_total_flops) as live:
        with torch.autocast("cpu", getattr(torch, precision), enabled=precision != "float32"):
            value = loss()
        value.backward()
    del value
    return Trace(flops[0], live.operators, *live.peaks(parameter.grad for parameter in model.parameters()))


class _LiveBytes(TorchDispatchMode):
    """Keeps book of tensors that are made, read and freed, those of `model` aside; `flops` says how many were done."""

    def __init__(self, model: nn.Module, flops: Callable[[], int]) -> None:
        super().__init__()
        self.operators: Counter[tuple[int, int]] = Counter()
        self._flops, self._flops_before = flops, 0
        self._events: list[tuple[int, int]] = []  # (number of the storage, bytes; negative where it is freed)
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for x in (*model.parameters(), *model.buffers()):
            self._numbers[x.untyped_storage()] = -1
        self._weights = weakref.WeakSet(self._numbers)  # and copies of them in another dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, written = ([x for x in tree_leaves(y) if isinstance(x, Tensor)] for y in ((args, kwargs), result))
        for x in written:
            self._see(x.untyped_storage())
        self._count(func, read, written)
        return result

    def _count(self, func: Any, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        flops = self._flops()
        done, self._flops_before = flops - self._flops_before, flops
        if func in _CASTS and all(x.untyped_storage() in self._weights for x in read):
            self._weights.update(x.untyped_storage() for x in written)
        if func.is_view or func.overloadpacket in _MOVE_NOTHING:
            return
        moved = [x for x in (*read, *written) if x.untyped_storage() not in self._weights]
        self.operators[done, sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in moved)] += 1

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
