"""A finished run, as reports, analyses and benchmarks read it.

A run is told by what it leaves in its work dir: the dumped config, cost.json, vis_data/scalars.json, model.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.registry import DATASETS, MODELS, init_default_scope
from safetensors.torch import load_file
from torch import nn

from rmoe.engine.building import user_errors
from rmoe.engine.checkpoint.export import MODEL
from rmoe.engine.model_config import for_one_process
from rmoe.errors import UserError
from rmoe.inference.evaluate import run_config
from rmoe.moe.state import load_global_state_dict
from rmoe.reporting.pictures import Scene


@dataclass(frozen=True)
class Row:
    """One metric of a run. Times are in seconds; `value` and `majority` in percent, `majority` being what the metric
    gives to always answering the commonest class of the training set."""

    arm: str
    task: str
    metric: str
    value: float
    majority: float
    train_seconds: float
    device_seconds: float
    flops_per_step: int
    params_total: int
    params_active: int
    params_trainable: int


class _Measure(NamedTuple):
    """A figure in summary.json, and where it comes from."""

    metric: str
    logged: str
    scale: float = 1.0  # from the log's unit to percent


@dataclass(frozen=True)
class _Task:
    """What a task is called, what is measured of it, and what its metrics give to the commonest class."""

    name: str
    measures: tuple[_Measure, ...]
    majority: Callable[[Any, Any], dict[str, float]]


def _classification_majority(train: Any, val: Any) -> dict[str, float]:
    from rmoe.tasks.classification import majority_top1

    return {"top1": majority_top1(train, val)}


def _segmentation_majority(train: Any, val: Any) -> dict[str, float]:
    from rmoe.tasks.segmentation import majority_miou

    return {"mIoU": majority_miou(train, val)}


def _detection_majority(train: Any, val: Any) -> dict[str, float]:
    from rmoe.tasks.detection import majority_ap

    return majority_ap(train, val)


_AP = (_Measure("box AP", "coco/bbox_mAP", 100.0), _Measure("mask AP", "coco/segm_mAP", 100.0))
_TASKS = {  # by the type of the config's val_evaluator
    "IoUMetric": _Task("segmentation", (_Measure("mIoU", "mIoU"),), _segmentation_majority),
    "rmoe.Accuracy": _Task("classification", (_Measure("top1", "accuracy/top1"),), _classification_majority),
    "rmoe.CocoMetric": _Task("detection", _AP, _detection_majority),
}


class Run:
    """A finished run's work dir.

    Raises:
        UserError: the folder is no finished run's, or its metric is unknown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = run_config(folder)
        with user_errors(f"{folder} is no finished run's: its dumped config lacks what a report needs"):
            kind, stage = self.config.val_evaluator.type, self.config.stage
        if kind not in _TASKS:
            raise UserError(f"{folder} was evaluated by {kind}; a report knows {', '.join(_TASKS)}")
        self.task = _TASKS[kind]
        self.arm: str = stage

    def rows(self, majority: Mapping[str, float]) -> list[Row]:
        """Returns the run in numbers, a row for each metric, with what that gives to the commonest class."""
        with user_errors(f"{self.folder}: cost.json is damaged, run the training again"):
            cost = json.loads(self._file("cost.json").read_text())
            measured = {field.name: cost[field.name] for field in fields(Row) if field.name in cost}
            return [
                Row(
                    arm=self.arm, task=self.task.name, metric=metric, value=value, majority=majority[metric], **measured
                )
                for metric, value in self.values().items()
            ]

    def values(self) -> dict[str, float]:
        """Returns the metrics, in percent, as they were logged last; only those that were."""
        logged: dict[str, Any] = {}
        for line in self._log():
            logged |= line
        wrong = [one.logged for one in self.task.measures if not isinstance(logged.get(one.logged, 0.0), int | float)]
        if wrong:
            raise UserError(f"{self.folder}: {wrong[0]} is {logged[wrong[0]]!r} in its logs, which is no number")
        found = {one.metric: one.scale * logged[one.logged] for one in self.task.measures if one.logged in logged}
        if not found:
            raise UserError(
                f"{self.folder} has no {self.task.measures[0].logged} in its logs; finish the run (--resume)"
            )
        return found

    def train_loss(self) -> float | None:
        """Returns the task's loss, without the gates', as logged over the last tenth of the steps; None if never."""
        lines = {line["step"]: line for line in self._log() if "loss" in line}
        if not lines:
            return None
        last = max(lines)
        late = [line for step, line in lines.items() if step > 0.9 * last]
        return float(np.mean([line["loss"] - line.get("loss_moe_aux", 0.0) for line in late]))

    def dataset(self, split: str) -> Any:
        """Returns the data set of "train" or "val"."""
        with user_errors(f"{self.folder}: {split}_dataloader.dataset"):
            init_default_scope(self.config.default_scope)
            return DATASETS.build(self._dataset_config(split))

    def scenes(self, count: int) -> list[Scene]:
        """Returns at most `count` validation images, evenly spread."""
        dataset = self.dataset("val")
        return [Scene(dataset, int(i)) for i in np.linspace(0, len(dataset) - 1, min(count, len(dataset)))]

    def model(self) -> nn.Module:
        """Returns the trained model on the CPU, in evaluation mode, in one process and without DeepSpeed's engine."""
        with user_errors(f"{self.folder}: its model and model.safetensors"):
            init_default_scope(self.config.default_scope)
            model = MODELS.build(for_one_process(self.config.model))
            load_global_state_dict(model, load_file(self._file(MODEL)))
            return model.eval()

    def _log(self) -> Iterator[dict[str, Any]]:
        """Yields what was logged, line by line; a step that a resumed run has done again is there twice."""
        for log in sorted(self.folder.rglob("scalars.json")):
            with user_errors(f"{log} is damaged"):
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                if not all(isinstance(line, dict) for line in lines):
                    raise ValueError("a line is no JSON object")
            yield from lines

    def _dataset_config(self, split: str) -> Any:
        """Returns a data set's config without the wrapper that seeds its augmentations: a report draws none."""
        config = self.config[f"{split}_dataloader"].dataset
        return config.get("dataset", config)

    def _file(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            raise UserError(f"{self.folder} has no {name}; give the work dir of a finished run")
        return self.folder / name
