"""Reads images for mmseg's and mmdet's pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mmengine.fileio
import numpy as np
from mmcv.transforms import LoadImageFromFile

from rmoe.data.images import UnreadableImage, read_image
from rmoe.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """Reads an image in blue, green, red, like mmcv's LoadImageFromFile but by `rmoe.data.images`.

    Unlike mmcv's, it refuses a file that was cut short. It does not turn an image by its EXIF orientation, because
    label maps, boxes and masks refer to the stored pixels.

    Args:
        to_float32: return float32 instead of uint8.
        backend_args: arguments of mmengine's file backend, for files that are not on this machine's file system.
    """

    def __init__(self, to_float32: bool = False, backend_args: Mapping[str, Any] | None = None) -> None:
        super().__init__(to_float32=to_float32, imdecode_backend="pillow", backend_args=backend_args)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds pixels and size to `results`; raises UserError if the file is no whole image of 8 bits a channel."""
        path = results["img_path"]
        image = read_image(path, fetch(path, self.backend_args))
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        results["img"] = pixels.astype(np.float32) if self.to_float32 else pixels
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


def fetch(path: str, backend_args: Mapping[str, Any] | None) -> bytes | None:
    """Returns the bytes of a file that mmengine has to fetch, or None for a file on this machine's file system."""
    if not backend_args and "://" not in path:
        return None
    try:
        return mmengine.fileio.get(path, backend_args=backend_args)
    except OSError as error:
        raise UnreadableImage(f"{path} is no readable image ({error}); restore or remove the file") from error
