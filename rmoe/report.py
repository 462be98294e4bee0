"""What runs achieved and what they cost: a table, `summary.json`, and pictures of predictions and of routing.

A run is told by what it leaves in its work dir: the dumped config, cost.json, vis_data/scalars.json, model.safetensors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

from rmoe.analysis import routing_maps
from rmoe.config import UserError
from rmoe.layers.moe import load_global_state_dict, moe_layers

SCENES = 6
_SURE = 0.5  # score from which on a detection is drawn
_TITLES = {"residual": "RMoE"}
_VOID = (0, 0, 0)
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
        self.config = Config.fromfile(configs[0])
        kind = self.config.val_evaluator.type
        if kind not in _TASKS:
            raise UserError(f"{folder} was evaluated by {kind}; a report knows {', '.join(_TASKS)}")
        self.task = _TASKS[kind]
        self.arm: str = self.config.stage

    def rows(self, majority: Mapping[str, float]) -> list[Row]:
        """The run in numbers, a row for each metric, with what that gives to the commonest class."""
        cost = json.loads(self._file("cost.json").read_text())
        measured = {field.name: cost[field.name] for field in fields(Row) if field.name in cost}
        return [
            Row(arm=self.arm, task=self.task.name, metric=metric, value=value, majority=majority[metric], **measured)
            for metric, value in self.values().items()
        ]

    def values(self) -> dict[str, float]:
        """By metric, in percent, as it was logged last; only those that were."""
        logs = sorted(self.folder.rglob("scalars.json"))
        logged: dict[str, Any] = {}
        for log in logs:
            for line in log.read_text().splitlines():
                logged |= json.loads(line)
        found = {one.metric: one.scale * logged[one.logged] for one in self.task.measures if one.logged in logged}
        if not found:
            raise UserError(
                f"{self.folder} has no {self.task.measures[0].logged} in its logs; finish the run (--resume)"
            )
        return found

    def dataset(self, split: str) -> Any:
        """The data set of "train" or "val"."""
        init_default_scope(self.config.default_scope)
        return DATASETS.build(self._dataset_config(split))

    def model(self) -> nn.Module:
        """The trained model on the CPU, in evaluation mode, in one process and without DeepSpeed's engine."""
        init_default_scope(self.config.default_scope)
        model = MODELS.build(_in_one_process(self.config.model))
        load_global_state_dict(model, load_file(self._file("model.safetensors")))
        return model.eval()

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
    rows = [row for run, majority in zip(runs, _majorities(runs), strict=True) for row in run.rows(majority)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    for task, draw, name in (
        ("segmentation", draw_predictions, "predictions.png"),
        ("detection", draw_detections, "detections.png"),
    ):
        if mine := [run for run in runs if run.task.name == task]:
            models = {run.folder.name: (_TITLES.get(run.arm, run.arm), run.model()) for run in mine}
            dataset = mine[0].dataset("val")
            scenes = [int(index) for index in np.linspace(0, len(dataset) - 1, min(SCENES, len(dataset)))]
            draw(dataset, scenes, list(models.values())).savefig(out / name)
            for folder, (_, model) in models.items():
                if moe_layers(model):
                    draw_experts(dataset, scenes, model).savefig(out / f"experts_{folder}.png")
    Console(width=_WIDTH).print(table(rows))
    return rows


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


def draw_predictions(dataset: Any, scenes: Sequence[int], models: Sequence[tuple[str, nn.Module]]) -> Figure:
    """A row for each of the `scenes` (indices into `dataset`): image, truth, and the answer of each titled model."""
    palette = dataset.metainfo["palette"]
    colours = np.array([*palette, *[_VOID] * (256 - len(palette))], dtype=np.uint8)
    figure, axes = _grid(len(scenes), ["image", "truth", *(title for title, _ in models)], legend=1.4)
    seen = {len(palette)}  # void, which no model answers
    for row, index in zip(axes, scenes, strict=True):
        batch = pseudo_collate([dataset[index]])
        truth = batch["data_samples"][0].gt_sem_seg.data[0].numpy()
        answers = [_predict(model, batch).pred_sem_seg.data[0].numpy() for _, model in models]
        row[0].imshow(_image(batch))
        for axis, labels in zip(row[1:], [truth, *answers], strict=True):
            axis.imshow(colours[labels])
            seen |= set(np.unique(labels).tolist())
    names = dataset.metainfo["classes"]
    _legend(figure, [(name, colours[label] / 255) for label, name in enumerate([*names, "void"]) if label in seen])
    return figure


def draw_detections(dataset: Any, scenes: Sequence[int], models: Sequence[tuple[str, nn.Module]]) -> Figure:
    """A row for each of the `scenes` (indices into `dataset`): image, truth, and what each titled model is sure of."""
    names = dataset.metainfo["classes"]
    colours = matplotlib.colormaps["hsv"](np.arange(len(names)) / len(names))[:, :3]
    figure, axes = _grid(len(scenes), ["image", "truth", *(title for title, _ in models)], legend=1.4)
    seen: set[int] = set()
    for row, index in zip(axes, scenes, strict=True):
        batch = pseudo_collate([dataset[index]])
        image = _image(batch)
        # From the data set's own list: the truth in a batch has been resized with the image.
        objects = dataset.get_data_info(index)["instances"]
        answers = [_predict(model, batch).pred_instances for _, model in models]
        drawn = [([one["bbox"] for one in objects], [one["bbox_label"] for one in objects], None)]
        for sure in (answer[answer.scores > _SURE] for answer in answers):
            drawn.append((sure.bboxes.tolist(), sure.labels.tolist(), sure.get("masks")))
        row[0].imshow(image)
        for axis, (boxes, labels, masks) in zip(row[1:], drawn, strict=True):
            axis.imshow(image)
            for number, ((x0, y0, x1, y1), label) in enumerate(zip(boxes, labels, strict=True)):
                colour = colours[label]
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
                if masks is not None:
                    axis.imshow(masks[number].numpy()[..., None] * np.array([*colour, 0.5]))
                seen.add(label)
    _legend(figure, [(names[label], colours[label]) for label in sorted(seen)])
    return figure


def draw_experts(dataset: Any, scenes: Sequence[int], model: nn.Module) -> Figure:
    """A row for each of the `scenes`: the image, and for each MoE layer the first expert of every token over it."""
    layers = moe_layers(model)
    experts = max(layer.num_experts for layer in layers.values())
    colours = matplotlib.colormaps["hsv"](np.arange(experts) / experts)[:, :3]  # no grey: the image under them is
    titles = [name.removeprefix("backbone.model.").removesuffix(".mlp") for name in layers]
    figure, axes = _grid(len(scenes), ["image", *titles], legend=1.2)
    for row, index in zip(axes, scenes, strict=True):
        batch = pseudo_collate([dataset[index]])
        size = tuple(batch["inputs"][0].shape[-2:])
        maps = routing_maps(model, partial(_predict, model, batch), size)
        image = _image(batch)
        row[0].imshow(image)
        for axis, expert_hw in zip(row[1:], maps.values(), strict=True):
            extent = (0, image.shape[1], image.shape[0], 0)
            axis.imshow(image.mean(-1), cmap="gray", extent=extent)
            axis.imshow(colours[expert_hw], extent=extent, alpha=0.65, interpolation="nearest")
    _legend(figure, [(f"expert {expert}", colours[expert]) for expert in range(experts)])
    return figure


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
    return changed


def _predict(model: Any, batch: Any) -> Any:
    """The data sample of a batch of one, answered."""
    with torch.no_grad():
        return model.test_step(batch)[0]


def _image(batch: Any) -> np.ndarray:
    with Image.open(batch["data_samples"][0].img_path) as image:
        return np.asarray(image.convert("RGB"))


def _grid(rows: int, titles: Sequence[str], legend: float) -> tuple[Figure, np.ndarray]:
    """A figure with a titled column for each of `titles` and `legend` inches on the right."""
    side = 2.0
    width = side * len(titles)
    figure = Figure(figsize=(width + legend, side * rows + 0.3), dpi=100)
    axes = figure.subplots(rows, len(titles), squeeze=False)
    top = 1 - 0.3 / (side * rows + 0.3)
    figure.subplots_adjust(left=0.005, right=width / (width + legend), bottom=0.005, top=top, wspace=0.03, hspace=0.03)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _legend(figure: Figure, entries: Sequence[tuple[str, Any]]) -> None:
    handles = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in entries]
    figure.legend(handles=handles, loc="center right", frameon=False)
