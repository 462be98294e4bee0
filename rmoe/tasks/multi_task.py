"""One backbone for several tasks, each with a model of mmseg or mmdet around it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import BaseModel
from torch import Tensor, nn

from rmoe.errors import UserError, nearest
from rmoe.moe.state import moe_layers
from rmoe.moe.tasks import task
from rmoe.registry import MODELS

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@MODELS.register_module()
class SharedLevels(nn.Module):
    """Stands for the backbone in the model of one task: gives it maps of the backbone that all tasks share.

    Args:
        out_indices: the maps, by their numbers in the shared backbone's `out_indices`; None for all of them.
    """

    def __init__(self, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.out_indices = out_indices

    def share(self, backbone: Any, number: int) -> None:
        """Takes the backbone, which stays another module's, for the task of that number.

        Raises:
            UserError: the backbone has no such maps.
        """
        there = [*backbone.out_indices]
        wanted = there if self.out_indices is None else [*self.out_indices]
        if not wanted or not set(wanted) <= {*there} or wanted != sorted({*wanted}):
            raise UserError(
                f"out_indices are {self.out_indices}; the shared backbone has {there}, of which a task takes some"
            )
        if wanted != there and getattr(backbone, "spread", False):
            raise UserError(
                f"a task reads the maps {wanted} and the shared backbone has {there}, whose strides follow from how "
                "many there are, as a ViT's do: give all tasks the same out_indices"
            )
        # Of a backbone whose maps are all made of one of its own, a task that wants that one gets all.
        self._levels = None if wanted == there else [there.index(one) for one in wanted]
        self.__dict__["_shared"], self._number = backbone, number  # not among the parameters of this module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Takes images [B, 3, H, W]; returns the task's maps of them."""
        backbone = self.__dict__["_shared"]
        with task(self._number, recomputes=getattr(backbone, "with_cp", True)):
            maps = backbone(images)
        return maps if self._levels is None else tuple(maps[level] for level in self._levels)


@MODELS.register_module()
class MultiTask(BaseModel):
    """Holds one backbone and, for each task, a model of mmseg or mmdet that gets its maps.

    A batch is a dict of the tasks' batches, of all tasks or some; tasks run in the alphabetical order of their names,
    by which they are numbered for the gates (`rmoe.task`).

    Args:
        backbone: `rmoe.TimmPyramid`, with the maps that any task needs.
        tasks: by the name of the task, the config of its model; `_scope_` says whose it is, and `backbone` has
            `out_indices` alone, the task's own among those of the shared one.
        weights: by the name of the task, what its losses are multiplied by; 1 where it is left out.

    Attributes:
        backbone: the shared one.
        tasks: the models by name.

    Raises:
        UserError: names that are none or of no task, a weight that is not positive, a model that takes no backbone,
            maps that the backbone does not have, or a mixture of another number of tasks.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        tasks: Mapping[str, Mapping[str, Any]],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        names = task_names(tasks)
        self.weights = checked_weights(weights or {}, names)
        self.backbone = MODELS.build(dict(backbone))
        models = {}
        for number, name in enumerate(names):
            config = dict(tasks[name])
            view = {"type": "rmoe.SharedLevels", "out_indices": (config.get("backbone") or {}).get("out_indices")}
            model = MODELS.build({**config, "backbone": view})
            if not isinstance(getattr(model, "backbone", None), SharedLevels) or not hasattr(model, "extract_feat"):
                raise UserError(f"model.tasks.{name} is a {type(model).__name__}, which has no backbone to share")
            try:
                model.backbone.share(self.backbone, number)
            except UserError as error:
                raise UserError(f"model.tasks.{name}.backbone: {error}") from error
            models[name] = model
        for layer in moe_layers(self.backbone).values():
            if layer.config.tasks not in (1, len(names)):
                raise UserError(
                    f"model.backbone.moe.tasks is {layer.config.tasks}, and the tasks are {', '.join(names)}: set it "
                    f"to {len(names)}, or leave it out for gates that do not know tasks"
                )
        self.tasks = nn.ModuleDict(models)
        self.data_preprocessor = _Preprocessor(models)

    def init_weights(self) -> None:
        """Initialises the heads, as each task's model does; the backbone has its weights."""
        for model in self.tasks.values():
            model.init_weights()  # type: ignore[operator]

    def forward(self, batches: Mapping[str, Any], mode: str = "tensor") -> Any:
        """Runs the tasks' models in one of mmengine's modes.

        Args:
            batches: preprocessed batches by task.
            mode: "loss" returns losses by name, TASK/NAME, those of each task times its weight; "predict" the answers
                of all batches, in the order of the tasks; "tensor" the tasks' feature maps by name.
        """
        models: dict[str, Any] = {name: self.tasks[name] for name in self.tasks if name in batches}
        ordered = [(name, model, batches[name]) for name, model in models.items()]
        if mode == "loss":
            found = {name: model(**batch, mode="loss") for name, model, batch in ordered}
            return {
                f"{name}/{key}": _times(self.weights[name], value) if "loss" in key else value
                for name, losses in found.items()
                for key, value in losses.items()
            }
        if mode == "predict":
            return [one for _, model, batch in ordered for one in model(**batch, mode="predict")]
        return {name: model.extract_feat(batch["inputs"]) for name, model, batch in ordered}


class OneTask:
    """Is a model of several tasks, or what evaluates it, as that of one of them.

    Args:
        model: with mmengine's `test_step`.
        name: of the task.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = model, name

    def test_step(self, batch: Any) -> Any:
        """Returns the answers to a batch of the task."""
        return self._model.test_step({self._name: batch})


class _Preprocessor(nn.Module):
    """Preprocesses the batch of each task as its model does."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        super().__init__()
        self._models = dict(models)  # which are modules of the whole model

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """Takes batches by task; returns the arguments of the model's forward."""
        return {
            "batches": {name: self._models[name].data_preprocessor(batch, training) for name, batch in data.items()}
        }


def task_names(tasks: Any) -> list[str]:
    """Returns the names of tasks in the order in which they run.

    Raises:
        UserError: fewer than two, or a name that cannot be one.
    """
    if not isinstance(tasks, Mapping) or len(tasks) < 2:
        raise UserError(f"tasks are {str(tasks)[:100]}; give a dict of two or more by name, or train the one alone")
    for name in tasks:
        taken = hasattr(nn.ModuleDict, str(name)) or "loss" in str(name)  # what has it in its name is added up
        if taken or not _NAME.fullmatch(str(name)):
            raise UserError(
                f"a task is called {name!r}; its name begins with a small letter, has small letters, digits and _ "
                "alone, and neither 'loss' nor a word of Python's dicts"
            )
    return sorted(tasks)


def checked_weights(weights: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Returns the weight of each task.

    Raises:
        UserError: one of no task, or one that is no positive number.
    """
    for name, weight in weights.items():
        if name not in names:
            raise UserError(f"model.weights has the task '{name}'{nearest(str(name), names)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UserError(f"the weight of the task {name} is {weight!r}; it is a positive number, such as 1.0")
    return {name: float(weights.get(name, 1.0)) for name in names}


def _times(weight: float, value: Any) -> Any:
    return [weight * one for one in value] if isinstance(value, list | tuple) else weight * value
