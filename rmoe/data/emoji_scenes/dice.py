"""Makes random choices that are the same with every NumPy version, on every machine and in any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_Item = TypeVar("_Item")


class Dice:
    """Draws random integers that depend on a key alone, such as (seed, split, index).

    It uses only the raw 64-bit words of PCG64. NumPy keeps these the same across versions, but not what its `Generator`
    makes of them.
    """

    def __init__(self, *key: int) -> None:
        self._words = np.random.PCG64(np.random.SeedSequence(key))

    def between(self, low: int, high: int) -> int:
        """Returns a whole number from `low` to `high`, both included."""
        return low + (int(self._words.random_raw()) * (high - low + 1) >> 64)

    def chance(self, percent: int) -> bool:
        """Returns True with a probability of `percent`."""
        return self.between(1, 100) <= percent

    def pick(self, items: Sequence[_Item]) -> _Item:
        """Returns one of `items`, all of which are equally likely."""
        return items[self.between(0, len(items) - 1)]

    def weighted(self, weights: Sequence[int]) -> int:
        """Returns an index into `weights`, with a probability in proportion to the weight."""
        rest = self.between(0, sum(weights) - 1)
        for index, weight in enumerate(weights):
            rest -= weight
            if rest < 0:
                return index
        raise AssertionError("weights are positive")

    def bytes(self, *shape: int) -> np.ndarray:
        """Returns random bytes, uint8 [*shape], uniform over 0 … 255."""
        count = int(np.prod(shape))
        words = np.asarray(self._words.random_raw(-(-count // 8)), dtype="<u8")
        return words.view(np.uint8)[:count].reshape(shape)
