"""A run's calibration: the batches of its first steps, and everything afterwards as without it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch.utils.data import BatchSampler, DataLoader, Sampler
from toy import ToyModel, ToyTokens

from rmoe.engine.calibration import calibrate_gates, first_batches
from rmoe.engine.randomness import EpochSampler, InfiniteSampler, SeededDataset
from rmoe.moe.state import moe_layers


class Buckets(BatchSampler):
    """As mmdet's: what does not fill a batch stays for the next pass."""

    def __init__(self, sampler: Sampler[int], batch_size: int) -> None:
        super().__init__(sampler, batch_size, False)
        self.buckets: list[list[int]] = [[], []]

    def __iter__(self) -> Iterator[list[int]]:
        for index in self.sampler:
            bucket = self.buckets[index % 2]
            bucket.append(index)
            if len(bucket) == self.batch_size:
                yield [*bucket]
                bucket.clear()


def loader(kind: str) -> DataLoader:
    dataset = SeededDataset(ToyTokens(noise=0.5), seed=3)
    sampler = EpochSampler(dataset, seed=3) if kind == "epoch" else InfiniteSampler(dataset, seed=3)
    more = {"batch_sampler": Buckets(sampler, 4)} if kind == "buckets" else {"batch_size": 4, "sampler": sampler}
    return DataLoader(dataset, collate_fn=pseudo_collate, **more)  # type: ignore[arg-type]


def of(batches: Iterator[Any], count: int) -> list[Any]:
    return [next(batches)["inputs"] for _ in range(count)]


@pytest.mark.parametrize("kind", ["infinite", "epoch", "buckets"])
def test_the_first_batches_are_those_of_the_first_steps_and_stay_so(kind: str) -> None:
    ours, expected = loader(kind), of(iter(loader(kind)), 3)
    torch.testing.assert_close(of(first_batches(ours), 2), expected[:2], rtol=0, atol=0)
    torch.testing.assert_close(of(iter(ours), 3), expected, rtol=0, atol=0)


def runner(**section: Any) -> Any:
    cfg = Config({"calibrate": section, "randomness": {"seed": 3}})
    loop = SimpleNamespace(dataloader=loader("infinite"))
    return SimpleNamespace(cfg=cfg, train_loop=loop, logger=logging.getLogger("calibration"))


def model() -> ToyModel:
    torch.manual_seed(0)
    return ToyModel(moe={"num_experts": 4, "rank": 2}, drop_path=0.5, norm=True).train()


def test_a_run_sets_its_gates_and_leaves_all_else(caplog: pytest.LogCaptureFixture) -> None:
    one, other, before = model(), model(), model().state_dict()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with caplog.at_level(logging.INFO):
        calibrate_gates(runner(batches=2), one)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert one.training
    changed = {name for name, x in one.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {f"{name}.gate.{part}" for name in moe_layers(one) for part in ("weight", "bias")}
    (line,) = [record.message for record in caplog.records if record.message.startswith("gates set")]
    assert all(name in line for name in moe_layers(one))
    calibrate_gates(runner(batches=2), other)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
