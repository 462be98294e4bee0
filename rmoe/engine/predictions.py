"""What the model answers for a few validation images, always the same: in TensorBoard over the steps, and in files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from PIL import Image

from rmoe.engine.check_values import check_arguments, whole
from rmoe.engine.checkpoint.files import PARTIAL
from rmoe.engine.task_data import TaskDatasets
from rmoe.registry import HOOKS
from rmoe.tasks.multi_task import OneTask
from rmoe.tasks.scenes import Picture, drawable, evenly_spread, picture, strip

FOLDER, INDEX = "predictions", "index.json"  # in the work dir


@HOOKS.register_module()
class PredictionsHook(Hook):
    """Shows, at each evaluation, what the model answers for some validation images, evenly spread over the data set.

        custom_hooks = [dict(type="rmoe.PredictionsHook", images=6)]

    A run has one of its own accord. The visualizer gets `prediction_N`, image, truth and answer side by side;
    WORK_DIR/predictions has the newest as single pictures, and index.json beside them, which `rmoe report` reads. Of
    several tasks each has a folder there, and its name before those of its pictures. Nothing is drawn of models that
    are neither classifiers nor segmentors nor detectors.

    Args:
        images: how many; 0 draws none.

    Raises:
        UserError: `images` is no number, or negative.
    """

    priority = "LOW"

    def __init__(self, images: int = 6) -> None:
        check_arguments("rmoe.PredictionsHook", images=(images, whole(0)))
        self._images = images

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] = ()) -> None:
        """Draws once in each evaluation, where the model evaluates and experts are at hand.

        Every process computes the answers, as parameters may be spread over them; the first one draws.
        """
        if batch_idx or not self._images or not outputs or not drawable(outputs[0]):
            return
        dataset, folder = runner.val_dataloader.dataset, Path(runner.work_dir) / FOLDER
        if not isinstance(dataset, TaskDatasets):
            self._show(runner, runner.model, dataset, folder, "")
            return
        for name, one in dataset.of.items():
            self._show(runner, OneTask(runner.model, name), one, folder / name, f"{name}/")

    def _show(self, runner: Any, model: Any, dataset: Any, folder: Path, prefix: str) -> None:
        scenes = evenly_spread(dataset, self._images)
        answers = [scene.answer(model) for scene in scenes]
        if not is_main_process():
            return
        shown = [(scene.name, picture(scene, answer)) for scene, answer in zip(scenes, answers, strict=True)]
        for number, (_, one) in enumerate(shown):
            runner.visualizer.add_image(f"{prefix}prediction_{number}", strip(one), step=runner.iter)
        try:
            write_pictures(folder, shown, runner.iter)
        except OSError as error:
            runner.logger.warning(f"the predictions on validation images could not be written: {error}")


def write_pictures(folder: Path, shown: Sequence[tuple[str, Picture]], step: int) -> None:
    """Writes the pictures and index.json aside, then puts them in the place of those that were there.

    Args:
        folder: to be made.
        shown: names of images, and their pictures.
        step: of training.

    Raises:
        OSError: they cannot be written.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    items = []
    for number, (name, one) in enumerate(shown):
        item: dict[str, Any] = {"name": name, "caption": one.caption, "true_caption": one.true_caption}
        for kind in ("image", "truth", "answer"):
            if (pixels := getattr(one, kind)) is not None:
                item[kind] = f"{number}_{kind}.png"
                Image.fromarray(pixels).save(partial / item[kind])
        items.append(item)
    (partial / INDEX).write_text(json.dumps({"step": step, "items": items}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
