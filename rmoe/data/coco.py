"""Checks data sets in COCO's layout: ROOT/annotations/instances_SPLIT.json and the images in ROOT/SPLIT."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmoe.data.check import ImageRead, Problem, Report, first_few, in_threads, missing_folder, try_image
from rmoe.data.coco_schema import covers, shown, wrong_fields
from rmoe.data.files import list_folder, reason
from rmoe.data.images import MOST_PIXELS
from rmoe.errors import UserError

_LISTS = ("images", "annotations", "categories")
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
_OFFICIAL = {"train2017": 118287, "val2017": 5000}  # images of the official set
_CLASSES = 80  # of the official set
_SLACK = 1.0  # pixels by which a box may reach over its image, since COCO's own boxes are rounded
_KINDS = {"name": "category-name", "bbox": "box-format", "segmentation": "mask-format", "file_name": "file-name"}
_ADVICE = {
    "missing-key": "an image has id, file_name, height and width, an annotation has id, image_id, category_id, bbox "
    "and area, a category has id and name: add what is missing; ids and sizes are whole numbers",
    "empty-list": "there is nothing to train on or to evaluate: add images, categories and annotations",
    "file-name": "file_name is the image's path within the folder of the images, without '..': mend it",
    "image-size": f"an image has at most {MOST_PIXELS} pixels: cut it into tiles",
    "duplicate-id": "ids are unique among the images, among the annotations and among the categories: renumber them",
    "category-name": "every category has a name of its own: add or change it",
    "unknown-image": "image_id is the id of one of the images: add the image or remove the annotation",
    "unknown-category": "category_id is the id of one of the categories: add the category or remove the annotation",
    "box-format": "bbox is [x, y, width, height] in pixels, four finite numbers, no size negative: mend it",
    "box-outside": "bbox is [x, y, width, height] in pixels within the image: mend or remove it",
    "mask-format": "segmentation is a list of polygons [x, y, x, y, …], each of an even count of at least 6 finite "
    "numbers, or run lengths {size: [height, width], counts: whole numbers from 0 or text}: mend or remove it",
    "mask-outside": "a polygon's coordinates are pixels of its image, or a little outside: mend or remove it",
    "mask-size": "a mask's run lengths have its image's [height, width] and cover all of it: mend or remove it",
}


def check_coco(root: str | Path, full: bool = True) -> Report:
    """Checks a whole data set of COCO's layout.

    Args:
        full: read every image as well.
    """
    root = Path(root)
    if not os.path.isdir(root / "annotations"):
        return Report([missing_folder(root / "annotations" if os.path.isdir(root) else root)])
    report, categories = Report(), {}
    for kind in ("train", "val"):
        names = fnmatch.filter(list_folder(root / "annotations")[1], f"instances_{kind}*.json")
        files = [root / "annotations" / name for name in names]
        if not files:
            found = f"{root}/annotations has no instances_{kind}*.json"
            report.problems.append(Problem("annotation-file", str(root), f"{found}; put the {kind} annotations there"))
        for path in files:
            split = path.stem.removeprefix("instances_")
            try:
                content = read_annotations(path)
            except UserError as error:
                report.problems.append(Problem("annotation-file", str(path), str(error)))
                continue
            report.add(checked := check_annotations(content, path), split)
            report.add(check_images(content, root / split, full), split)
            if len(content["categories"]) == _CLASSES:
                report.compare(f"{split} images", _OFFICIAL.get(split))
            if not checked.problems:
                categories[split] = {(str(one["id"]), one["name"]) for one in content["categories"]}
    first = next(iter(categories), "")
    for split, pairs in categories.items():
        if other := sorted(map(str, pairs ^ categories[first])):
            found = f"the categories of {first} and {split} in {root} differ: {first_few(other)}"
            report.problems.append(Problem("other-classes", str(root), f"{found}; both need the same ids and names"))
    return report


def read_annotations(path: str | Path) -> dict[str, Any]:
    """Returns the content of a COCO annotation file.

    Raises:
        UserError: the file is missing, is no whole JSON, holds other content, a number that is not finite, or a key
            twice in one object.
    """

    def refuse(constant: str) -> None:
        raise UserError(f"annotation file {path} holds {constant}; numbers in it are finite: mend or remove them")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
            raise UserError(f"annotation file {path} has the key {shown(twice)} twice in one object; keep one of them")
        return content

    try:
        content = json.loads(Path(path).read_bytes(), parse_constant=refuse, object_pairs_hook=unique)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read ({reason(error)}); correct the path") from None
    except (ValueError, RecursionError) as error:
        found = f"annotation file {path} is no whole JSON ({reason(error)})"
        raise UserError(f"{found}; it was cut short or is something else: fetch it again") from None
    lists = content if isinstance(content, dict) else {}
    lacking = [key for key in _LISTS if not isinstance(lists.get(key), list)]
    if lacking:
        found = f"annotation file {path} has no list '{lacking[0]}'"
        raise UserError(f"{found}; a COCO file of instances is an object with the lists {', '.join(_LISTS)}")
    return lists


def check_annotations(content: Mapping[str, Any], path: str | Path) -> Report:
    """Checks what `read_annotations` returned: all faults of one kind become one problem, which names the first.

    Images without objects are allowed, and so are objects smaller than a pixel; the report notes how many there are.
    """
    faults, counts, notes = _Faults(), {key: len(content[key]) for key in _LISTS}, []
    _check_keys(content, faults)
    if not faults.first:
        _check_ids(content, faults)
        sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
        _check_objects(content, sizes, faults)
        _check_masks(content, sizes, faults)
        objects = content["annotations"]
        empty = counts["images"] - len({one["image_id"] for one in objects} & {one["id"] for one in content["images"]})
        tiny = sum(one["area"] <= 0 or min(one["bbox"][2:]) < 1 for one in objects) if not faults.first else 0
        counts |= {"images without annotations": empty, "crowds": sum(bool(one.get("iscrowd")) for one in objects)}
        if empty:
            notes.append(f"{path}: {empty} of {counts['images']} images have no annotation; evaluated, not trained on")
        if tiny:
            notes.append(f"{path}: {tiny} of {len(objects)} annotations are smaller than a pixel; not trained on")
    return Report([faults.problem(kind, path) for kind in faults.first], counts, notes)


def check_images(content: Mapping[str, Any], folder: str | Path, full: bool) -> Report:
    """Checks that the images of an annotation file are in `folder`.

    Args:
        full: read every image as well, and compare its size with the annotation file.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        return Report([missing_folder(folder)])
    images = [one for one in content["images"] if not wrong_fields("images", one)]
    names = [one["file_name"] for one in images]
    if lacking := [name for name in names if not os.path.isfile(folder / name)]:
        found = f"{len(lacking)} of {len(names)} images are not in {folder}: {first_few(lacking)}"
        todo = "add them, or remove them from the annotation file"
        return Report([Problem("missing-image", str(folder), f"{found}; {todo}")])
    report = Report()
    if full:
        wanted = [(str(folder / one["file_name"]), (one["width"], one["height"])) for one in images]
        report.add_images([path for path, _ in wanted], in_threads(lambda one: _check_image(*one), wanted))
    return report


def _check_image(path: str, wanted: tuple[int, int]) -> ImageRead:
    """Reads an image and compares its size with `wanted`, (width, height) in the annotation file."""
    read = try_image(path)
    if read.size is None or read.size == wanted:
        return read
    found = f"image {path} is {_pixels(read.size[::-1])}, its annotation file says {_pixels(wanted[::-1])}"
    return read._replace(problem=Problem("size", path, f"{found}; both must have the same width and height"))


class _Faults:
    """Keeps the first fault of each kind and counts all of them."""

    def __init__(self) -> None:
        self.first: dict[str, str] = {}
        self._number: dict[str, int] = {}

    def add(self, kind: str, text: str) -> None:
        self.first.setdefault(kind, text)
        self._number[kind] = self._number.get(kind, 0) + 1

    def problem(self, kind: str, path: str | Path) -> Problem:
        more = f" (and {self._number[kind] - 1} more)" if self._number[kind] > 1 else ""
        return Problem(kind, str(path), f"{path}: {self.first[kind]}{more}; {_ADVICE[kind]}")


def _check_keys(content: Mapping[str, Any], faults: _Faults) -> None:
    for key in _LISTS:
        if not content[key]:
            faults.add("empty-list", f"the list '{key}' is empty")
        for position, item in enumerate(content[key]):
            for name in wrong_fields(key, item):
                if not name:
                    faults.add("missing-key", f"{_SINGULAR[key]} number {position} is {shown(item)}")
                    continue
                number, value = item.get("id"), item.get(name)
                what = f"{_SINGULAR[key]} {shown(number) if type(number) in (int, str) else f'number {position}'}"
                faults.add(_KINDS.get(name, "missing-key"), f"{what} has {_words(name, value)}")


def _words(name: str, value: Any) -> str:
    """Returns the field `name` of an item with its value, in words."""
    if name == "name" and (value is None or value == "" or (isinstance(value, str) and value.isspace())):
        return "no name"
    return f"the box {shown(value)}" if name == "bbox" else f"{name} {shown(value)}"


def _check_ids(content: Mapping[str, Any], faults: _Faults) -> None:
    for key in _LISTS:
        seen = set()
        for item in content[key]:
            if item["id"] in seen:
                faults.add("duplicate-id", f"two {key} have the id {item['id']}")
            seen.add(item["id"])
    names = set()
    for item in content["categories"]:
        if item["name"] in names:
            faults.add("category-name", f"two categories are called {shown(item['name'])}")
        names.add(item["name"])


def _check_objects(content: Mapping[str, Any], sizes: Mapping[Any, list[int]], faults: _Faults) -> None:
    categories = {category["id"] for category in content["categories"]}
    for image, (height, width) in sizes.items():
        if height * width > MOST_PIXELS:
            faults.add("image-size", f"image {image} has {_pixels((height, width))}")
    for one in content["annotations"]:
        size, box = sizes.get(one["image_id"]), one["bbox"]
        if size is None:
            faults.add("unknown-image", f"annotation {one['id']} has the image_id {one['image_id']}")
            continue
        if one["category_id"] not in categories:
            faults.add("unknown-category", f"annotation {one['id']} has the category_id {one['category_id']}")
        if not _within(box, size):
            faults.add("box-outside", f"annotation {one['id']} has the box {shown(box)} in an image of {_pixels(size)}")


def _check_masks(content: Mapping[str, Any], sizes: Mapping[Any, list[int]], faults: _Faults) -> None:
    for one in content["annotations"]:
        size, mask = sizes.get(one["image_id"]), one.get("segmentation")
        if not mask or size is None:
            continue
        if isinstance(mask, Mapping):
            if not covers(mask, size):
                what = f"of size {mask['size']}" if mask["size"] != size else "whose runs do not add up"
                faults.add("mask-size", f"annotation {one['id']} has a mask {what} in an image of {_pixels(size)}")
        elif far := [polygon for polygon in mask if not _near(polygon, size)]:
            what = f"the polygon {shown(far[0])} in an image of {_pixels(size)}"
            faults.add("mask-outside", f"annotation {one['id']} has {what}")


def _near(polygon: list[float], size: list[int]) -> bool:
    """Returns whether a polygon lies within its image or near it: pycocotools takes memory for its whole extent."""
    reach = max(size)
    return min(polygon) >= -reach and max(polygon) <= 2 * reach


def _within(box: list[float], size: list[int]) -> bool:
    (x, y, width, height), (rows, columns) = box, size
    return min(x, y) >= -_SLACK and x + width <= columns + _SLACK and y + height <= rows + _SLACK


def _pixels(size: Any) -> str:
    return f"{size[1]} x {size[0]} pixels"
