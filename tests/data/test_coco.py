from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rmoe.data.coco import check_annotations, check_coco, read_annotations
from rmoe.errors import UserError


def content() -> dict[str, Any]:
    """Annotates 3 images of 8 x 6 pixels: a dog with a polygon, a cat and a crowd as run lengths, none."""
    run_lengths = {"size": [6, 8], "counts": [10, 5, 33]}
    boxed = {"bbox": [1, 1, 4, 3], "area": 12.0, "iscrowd": 0}
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": 6, "width": 8} for number in (1, 2, 3)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [[1, 1, 5, 1, 5, 4]], **boxed},
            {"id": 2, "image_id": 1, "category_id": 9, "segmentation": run_lengths, **boxed},
            {"id": 3, "image_id": 3, "category_id": 9, "segmentation": run_lengths, **boxed, "iscrowd": 1},
        ],
    }


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        for image in content()["images"]:
            Image.new("RGB", (8, 6)).save(tmp_path / split / image["file_name"])
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content()))
    return tmp_path


def only(problems):
    assert len(problems) == 1, problems
    assert "\n" not in problems[0].message
    return problems[0]


def test_a_sound_set_is_counted_and_its_empty_image_noted(root):
    report = check_coco(root)
    assert report.problems == []
    one = {"images": 3, "annotations": 3, "categories": 2, "images without annotations": 1, "crowds": 1}
    assert report.counts == {f"{split} {key}": n for split in ("train2017", "val2017") for key, n in one.items()}
    path = root / "annotations" / "instances_train2017.json"
    assert report.notes[0] == f"{path}: 1 of 3 images have no annotation; evaluated, not trained on"


def faulty(key: str, position: int, **changed: Any) -> dict[str, Any]:
    faulty = content()
    faulty[key][position] |= changed
    return faulty


RLE = {"size": [6, 9], "counts": "abc"}
SHORT = {"size": [6, 8], "counts": [1, 2]}


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (
            ("annotations", 0, {"bbox": [5, 1, 7, 3]}),
            "box-outside",
            "annotation 1 has the box [5, 1, 7, 3] in an image of 8 x 6",
        ),
        (("annotations", 0, {"bbox": [-3, 1, 4, 3]}), "box-outside", "the box [-3, 1, 4, 3]"),
        (
            ("annotations", 0, {"bbox": [1, 1, -2, 3]}),
            "box-format",
            "the box [1, 1, -2, 3]; bbox is [x, y, width, height]",
        ),
        (("annotations", 0, {"bbox": [1, 1, 2]}), "box-format", "the box [1, 1, 2]"),
        (("annotations", 0, {"bbox": [1, 1, 2, "3"]}), "box-format", "the box [1, 1, 2, '3']"),
        (("annotations", 0, {"bbox": [1, 1, 2, float("nan")]}), "box-format", "the box [1, 1, 2, nan]"),
        (("annotations", 1, {"id": 1}), "duplicate-id", "two annotations have the id 1"),
        (("images", 1, {"id": 1}), "duplicate-id", "two images have the id 1"),
        (("categories", 1, {"id": 7}), "duplicate-id", "two categories have the id 7"),
        (("categories", 1, {"name": " "}), "category-name", "category 9 has no name"),
        (("categories", 1, {"name": None}), "category-name", "category 9 has no name"),
        (("categories", 1, {"name": "dog"}), "category-name", "two categories are called 'dog'"),
        (("annotations", 0, {"image_id": 5}), "unknown-image", "annotation 1 has the image_id 5"),
        (("annotations", 0, {"category_id": 5}), "unknown-category", "annotation 1 has the category_id 5"),
        (
            ("annotations", 1, {"segmentation": RLE}),
            "mask-size",
            "annotation 2 has a mask of size [6, 9] in an image of 8 x 6",
        ),
        (("annotations", 1, {"segmentation": SHORT}), "mask-size", "annotation 2 has a mask whose runs do not add up"),
        (
            ("annotations", 1, {"segmentation": {"size": [6, 8], "counts": "\ud800"}}),  # which no encoding has
            "mask-size",
            "annotation 2 has a mask whose runs do not add up",
        ),
        (("annotations", 1, {"area": None}), "missing-key", "annotation 2 has area None"),
        (("images", 0, {"height": "6"}), "missing-key", "image 1 has height '6'"),
    ],
)
def test_faults_are_told_in_one_line(fault, kind, text):
    key, position, changed = fault
    problems = check_annotations(faulty(key, position, **changed), "a.json").problems
    problem = next(problem for problem in problems if problem.kind == kind)
    assert problem.message.startswith("a.json: ")
    assert "\n" not in problem.message
    assert text in problem.message
    assert len(problems) == 1 or kind == "duplicate-id"  # then something else has lost its image or category


def test_faults_of_one_kind_are_one_problem():
    wrong = content()
    for one in wrong["annotations"]:
        one["bbox"] = [0, 0, 80, 60]
    problem = only(check_annotations(wrong, "a.json").problems)
    assert problem.message == (
        "a.json: annotation 1 has the box [0, 0, 80, 60] in an image of 8 x 6 pixels (and 2 more); "
        "bbox is [x, y, width, height] in pixels within the image: mend or remove it"
    )


def test_what_official_annotations_hold_is_allowed():
    """Accepts boxes rounded over the edge by under a pixel, and objects of no height (train2017: 918 and 2206849)."""
    assert check_annotations(faulty("annotations", 0, bbox=[4.5, 0, 4.1, 6.02]), "a.json").problems == []
    report = check_annotations(faulty("annotations", 0, bbox=[1.5, 2, 1.03, 0.0], area=0.0), "a.json")
    assert report.problems == []
    assert report.notes[1] == "a.json: 1 of 3 annotations are smaller than a pixel; not trained on"


def test_entries_that_are_no_objects():
    problem = only(check_annotations({**content(), "images": ["a.jpg", "b.jpg"]}, "a.json").problems)
    assert problem.message.startswith("a.json: image number 0 is 'a.jpg' (and 1 more); an image has id, file_name")


def test_an_annotation_file_cut_short(root):
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:-40])
    problem = only(check_coco(root).problems)
    assert problem.kind == "annotation-file"
    assert f"annotation file {path} is no whole JSON" in problem.message
    assert problem.message.endswith("it was cut short or is something else: fetch it again")


@pytest.mark.parametrize("text", ["[]", '{"images": [], "annotations": []}', '{"images": {}}'])
def test_json_of_another_kind(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="has no list '.*'; a COCO file of instances is an object with the lists"):
        read_annotations(tmp_path / "a.json")


def test_missing_files(root, tmp_path):
    assert only(check_coco(root / "nowhere").problems).message.startswith(f"folder {root}/nowhere does not exist")
    (root / "val2017" / "2.jpg").unlink()
    problem = only(check_coco(root).problems)
    assert problem.kind == "missing-image"
    assert f"1 of 3 images are not in {root}/val2017: 2.jpg; add them" in problem.message
    (root / "annotations" / "instances_val2017.json").unlink()
    assert "has no instances_val*.json; put the val annotations there" in only(check_coco(root).problems).message
    (root / "train2017").rename(root / "train")
    assert [problem.kind for problem in check_coco(root).problems] == ["missing-folder", "annotation-file"]


def test_images_are_read(root):
    Image.new("RGB", (9, 6)).save(root / "train2017" / "1.jpg")
    (root / "train2017" / "2.jpg").write_bytes((root / "train2017" / "2.jpg").read_bytes()[:200])
    assert check_coco(root, full=False).problems == []
    size, unreadable = check_coco(root).problems
    assert f"image {root}/train2017/1.jpg is 9 x 6 pixels, its annotation file says 8 x 6 pixels" in size.message
    assert unreadable.kind == "unreadable"


def test_orientations_are_noted_and_not_followed(root):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (8, 6)).save(root / "train2017" / "1.jpg", exif=exif)
    report = check_coco(root)
    assert report.problems == []
    assert any(f"1 of 3 images ({root}/train2017/1.jpg) have an EXIF orientation" in note for note in report.notes)


def test_images_are_read_even_if_annotations_are_wrong(root):
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(faulty("annotations", 0, segmentation=[[1, 1, 5]])))
    (root / "train2017" / "2.jpg").write_bytes(b"")
    assert [problem.kind for problem in check_coco(root).problems] == ["mask-format", "unreadable"]


def test_splits_with_other_categories(root):
    other = faulty("categories", 0, name="wolf")
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(other))
    problem = only(check_coco(root).problems)
    assert problem.kind == "other-classes"
    assert f"the categories of train2017 and val2017 in {root} differ: ('7', 'dog'), ('7', 'wolf')" in problem.message
