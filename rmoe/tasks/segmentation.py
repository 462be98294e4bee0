"""Adds to mmseg data sets in ADE20K's layout with any class list, which tell their faults in one line, and a baseline.

Models, heads, augmentations and the metric are mmseg's. Import this module, by `custom_imports` in a config, to use
`rmoe.SegDataset`, `rmoe.ADE20K` and `rmoe.LoadLabels`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation import IoUMetric
from torch import Tensor

from rmoe.data.arguments import check_arguments, require_count
from rmoe.data.classes import class_list
from rmoe.data.files import stems
from rmoe.data.images import IGNORED, read_label_map
from rmoe.data.palette import palette
from rmoe.errors import UserError
from rmoe.registry import DATASETS, TRANSFORMS
from rmoe.tasks import mmcv_precision as mmcv_precision  # imported for what it changes
from rmoe.tasks.images import fetch


class _CheckedFiles(BaseSegDataset):
    """Checks before training begins that the folders exist and every image has its label map."""

    def __init__(self, **mmseg: Any) -> None:
        check_arguments(mmseg)
        super().__init__(**mmseg)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Returns mmseg's list of images and label maps after the checks."""
        for folder in filter(None, self.data_prefix.values()):
            if not os.path.isdir(folder):
                raise UserError(f"there is no folder {folder}; set data_root and data_prefix to the data set's folders")
        if not (folder := self.data_prefix.get("img_path")):
            raise UserError("data_prefix has no img_path; set it to the folder of the images")
        images = self._list(folder)
        if not images:
            raise UserError(f"{folder} holds no image *{self.img_suffix}; set img_suffix or the folder")
        lacking = [one for one in images if "seg_map_path" in one and not os.path.isfile(one["seg_map_path"])]
        if lacking:
            raise UserError(
                f"{len(lacking)} of {len(images)} images have no label map, first {lacking[0]['img_path']}: "
                f"there is no {lacking[0]['seg_map_path']}; add the label maps or remove the images"
            )
        for one in images:
            one["num_classes"] = len(self.metainfo["classes"])
        return images

    def _list(self, folder: str) -> list[dict[str, Any]]:
        """Returns mmseg's list of images and label maps; without a list file each folder is visited once."""
        if self.ann_file and not os.path.isfile(self.ann_file):
            raise UserError(f"there is no list of images {self.ann_file}; correct ann_file")
        if self.ann_file or self.backend_args:
            return list(super().load_data_list())
        names = sorted(stems(folder, self.img_suffix), key=lambda stem: stem + self.img_suffix)
        return [self._entry(os.path.join(folder, name + self.img_suffix), name) for name in names]

    def _entry(self, path: str, name: str) -> dict[str, Any]:
        keys = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        entry: dict[str, Any] = {"img_path": path, **keys, "seg_fields": []}
        if maps := self.data_prefix.get("seg_map_path"):
            entry["seg_map_path"] = os.path.join(maps, name + self.seg_map_suffix)
        return entry


@DATASETS.register_module()
class SegDataset(_CheckedFiles):
    """Reads images and label maps from two folders, with any class list.

    Args:
        classes: names of the classes in the order of their indices, or a file with them; see
            `rmoe.data.classes.class_list`. With `reduce_zero_label`, the first class has the label value 1 and 0 is
            void.
        num_classes: number of the model's classes.
        **mmseg: arguments of mmseg's `BaseSegDataset`.

    Raises:
        UserError: a folder, file or label map is missing, or the class list has another number of names.
    """

    def __init__(self, classes: str | Sequence[str], num_classes: int, **mmseg: Any) -> None:
        check_arguments({"classes": classes, "num_classes": num_classes})
        require_count(
            "num_classes", num_classes, most=IGNORED - bool(mmseg.get("reduce_zero_label"))
        )  # 8 bits, and void
        metainfo = class_list(classes, num_classes).metainfo
        super().__init__(metainfo={"palette": list(map(list, palette(num_classes))), **metainfo}, **mmseg)


@DATASETS.register_module()
class ADE20K(_CheckedFiles, ADE20KDataset):
    """Is mmseg's ADE20K, with the files checked."""


@TRANSFORMS.register_module()
class LoadLabels(LoadAnnotations):
    """Is mmseg's LoadAnnotations, and checks that a label map has a class index of 8 bits for each pixel of the image.

    Args:
        num_classes: number of the model's classes; if the data set has fewer, its own number is the limit.
        **mmseg: arguments of mmseg's `LoadAnnotations`.
    """

    def __init__(self, num_classes: int, **mmseg: Any) -> None:
        super().__init__(**mmseg)
        self.num_classes = require_count("num_classes", num_classes, most=IGNORED)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds the label map to `results`; raises UserError for another size than the image's or unknown classes."""
        results, path = super().transform(results), results["seg_map_path"]
        labels = results["gt_seg_map"]
        if labels.shape != results.get("ori_shape", labels.shape):
            raise UserError(
                f"{path} is {labels.shape}, its image {results['ori_shape']} (rows, columns); both must have one size"
            )
        highest = int(labels.max(where=labels != IGNORED, initial=0))
        classes = min(self.num_classes, results.get("num_classes", self.num_classes))
        if highest >= classes:
            first = int(results["reduce_zero_label"])
            void = f"0 or {IGNORED}" if first else f"{IGNORED}"
            raise UserError(
                f"{path} has the label value {highest + first}; allowed are {first} to {classes - 1 + first} "
                f"for the {classes} classes and {void} for void; mend the file or set num_classes"
            )
        return results

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        """Reads the label map in place of mmseg's method, which cuts files to 8 bits before they can be checked."""
        if not (path := results.get("seg_map_path")):
            raise UserError(
                f"{results['img_path']} has no label map, since its data set's data_prefix has no seg_map_path; set "
                "that, or leave LoadLabels out of the pipeline"
            )
        if self.reduce_zero_label not in (None, results["reduce_zero_label"]):
            raise UserError("reduce_zero_label of LoadLabels differs from the data set's; set it in the data set alone")
        values: np.ndarray = np.arange(IGNORED + 1, dtype=np.uint8)
        if results["reduce_zero_label"]:
            values = np.array([IGNORED, *range(IGNORED - 1), IGNORED], dtype=np.uint8)
        new = values.copy()
        for old, label in (results.get("label_map") or {}).items():
            new[values == old] = label
        results["gt_seg_map"] = new[read_label_map(path, fetch(path, self.backend_args))]
        results["seg_fields"].append("gt_seg_map")


def majority_miou(train: BaseSegDataset, val: BaseSegDataset) -> float:
    """Returns mIoU in percent, by mmseg's IoUMetric, of answering `train`'s commonest class everywhere in `val`."""
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


def class_values(metric: IoUMetric, results: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Returns IoU, Acc and so on of each class in percent, from the `results` that a metric has collected; NaN for a
    class that is neither in the truth nor in the answers.
    """
    areas = (sum(area) for area in zip(*results, strict=True))
    found = metric.total_area_to_metrics(*areas, metric.metrics, metric.nan_to_num, metric.beta)
    found.pop("aAcc")
    return {
        name: {key: 100 * float(values[label]) for key, values in found.items()}
        for label, name in enumerate(metric.dataset_meta["classes"])
    }


def label_maps(dataset: BaseSegDataset) -> Iterator[np.ndarray]:
    """Yields the label maps of a data set before any augmentation, uint8 [H, W]: class indices, `IGNORED` for void."""
    load = next(step for step in dataset.pipeline.transforms if isinstance(step, LoadAnnotations))
    for index in range(len(dataset)):
        yield load(dataset.get_data_info(index))["gt_seg_map"]


def check_plain(model: Any) -> None:
    """Checks that a segmentor's logits are a function of its images alone, by mmseg's own way from maps to pixels.

    Raises:
        UserError: it is another kind of segmentor, or its head decides in a way of its own.
    """
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # with all models, which data sets do not need
    from mmseg.models.segmentors import EncoderDecoder

    head = getattr(model, "decode_head", None)
    methods = ("predict", "predict_by_feat")
    plain = isinstance(head, BaseDecodeHead) and all(
        getattr(type(head), name) is getattr(BaseDecodeHead, name) for name in methods
    )
    if type(model) is not EncoderDecoder or not plain:
        raise UserError(
            f"a {type(model).__name__} with a {type(head).__name__} goes from maps to pixels in a way of its own; "
            "known is an EncoderDecoder with one head that leaves that to mmseg: give --part backbone"
        )
    test = getattr(model.data_preprocessor, "test_cfg", None)
    if test:
        raise UserError(
            f"the preprocessor pads images in evaluation ({dict(test)}), which a graph does not: leave that out"
        )


def whole_logits(model: Any, images: Tensor) -> Tensor:
    """Returns a segmentor's logits at the size of the images, [B, classes, H, W], as mmseg computes them of a whole
    image that needs no padding.

    Args:
        model: that `check_plain` lets pass.
        images: [B, 3, H, W], normalised.
    """
    small = model.decode_head(model.extract_feat(images))
    return F.interpolate(small, images.shape[-2:], mode="bilinear", align_corners=model.align_corners)
