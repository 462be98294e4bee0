"""Tests segmentation data: the checks of files, faults told in one line, and the baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from PIL import Image

from rmoe.errors import UserError
from rmoe.tasks.segmentation import label_maps, majority_miou

CLASSES = ("sky", "grass", "dog")
LOAD = [{"type": "rmoe.LoadImage"}, {"type": "rmoe.LoadLabels", "num_classes": 3}]


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("mmseg")


def write(root: Path, split: str, *label_rows: list[int]) -> Path:
    """Writes an image of 4 x 2 pixels for each row of label values, which fills both rows of its label map."""
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(label_rows):
        labels = np.array([row, row], dtype=np.uint8)
        Image.fromarray(np.full((2, 4, 3), 90, dtype=np.uint8)).save(root / f"images/{split}/{index}.jpg")
        Image.fromarray(labels).save(root / f"annotations/{split}/{index}.png")
    return root


def dataset(root: Path, split: str = "training", **changed: Any) -> BaseSegDataset:
    config = {
        "type": "rmoe.SegDataset",
        "classes": CLASSES,
        "num_classes": 3,
        "data_root": str(root),
        "data_prefix": {"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"},
        "reduce_zero_label": True,
        "pipeline": [*LOAD, {"type": "PackSegInputs"}],
    }
    return DATASETS.build({**config, **changed})


def test_reads_an_image_and_its_labels(tmp_path):
    item = dataset(write(tmp_path, "training", [0, 1, 2, 3]))[0]
    assert item["inputs"].shape == (3, 2, 4)
    assert item["data_samples"].gt_sem_seg.data.tolist() == [[[255, 0, 1, 2]] * 2]


def test_class_lists(tmp_path):
    write(tmp_path, "training", [1, 1, 1, 1])
    (tmp_path / "classes.txt").write_text("sky\ngrass\n\ndog\n")
    palette = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": CLASSES, "palette": palette, "isthing": [0, 0, 1]}))
    assert dataset(tmp_path, classes=str(tmp_path / "classes.txt")).metainfo["classes"] == CLASSES
    meta = dataset(tmp_path, classes=str(tmp_path / "classes.json")).metainfo
    assert (tuple(meta["classes"]), meta["palette"]) == (CLASSES, palette)


def test_mmsegs_own_data_sets_work_with_the_checks(tmp_path):
    write(tmp_path, "training", [0, 1, 150, 1])
    load = [{"type": "rmoe.LoadImage"}, {"type": "rmoe.LoadLabels", "num_classes": 150}, {"type": "PackSegInputs"}]
    prefix = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    for name in ("ADE20KDataset", "rmoe.ADE20K"):
        built = DATASETS.build({"type": name, "data_root": str(tmp_path), "data_prefix": prefix, "pipeline": load})
        assert isinstance(built, ADE20KDataset)
        assert len(built.metainfo["classes"]) == 150
        assert built[0]["data_samples"].gt_sem_seg.data.tolist() == [[[255, 0, 149, 0]] * 2]


def test_a_void_label_takes_one_of_the_values(tmp_path):
    """Of 8 bits 255 is void, and with reduce_zero_label 0 as well: 254 classes are left."""
    classes = [f"class {number}" for number in range(255)]
    write(tmp_path, "training", [0, 1, 2, 254])
    assert len(dataset(tmp_path, classes=classes, num_classes=255, reduce_zero_label=False)) == 1
    assert len(dataset(tmp_path, classes=classes[:254], num_classes=254)) == 1
    with pytest.raises(UserError, match="num_classes is 255; it is a whole number from 1 to 254"):
        dataset(tmp_path, classes=classes, num_classes=255)


def test_without_a_void_label(tmp_path):
    item = dataset(write(tmp_path, "training", [0, 1, 2, 255]), reduce_zero_label=False)[0]
    assert item["data_samples"].gt_sem_seg.data.tolist() == [[[0, 1, 2, 255]] * 2]
    write(tmp_path, "training", [0, 1, 3, 255])
    with pytest.raises(UserError, match="label value 3; allowed are 0 to 2 for the 3 classes and 255 for void"):
        dataset(tmp_path, reduce_zero_label=False)[0]


def test_a_label_above_the_class_count(tmp_path):
    with pytest.raises(
        UserError, match="training/0.png has the label value 7; allowed are 1 to 3 for .* 0 or 255 for void"
    ):
        dataset(write(tmp_path, "training", [0, 1, 2, 7]))[0]


def test_files_missing_or_broken(tmp_path):
    def refused(message: str, **changed: Any) -> None:
        with pytest.raises(UserError, match=message):
            dataset(tmp_path, **changed)[0]

    refused("there is no folder .*images/training")
    write(tmp_path, "training")
    refused("holds no image")
    write(tmp_path, "training", [1, 1, 1, 1], [2, 2, 2, 2])
    refused("class list has 2 names, num_classes is 3; make them equal", classes=("sky", "grass"))
    refused("the class list nowhere.txt cannot be read", classes="nowhere.txt")
    image, labels = tmp_path / "images/training/0.jpg", tmp_path / "annotations/training/0.png"
    whole_image, whole_labels = image.read_bytes(), labels.read_bytes()
    image.write_bytes(whole_image[:-30])
    refused("images/training/0.jpg is no readable image")
    image.write_bytes(whole_image)
    labels.write_bytes(whole_labels[:50])
    refused("annotations/training/0.png is no readable label map")
    Image.fromarray(np.ones((2, 5), dtype=np.uint8)).save(labels)
    refused(r"0.png is \(2, 5\), its image \(2, 4\)")
    Image.fromarray(np.ones((2, 4, 3), dtype=np.uint8)).save(labels)
    refused("one class index per pixel")
    labels.unlink()
    refused("1 of 2 images have no label map, first .*0.jpg: there is no .*0.png")


def test_a_data_set_without_label_maps(tmp_path):
    write(tmp_path, "training", [1, 1, 1, 1])
    for other in ({}, {"seg_map": "annotations/training"}):
        with pytest.raises(
            UserError, match=r"images/training/0.jpg has no label map, .* has no seg_map_path; set that"
        ):
            dataset(tmp_path, data_prefix={"img_path": "images/training", **other})[0]


def test_majority_by_hand(tmp_path):
    """Trains on class 1 (grass) on 5 of 7 pixels a row; to validate, it covers 3 of 8 pixels, sky 4, one is void."""
    write(tmp_path, "training", [1, 2, 2, 2], [0, 2, 2, 3])
    write(tmp_path, "validation", [0, 2, 2, 2], [1, 1, 1, 1])
    train, val = dataset(tmp_path), dataset(tmp_path, "validation")
    assert [labels.tolist() for labels in label_maps(val)] == [[[255, 1, 1, 1]] * 2, [[0, 0, 0, 0]] * 2]
    # sky 0 of 4, grass 3 of 7; "dog" is neither there nor answered and does not count
    assert majority_miou(train, val) == pytest.approx(100 * (0 + 3 / 7) / 2)


def test_pixels_of_more_than_8_bits_are_refused(tmp_path):
    write(tmp_path, "training", [1, 1, 1, 1])
    labels, image = tmp_path / "annotations/training/0.png", tmp_path / "images/training/0.jpg"
    Image.fromarray(np.full((2, 4), 257, dtype=np.uint16)).save(labels)  # 257 - 256 is class 1
    with pytest.raises(UserError, match="0.png has mode I;16; it must be 8-bit with one channel"):
        dataset(tmp_path)[0]
    write(tmp_path, "training", [1, 1, 1, 1])
    Image.fromarray(np.full((2, 4), 40_000, dtype=np.uint16)).save(image, "PNG")
    with pytest.raises(UserError, match="0.jpg has mode I;16, of more than 8 bits a channel"):
        dataset(tmp_path)[0]


def test_palettes_are_indices(tmp_path):
    write(tmp_path, "training", [0, 1, 2, 3])
    labels = Image.fromarray(np.array([[0, 1, 2, 3]] * 2, dtype=np.uint8))
    labels.putpalette([200, 10, 10] * 256)
    labels.save(tmp_path / "annotations/training/0.png")
    assert dataset(tmp_path)[0]["data_samples"].gt_sem_seg.data.tolist() == [[[255, 0, 1, 2]] * 2]


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_and_label_maps_are_read_as_they_are_stored(tmp_path, orientation):
    write(tmp_path, "training", [0, 1, 2, 3])
    image, exif = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "images/training/0.jpg", "PNG", exif=exif)
    inputs = dataset(tmp_path)[0]["inputs"]
    assert inputs.permute(1, 2, 0).flip(-1).tolist() == np.asarray(image).tolist()


@pytest.mark.timeout(20)
def test_links_that_lead_back_are_followed_once(tmp_path):
    write(tmp_path, "training", [1, 1, 1, 1])
    for kind in ("images", "annotations"):
        for name in ("a", "b"):
            (tmp_path / kind / "training" / name).symlink_to(".")
    assert [Path(one["img_path"]).name for one in dataset(tmp_path).load_data_list()] == ["0.jpg"]


def test_a_class_list_without_colours_may_be_json(tmp_path):
    write(tmp_path, "training", [1, 1, 1, 1])
    for text in ('["sky", "grass", "dog"]', '{"classes": ["sky", "grass", "dog"]}'):
        (tmp_path / "classes.json").write_text(text)
        assert dataset(tmp_path, classes=str(tmp_path / "classes.json")).metainfo["classes"] == CLASSES


def test_the_classes_of_the_data_set_count(tmp_path):
    """Covers a config that keeps the pipeline of its base, which was made for 150 classes."""
    write(tmp_path, "training", [0, 1, 2, 7])
    load = [{"type": "rmoe.LoadImage"}, {"type": "rmoe.LoadLabels", "num_classes": 150}, {"type": "PackSegInputs"}]
    with pytest.raises(UserError, match="label value 7; allowed are 1 to 3 for the 3 classes"):
        dataset(tmp_path, pipeline=load)[0]


@pytest.mark.parametrize(
    "changed", [{"num_classes": "3"}, {"data_root": 7}, {"classes": [1, 2, 3]}, {"data_prefix": {}}]
)
def test_arguments_of_other_types(tmp_path, changed):
    with pytest.raises(UserError, match=next(iter(changed)) if "classes" not in changed else "has the name 1"):
        dataset(write(tmp_path, "training", [1, 1, 1, 1]), **changed)
