"""Random choices that are the same with every NumPy version, on every machine and for any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_Item = TypeVar("_Item")


class Dice:
    """Random integers from a key, e.g. (seed, split, index).

    Only the raw 64-bit words of PCG64 are used: NumPy keeps a bit generator's words across versions, but not what
    `Generator` makes of them.
    """

    def __init__(self, *key: int) -> None:
        self._words = np.random.PCG64(np.random.SeedSequence(key))

    def between(self, low: int, high: int) -> int:
        """One of low … high, both included."""
        return low + (int(self._words.random_raw()) * (high - low + 1) >> 64)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 calls."""
        return self.between(1, 100) <= percent

    def pick(self, items: Sequence[_Item]) -> _Item:
        """One of `items`, each as likely."""
        return items[self.between(0, len(items) - 1)]

    def weighted(self, weights: Sequence[int]) -> int:
        """An index into `weights`, with a probability in proportion to the weight."""
        rest = self.between(0, sum(weights) - 1)
        for index, weight in enumerate(weights):
            rest -= weight
            if rest < 0:
                return index
        raise AssertionError("weights are positive")

    def bytes(self, *shape: int) -> np.ndarray:
        """uint8 array of `shape`, uniform over 0 … 255."""
        count = int(np.prod(shape))
        words = np.asarray(self._words.random_raw(-(-count // 8)), dtype="<u8")
        return words.view(np.uint8)[:count].reshape(shape)
