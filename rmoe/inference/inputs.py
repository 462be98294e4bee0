"""Turns an image into a model's input, as the run did for its validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import timm.data
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import TRANSFORMS, DefaultScope
from PIL import Image

from rmoe.engine import safe_config
from rmoe.engine.check_values import short_name
from rmoe.errors import UserError

Item = dict[str, Any]
"""Holds one image as a model takes it: `inputs`, a tensor [3, H, W], and for mmseg and mmdet `data_samples`."""


class Inputs:
    """Makes images the items that a data set would yield, without their truth.

    Args:
        described: what `rmoe.engine.checkpoint.export.inputs_of` returned.

    Attributes:
        scope: of the registries that the transforms are in.
        transform: timm's, from an image to a tensor; None where the run has a pipeline of mmseg or mmdet.

    Raises:
        UserError: it has neither a pipeline nor a transform.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        self.scope = described.get("scope", "mmengine")
        self.transform: Any = None
        if "transform" in described:
            self.transform = timm.data.create_transform(**described["transform"], is_training=False)
            return
        if not isinstance(described.get("pipeline"), list):
            raise UserError("the run's inputs have neither a pipeline nor a transform; train it again")
        steps = safe_config.with_pairs({"pipeline": described["pipeline"]})["pipeline"]
        self._float = any(step.get("to_float32") for step in steps if short_name(step["type"]).startswith("LoadImage"))
        with DefaultScope.overwrite_default_scope(self.scope):
            self._steps = [TRANSFORMS.build(step) for step in steps if not short_name(step["type"]).startswith("Load")]

    def __call__(self, image: Image.Image, name: str = "") -> Item:
        """Returns the item of an image, which `name` stands for in the item."""
        rgb = image.convert("RGB")
        if self.transform is not None:
            return {"inputs": self.transform(rgb)}
        pixels = np.ascontiguousarray(np.asarray(rgb)[..., ::-1])
        size = pixels.shape[:2]
        results: Any = {
            "img": pixels.astype(np.float32) if self._float else pixels,
            **{"img_path": name, "img_id": 0, "img_shape": size, "ori_shape": size, "height": size[0]},
            **{"width": size[1], "scale_factor": (1.0, 1.0), "flip": False, "flip_direction": None, "seg_fields": []},
        }
        for step in self._steps:
            results = step(results)
        return results

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """Returns a batch of items of one shape."""
        return default_collate(items) if self.transform is not None else pseudo_collate(items)
