"""COCO-style detection with mmdet: data sets of any class list whose faults are told in one line, a metric that says 0,
and mmcv's operations under mixed precision.

The models, heads, augmentations and the evaluation by pycocotools are mmdet's. Import this module (a config's
`custom_imports`) to use `rmoe.Coco`, `rmoe.DetDataset`, `rmoe.LoadObjects` and `rmoe.CocoMetric`.
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
from mmcv.ops.focal_loss import SigmoidFocalLossFunction
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
from mmcv.ops.nms import NMSop
from mmcv.ops.roi_align import RoIAlignFunction
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from pycocotools.mask import encode
from torch import Tensor

from rmoe.data.arguments import check_arguments
from rmoe.data.check import require
from rmoe.data.classes import class_list
from rmoe.data.coco import check_annotations, read_annotations
from rmoe.errors import UserError, nearest
from rmoe.registry import DATASETS, METRICS, TRANSFORMS

_ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


class CheckedCOCO(COCO):
    """mmdet's index of an annotation file, whose content is checked first.

    Categories are in the order of their ids: pycocotools evaluates them so, whatever their order in the file.
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
        """Ids of the categories called `cat_names`, in the same order, which mmdet takes for granted.

        Raises:
            UserError: a name that the file does not have, or another order than that of the ids.
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
    """mmdet's COCO, with annotations and files checked before training begins.

    Raises:
        UserError: a missing file or folder, classes or annotations that do not fit together.
    """

    COCOAPI = CheckedCOCO

    def __init__(self, **mmdet: Any) -> None:
        check_arguments(mmdet)
        super().__init__(**mmdet)

    def load_data_list(self) -> list[dict[str, Any]]:
        """See mmdet."""
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
    """Images in a folder and a COCO annotation file, with any class list.

    Args:
        classes: names of the classes in the order of their category ids, or a file with them; see
            `rmoe.data.classes.class_list`. Annotations of other categories are left out.
        num_classes: classes of the model.
        **mmdet: arguments of mmdet's `CocoDataset`.

    Raises:
        UserError: as `Coco`, or another number of classes.
    """

    def __init__(self, classes: str | Sequence[str], num_classes: int, **mmdet: Any) -> None:
        check_arguments({"classes": classes, "num_classes": num_classes})
        super().__init__(metainfo={"classes": class_list(classes, num_classes).names}, **mmdet)


@TRANSFORMS.register_module()
class LoadObjects(LoadAnnotations):
    """mmdet's LoadAnnotations, with the image's size checked, and that there are masks where they are asked for."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Raises UserError for an image of another size, or an object without a mask."""
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
    """mmdet's CocoMetric, by pycocotools, with which no detection at all scores 0 instead of nothing.

    Nothing would leave the values of the evaluation before in the logs.

    Args:
        ann_file: the validation set's annotations.
        **mmdet: arguments of mmdet's `CocoMetric`.

    Raises:
        UserError: annotations that cannot be used, or have no masks to compare with.
    """

    def __init__(self, ann_file: str, **mmdet: Any) -> None:
        super().__init__(**mmdet)
        self._coco_api = CheckedCOCO(ann_file)
        lacking = [one["id"] for one in self._coco_api.dataset["annotations"] if not one.get("segmentation")]
        if "segm" in self.metrics and lacking:
            raise UserError(
                f"{ann_file} has {len(lacking)} annotations without a segmentation, first {lacking[0]}; add them, or "
                "evaluate boxes alone: val_evaluator.metric=bbox"
            )

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """See mmdet."""
        found = super().compute_metrics(results)
        names = [f"{metric}_{item}" for metric in self.metrics for item in _ITEMS]
        if self.classwise:
            names += [f"{name}_precision" for name in self.dataset_meta["classes"]]
        return {**dict.fromkeys(names, 0.0), **found}


def majority_ap(train: CocoDataset, val: CocoDataset) -> dict[str, float]:
    """AP in percent, by pycocotools, of answering for every image of `val` one object all over it, of the class with
    most objects in `train`: {"box AP": …, "mask AP": …}.
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
    found = {}
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for metric, kind in (("box AP", "bbox"), ("mask AP", "segm")):
            evaluation = COCOeval(truth, truth.loadRes(answers), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            found[metric] = 100 * max(float(evaluation.stats[0]), 0.0)  # -1: no object at all
    return found


def made_up_objects(height: int, width: int, objects: int = 8) -> DetDataSample:
    """A data sample with boxes and masks at random places, to measure with; COCO's images have 7 objects on average."""
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


def _compute_in_float32(function: type[torch.autograd.Function]) -> None:
    """Under autocast, to bfloat16 say, lets an operation that mmcv has not got in that format take and give it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain_forward = torch.amp.custom_fwd(function.forward, device_type=device, cast_inputs=torch.float32)
    plain_backward = function.backward

    def forward(ctx: Any, first: Tensor, *rest: Any) -> Tensor:
        result = plain_forward(ctx, first, *rest)
        return result.to(first.dtype) if result.is_floating_point() else result

    def backward(ctx: Any, gradient: Tensor) -> Any:
        return plain_backward(ctx, gradient.float())

    function.forward, function.backward = staticmethod(forward), staticmethod(backward)  # type: ignore[method-assign]


for _function in (NMSop, RoIAlignFunction, ModulatedDeformConv2dFunction, SigmoidFocalLossFunction):
    _compute_in_float32(_function)
