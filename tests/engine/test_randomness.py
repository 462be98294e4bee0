"""What is drawn depends on the seed and the position in the run, and on nothing else."""

from __future__ import annotations

import itertools
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toy import ToyTokens

from rmoe.engine import randomness
from rmoe.engine.randomness import Draw, EpochSampler, InfiniteSampler, SeededDataset, seeded


def first(sampler: Any, count: int) -> list[tuple[int, int]]:
    return [(int(draw), draw.position) for draw in itertools.islice(iter(sampler), count)]


def test_every_epoch_is_a_permutation_and_they_differ() -> None:
    drawn = [index for index, _ in first(InfiniteSampler(range(5), seed=1), 15)]
    epochs = [drawn[:5], drawn[5:10], drawn[10:]]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert drawn != [index for index, _ in first(InfiniteSampler(range(5), seed=2), 15)]


def test_skip_goes_on_where_the_run_was() -> None:
    sampler = InfiniteSampler(range(7), seed=1)
    whole = first(sampler, 20)
    sampler.skip(9)
    assert first(sampler, 11) == whole[9:]


@pytest.mark.parametrize("kind", [InfiniteSampler, EpochSampler])
def test_processes_share_one_sequence(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = first(kind(range(6), seed=1), 6)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(randomness, "get_dist_info", lambda rank=rank: (rank, 2))
        monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda rank=rank: (rank, 2))
        parts.append(first(kind(range(6), seed=1), 3))
    assert [draw for pair in zip(*parts, strict=True) for draw in pair] == alone


def test_epochs_of_the_epoch_sampler_have_other_positions() -> None:
    sampler = EpochSampler(range(4), seed=1)
    before = first(sampler, 4)
    sampler.set_epoch(1)
    assert {position for _, position in before + first(sampler, 4)} == set(range(8))


def test_a_draw_travels_to_a_worker() -> None:
    draw = pickle.loads(pickle.dumps(Draw(3, 40)))
    assert draw == 3
    assert draw.position == 40


def values(batches: Any) -> list[float]:
    return [float(x["inputs"].sum()) for batch in batches for x in batch]


def test_augmentation_is_the_same_with_workers_and_after_a_skip() -> None:
    def loader(workers: int, skip: int = 0) -> Any:
        sampler = InfiniteSampler(range(6), seed=1)
        sampler.skip(skip)
        data = SeededDataset(ToyTokens(6, noise=1.0), seed=1)
        return DataLoader(data, batch_size=2, sampler=sampler, num_workers=workers, collate_fn=list)

    random.seed(0)
    alone = values(itertools.islice(loader(0), 6))
    random.seed(1)
    assert values(itertools.islice(loader(2), 6)) == alone
    assert values(itertools.islice(loader(0, skip=4), 4)) == alone[4:]
    assert len(set(alone)) == len(alone)  # the second epoch draws other augmentations


def test_loading_leaves_the_process_as_it_was() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with seeded(5):
        drawn = random.random(), np.random.rand(), torch.rand(()).item()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    with seeded(5):
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == drawn


def test_the_inner_data_set_shows_through() -> None:
    data = SeededDataset({"type": "ToyTokens", "length": 4}, seed=1)
    assert data.metainfo == ToyTokens.metainfo
    assert len(data) == 4
    assert len(pickle.loads(pickle.dumps(data))) == 4
    assert not hasattr(data, "full_init")
