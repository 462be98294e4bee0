"""Adds to mmdet data sets in COCO's layout with any class list, which tell their faults in one line; a metric that is 0
when nothing is detected; and mmcv's operations under mixed precision.

Models, heads, augmentations and the evaluation by pycocotools are mmdet's. Import this module, by `custom_imports` in a
config, to use `rmoe.Coco`, `rmoe.DetDataset`, `rmoe.LoadObjects` and `rmoe.CocoMetric`.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from pycocotools.mask import encode

from rmoe.data.arguments import check_arguments
from rmoe.data.check import require
from rmoe.data.classes import class_list
from rmoe.data.coco import check_annotations, read_annotations
from rmoe.errors import UserError, nearest
from rmoe.registry import DATASETS, METRICS, TRANSFORMS
from rmoe.tasks import mmcv_precision as mmcv_precision  # imported for what it changes

_ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


class CheckedCOCO(COCO):
    """Is mmdet's index of an annotation file, with the content checked first.

    It sorts the categories by id, whatever their order in the file, because pycocotools evaluates them in this order.
    """

    def __init__(self, annotation_file: str) -> None:
        super().__init__()
        self.dataset = read_annotations(annotation_file)
        require(check_annotations(self.dataset, annotation_file).problems)
        self.dataset["categories"].sort(key=lambda category: category["id"])
        for one in self.dataset["annotations"]:
            one.setdefault("iscrowd", 0)  # pycocotools' evaluation fails without
        self.createIndex()
        self.img_ann_map, self.cat_img_map, self._path = self.imgToAnns, self.catToImgs, annotation_file

    def get_cat_ids(self, cat_names: Sequence[str] = (), **mmdet: Any) -> list[int]:
        """Returns the ids of the categories `cat_names` in the order of these names, which mmdet assumes.

        Raises:
            UserError: the file does not have one of the names, or they are not in the order of the ids.
        """
        names = [category["name"] for category in self.dataset["categories"]]
        if unknown := [name for name in cat_names if name not in names]:
            raise UserError(
                f"{self._path} has no category '{unknown[0]}', which the class list has{nearest(unknown[0], names)}"
            )
        if (ordered := [name for name in names if name in cat_names]) != list(cat_names):
            order = f"the order of the category ids of {self._path}"
            raise UserError(f"the class list is not in {order}; write it as {', '.join(ordered)}")
        return super().get_cat_ids(cat_names, **mmdet)


@DATASETS.register_module()
class Coco(CocoDataset):
    """Is mmdet's COCO, with annotations and files checked before training begins.

    Raises:
        UserError: a file or folder is missing, or classes and annotations do not fit together.
    """

    COCOAPI = CheckedCOCO

    def __init__(self, **mmdet: Any) -> None:
        check_arguments(mmdet)
        super().__init__(**mmdet)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Returns mmdet's list of images after it has checked that all of them exist."""
        folder = self.data_prefix.get("img") or "."
        if not os.path.isdir(folder):
            raise UserError(f"there is no folder {folder}; set data_root and data_prefix to the data set's folders")
        images: list[dict[str, Any]] = super().load_data_list()
        lacking = [image["img_path"] for image in images if not os.path.isfile(image["img_path"])]
        if lacking:
            raise UserError(
                f"{len(lacking)} of the {len(images)} images in {self.ann_file} are missing, first {lacking[0]}; "
                "add them or set data_prefix to their folder"
            )
        return images


@DATASETS.register_module()
class DetDataset(Coco):
    """Reads images from a folder and a COCO annotation file, with any class list.

    Args:
        classes: names of the classes in the order of their category ids, or a file with them; see
            `rmoe.data.classes.class_list`. Annotations of other categories are left out.
        num_classes: number of the model's classes.
        **mmdet: arguments of mmdet's `CocoDataset`.

    Raises:
        UserError: see `Coco`; or the class list has another number of names.
    """

    def __init__(self, classes: str | Sequence[str], num_classes: int, **mmdet: Any) -> None:
        check_arguments({"classes": classes, "num_classes": num_classes})
        super().__init__(metainfo={"classes": class_list(classes, num_classes).names}, **mmdet)


@TRANSFORMS.register_module()
class LoadObjects(LoadAnnotations):
    """Is mmdet's LoadAnnotations, and checks the image's size and that every object has a mask if masks are needed."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds the objects to `results`; raises UserError if the image has another size or an object lacks its mask."""
        path, size = results["img_path"], (results["height"], results["width"])
        if results["ori_shape"] != size:
            raise UserError(
                f"{path} is {results['ori_shape']}, by its annotation file {size} (rows, columns); mend either"
            )
        if self.with_mask and not all("mask" in instance for instance in results["instances"]):
            raise UserError(f"{path} has an object without a segmentation; add it, or train a detector of boxes alone")
        return super().transform(results)


@METRICS.register_module()
class CocoMetric(MMDetCocoMetric):
    """Is mmdet's CocoMetric, by pycocotools, and returns 0 for all values if nothing at all was detected.

    mmdet's returns no values then, and the logs would repeat those of the evaluation before.

    Args:
        ann_file: the validation set's annotations.
        **mmdet: arguments of mmdet's `CocoMetric`.

    Raises:
        UserError: the annotations are faulty, or lack masks and masks are to be evaluated.
    """

    metrics: list[str]

    def __init__(self, ann_file: str, **mmdet: Any) -> None:
        super().__init__(**mmdet)
        self._class_precision: dict[str, dict[str, float]] = {}
        self._coco_api = CheckedCOCO(ann_file)
        lacking = [one["id"] for one in self._coco_api.dataset["annotations"] if not one.get("segmentation")]
        if "segm" in self.metrics and lacking:
            raise UserError(
                f"{ann_file} has {len(lacking)} annotations without a segmentation, first {lacking[0]}; add them, or "
                "evaluate boxes alone: val_evaluator.metric=bbox"
            )

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Returns mmdet's values, and 0 for each that it leaves out."""
        found: dict[str, float] = {}
        kinds = self.metrics
        for kind in kinds:  # one by one: mmdet has one name for a class's boxes and its masks
            self.metrics = [kind]
            one = super().compute_metrics(results)
            found |= one
            precision = {name: one.get(f"{name}_precision", 0.0) for name in self.dataset_meta["classes"]}
            self._class_precision[kind] = precision
        self.metrics = kinds
        names = [f"{metric}_{item}" for metric in self.metrics if metric in ("bbox", "segm") for item in _ITEMS]
        if self.classwise:
            names += [f"{name}_precision" for name in self.dataset_meta["classes"]]
        return {**dict.fromkeys(names, 0.0), **found}

    def class_values(self) -> dict[str, dict[str, float]]:
        """Returns AP of each class in percent by what was evaluated last, "bbox AP" and "segm AP"; it is empty without
        `classwise`, and NaN for a class that the annotations do not have.
        """
        kinds = self._class_precision if self.classwise else {}
        return {
            name: {f"{kind} AP": 100 * float(values[name]) for kind, values in kinds.items()}
            for name in (self.dataset_meta["classes"] if kinds else ())
        }


def majority_ap(train: CocoDataset, val: CocoDataset) -> dict[str, float]:
    """Returns {"box AP": …, "mask AP": …} in percent, by pycocotools, of answering one object for every image of
    `val`: it covers the image and has the class with most objects in `train`. Where an object of `val` has no mask
    there is no mask AP.
    """
    objects = CheckedCOCO(train.ann_file)
    names = {category["id"]: category["name"] for category in objects.dataset["categories"]}
    counts = Counter(names[one["category_id"]] for one in objects.dataset["annotations"])
    commonest = max(val.metainfo["classes"], key=lambda name: counts[name])
    truth = CheckedCOCO(val.ann_file)
    (category,) = truth.get_cat_ids([commonest])
    answers = []
    for image in truth.dataset["images"]:
        width, height = image["width"], image["height"]
        whole = encode(np.ones((height, width), np.uint8, order="F"))
        box = [0, 0, width, height]
        answers.append(
            {"image_id": image["id"], "category_id": category, "score": 1.0, "bbox": box, "segmentation": whole}
        )
    kinds = {"box AP": "bbox"}
    if all(one.get("segmentation") for one in truth.dataset["annotations"]):
        kinds["mask AP"] = "segm"
    found = {}
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for metric, kind in kinds.items():
            evaluation = COCOeval(truth, truth.loadRes(answers), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            found[metric] = 100 * max(float(evaluation.stats[0]), 0.0)  # -1: no object at all
    return found


def made_up_objects(height: int, width: int, objects: int = 8) -> DetDataSample:
    """Makes a data sample with random boxes and masks for measurements; COCO's images have 7 objects on average."""
    size = torch.tensor([width, height])
    corners = torch.rand(objects, 2) * size * 0.6
    boxes = torch.cat([corners, corners + size * (0.1 + 0.3 * torch.rand(objects, 2))], 1)
    masks = np.zeros((objects, height, width), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    place = dict.fromkeys(("img_shape", "ori_shape", "batch_input_shape"), (height, width))
    sample = DetDataSample(metainfo=place)
    truth = {"bboxes": boxes, "labels": torch.zeros(objects).long(), "masks": BitmapMasks(masks, height, width)}
    sample.gt_instances, sample.ignored_instances = InstanceData(**truth), InstanceData(bboxes=torch.zeros(0, 4))
    return sample
