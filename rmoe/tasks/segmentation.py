"""ADE20K-style segmentation with mmseg: data sets of any class list whose faults are told in one line, and a baseline.

The models, heads, augmentations and the metric are mmseg's. Import this module (a config's `custom_imports`) to use
`rmoe.SegDataset`, `rmoe.ADE20K` and `rmoe.LoadLabels`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation import IoUMetric

from rmoe.errors import UserError
from rmoe.registry import DATASETS, TRANSFORMS

IGNORED = 255


class _CheckedFiles:
    """Before training begins: folders exist, and every image has its label map."""

    def load_data_list(self) -> list[dict[str, Any]]:
        for folder in filter(None, self.data_prefix.values()):  # type: ignore[attr-defined]
            if not Path(folder).is_dir():
                raise UserError(f"there is no folder {folder}; set data_root and data_prefix to the data set's folders")
        images: list[dict[str, Any]] = super().load_data_list()  # type: ignore[misc]
        if not images:
            suffix, folder = self.img_suffix, self.data_prefix["img_path"]  # type: ignore[attr-defined]
            raise UserError(f"{folder} holds no image *{suffix}")
        lacking = [image for image in images if "seg_map_path" in image and not Path(image["seg_map_path"]).is_file()]
        if lacking:
            raise UserError(
                f"{len(lacking)} of {len(images)} images have no label map, first {lacking[0]['img_path']}: "
                f"there is no {lacking[0]['seg_map_path']}; add the label maps or remove the images"
            )
        return images


@DATASETS.register_module()
class SegDataset(_CheckedFiles, BaseSegDataset):
    """Images and index PNGs in two folders, with any class list.

    Args:
        classes: names of the classes in the order of their indices, or a file with them: text, one name in each line,
            or JSON with the keys "classes" and "palette". With `reduce_zero_label`, the first class is the value 1 of
            the label maps and 0 is void.
        num_classes: classes of the model.
        **mmseg: arguments of mmseg's `BaseSegDataset`.

    Raises:
        UserError: a missing folder, file or label map, or another number of classes.
    """

    def __init__(self, classes: str | Sequence[str], num_classes: int, **mmseg: Any) -> None:
        metainfo = _read_classes(classes) if isinstance(classes, str) else {"classes": tuple(classes)}
        if len(metainfo["classes"]) != num_classes:
            found = len(metainfo["classes"])
            raise UserError(f"the class list has {found} names ({classes}); the config says num_classes={num_classes}")
        super().__init__(metainfo=metainfo, **mmseg)


@DATASETS.register_module()
class ADE20K(_CheckedFiles, ADE20KDataset):
    """mmseg's ADE20K, with the files checked."""


@TRANSFORMS.register_module()
class LoadLabels(LoadAnnotations):
    """mmseg's LoadAnnotations, with the label map checked: one class index for each pixel of the image.

    Args:
        num_classes: classes of the model.
        **mmseg: arguments of mmseg's `LoadAnnotations`.
    """

    def __init__(self, num_classes: int, **mmseg: Any) -> None:
        super().__init__(**mmseg)
        self.num_classes = num_classes

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Raises UserError for a file that is no label map, of another size than its image, or with unknown classes."""
        path = results["seg_map_path"]
        try:
            results = super().transform(results)
        except OSError as error:
            raise UserError(f"{path} is no readable label map ({error}); restore it or remove its image") from error
        labels = results["gt_seg_map"]
        if labels.ndim != 2:
            raise UserError(
                f"{path} has the shape {labels.shape}; a label map is an 8-bit PNG with one class index per pixel"
            )
        if labels.shape != results.get("ori_shape", labels.shape):
            raise UserError(
                f"{path} is {labels.shape}, its image {results['ori_shape']} (rows, columns); they must agree"
            )
        highest = int(labels.max(where=labels != IGNORED, initial=0))
        if highest >= self.num_classes:
            first = int(self.reduce_zero_label)
            void = f"0 or {IGNORED}" if first else f"{IGNORED}"
            raise UserError(
                f"{path} has the label value {highest + first}; allowed are {first} to {self.num_classes - 1 + first} "
                f"for the {self.num_classes} classes and {void} for void; mend the file or set num_classes"
            )
        return results


def majority_miou(train: BaseSegDataset, val: BaseSegDataset) -> float:
    """mIoU in percent, by mmseg's IoUMetric, of answering everywhere in `val` the class commonest in `train`."""
    classes = len(val.metainfo["classes"])
    counts = sum(np.bincount(labels.ravel(), minlength=IGNORED + 1)[:classes] for labels in label_maps(train))
    commonest = int(np.argmax(counts))
    areas = []
    for labels in label_maps(val):
        truth = torch.from_numpy(labels)
        answer = torch.full_like(truth, commonest)
        areas.append(IoUMetric.intersect_and_union(answer, truth, classes, IGNORED))
    metrics = IoUMetric.total_area_to_metrics(*(sum(area) for area in zip(*areas, strict=True)))
    return float(100 * np.nanmean(metrics["IoU"]))


def label_maps(dataset: BaseSegDataset) -> Iterator[np.ndarray]:
    """The label maps of a data set as they lie on disk, uint8 [H, W] of class indices, 255 = void."""
    load = next(step for step in dataset.pipeline.transforms if isinstance(step, LoadAnnotations))
    for index in range(len(dataset)):
        yield load(dataset.get_data_info(index))["gt_seg_map"]


def _read_classes(path: str) -> dict[str, Any]:
    """mmseg's metainfo from a class list."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            return {key: json.loads(text)[key] for key in ("classes", "palette")}
    except (OSError, ValueError, KeyError) as error:
        wanted = "a text file of names or a JSON file with 'classes' and 'palette'"
        raise UserError(f"the class list {path} cannot be read ({error}); give {wanted}") from error
    return {"classes": tuple(line.strip() for line in text.splitlines() if line.strip())}
