"""The data of several tasks as one loader's; their metrics."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import BaseMetric
from torch.utils.data import DataLoader, Dataset

from rmoe.engine import task_data
from rmoe.engine.randomness import InfiniteSampler, SeededDataset
from rmoe.engine.task_data import TaskBatches, TaskDatasets, TaskEvaluator, TaskSampler, collate_tasks
from rmoe.errors import UserError

SIZES = {"detection": 2, "segmentation": 3}


class Numbers(Dataset):
    """Items say which data set and sample they are, and what has been drawn for them."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length
        self.metainfo = {"classes": (name,)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        import random

        return {"inputs": (self.name, index, random.random())}


def datasets(*lengths: int) -> TaskDatasets:
    made = {name: Numbers(name, length) for name, length in zip(SIZES, lengths, strict=True)}
    return TaskDatasets(dict(reversed(made.items())))  # in whatever order they are written


def steps(count: int, skipped: int = 0) -> list[dict[str, Any]]:
    dataset = SeededDataset(datasets(5, 7), seed=3)
    sampler = TaskSampler(dataset, SIZES, seed=3)
    sampler.skip(skipped * 5)
    loader = DataLoader(dataset, batch_size=5, sampler=sampler, collate_fn=collate_tasks)
    return [*itertools.islice(loader, count)]


def test_each_task_sees_what_it_sees_alone() -> None:
    """The same samples, drawn with the same chance, in batches of the task's own size."""
    found = steps(8)
    for name, length in (("detection", 5), ("segmentation", 7)):
        dataset = SeededDataset(Numbers(name, length), seed=3)
        sampler = InfiniteSampler(dataset, seed=3)
        alone = DataLoader(dataset, batch_size=SIZES[name], sampler=sampler, collate_fn=pseudo_collate)
        assert [step[name] for step in found] == [*itertools.islice(alone, 8)]


def test_tasks_stand_in_a_step_by_name() -> None:
    assert [[*step] for step in steps(2)] == [["detection", "segmentation"]] * 2


def test_a_resumed_run_goes_on_in_every_task() -> None:
    assert steps(3, skipped=4) == steps(7)[4:]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_every_sample_in_batches_of_one_task(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """Processes have equally many, so that what is collected from them in turn begins with the data set in order."""
    dataset, shares = datasets(5, 7), []
    for rank in range(processes):
        monkeypatch.setattr(task_data, "get_dist_info", lambda rank=rank: (rank, processes))
        sampler = type("Sampler", (), {"dataset": dataset})()
        loader = DataLoader(dataset, batch_sampler=TaskBatches(sampler, SIZES), collate_fn=collate_tasks)
        batches = [*loader]
        assert len(batches) == len(loader)
        assert all(len(batch) == 1 for batch in batches)
        for batch in batches:
            ((name, one),) = batch.items()
            assert len(one["inputs"][0]) <= SIZES[name]
        shares.append(batches)
    for name, length in (("detection", 5), ("segmentation", 7)):
        own = [[i for batch in share if name in batch for i in batch[name]["inputs"][1]] for share in shares]
        assert len({len(one) for one in own}) == 1
        assert list(itertools.chain(*zip(*own, strict=True)))[:length] == [*range(length)]


def test_metainfo_is_that_of_each() -> None:
    assert datasets(5, 7).metainfo == {
        "detection": {"classes": ("detection",), "size": 5},
        "segmentation": {"classes": ("segmentation",), "size": 7},
    }


def test_a_task_without_data() -> None:
    with pytest.raises(UserError, match="the data set of the task segmentation has no samples, a Numbers"):
        datasets(5, 0)


class Share(BaseMetric):
    """Share of answers that are even; it counts what it was given."""

    default_prefix = "toy"

    def process(self, data_batch: Any, data_samples: Any) -> None:
        assert len(data_batch["inputs"]) == len(data_samples)
        self.results += data_samples

    def compute_metrics(self, results: Any) -> dict[str, float]:
        return {"even": sum(one % 2 == 0 for one in results) / len(results), "a/b": float(len(results))}


def evaluator(*more: Any) -> TaskEvaluator:
    made = TaskEvaluator({"segmentation": [Share(), *more], "detection": Share()})
    made.dataset_meta = datasets(3, 2).metainfo
    return made


def test_metrics_have_the_name_of_the_task() -> None:
    """Answers go to the metrics of their task, and padding beyond the size of its data set does not count."""
    made = evaluator()
    made.process([1, 2, 4, 6], {"segmentation": {"inputs": [0]}, "detection": {"inputs": [0, 0, 0]}})
    made.process([5, 7], {"segmentation": {"inputs": [0, 0]}})
    assert made.evaluate(99) == {
        **{"detection/even": 2 / 3, "detection/a/b": 3.0},
        **{"segmentation/even": 0.5, "segmentation/a/b": 2.0},
    }
    assert made.of["detection"].metrics[0].dataset_meta["classes"] == ("detection",)


def test_two_metrics_of_one_name() -> None:
    made = evaluator(Share())
    made.process([1, 2], {"segmentation": {"inputs": [0]}, "detection": {"inputs": [0]}})
    with pytest.raises(UserError, match="two metrics of the task segmentation give segmentation/a/b"):
        made.evaluate(2)
