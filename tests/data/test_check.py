from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe.data.check import (
    check_ade20k,
    check_class_list,
    check_image_folder,
    check_imagenet,
    check_segmentation,
    require,
)
from rmoe.data.classes import class_list
from rmoe.errors import UserError

NAMES = [f"ADE_{number}" for number in range(5)]


@pytest.fixture
def root(tmp_path) -> Path:
    """Writes a sound data set of ADE20K's layout with 5 scenes in each split and 3 classes."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number, name in enumerate(NAMES):
            labels = np.full((8, 6), number % 4, dtype=np.uint8)
            labels[0, 0] = 255
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"{name}.png")
            Image.new("RGB", (6, 8)).save(tmp_path / "images" / split / f"{name}.jpg")
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["sky", "dog", "cat"]}))
    return tmp_path


def check(root: Path, **options):
    options = {"num_classes": 3, "reduce_zero_label": True, "full": True} | options
    return check_segmentation(root / "images" / "training", root / "annotations" / "training", **options).problems


def only(problems):
    assert len(problems) == 1, problems
    assert "\n" not in problems[0].message
    return problems[0]


def test_a_sound_set_has_no_problem(root):
    assert check(root) == []
    assert check_ade20k(root).problems == []
    assert check(root, num_classes=4, reduce_zero_label=False) == []
    require([])


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_missing_folder(root, kind):
    folder = root / kind / "training"
    folder.rename(root / "elsewhere")
    problem = only(check(root, full=False))
    assert problem.kind == "missing-folder"
    assert problem.message == f"folder {folder} does not exist; correct the path, or put the data set there"


def test_a_file_is_no_folder(root):
    problem = only(check_image_folder(root / "classes.json").problems)
    assert "is a file, not a folder" in problem.message


def test_folder_without_images(root):
    assert only(check(root, full=False, img_suffix=".jpeg")).kind == "no-images"


def test_images_without_label_maps_are_counted_and_the_first_named(root):
    for name in NAMES[1:]:
        (root / "annotations" / "training" / f"{name}.png").unlink()
    problem = only(check(root, full=False))
    assert problem.kind == "image-without-label-map"
    assert "4 of 5 images in" in problem.message
    assert "ADE_1.jpg, ADE_2.jpg, ADE_3.jpg, …; add the .png files or remove the images" in problem.message


def test_label_maps_without_image(root):
    (root / "images" / "training" / "ADE_2.jpg").unlink()
    problem = only(check(root, full=False))
    assert problem.kind == "label-map-without-image"
    assert "1 of 5 label maps in" in problem.message
    assert "ADE_2.png; add the .jpg files or remove the label maps" in problem.message


def test_folders_within_folders_are_paired_by_relative_path(root):
    for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
        inner = root / kind / "training" / "city"
        inner.mkdir()
        (root / kind / "training" / f"ADE_0{suffix}").rename(inner / f"ADE_0{suffix}")
    assert check(root) == []


@pytest.mark.parametrize(("kind", "suffix"), [("images", ".jpg"), ("annotations", ".png")])
def test_truncated_file(root, kind, suffix):
    path = root / kind / "training" / f"ADE_1{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (8, 6), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert check(root, full=False) == []
    problem = only(check(root))
    assert problem.kind == "unreadable"
    assert problem.path == str(path)
    assert f"{path} is no readable {'image' if kind == 'images' else 'label map'} (" in problem.message


def test_file_that_is_no_image(root):
    path = root / "images" / "training" / "ADE_3.jpg"
    path.write_text("<html>404</html>")
    assert only(check(root)).kind == "unreadable"


def test_label_value_above_the_class_count(root):
    path = root / "annotations" / "training" / "ADE_1.png"
    Image.fromarray(np.full((8, 6), 9, dtype=np.uint8)).save(path)
    problem = only(check(root))
    assert problem.kind == "label-value"
    allowed = "with 3 classes it may hold 0 (void), 1 to 3 and 255 (ignored): mend it or num_classes"
    assert problem.message == f"label map {path} has the value 9; {allowed}"
    assert "0 to 7 and 255" in only(check(root, num_classes=8, reduce_zero_label=False)).message


def test_zero_based_label_maps_may_not_hold_the_class_count(root):
    problem = only(check(root, reduce_zero_label=False))
    assert problem.path == str(root / "annotations" / "training" / "ADE_3.png")
    assert "has the value 3; with 3 classes it may hold 0 to 2 and 255" in problem.message


def test_label_map_of_another_size(root):
    Image.new("L", (7, 8)).save(root / "annotations" / "training" / "ADE_1.png")
    problem = only(check(root))
    assert problem.kind == "size"
    assert "is 7x8 pixels, its image 6x8" in problem.message


def test_label_map_of_colours(root):
    Image.new("RGB", (6, 8)).save(root / "annotations" / "training" / "ADE_1.png")
    problem = only(check(root))
    assert problem.kind == "mode"
    assert "has mode RGB; it must be 8-bit with one channel (L or P)" in problem.message


def test_palette_label_maps_are_read_as_indices(root):
    path = root / "annotations" / "training" / "ADE_1.png"
    labels = Image.fromarray(np.full((8, 6), 3, dtype=np.uint8))
    labels.putpalette([200, 10, 10] * 256)
    labels.save(path)
    assert Image.open(path).mode == "P"
    assert check(root) == []


@pytest.mark.parametrize("value", [257, 65_535])
def test_label_maps_of_16_bits_are_refused(root, value):
    Image.fromarray(np.full((8, 6), value, dtype=np.uint16)).save(root / "annotations" / "training" / "ADE_1.png")
    problem = only(check(root))
    assert problem.kind == "mode"
    assert "has mode I;16; it must be 8-bit with one channel (L or P)" in problem.message


def test_images_of_16_bits_are_refused(root):
    Image.fromarray(np.full((8, 6), 40_000, np.uint16)).save(root / "images" / "training" / "ADE_1.jpg", "PNG")
    problem = only(check(root))
    assert problem.kind == "mode"
    assert "has mode I;16, of more than 8 bits a channel" in problem.message


def test_orientations_are_counted_and_not_followed(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "images" / "training" / "ADE_1.jpg"
    Image.new("RGB", (6, 8)).save(path, exif=exif)
    report = check_ade20k(root)
    assert report.problems == []
    assert f"1 of 5 images ({path}) have an EXIF orientation, which is not followed" in report.notes[0]
    Image.new("RGB", (8, 6)).save(path, exif=exif)  # turned, it would be as large as its label map
    assert only(check_ade20k(root).problems).kind == "size"


@pytest.mark.timeout(20)
def test_links_that_lead_back_are_followed_once(root, folder):
    for place in (root / "images" / "training", root / "annotations" / "training", folder / "train" / "cat"):
        for name in ("a", "b"):
            (place / name).symlink_to(".")
    assert check_ade20k(root).problems == []
    for name in ("a", "b"):
        (folder / "train" / name).symlink_to(".")
    report = check_imagenet(folder)
    assert report.problems == []
    assert report.counts["train images"] == 2


def test_a_link_to_nowhere_is_no_image(folder):
    (folder / "train" / "cat" / "2.jpg").symlink_to("nowhere.jpg")
    assert only(check_imagenet(folder).problems).kind == "unreadable"


def test_images_with_another_suffix_are_found_and_noted(root):
    for path in (root / "images").rglob("*.jpg"):
        path.rename(path.with_suffix(".webp"))
    report = check_ade20k(root)
    assert report.problems == []
    assert "the data set in the config needs img_suffix='.webp'" in report.notes[0]


def test_require_raises_one_line():
    with pytest.raises(UserError, match=r"^folder /nowhere/a does not exist; .* \(and 1 more problems\)$"):
        require(check_segmentation("/nowhere/a", "/nowhere/b", 3).problems)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.json", '{"classes": ["sky", "dog"]}'),
        ("classes.json", '["sky", "dog"]'),
        ("classes.txt", "sky\n\ndog\n"),
        ("instances.json", '{"images": [], "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "sky"}]}'),
        ("objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t5\t1\t1\tsky\n2\t0.1\t5\t1\t0\tdog\n"),
    ],
)
def test_class_lists(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert class_list(tmp_path / name).names == ("sky", "dog")
    assert check_class_list(tmp_path / name, 2) == []
    problem = only(check_class_list(tmp_path / name, 3))
    assert "has 2 names, num_classes is 3; make them equal" in problem.message


@pytest.mark.parametrize(
    "text",
    ['{"names": []}', '["sky"', '{"classes": 3}', '["sky", 1]', '{"categories": [{"id": 1}]}', '{"categories": 3}'],
)
def test_unreadable_class_lists(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    problem = only(check_class_list(tmp_path / "classes.json", 2))
    assert problem.kind == "class-list"
    assert "give JSON or text, one name a line" in problem.message


def test_what_is_there_is_counted(root):
    report = check_ade20k(root)
    found = {"images": 5, "label maps": 5, "lowest label": 0, "highest label": 3, "empty label maps": 2}
    assert report.counts == {"classes": 3} | {
        f"{s} {key}": n for s in ("training", "validation") for key, n in found.items()
    }
    void = [root / "annotations" / "validation" / f"ADE_{number}.png" for number in (0, 4)]
    assert report.notes[1] == f"2 of 5 label maps hold nothing but void: {void[0]}, {void[1]}"


def test_the_official_numbers_are_known(root):
    (root / "classes.json").unlink()
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.1\tsky\n2\t0.1\tdog\n3\t0.1\tcat\n")
    report = check_ade20k(root, full=False)
    assert report.problems == []
    assert report.notes == [
        "5 training images; the official set has 20210",
        "5 validation images; the official set has 2000",
    ]


@pytest.mark.parametrize("trace", ["images/ADE/training/urban/street/ADE_train_1_seg.png", "index_ade20k.pkl"])
def test_the_wrong_archive_of_ade20k_is_named(tmp_path, trace):
    (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / trace).write_bytes(b"")
    problem = only(check_ade20k(tmp_path).problems)
    assert problem.kind == "wrong-archive"
    assert "is the full ADE20K" in problem.message
    assert problem.message.endswith("fetch SceneParse150, ADEChallengeData2016.zip, instead")


def test_the_full_ade20k_of_2016(tmp_path):
    scene = tmp_path / "images" / "training" / "a" / "abbey"
    scene.mkdir(parents=True)
    (scene / "ADE_train_00000001_seg.png").write_bytes(b"")
    assert only(check_ade20k(tmp_path).problems).kind == "wrong-archive"


def test_missing_class_list(root):
    assert "No such file" in only(check_class_list(root / "names.txt", 2)).message
    (root / "classes.json").unlink()
    assert "--num-classes" in only(check_ade20k(root).problems).message
    assert check_ade20k(root, num_classes=3).problems == []


@pytest.fixture
def folder(tmp_path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "1.JPEG")
    return tmp_path


def test_a_sound_image_folder_has_no_problem(folder):
    assert check_image_folder(folder / "train", full=True).problems == []
    assert check_imagenet(folder).problems == []


def test_image_folder_problems(folder):
    assert only(check_image_folder(folder / "test").problems).kind == "missing-folder"
    (folder / "train" / "bird").mkdir()
    problem = only(check_image_folder(folder / "train").problems)
    assert problem.kind == "empty-class"
    assert f"class folder {folder / 'train' / 'bird'} has no image" in problem.message
    assert [found.kind for found in check_imagenet(folder).problems] == ["empty-class", "other-classes"]
    assert "1 classes are in only one of" in check_imagenet(folder).problems[1].message


def test_images_outside_class_folders(folder):
    problems = check_image_folder(folder / "train" / "cat").problems
    assert [problem.kind for problem in problems] == ["stray-file", "no-images"]
    assert "put each into the folder of its class" in problems[0].message


def test_truncated_image_in_a_class_folder(folder):
    path = folder / "train" / "dog" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:100])
    assert check_image_folder(folder / "train").problems == []
    assert only(check_image_folder(folder / "train", full=True).problems).path == str(path)
