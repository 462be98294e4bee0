"""A run, as reports, analyses and benchmarks read it.

A run is told by what it leaves in its work dir: the dumped config, cost.json, vis_data/scalars.json, the log,
model.safetensors, predictions/ (see `rmoe.engine.predictions`) and, once `rmoe analyze` has looked into it, analysis/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError
from safetensors.torch import load_file
from torch import nn

from rmoe.engine.building import user_errors
from rmoe.engine.changes import parsed
from rmoe.engine.checkpoint.export import MODEL, read_metadata
from rmoe.engine.model_config import for_one_process
from rmoe.engine.task_config import model_tasks, read_alone, state_of, task_config
from rmoe.errors import UserError
from rmoe.inference.evaluate import dumped_config, run_config
from rmoe.moe.state import load_global_state_dict
from rmoe.tasks.scenes import Scene, evenly_spread

ANALYSIS, ANALYSIS_JSON = "analysis", "analysis.json"  # where `rmoe analyze` writes, in the work dir


class _File(BaseModel):
    """Says what a file has to hold for what is read of it; it may hold more."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Cost(_File):
    """Describes cost.json."""

    train_seconds: NonNegativeFloat
    device_seconds: NonNegativeFloat
    flops_per_step: NonNegativeFloat
    params_total: NonNegativeInt
    params_active: NonNegativeInt
    params_trainable: NonNegativeInt
    steps: NonNegativeInt | None = None
    devices: PositiveInt | None = None
    device: str | None = None
    precision: str | None = None
    zero_stage: int | None = None
    ep_size: int | None = None
    command: list[str] | None = None
    software: dict[str, str | None] | None = None


class _Load(_File):
    """Describes what analysis.json says of the load of a layer."""

    load: list[float]
    load_entropy: float
    information: float
    by_class: dict[str, list[NonNegativeInt]]


class _Layer(_File):
    """Describes what analysis.json says of a layer."""

    load: _Load


class _Analysis(_File):
    """Describes analysis.json."""

    layers: dict[str, _Layer]


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


def _of_task(task: _Task, name: str) -> _Task:
    """Returns what is measured of a task that is one of several of a run, in whose logs metrics have its name."""
    measures = (one._replace(logged=f"{name}/{one.logged.rpartition('/')[2]}") for one in task.measures)
    return replace(task, measures=tuple(measures))


def _evaluator(config: Config) -> Any:
    """Returns a run's evaluator: of several, the first one whose metric is known here."""
    found = config.val_evaluator
    several = found if isinstance(found, list) else [found]
    return next((one for one in several if one.type in _TASKS), several[0])


def runs_in(folder: Path) -> list[Run]:
    """Returns the run in a work dir, or one for each of its tasks where it has several."""
    names = model_tasks(run_config(folder).get("model"))
    return [Run(folder, task=name) for name in names] if names else [Run(folder)]


class Run:
    """A run's work dir.

    Args:
        folder: the work dir.
        task: which one, of a run of several; it is then as if a run of that task alone had left the folder.
        trusted: whether its dumped config, which is a program, may be run; otherwise it is read as data.

    Attributes:
        folder: the work dir.
        part: the task of several that this is the run of; else None.
        config: as the run has dumped it.
        task: what was trained.
        stage: of the pipeline, as the config says.

    Raises:
        UserError: the folder is no run's, or its metric is unknown.
    """

    def __init__(self, folder: Path, *, task: str | None = None, trusted: bool = True) -> None:
        self.folder, self.part = folder, task
        whole = run_config(folder) if trusted else literal_config(folder)
        with user_errors(f"{folder} is no run's: its dumped config lacks what a report needs"):
            self._model = whole.get("model")
            self.config = task_config(whole, task, folder)
        with user_errors(f"{folder} is no run's: its dumped config lacks what a report needs"):
            kind, stage = _evaluator(self.config).type, self.config.stage
        if kind not in _TASKS:
            raise UserError(f"{folder} was evaluated by {kind}; a report knows {', '.join(_TASKS)}")
        self.task = _TASKS[kind] if task is None else _of_task(_TASKS[kind], task)
        self.stage = str(stage)

    @property
    def seed(self) -> int:
        """Returns the seed of the run; 0 where the config names none, as in training."""
        return (self.config.get("randomness") or {}).get("seed") or 0

    @property
    def core_sha256(self) -> str | None:
        """Returns the hash of the core's file that a finished run was made from; None where the run does not say."""
        with suppress(UserError):
            return read_metadata(self.folder).get("core_sha256")
        return None

    def left(self, kind: str) -> Path:
        """Returns the folder of that name that the run has left, of its task where it has several."""
        return self.folder / kind / (self.part or "")

    def cost(self) -> dict[str, Any]:
        """Returns the content of cost.json.

        Raises:
            UserError: there is none yet, or it is damaged.
        """
        return _fitting(self._file("cost.json"), _Cost, "run the training again")

    def analysis(self) -> dict[str, Any] | None:
        """Returns the content of analysis.json, which `rmoe analyze` has left; None where it has not.

        Raises:
            UserError: it is damaged.
        """
        path = self.left(ANALYSIS) / ANALYSIS_JSON
        return _fitting(path, _Analysis, "run rmoe analyze again") if path.is_file() else None

    def values(self) -> dict[str, float]:
        """Returns the metrics, in percent, as they were logged last; only those that were.

        Raises:
            UserError: there is none yet, or one that is no number.
        """
        if not (found := self.logged_values()):
            raise UserError(
                f"{self.folder} has no {self.task.measures[0].logged} in its logs; finish the run (--resume)"
            )
        return found

    def logged_values(self) -> dict[str, float]:
        """Returns what `values` does, and nothing where nothing was logged."""
        found = {}
        for one in self.task.measures:
            if points := self.scalars.get(one.logged):
                _, value = points[-1]
                found[one.metric] = one.scale * value
        return found

    @cached_property
    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        """Returns all numbers that were logged over steps, as (step, value) in order of the steps; of a step that a
        resumed run has done again, the later ones.

        Raises:
            UserError: a log is damaged.
        """
        found: dict[str, dict[int, float]] = {}
        for line in self._log():
            for name, value in line.items():
                measured = name in (one.logged for one in self.task.measures)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found.setdefault(name, {})[line.get("step", 0)] = value
                elif measured:
                    raise UserError(f"{self.folder}: {name} is {value!r} in its logs, which is no number")
        return {name: sorted(points.items()) for name, points in found.items() if name not in ("step", "iter", "epoch")}

    def per_class(self) -> tuple[str, dict[str, float]]:
        """Returns what was measured of each class, and the values in percent by class, as they were logged last.

        Those of segmentation are in the table that mmseg logs, those of detection among the metrics of a config with
        `val_evaluator.classwise`; there are none of classification.
        """
        if self.task.name == "detection":
            masks = "segm" in (_evaluator(self.config).get("metric") or "bbox")
            place = re.escape("coco" if self.part is None else self.part)
            named = ((re.fullmatch(rf"{place}/(.+)_precision", name), points) for name, points in self.scalars.items())
            return "mask AP" if masks else "box AP", {match[1]: 100 * x[-1][1] for match, x in named if match}
        logs = sorted(self.folder.glob("*/*.log")) if self.task.name == "segmentation" else []
        texts = "".join(log.read_text(errors="replace") for log in logs)
        with user_errors(f"{self.folder}: the table of classes in its log is damaged"):
            return "IoU", _class_table(texts.rpartition("per class results")[2] if "per class results" in texts else "")

    def residual_norms(self) -> dict[str, list[tuple[int, float]]]:
        """Returns ‖Δ‖ / ‖core‖ over the steps, by layer; none of a dense run."""
        logged = ((name.partition("residual/"), points) for name, points in self.scalars.items())
        return {layer: points for (before, found, layer), points in logged if found and not before}

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
        return evenly_spread(self.dataset("val"), count)

    def model(self) -> nn.Module:
        """Returns the trained model on the CPU, in evaluation mode, in one process and without DeepSpeed's engine."""
        with user_errors(f"{self.folder}: its model and model.safetensors"):
            init_default_scope(self.config.default_scope)
            model = MODELS.build(for_one_process(self.config.model))
            state = load_file(self._file(MODEL))
            if self.part is not None:
                state = read_alone(state_of(self._model, state, self.part), model)
            load_global_state_dict(model, state)
            return model.eval()

    def _log(self) -> Iterator[dict[str, Any]]:
        """Yields what was logged, line by line; a step that a resumed run has done again is there twice."""
        for log in sorted(self.folder.glob("*/vis_data/scalars.json")):
            with user_errors(f"{log} is damaged"):
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                if not all(isinstance(line, dict) for line in lines):
                    raise ValueError("a line is no JSON object")
                if wrong := [line["step"] for line in lines if not isinstance(line.get("step", 0), int)]:
                    raise ValueError(f"a step is {wrong[0]!r:.40}")
            yield from lines

    def _dataset_config(self, split: str) -> Any:
        """Returns a data set's config without the wrapper that seeds its augmentations: a report draws none."""
        config = self.config[f"{split}_dataloader"].dataset
        return config.get("dataset", config)

    def _file(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            raise UserError(f"{self.folder} has no {name}; give the work dir of a finished run")
        return self.folder / name


def _fitting(path: Path, schema: type[BaseModel], advice: str) -> dict[str, Any]:
    """Returns the content of a JSON file.

    Raises:
        UserError: it cannot be read, or does not fit the schema.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {where[:80]}: {first['msg']}; {advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; {advice}") from error
    return content


def literal_config(folder: Path) -> Config:
    """Returns the config that a run has dumped, read as data.

    Raises:
        UserError: the folder is no run's, or the config is damaged.
    """
    path = dumped_config(folder)
    with user_errors(f"{path} is no dumped config"):
        return Config(parsed(path.read_text()))


def _class_table(text: str) -> dict[str, float]:
    """Returns IoU in percent by class, from a text that begins with mmseg's table: | Class | IoU | Acc |, say."""
    found: dict[str, float] = {}
    heads: list[str] = []
    for line in text.splitlines():
        if not line.startswith(("|", "+")):
            if heads:
                break
        elif not heads and line.startswith("|"):
            heads = [cell.strip() for cell in line.strip("|").split("|")]
            if "IoU" not in heads:
                break
        elif line.startswith("|"):
            name, *cells = line.strip("|").rsplit("|", len(heads) - 1)  # a name may have a | in it
            found[name.strip()] = float(cells[heads.index("IoU") - 1])
    return found
