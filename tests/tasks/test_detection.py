"""Tests detection: the checks of annotations, the metric, mmcv's operations and schedules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcv.ops import RoIAlign, modulated_deform_conv2d, nms
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, PARAM_SCHEDULERS, init_default_scope
from PIL import Image
from pycocotools import mask as rle
from torchvision.ops import roi_align as torchvision_roi_align

import rmoe.tasks.detection  # registers its classes
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "rmoe" / "configs"
COCO = CocoDataset.METAINFO["classes"]
THINGS = ("dog", "cat")
LOAD = [{"type": "rmoe.LoadImage"}, {"type": "rmoe.LoadObjects", "with_mask": True}, {"type": "PackDetInputs"}]
ROWS, COLUMNS = 48, 64
SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("mmdet")


def instances(classes: tuple[str, ...] = THINGS) -> dict[str, Any]:
    """Annotates two images, each with an object of the first and one of the last class (run lengths, polygon)."""
    left = np.zeros((ROWS, COLUMNS), dtype=np.uint8, order="F")
    left[8:40, 4:30] = 1
    code = rle.encode(left)
    masks = [{"size": code["size"], "counts": code["counts"].decode()}, [[34, 10, 60, 10, 60, 40, 34, 40]]]
    boxes = [[4, 8, 26, 32], [34, 10, 26, 30]]
    ids = [3, 3 + len(classes) - 1]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": ROWS, "width": COLUMNS} for i in (1, 2)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=3)],
        "annotations": [
            {
                "id": 2 * image + one,
                "image_id": image,
                "category_id": ids[one],
                "bbox": boxes[one],
                "area": boxes[one][2] * boxes[one][3],
                "segmentation": masks[one],
                "iscrowd": 0,
            }
            for image in (1, 2)
            for one in (0, 1)
        ],
    }


def write(root: Path, content: Mapping[str, Any]) -> Path:
    """Writes the data set in COCO's layout, with the same content for training and validation."""
    (root / "annotations").mkdir(exist_ok=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            pixels = np.full((image["height"], image["width"], 3), 60, dtype=np.uint8)
            pixels[8:40, 4:30] = (200, 40, 40)
            Image.fromarray(pixels).save(root / split / image["file_name"])
    return root


def dataset(root: Path, **changed: Any) -> Any:
    config = {
        "type": "rmoe.DetDataset",
        "classes": THINGS,
        "num_classes": 2,
        "data_root": str(root),
        "ann_file": "annotations/instances_train2017.json",
        "data_prefix": {"img": "train2017"},
        "pipeline": LOAD,
    }
    return DATASETS.build({**config, **changed})


def test_the_baseline_is_the_commonest_class_all_over_the_image(tmp_path):
    content = instances()
    for one in content["annotations"]:
        if one["category_id"] == 3:  # 5/6 of the image: right at 7 of the 10 thresholds, 0.5 to 0.8
            one |= {"bbox": [0, 0, 64, 40], "area": 2560, "segmentation": [[0, 0, 64, 0, 64, 40, 0, 40]]}
    del content["annotations"][-1]  # dogs are the commoner
    val = {"ann_file": "annotations/instances_val2017.json", "data_prefix": {"img": "val2017"}}
    train = dataset(write(tmp_path, content))
    found = rmoe.tasks.detection.majority_ap(train, dataset(tmp_path, **val))
    assert found == pytest.approx({"box AP": 35.0, "mask AP": 35.0})  # and 0 for cats
    del content["annotations"][0]["segmentation"]
    write(tmp_path, content)
    assert rmoe.tasks.detection.majority_ap(train, dataset(tmp_path, **val)) == pytest.approx({"box AP": 35.0})


def metric(root: Path, **changed: Any) -> Any:
    file = str(root / "annotations" / "instances_val2017.json")
    built = METRICS.build(
        {"type": "rmoe.CocoMetric", "ann_file": file, "metric": ["bbox", "segm"], "classwise": True, **changed}
    )
    built.dataset_meta = {"classes": THINGS}
    return built


def answers(labels: list[int]) -> list[dict[str, Any]]:
    """Returns for each of the two images the two true boxes and masks with these labels."""
    masks = torch.zeros(2, ROWS, COLUMNS, dtype=torch.bool)
    masks[0, 8:40, 4:30] = True
    masks[1, 10:40, 34:60] = True
    boxes = torch.tensor([[4.0, 8, 30, 40], [34, 10, 60, 40]])[: len(labels)]
    found = {
        "bboxes": boxes,
        "scores": torch.tensor([0.9, 0.8])[: len(labels)],
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
    found["masks"] = masks[: len(labels)]
    return [{"img_id": i, "ori_shape": (ROWS, COLUMNS), "pred_instances": found} for i in (1, 2)]


def evaluated(measure: Any, labels: list[int]) -> dict[str, float]:
    measure.process({}, answers(labels))
    return measure.evaluate(2)


def test_reads_objects_and_masks(tmp_path):
    item = dataset(write(tmp_path, instances()))[1]
    truth = item["data_samples"].gt_instances
    assert item["inputs"].shape == (3, ROWS, COLUMNS)
    assert (truth.labels.tolist(), truth.bboxes.tensor[1].tolist()) == ([0, 1], [34, 10, 60, 40])
    assert truth.masks.masks[0].sum() == 26 * 32


def test_class_lists(tmp_path):
    write(tmp_path, instances())
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    for classes in (str(tmp_path / "classes.txt"), str(tmp_path / "annotations" / "instances_val2017.json")):
        assert dataset(tmp_path, classes=classes).metainfo["classes"] == THINGS
    cats = dataset(tmp_path, classes=["cat"], num_classes=1)
    assert cats[0]["data_samples"].gt_instances.labels.tolist() == [0]

    def refused(message: str, classes: list[str]) -> None:
        with pytest.raises(UserError, match=message):
            dataset(tmp_path, classes=classes)

    refused("has no category 'wolf', which the class list has", ["dog", "wolf"])
    refused("not in the order of the category ids of .*; write it as dog, cat", ["cat", "dog"])
    refused("the class list has 1 names, num_classes is 2; make them equal", ["cat"])


def test_coco_itself_needs_no_class_list(tmp_path):
    write(tmp_path, instances(COCO))
    prefix, file = {"img": "val2017"}, "annotations/instances_val2017.json"
    built = DATASETS.build({"type": "rmoe.Coco", "data_root": str(tmp_path), "data_prefix": prefix, "ann_file": file})
    assert isinstance(built, CocoDataset)
    assert len(built.metainfo["classes"]) == 80
    assert [one["bbox_label"] for one in built.get_data_info(0)["instances"]] == [0, 79]


def test_categories_are_numbered_by_their_ids_whatever_their_order_in_the_file(tmp_path):
    content = instances()
    content["categories"].reverse()
    write(tmp_path, content)
    assert dataset(tmp_path)[0]["data_samples"].gt_instances.labels.tolist() == [0, 1]
    found = evaluated(metric(tmp_path), [0, 0])  # dogs are right, cats are taken for dogs
    assert (found["coco/dog_precision"], found["coco/cat_precision"]) == (1, 0)


def test_bad_annotations_and_files(tmp_path):
    def refused(message: str, **changed: Any) -> None:
        with pytest.raises(UserError, match=message) as raised:
            dataset(tmp_path, **changed)[0]
        assert "\n" not in str(raised.value)

    refused("there is no folder .*train2017; set data_root and data_prefix")
    content = instances()
    path = write(tmp_path, content) / "annotations" / "instances_train2017.json"
    refused("annotation file .*nothing.json cannot be read", ann_file="nothing.json")
    (tmp_path / "train2017" / "1.jpg").rename(tmp_path / "1.jpg")
    refused("1 of the 2 images in .* are missing, first .*train2017/1.jpg")
    Image.new("RGB", (ROWS, COLUMNS)).save(tmp_path / "train2017" / "1.jpg")
    refused(r"1.jpg is \(64, 48\), by its annotation file \(48, 64\) \(rows, columns\)")
    (tmp_path / "train2017" / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:200])
    refused("1.jpg is no readable image")
    content["annotations"][0]["bbox"] = [40, 8, 60, 20]
    path.write_text(json.dumps(content))
    refused(r"annotation 2 has the box \[40, 8, 60, 20\] in an image of 64 x 48 pixels; bbox is")
    path.write_text(json.dumps(content)[:-50])
    refused("is no whole JSON .*; it was cut short")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
def test_polygons_that_would_take_all_memory(tmp_path, number):
    content = instances()
    content["annotations"][1]["segmentation"][0][0] = number
    write(tmp_path, content)
    for use in (dataset, metric):
        with pytest.raises(UserError, match="finite|the polygon"):
            use(tmp_path)


def test_annotations_may_leave_out_iscrowd(tmp_path):
    content = instances()
    for one in content["annotations"]:
        del one["iscrowd"]
    assert evaluated(metric(write(tmp_path, content)), [0, 1])["coco/segm_mAP"] == 1


def test_boxes_and_masks_refer_to_the_stored_image(tmp_path):
    write(tmp_path, instances())
    image, exif = Image.new("RGB", (COLUMNS, ROWS)), Image.Exif()
    image.putpixel((0, 0), (255, 255, 255))
    exif[0x0112] = 6
    image.save(tmp_path / "train2017" / "1.jpg", "PNG", exif=exif)
    inputs = dataset(tmp_path)[0]["inputs"]
    assert inputs.shape == (3, ROWS, COLUMNS)
    assert inputs[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "changed", [{"num_classes": 0}, {"num_classes": True}, {"ann_file": 7}, {"data_prefix": {"img": 3}}]
)
def test_arguments_of_other_types(tmp_path, changed):
    with pytest.raises(UserError, match=f"{next(iter(changed))} is "):
        dataset(write(tmp_path, instances()), **changed)


def test_masks_are_needed_where_they_are_asked_for(tmp_path):
    content = instances()
    del content["annotations"][0]["segmentation"]
    write(tmp_path, content)
    with pytest.raises(
        UserError, match="1.jpg has an object without a segmentation; add it, or train a detector of boxes"
    ):
        dataset(tmp_path)[0]
    boxes = [LOAD[0], {"type": "rmoe.LoadObjects"}, LOAD[2]]
    assert len(dataset(tmp_path, pipeline=boxes)[0]["data_samples"].gt_instances) == 2
    with pytest.raises(
        UserError, match="has 1 annotations without a segmentation, first 2; add them, or evaluate boxes"
    ):
        metric(tmp_path)
    assert evaluated(metric(tmp_path, metric="bbox"), [0, 1])["coco/bbox_mAP"] == 1


def test_average_precision_by_hand(tmp_path):
    """Scores right boxes, masks and labels, and then the cats' right boxes with the dogs' label."""
    write(tmp_path, instances())
    right, half = evaluated(metric(tmp_path), [0, 1]), evaluated(metric(tmp_path), [0, 0])
    assert (right["coco/bbox_mAP"], right["coco/segm_mAP"]) == (1, 1)
    assert (half["coco/bbox_mAP"], half["coco/segm_mAP"]) == (0.5, 0.5)


def test_no_detection_at_all_scores_zero(tmp_path):
    measure = metric(write(tmp_path, instances()))
    before, after = evaluated(measure, [0, 1]), evaluated(measure, [])
    assert set(after) >= {key for key in before if "copypaste" not in key}
    assert set(after.values()) == {0.0}
    recall = evaluated(metric(tmp_path, metric="proposal_fast", classwise=False), [0, 1])
    assert set(recall) == {"coco/AR@100", "coco/AR@300", "coco/AR@1000"}  # it has no precision that could be 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mmcvs_operations_under_autocast(dtype):
    """Checks that they return the format that they got, and the values of float32."""
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 0, 4, 4], [0.0, 0, 4, 3.9], [4.0, 4, 7, 7]])
    scores = torch.tensor([0.5, 0.75, 0.25])
    maps, offsets, weights = torch.randn(1, 4, 8, 8), torch.randn(1, 18, 8, 8), torch.randn(4, 4, 3, 3)
    rois = torch.cat([torch.zeros(3, 1), boxes], dim=1)
    pooled, deformed = (
        RoIAlign(2)(maps, rois),
        modulated_deform_conv2d(maps, offsets, offsets[:, :9], weights, None, 1, 1, 1, 1, 1),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        assert nms(boxes.to(dtype), scores.to(dtype), 0.5)[1].tolist() == [1, 2]
        given = maps.to(dtype).requires_grad_()
        again = RoIAlign(2)(given, rois.to(dtype))
        deformed_again = modulated_deform_conv2d(
            given, offsets.to(dtype), offsets[:, :9].to(dtype), weights.to(dtype), None, 1, 1, 1, 1, 1
        )
    (again.sum() + deformed_again.sum()).backward()
    assert (again.dtype, deformed_again.dtype, given.grad.dtype) == (dtype, dtype, dtype)
    tolerance = {"atol": 0.1, "rtol": 0.05} if dtype != torch.float32 else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(again.float(), pooled, **tolerance)
    torch.testing.assert_close(deformed_again.float(), deformed, **tolerance)


def test_mmcvs_operations_read_a_pyramids_maps():
    """Checks maps in timm's order of memory; the operations assume the order B, C, H, W."""
    torch.manual_seed(0)
    maps = TimmPyramid("swin_tiny_patch4_window7_224", SWIN)(torch.randn(2, 3, 64, 64))
    rois = torch.tensor([[0.0, 3, 5, 40, 50], [1.0, 9, 2, 30, 60]])
    for level, stride in zip(maps, (4, 8, 16, 32), strict=True):
        pooled = RoIAlign(3, 1 / stride, 2)(level, rois)
        torch.testing.assert_close(pooled, torchvision_roi_align(level, rois, 3, 1 / stride, 2, aligned=True))


def test_the_published_schedules():
    config = Config.fromfile(FOLDER / "detection/mask_rcnn_swin_tiny_dense_coco_1x.py")
    optimizer = torch.optim.AdamW(
        [torch.zeros(1)], **{k: v for k, v in config.optim_wrapper.optimizer.items() if k != "type"}
    )
    assert optimizer.defaults["weight_decay"] == 0.05
    schedule = [PARAM_SCHEDULERS.build(dict(one, optimizer=optimizer)) for one in config.param_scheduler]
    rates = {}
    for step in range(config.train_cfg.max_iters):
        rates[step] = optimizer.param_groups[0]["lr"]
        for one in schedule:
            one.step()
    epoch = config.epoch
    assert rates[0] == pytest.approx(1e-7)
    assert rates[1000] == pytest.approx(1e-4)
    assert rates[8 * epoch - 1] == pytest.approx(1e-4)
    assert rates[8 * epoch] == pytest.approx(1e-5)
    assert rates[11 * epoch - 1] == pytest.approx(1e-5)
    assert rates[11 * epoch] == pytest.approx(1e-6)
    assert 16 * epoch == pytest.approx(117266, abs=16)
