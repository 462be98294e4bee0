"""Randomness as a function of the position in a run, not a state of a process.

What a training step draws depends on (seed, step, process); what loading a sample draws, on (seed, position in the
run's sequence of samples). So a resumed run, or one with another number of loader workers, draws what the run that was
never stopped would have drawn, and no random state needs to be saved.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine import registry
from mmengine.dataset import DefaultSampler
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.registry import Registry
from torch.utils.data import Dataset, Sampler

from rmoe.errors import UserError
from rmoe.registry import DATASETS

DATA_SAMPLERS = Registry("data sampler", parent=registry.DATA_SAMPLERS, scope="rmoe")


class Draw(int):
    """The index of a sample that knows its position in the sequence of all samples that the run draws."""

    position: int

    def __new__(cls, index: int, position: int) -> Draw:
        """Makes the draw of sample `index`."""
        draw = super().__new__(cls, index)
        draw.position = position
        return draw

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return int(self), self.position  # draws travel to loader workers


@DATA_SAMPLERS.register_module()
class InfiniteSampler(Sampler[int]):
    """The data set again and again, each time in a new order that follows from the seed; process r of n takes every
    n-th draw from the r-th on.

    Args:
        dataset: what to draw from.
        shuffle: whether the order is random.
        seed: the same on every process.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self._size, self._shuffle, self._seed, self._skipped = _counted(dataset), shuffle, seed, 0

    def __iter__(self) -> Iterator[Draw]:
        rank, world_size = get_dist_info()
        epoch, order = -1, range(self._size)
        for position in itertools.count(self._skipped * world_size + rank, world_size):
            if epoch != position // self._size:
                epoch = position // self._size
                order = self._order(epoch)
            yield Draw(order[position % self._size], position)

    def _order(self, epoch: int) -> Any:
        if not self._shuffle:
            return range(self._size)
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "epoch", epoch))
        return torch.randperm(self._size, generator=generator).tolist()

    def skip(self, num_samples: int) -> None:
        """Starts the next iteration after the first `num_samples` draws of this process (mmengine's contract)."""
        self._skipped = num_samples

    def __len__(self) -> int:
        return self._size


@DATA_SAMPLERS.register_module()
class EpochSampler(DefaultSampler):
    """mmengine's `DefaultSampler`, for loops by epoch, whose indices are `Draw`s."""

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None, round_up: bool = True) -> None:
        _counted(dataset)
        super().__init__(dataset, shuffle, seed, round_up)

    def __iter__(self) -> Iterator[Draw]:
        start = self.epoch * self.total_size + self.rank
        for step, index in enumerate(super().__iter__()):
            yield Draw(index, start + step * self.world_size)


def _counted(dataset: Sized) -> int:
    if not (size := len(dataset)):
        raise UserError(
            f"the training data set, a {type(dataset).__name__}, has no samples; check its path and filters"
        )
    return size


@DATASETS.register_module()
class SeededDataset(Dataset):
    """A data set whose random augmentation follows from the seed and the sample's position in the run.

    Everything but the access to a sample is the inner data set's.

    Args:
        dataset: a data set, or the config of one.
        seed: the same on every process.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset = registry.DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self._seed = seed

    def __getitem__(self, draw: int) -> Any:
        if not isinstance(draw, Draw):
            return self.dataset[draw]
        with seeded(derived_seed(self._seed, "draw", draw.position)):
            return self.dataset[int(draw)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)  # while it is being unpickled, there is no inner data set yet
        return getattr(self.dataset, name)


class StepSeedHook(Hook):
    """Seeds every generator before each training step, so that drop path and the gate's noise can be replayed."""

    priority = "VERY_HIGH"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seeds before the step's forward pass; the batch has been loaded."""
        seed_everything(derived_seed(self._seed, "step", runner.iter, get_dist_info()[0]))


def derived_seed(*parts: int | str) -> int:
    """Returns a seed of 63 bits, another for other parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators, those of all CUDA devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's CPU generators inside the block; afterwards they are as they were before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
