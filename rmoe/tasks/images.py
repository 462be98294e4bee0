"""Reading images for mmseg's and mmdet's pipelines."""

from __future__ import annotations

from typing import Any

from mmcv.transforms import LoadImageFromFile

from rmoe.errors import UserError
from rmoe.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """mmcv's LoadImageFromFile through Pillow, which does not read a file that was cut short as if it were whole."""

    def __init__(self, **mmcv: Any) -> None:
        super().__init__(imdecode_backend="pillow", **mmcv)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Raises UserError for a file that is no whole image."""
        try:
            return super().transform(results)
        except OSError as error:
            raise UserError(
                f"{results['img_path']} is no readable image ({error}); restore or remove the file"
            ) from error
