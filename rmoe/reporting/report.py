"""What runs achieved and what they cost: a table, `summary.json`, and pictures; and what a mixture is inside.

A run is told by what it leaves in its work dir: the dumped config, cost.json, vis_data/scalars.json, model.safetensors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.registry import DATASETS, MODELS, init_default_scope
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

from rmoe.backbones.build import allow_random_cores
from rmoe.engine.building import user_errors
from rmoe.engine.lock import check_folder
from rmoe.engine.read_config import read_config
from rmoe.errors import UserError
from rmoe.moe.state import load_global_state_dict, moe_layers
from rmoe.reporting.analysis import (
    LayerLoad,
    LayerMovement,
    LayerWeights,
    layer_means,
    load_statistics,
    movement,
    weight_statistics,
)
from rmoe.reporting.pictures import (
    Scene,
    draw_detections,
    draw_experts,
    draw_load,
    draw_movement,
    draw_predictions,
    draw_weights,
)

SCENES = 6
_TITLES = {"residual": "RMoE"}
_WIDTH = 150  # columns of the table: not cut when the output is a file


@dataclass(frozen=True)
class Row:
    """One run. Times in seconds; `value` and `majority` in percent, `majority` being what the metric gives to always
    answering the commonest class of the training set."""

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
        configs = sorted(folder.glob("*.py"))
        if len(configs) != 1:
            raise UserError(f"{folder} holds {len(configs)} dumped configs; give the work dir of one finished run")
        self.config = read_config(configs[0], {})
        with user_errors(f"{folder} is no finished run's: {configs[0].name} lacks what a report needs"):
            kind, stage = self.config.val_evaluator.type, self.config.stage
        if kind not in _TASKS:
            raise UserError(f"{folder} was evaluated by {kind}; a report knows {', '.join(_TASKS)}")
        self.task = _TASKS[kind]
        self.arm: str = stage

    def rows(self, majority: Mapping[str, float]) -> list[Row]:
        """The run in numbers, a row for each metric, with what that gives to the commonest class."""
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
        """By metric, in percent, as it was logged last; only those that were."""
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
        """The task's loss, without the gates', as logged over the last tenth of the steps; None if it never was."""
        lines = {line["step"]: line for line in self._log() if "loss" in line}
        if not lines:
            return None
        last = max(lines)
        late = [line for step, line in lines.items() if step > 0.9 * last]
        return float(np.mean([line["loss"] - line.get("loss_moe_aux", 0.0) for line in late]))

    def dataset(self, split: str) -> Any:
        """The data set of "train" or "val"."""
        with user_errors(f"{self.folder}: {split}_dataloader.dataset"):
            init_default_scope(self.config.default_scope)
            return DATASETS.build(self._dataset_config(split))

    def scenes(self, count: int) -> list[Scene]:
        """At most `count` validation images, evenly spread."""
        dataset = self.dataset("val")
        return [Scene(dataset, int(i)) for i in np.linspace(0, len(dataset) - 1, min(count, len(dataset)))]

    def model(self) -> nn.Module:
        """The trained model on the CPU, in evaluation mode, in one process and without DeepSpeed's engine."""
        with user_errors(f"{self.folder}: its model and model.safetensors"):
            init_default_scope(self.config.default_scope)
            model = MODELS.build(_in_one_process(self.config.model))
            load_global_state_dict(model, load_file(self._file("model.safetensors")))
            return model.eval()

    def _log(self) -> Iterator[dict[str, Any]]:
        """Line by line; a step that a resumed run has done again is there twice."""
        for log in sorted(self.folder.rglob("scalars.json")):
            with user_errors(f"{log} is damaged"):
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                if not all(isinstance(line, dict) for line in lines):
                    raise ValueError("a line is no JSON object")
            yield from lines

    def _dataset_config(self, split: str) -> Any:
        """Without the wrapper that seeds its augmentations: a report draws none."""
        config = self.config[f"{split}_dataloader"].dataset
        return config.get("dataset", config)

    def _file(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            raise UserError(f"{self.folder} has no {name}; give the work dir of a finished run")
        return self.folder / name


def report(folders: Sequence[str | Path], out: str | Path) -> list[Row]:
    """Prints the table of the runs, writes OUT/summary.json, and draws: OUT/predictions.png of runs of segmentation,
    OUT/detections.png of those of detection, and OUT/experts_RUN.png of each mixture among them.

    Args:
        folders: work dirs of finished runs.
        out: folder for the results; made if need be.

    Raises:
        UserError: a folder that is no finished run's.
    """
    runs, out = [Run(Path(folder)) for folder in folders], Path(out)
    check_folder(out, "--out")
    rows = [row for run, majority in zip(runs, _majorities(runs), strict=True) for row in run.rows(majority)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    for task, draw, name in (
        ("segmentation", draw_predictions, "predictions.png"),
        ("detection", draw_detections, "detections.png"),
    ):
        if mine := [run for run in runs if run.task.name == task]:
            models = {run.folder.name: (_TITLES.get(run.arm, run.arm), run.model()) for run in mine}
            scenes = mine[0].scenes(SCENES)
            draw(scenes, list(models.values())).savefig(out / name)
            for folder, (_, model) in models.items():
                if moe_layers(model):
                    draw_experts(scenes, model).savefig(out / f"experts_{folder}.png")
    Console(width=_WIDTH).print(table(rows))
    return rows


def analyze(folder: str | Path, out: str | Path, before: str | Path | None = None, images: int = 100) -> dict[str, Any]:
    """Looks into the mixture of a finished run: prints a table, writes OUT/analysis.json, and draws OUT/weights.png,
    OUT/load.png and OUT/experts.png; with an earlier run, OUT/movement.png.

    Args:
        folder: work dir of the run.
        out: folder for the results; made if need be.
        before: work dir of a run of the same experts, such as the upstream one that this one started from.
        images: validation images that are sent through the gates.

    Returns:
        What analysis.json holds: by layer, see `rmoe.reporting.analysis`.

    Raises:
        UserError: no finished run's work dir, a dense model, or two runs with other experts.
    """
    if images < 1:
        raise UserError(f"--images is {images}; it is at least 1")
    run, out = Run(Path(folder)), Path(out)
    check_folder(out, "--out")
    model = run.model()
    weights = weight_statistics(model)
    moved = movement(Run(Path(before)).model(), model) if before else {}
    init_default_scope(run.config.default_scope)
    scenes = run.scenes(images)
    classes = list(scenes[0].dataset.metainfo["classes"])
    load = load_statistics(model, scenes, classes)
    out.mkdir(parents=True, exist_ok=True)
    layers = {
        name: {"weights": asdict(weights[name]), "load": asdict(load[name])}
        | ({"movement": asdict(moved[name])} if before else {})
        for name in weights
    }
    found = {"run": str(folder), "before": before and str(before), "images": len(scenes), "layers": layers}
    (out / "analysis.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_weights(weights).savefig(out / "weights.png")
    draw_load(load).savefig(out / "load.png")
    draw_experts(scenes[:: max(1, len(scenes) // SCENES)][:SCENES], model).savefig(out / "experts.png")
    if before:
        draw_movement(moved).savefig(out / "movement.png")
    Console(width=_WIDTH).print(_inside(weights, load, moved))
    return found


def _inside(
    weights: Mapping[str, LayerWeights], load: Mapping[str, LayerLoad], moved: Mapping[str, LayerMovement]
) -> Table:
    drawn = Table(title="means over a layer's experts")
    drawn.add_column("layer", no_wrap=True)
    lines = {name: layer_means(weights[name], load[name], moved.get(name)) for name in weights}
    for head, value in next(iter(lines.values())).items():
        if value is not None:
            drawn.add_column(head, justify="right")
    for name, line in lines.items():
        drawn.add_row(name.removesuffix(".mlp"), *(f"{x:.3f}" for x in line.values() if x is not None))
    return drawn


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    texts = ("task", "arm", "metric")
    heads = (*texts, "value", "majority", "train s", "device s", "GFLOP/step", "params", "active", "trainable")
    drawn = Table(title="value and majority in %; majority: always answering the commonest class")
    for head in heads:
        drawn.add_column(head, justify="left" if head in texts else "right")
    for row in rows:
        numbers = (row.value, row.majority, row.train_seconds, row.device_seconds, row.flops_per_step / 1e9)
        counts = (row.params_total, row.params_active, row.params_trainable)
        drawn.add_row(row.task, row.arm, row.metric, *(f"{x:.2f}" for x in numbers), *(f"{x:,}" for x in counts))
    return drawn


def _majorities(runs: Sequence[Run]) -> list[dict[str, float]]:
    """For each run; computed once for runs on the same data."""
    known: dict[str, dict[str, float]] = {}
    keys = [str([run.config[f"{split}_dataloader"].dataset for split in ("train", "val")]) for run in runs]
    for key, run in zip(keys, runs, strict=True):
        if key not in known:
            known[key] = run.task.majority(run.dataset("train"), run.dataset("val"))
    return [known[key] for key in keys]


def _in_one_process(config: Any) -> Any:
    """The model's config with all experts in this process and no weights to fetch: the run's own hold the core."""
    changed = copy.deepcopy(config)
    for part in (changed, changed.get("backbone", {})):
        if str(part.get("type")).startswith("rmoe."):
            part["core"] = None
            (part.get("kwargs") or {}).pop("pretrained", None)
            if part.get("moe"):
                part["moe"]["ep_size"] = 1
    allow_random_cores(changed)
    return changed
