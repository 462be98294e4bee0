"""Evaluates a finished run again, by the metrics of its training, also on other data and with flips and scales."""

from __future__ import annotations

import ast
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.registry import DATASETS, MODELS, DefaultScope
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.data import DataLoader

import rmoe
from rmoe.backbones.hub import CONFIG
from rmoe.engine.building import user_errors
from rmoe.engine.check_values import short_name
from rmoe.engine.read_config import change, read_config
from rmoe.engine.task_config import task_config
from rmoe.engine.terminal import progress_bar
from rmoe.errors import UserError, printable
from rmoe.inference.load import load, quiet
from rmoe.inference.moved import ROOTS, moved_paths
from rmoe.inference.predictor import Predictor
from rmoe.inference.printing import tell
from rmoe.tasks.classification import Accuracy, ImageFolder

_LARGEST = 16.0  # scale of an image


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Holds what an evaluation found.

    Attributes:
        weights: the file that was evaluated.
        split: whose data set.
        data: the folder of the data set, if it has one.
        images: how many.
        scales, flip: of the test-time augmentation.
        metrics: by name, as training logs them.
        classes: for each class its values in percent; NaN for one that the data set does not have.
    """

    weights: str
    split: str
    data: str | None
    images: int
    scales: tuple[float, ...]
    flip: bool
    metrics: dict[str, float]
    classes: dict[str, dict[str, float]]

    def content(self) -> dict[str, Any]:
        """Returns it as JSON can hold it: None for NaN."""
        plain = dataclasses.asdict(self) | {"rmoe": rmoe.__version__}
        plain["metrics"] = {name: _number(x) for name, x in self.metrics.items()}
        plain["classes"] = {
            name: {key: _number(x) for key, x in values.items()} for name, values in self.classes.items()
        }
        return plain


def evaluate(
    path: str | Path,
    *,
    task: str | None = None,
    split: str = "val",
    data_root: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    scales: Sequence[float] = (),
    flip: bool = False,
    batch_size: int | None = None,
    device: Any = None,
    dtype: Any = None,
    precision: Any = None,
) -> Evaluation:
    """Evaluates a run in this process, as its training did.

    Args:
        path: of the run, see `rmoe.load`; the config that it dumped is read.
        task: see `rmoe.load`.
        split: "val", "test" or "train": the config's data set that is evaluated on, by the validation's transforms.
        data_root: a folder that stands in for the data set's own, with the same layout and classes.
        options: what to change in the config, by dotted keys.
        scales: of the images, for test-time augmentation.
        flip: evaluate flipped images as well, and merge.
        batch_size: the config's by default.
        device: see `rmoe.load`.
        dtype: see `rmoe.load`.
        precision: see `rmoe.load`.

    Raises:
        UserError: what `rmoe.load` raises; the config has no such data set, or that has other classes; a scale out of
            range; flips or scales of a classifier.
    """
    if wrong := [scale for scale in scales if not 0 < scale <= _LARGEST]:
        raise UserError(f"the scale {wrong[0]} is out of range; it is more than 0 and at most {_LARGEST:g}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"the batch size is {batch_size}; it is at least 1")
    predictor = load(path, task=task, device=device, dtype=dtype, precision=precision)
    folder = work_dir(predictor.source)
    config = run_config(folder, options, task)
    where = f"{folder}: val_dataloader and val_evaluator"
    if not config.get("val_dataloader") or not config.get("val_evaluator"):
        raise UserError(f"{where}: the config has none, so that there is nothing to evaluate by; give --cfg-options")
    augmented = bool(scales or flip)
    if augmented and predictor.task not in ("segmentation", "detection"):
        raise UserError(f"flips and scales are for segmentation and detection; this is {predictor.task}")
    with user_errors(where), quiet(), DefaultScope.overwrite_default_scope(config.get("default_scope")):
        described, measured = _data(config, split, data_root)
        if augmented:
            described["pipeline"] = _augmented(described["pipeline"], scales or (1.0,), flip)
        dataset = DATASETS.build(described)
        if isinstance(dataset, ImageFolder) and predictor.inputs is not None:
            dataset.transform = predictor.inputs.transform  # not that of training, whatever the split
        _check_classes(dataset.metainfo.get("classes"), predictor)
        for one in measured:
            if split != "val" and "ann_file" in one:
                one["ann_file"] = dataset.ann_file
            if short_name(one["type"]) == "CocoMetric":
                one["classwise"] = True
                if augmented:
                    one["metric"] = _boxes(one.get("metric", "bbox"))
        evaluator = Evaluator(measured)
        evaluator.dataset_meta = dataset.metainfo
        if augmented:
            predictor = dataclasses.replace(predictor, model=_merging(predictor))
        loader = config.val_dataloader
        batches = DataLoader(
            dataset,
            batch_size=batch_size or loader.get("batch_size") or 1,
            num_workers=loader.get("num_workers", 0),
            collate_fn=_collate(predictor, loader),
        )
    metrics, classes = _measured(predictor, batches, evaluator, len(dataset))
    root = next((str(described[key]) for key in ROOTS if described.get(key)), None)
    return Evaluation(str(predictor.source), split, root, len(dataset), tuple(scales), flip, metrics, classes)


def work_dir(source: Path) -> Path:
    """Returns the folder in which the weights that a predictor came from have what their run left: an export's own, in
    which there is no more than that.
    """
    return source if (source / CONFIG).is_file() else source.parent


def dumped_configs(folder: Path) -> list[Path]:
    """Returns the files of a folder that are configs as runs dump them: of assignments alone, unless damaged."""
    return [path for path in sorted(folder.glob("*.py")) if _assigns_alone(path)]


def _assigns_alone(path: Path) -> bool:
    try:
        lines = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError):
        return True  # no program that could run; whoever reads it tells the damage
    return all(isinstance(line, ast.Assign) for line in lines)


def dumped_config(folder: Path) -> Path:
    """Returns the file of the config that a run has dumped; raises UserError if there is none, or more than one."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the work dir of one finished run")
    configs = dumped_configs(folder)
    if len(configs) != 1:
        raise UserError(f"{folder} holds {len(configs)} dumped configs; give the work dir of one finished run")
    return configs[0]


def run_config(folder: Path, options: Mapping[str, Any] | None = None, task: str | None = None) -> Config:
    """Returns the config that a run has dumped into its work dir, with `options` set in it; of a run of several tasks,
    that of a run of the one.

    Raises:
        UserError: there is none, or more than one; or see `rmoe.engine.task_config.checked_task`.
    """
    path = dumped_config(folder)
    with quiet():
        config = read_config(path, {} if task is not None else options or {})
    if task is not None:
        config = task_config(config, task, folder)
        change(config, options or {})
    return config


def show(found: Evaluation) -> None:
    """Prints the metrics and the table of the classes."""
    console = Console()
    augmented = f", scales {', '.join(f'{x:g}' for x in found.scales)}" if found.scales else ""
    augmented += ", flipped as well" if found.flip else ""
    tell(f"{found.weights}: {found.split}, {found.images} images{augmented}", console)
    if found.classes:
        columns = list(next(iter(found.classes.values())))
        table = Table("class", *columns)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, values in found.classes.items():
            cells = (f"{values[key]:.2f}" if math.isfinite(values[key]) else "" for key in columns)
            table.add_row(Text(printable(name)), *cells)
        console.print(table)
    for name, value in found.metrics.items():
        if not name.endswith("_precision"):  # they are in the table
            tell(f"{name}: {value:g}", console)


def _data(config: Config, split: str, root: str | Path | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the config of the data set, with the validation's transforms, and those of the metrics."""
    validation, plain = inner(config.val_dataloader.dataset), config.to_dict()["val_evaluator"]
    found = validation
    if split != "val":
        if not config.get(f"{split}_dataloader"):
            raise UserError(f"the config has no {split}_dataloader; take another --split")
        kept = {key: validation[key] for key in ("pipeline", "transform", "test_mode") if key in validation}
        found = inner(config[f"{split}_dataloader"].dataset) | kept
    content: dict[str, Any] = {"dataset": found, "evaluators": plain if isinstance(plain, list) else [plain]}
    if root is not None:
        old = next((found[key] for key in ROOTS if found.get(key)), None)
        if not old:
            raise UserError(
                "the data set's config has no data_root that --data-root could stand for; use --cfg-options"
            )
        content = moved_paths(content, Path(old), Path(root))
    return content["dataset"], content["evaluators"]


def inner(config: Any) -> dict[str, Any]:
    """Returns a data set's config, as plain data, without what is wrapped around it."""
    while "dataset" in config:
        config = config["dataset"]
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _check_classes(found: Any, predictor: Predictor) -> None:
    names, known = tuple(found or ()), tuple(predictor.metadata.get("classes") or ())
    if known and names != known:
        pairs = zip(names, known, strict=False)
        number = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(names), len(known)))
        said = [repr(each[number]) if number < len(each) else "missing" for each in (names, known)]
        raise UserError(
            f"the data set has {len(names)} classes, the run {len(known)}; class {number} is {said[0]} in "
            f"the data set and {said[1]} in the run: give a data set with the run's classes in their order"
        )


def _augmented(pipeline: Sequence[Any], scales: Sequence[float], flip: bool) -> list[dict[str, Any]]:
    """Returns a pipeline that yields each image in all scales, and flipped; truth is loaded after both."""
    load = [step for step in pipeline if short_name(step["type"]).startswith("LoadImage")]
    rest = [step for step in pipeline if step not in load]
    resize = next((step for step in rest if short_name(step["type"]) == "Resize"), None)
    rest = [step for step in rest if step is not resize]
    for step in rest:
        if "meta_keys" in step:
            step["meta_keys"] = tuple(dict.fromkeys([*step["meta_keys"], "flip", "flip_direction"]))
    sizes = [_scaled(resize or {"type": "Resize", "scale_factor": 1.0, "keep_ratio": True}, scale) for scale in scales]
    flips = [{"type": "RandomFlip", "prob": prob} for prob in ((0.0, 1.0) if flip else (0.0,))]
    return [*load, {"type": "TestTimeAug", "transforms": [sizes, flips, *([step] for step in rest)]}]


def _scaled(resize: Mapping[str, Any], scale: float) -> dict[str, Any]:
    for key in ("scale", "scale_factor"):
        if resize.get(key) is not None:
            given, whole = resize[key], key == "scale"
            sides = [side * scale for side in (given if isinstance(given, list | tuple) else (given, given))]
            return {**resize, key: tuple(max(1, round(side)) if whole else side for side in sides)}
    raise UserError("the pipeline's Resize has neither scale nor scale_factor, so that --scales cannot change it")


def _merging(predictor: Predictor) -> nn.Module:
    """Returns the model that merges what the predictor's says of all versions of an image."""
    if predictor.task == "segmentation":
        return MODELS.build({"type": "SegTTAModel", "module": predictor.model})
    model: Any = predictor.model
    settings = model.test_cfg.get("rcnn", model.test_cfg)
    if "nms" not in settings:
        raise UserError(
            f"a {type(model).__name__} has no nms in its test_cfg, by which the answers to flipped and scaled images "
            "are merged: evaluate it without --flip and --scales"
        )
    kept = {"nms": settings["nms"], "max_per_img": settings["max_per_img"]}
    return MODELS.build({"type": "DetTTAModel", "module": _BoxesAlone(model), "tta_cfg": Config(kept)})


class _BoxesAlone(nn.Module):
    """Is a detector that leaves out masks, which mmdet does not merge."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def test_step(self, batch: Any) -> Any:
        """Returns the detector's answers without masks."""
        answers = self.detector.test_step(batch)  # type: ignore[operator]
        for answer in answers:
            answer.pred_instances.pop("masks", None)
        return answers


def _boxes(metric: Any) -> list[str]:
    return [name for name in ([metric] if isinstance(metric, str) else metric) if name != "segm"]


def _collate(predictor: Predictor, loader: Mapping[str, Any]) -> Any:
    if predictor.inputs is None:
        raise UserError(f"{predictor.source} does not say how images become its inputs; train it again")
    return predictor.inputs.collate


def _measured(
    predictor: Predictor, batches: DataLoader, evaluator: Evaluator, images: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns the metrics, and the values of the classes."""
    with progress_bar() as bar, quiet(), redirect_stdout(io.StringIO()):  # pycocotools prints
        task = bar.add_task("evaluate", total=len(batches), note="")
        for batch in batches:
            evaluator.process(data_samples=predictor.run(batch), data_batch=batch)
            bar.update(task, advance=1, refresh=True)
        results = {metric: list(metric.results) for metric in evaluator.metrics}
        metrics = {name: float(value) for name, value in evaluator.evaluate(images).items()}
    classes: dict[str, dict[str, float]] = {}
    for metric, found in results.items():
        for name, values in _class_values(metric, found, predictor.task).items():
            classes.setdefault(name, {}).update(values)
    return metrics, classes


def _class_values(metric: BaseMetric, results: list[Any], task: str | None) -> dict[str, dict[str, float]]:
    """Returns each class's values in percent by a metric; of a metric that is not known here, nothing."""
    if isinstance(metric, Accuracy):
        return metric.class_values(results)
    if task == "segmentation":
        from rmoe.tasks.segmentation import IoUMetric, class_values

        return class_values(metric, results) if isinstance(metric, IoUMetric) else {}
    if task == "detection":
        from rmoe.tasks.detection import CocoMetric

        return metric.class_values() if isinstance(metric, CocoMetric) else {}
    return {}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
