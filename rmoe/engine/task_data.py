"""The data of several tasks in one run: their data sets as one, batches of all of them, metrics under their names."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine import registry
from mmengine.dataset import pseudo_collate
from mmengine.dist import get_dist_info
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS, Registry
from torch.utils.data import Dataset, Sampler

from rmoe.engine.randomness import DATA_SAMPLERS, Draw, InfiniteSampler
from rmoe.errors import UserError
from rmoe.registry import DATASETS

EVALUATORS = Registry("evaluator", parent=registry.EVALUATOR, scope="rmoe")
FUNCTIONS = Registry("function", parent=registry.FUNCTIONS, scope="rmoe")


@DATASETS.register_module()
class TaskDatasets(Dataset):
    """Is the data sets of all tasks one after the other, in the alphabetical order of the tasks' names.

    Items are {"task": name, "item": item of its data set}, for `collate_tasks`. `metainfo` has for each task that of
    its data set, and the `size`.

    Args:
        datasets: by the name of the task, a data set or the config of one.

    Raises:
        UserError: one has no samples.
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        made = {name: registry.DATASETS.build(one) if isinstance(one, dict) else one for name, one in datasets.items()}
        self.of = {name: made[name] for name in sorted(made)}
        for one in self.of.values():
            if hasattr(one, "full_init"):
                one.full_init()
        sizes = {name: len(one) for name, one in self.of.items()}
        if empty := [name for name, size in sizes.items() if not size]:
            raise UserError(
                f"the data set of the task {empty[0]} has no samples, a {type(self.of[empty[0]]).__name__}; check its "
                "path and filters"
            )
        ends = [*itertools.accumulate(sizes.values())]
        self.starts = dict(zip(sizes, [0, *ends[:-1]], strict=True))
        self._ends = ends
        self.metainfo = {
            name: {**(getattr(one, "metainfo", None) or {}), "size": sizes[name]} for name, one in self.of.items()
        }

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = [*self.of][bisect.bisect_right(self._ends, index)]
        return {"task": name, "item": self.of[name][index - self.starts[name]]}


@FUNCTIONS.register_module()
def collate_tasks(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the batches of the tasks by their names, each as mmengine's `pseudo_collate` makes it."""
    names = dict.fromkeys(one["task"] for one in items)
    return {name: pseudo_collate([one["item"] for one in items if one["task"] == name]) for name in names}


@DATA_SAMPLERS.register_module()
class TaskSampler(Sampler[int]):
    """Draws for each step a batch of every task, one task after the other; the draws of a task are those of its run
    alone (`rmoe.InfiniteSampler`).

    Args:
        dataset: `TaskDatasets`.
        batch_sizes: images of each task in a step of one process; the loader's batch size is their sum.
        shuffle: whether the order is random.
        seed: the same on every process.
    """

    def __init__(self, dataset: Any, batch_sizes: Mapping[str, int], shuffle: bool = True, seed: int = 0) -> None:
        self._size, self._step = len(dataset), sum(batch_sizes.values())
        self._parts = [
            (InfiniteSampler(one, shuffle, seed), batch_sizes[name], dataset.starts[name])
            for name, one in dataset.of.items()
        ]

    def __iter__(self) -> Iterator[Draw]:
        parts = [(iter(sampler), size, start) for sampler, size, start in self._parts]
        while True:
            for draws, size, start in parts:
                for draw in itertools.islice(draws, size):
                    yield Draw(draw + start, draw.position)

    def skip(self, num_samples: int) -> None:
        """Starts the next iteration after the first `num_samples` draws, whole steps (mmengine's contract)."""
        for sampler, size, _ in self._parts:
            sampler.skip(num_samples // self._step * size)

    def __len__(self) -> int:
        return self._size


@DATA_SAMPLERS.register_module()
class TaskBatches(Sampler[list[int]]):
    """Goes through the data set of each task once, in batches of one task; every process gets equally many samples of
    each, for which a data set begins anew where it does not go up.

    Args:
        sampler: of `TaskDatasets`; only its data set is looked at.
        batch_sizes: of each task.
        batch_size: not read; mmengine gives it.
    """

    def __init__(self, sampler: Any, batch_sizes: Mapping[str, int], batch_size: int = 1) -> None:
        rank, world_size = get_dist_info()
        self._batches: list[list[int]] = []
        for name, one in sampler.dataset.of.items():
            every = range(math.ceil(len(one) / world_size) * world_size)
            own = [sampler.dataset.starts[name] + index % len(one) for index in every[rank::world_size]]
            self._batches += [own[i : i + batch_sizes[name]] for i in range(0, len(own), batch_sizes[name])]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


@EVALUATORS.register_module()
class TaskEvaluator(Evaluator):
    """Evaluates each task by its own metrics, whose names become TASK/METRIC: "segmentation/mIoU".

    Args:
        metrics: by the name of the task, the config of a metric or a list of them.
    """

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self.of: dict[str, Evaluator] = {}
        for name in sorted(metrics):
            given = metrics[name] if isinstance(metrics[name], Sequence) else [metrics[name]]
            self.of[name] = Evaluator([METRICS.build(one) if isinstance(one, dict) else one for one in given])
        super().__init__([metric for one in self.of.values() for metric in one.metrics])

    @property
    def dataset_meta(self) -> dict[str, Any] | None:
        """Returns the `metainfo` of the tasks' data sets."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict[str, Any]) -> None:
        self._dataset_meta = dataset_meta
        for name, one in self.of.items():
            one.dataset_meta = dataset_meta[name]

    def process(self, data_samples: Sequence[Any], data_batch: Any = None) -> None:
        """Takes in the answers to a batch of some tasks, in the order of the tasks."""
        done = 0
        for name, evaluator in self.of.items():
            if name in data_batch:
                count = len(data_batch[name]["inputs"])
                evaluator.process(data_samples[done : done + count], data_batch[name])
                done += count

    def evaluate(self, size: int) -> dict[str, Any]:
        """Returns the metrics of all tasks."""
        assert self._dataset_meta is not None
        found: dict[str, Any] = {}
        for name, evaluator in self.of.items():
            for metric in evaluator.metrics:
                values = metric.evaluate(self._dataset_meta[name]["size"])
                named = {f"{name}/{key.removeprefix(f'{metric.prefix}/')}": value for key, value in values.items()}
                if twice := sorted(named.keys() & found.keys()):
                    raise UserError(f"two metrics of the task {name} give {twice[0]}; evaluate it by one of them")
                found |= named
        return found
