from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rmoe.data.preflight import preflight
from rmoe.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    """Makes two images with label maps, the same images with COCO annotations, and a classification set."""
    for folder in ("images", "labels", "classified/train/ant", "classified/train/bee", "classified/val/ant"):
        (tmp_path / folder).mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (8, 6)).save(tmp_path / "images" / f"{number}.jpg")
        Image.new("L", (8, 6)).save(tmp_path / "labels" / f"{number}.png")
    box = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [1, 1, 4, 3], "area": 12}
    images = [{"id": number, "file_name": f"{number}.jpg", "height": 6, "width": 8} for number in (1, 2)]
    content = {"images": images, "categories": [{"id": 5, "name": "ant"}], "annotations": [box]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    (tmp_path / "classes.txt").write_text("sky\ndog\n")
    return tmp_path


def segmentation(root: Path, **changed: Any) -> dict[str, Any]:
    prefix = {"img_path": "images", "seg_map_path": "labels"}
    return {"type": "rmoe.SegDataset", "data_root": str(root), "data_prefix": prefix, **changed}


def detection(root: Path, **changed: Any) -> dict[str, Any]:
    prefix = {"img": "images"}
    return {"type": "CocoDataset", "data_root": str(root), "ann_file": "boxes.json", "data_prefix": prefix, **changed}


def folders(root: Path, **changed: Any) -> dict[str, Any]:
    return {"type": "rmoe.ImageFolder", "root": str(root / "classified"), "split": "val", **changed}


def config(dataset: dict[str, Any], loader: str = "train_dataloader") -> dict[str, Any]:
    return {loader: {"dataset": dataset}, "val_evaluator": None}


def refused(message: str, dataset: dict[str, Any]) -> None:
    for loader in ("train_dataloader", "val_dataloader"):
        with pytest.raises(UserError, match=message) as raised:
            preflight(config(dataset, loader))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [segmentation, detection, folders])
def test_sound_sets_pass(root, make):
    preflight(config(make(root)))
    repeated = {"type": "RepeatDataset", "dataset": {"type": "ConcatDataset", "datasets": [make(root), make(root)]}}
    preflight(config(repeated))


def test_a_config_without_data_is_left_to_others():
    preflight({})
    preflight({"train_dataloader": None, "val_dataloader": {"batch_size": 1}})


def test_inside_wrappers(root):
    missing = segmentation(root, data_prefix={"img_path": "pictures", "seg_map_path": "labels"})
    refused(f"folder {root}/pictures does not exist", {"type": "RepeatDataset", "dataset": missing})
    refused(
        f"folder {root}/pictures does not exist", {"type": "ConcatDataset", "datasets": [segmentation(root), missing]}
    )


def test_segmentation(root):
    (root / "labels" / "2.png").unlink()
    lacking = f"1 of 2 images in {root}/images have no label map in {root}/labels: 2.jpg"
    refused(lacking, segmentation(root))
    refused(lacking, segmentation(root, type="mmseg.ADE20KDataset"))
    refused(lacking, segmentation(root, type="Other", img_suffix=".jpg", seg_map_suffix=".png"))
    refused("images has no .tif image", segmentation(root, img_suffix=".tif"))
    refused(
        "class list .*classes.txt has 2 names, num_classes is 3",
        segmentation(root, classes=f"{root}/classes.txt", num_classes=3),
    )
    preflight(config(segmentation(root, type="CityscapesDataset")))  # its files are called otherwise
    preflight(config(segmentation(root, ann_file="list.txt")))  # names some of the files
    for other in ({}, {"seg_map_path": None}, {"seg_map": "labels"}):  # which is for the data set to judge
        preflight(config(segmentation(root, data_prefix={"img_path": "images", **other})))
    preflight(config(segmentation(root, data_prefix={"img_path": None, "seg_map_path": "labels"})))
    preflight(config(segmentation(root, data_root="s3://bucket")))
    preflight(config(segmentation(root, data_root="elsewhere", backend_args={"backend": "petrel"})))


def test_detection(root):
    refused(f"annotation file {root}/nothing.json cannot be read", detection(root, ann_file="nothing.json"))
    refused(f"folder {root}/pictures does not exist", detection(root, data_prefix={"img": "pictures"}))
    for kind in ("mmdet.CocoDataset", "rmoe.Coco", "rmoe.DetDataset"):
        (root / "boxes.json").write_text((root / "boxes.json").read_text().replace("[1, 1, 4, 3]", "[1, 1, 40, 3]"))
        refused(r"annotation 1 has the box \[1, 1, 40, 3\]", detection(root, type=kind))
    preflight(config(detection(root, type="LVISV1Dataset")))


@pytest.mark.parametrize("number", ["1e300", "1e400", "NaN"])
def test_polygons_are_looked_at_before_training(root, number):
    mask = f'"segmentation": [[1, 1, 4, 1, 4, {number}]], "area"'
    (root / "boxes.json").write_text((root / "boxes.json").read_text().replace('"area"', mask))
    refused(f"{root}/boxes.json.*(finite|polygon)", detection(root))


def test_detection_without_its_images(root):
    (root / "images" / "2.jpg").unlink()
    refused(f"1 of 2 images are not in {root}/images: 2.jpg", detection(root))


def test_image_folders(root):
    refused(f"folder {root}/classified/test does not exist", folders(root, split="test"))
    refused("folder nowhere/train does not exist", {**folders(root), "root": "nowhere"})
