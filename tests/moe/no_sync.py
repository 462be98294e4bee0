"""Raises at every operation that on a GPU would wait for the device, or whose result's shape depends on values.

    with no_sync():
        layer(x)

It works on CPU tensors, so that what runs on a GPU can be judged without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.bincount, aten.masked_select, aten.is_nonzero, aten.equal),
    *(aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Waits(AssertionError):
    """An operation waits for the device."""


class _NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in WAITING or (packet is aten._to_copy and _to_cpu(args, kwargs or {})):
            raise Waits(f"{func} waits for the device")
        if packet in INDEXING and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None):
            raise Waits(f"{func} by a mask waits for the device")
        return func(*args, **(kwargs or {}))


def _to_cpu(args: Any, kwargs: Any) -> bool:
    """Whether a tensor of another device is copied to the CPU."""
    return kwargs.get("device") == torch.device("cpu") and args[0].device.type != "cpu"


@contextmanager
def no_sync() -> Iterator[None]:
    """Raises `Waits` inside the block where an operation would wait, backward included."""

    def wait(x: torch.Tensor) -> None:
        raise Waits("tolist() and numpy() wait for the device")

    # On the CPU no operation is behind these two.
    with _NoSync(), mock.patch.object(torch.Tensor, "tolist", wait), mock.patch.object(torch.Tensor, "numpy", wait):
        yield
