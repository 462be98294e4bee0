"""Checks of data sets in COCO's layout: ROOT/annotations/instances_SPLIT.json and the images in ROOT/SPLIT."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmoe.data.check import Problem, Report, each, missing_folder, read_image, reason, some
from rmoe.errors import UserError

_LISTS = ("images", "annotations", "categories")
_NUMBER, _ID = (int, float), (int, str)
_KEYS: dict[str, dict[str, Any]] = {
    "images": {"id": _ID, "file_name": str, "height": _NUMBER, "width": _NUMBER},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": int, "bbox": list, "area": _NUMBER},
    "categories": {"id": int},
}
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
_OFFICIAL = {"train2017": 118287, "val2017": 5000}  # images
_CLASSES = 80
_SLACK = 1.0  # pixels by which a box may reach over its image: COCO's own are rounded
_ADVICE = {
    "missing-key": "an image has id, file_name, height and width; an annotation id, image_id, category_id, bbox and "
    "area; a category id and name: add it",
    "duplicate-id": "ids are unique among the images, among the annotations and among the categories: renumber them",
    "category-name": "every category has a name of its own: add or change it",
    "unknown-image": "image_id is the id of one of the images: add the image or remove the annotation",
    "unknown-category": "category_id is the id of one of the categories: add the category or remove the annotation",
    "box-format": "bbox is [x, y, width, height] in pixels, four finite numbers, no size negative: mend it",
    "box-outside": "bbox is [x, y, width, height] in pixels within the image: mend or remove it",
    "mask-size": "a mask's run lengths have its image's [height, width] and cover all of it: mend or remove it",
}


def check_coco(root: str | Path, full: bool = True) -> Report:
    """Checks a whole data set of COCO's layout.

    Args:
        full: read every image as well.
    """
    root = Path(root)
    if not (root / "annotations").is_dir():
        return Report([missing_folder(root / "annotations" if root.is_dir() else root)])
    report, categories = Report(), {}
    for kind in ("train", "val"):
        files = sorted((root / "annotations").glob(f"instances_{kind}*.json"))
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
            report.add(check_annotations(content, path), split)
            report.problems += check_images(content, root / split, full)
            if len(content["categories"]) == _CLASSES:
                report.compare(f"{split} images", _OFFICIAL.get(split))
            categories[split] = {(str(one.get("id")), one.get("name")) for one in content["categories"]}
    first = next(iter(categories), "")
    for split, pairs in categories.items():
        if other := sorted(map(str, pairs ^ categories[first])):
            found = f"the categories of {first} and {split} in {root} differ: {some(other)}"
            report.problems.append(Problem("other-classes", str(root), f"{found}; both need the same ids and names"))
    return report


def read_annotations(path: str | Path) -> dict[str, Any]:
    """The content of a COCO annotation file.

    Raises:
        UserError: the file is missing, is no whole JSON, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read ({reason(error)}); correct the path") from None
    except ValueError as error:
        found = f"annotation file {path} is no whole JSON ({error})"
        raise UserError(f"{found}; it was cut short or is something else: fetch it again") from None
    lists = content if isinstance(content, dict) else {}
    lacking = [key for key in _LISTS if not isinstance(lists.get(key), list)]
    if lacking:
        found = f"annotation file {path} has no list '{lacking[0]}'"
        raise UserError(f"{found}; a COCO file of instances is an object with the lists {', '.join(_LISTS)}")
    return lists


def check_annotations(content: Mapping[str, Any], path: str | Path) -> Report:
    """Checks what `read_annotations` returned: faults of one kind are one problem, which names the first of them.

    Images without objects are allowed, and so are objects of less than a pixel; both are counted and noted.
    """
    faults, counts, notes = _Faults(), {key: len(content[key]) for key in _LISTS}, []
    _check_keys(content, faults)
    if not faults.first:
        _check_ids(content, faults)
        _check_objects(content, faults)
        objects = content["annotations"]
        empty = counts["images"] - len({one["image_id"] for one in objects} & {one["id"] for one in content["images"]})
        tiny = sum(one["area"] <= 0 or min(one["bbox"][2:]) < 1 for one in objects) if not faults.first else 0
        counts |= {"images without annotations": empty, "crowds": sum(bool(one.get("iscrowd")) for one in objects)}
        if empty:
            notes.append(f"{path}: {empty} of {counts['images']} images have no annotation; evaluated, not trained on")
        if tiny:
            notes.append(f"{path}: {tiny} of {len(objects)} annotations are smaller than a pixel; not trained on")
    return Report([faults.problem(kind, path) for kind in faults.first], counts, notes)


def check_images(content: Mapping[str, Any], folder: str | Path, full: bool) -> list[Problem]:
    """Checks that the images of an annotation file are in `folder`; if `full`, that they can be read and are as large
    as it says."""
    folder = Path(folder)
    if not folder.is_dir():
        return [missing_folder(folder)]
    images = [one for one in content["images"] if one.get("file_name")]
    lacking = [one["file_name"] for one in images if not (folder / one["file_name"]).is_file()]
    if lacking:
        found = f"{len(lacking)} of {len(images)} images are not in {folder}: {some(lacking)}"
        return [Problem("missing-image", str(folder), f"{found}; add them, or remove them from the annotation file")]
    if not full:
        return []
    return [problem for found in each(lambda one: _check_image(one, folder), images) for problem in found]


class _Faults:
    """The first fault of each kind, and how many there are."""

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
    for key, wanted in _KEYS.items():
        for position, item in enumerate(content[key]):
            if not isinstance(item, Mapping):
                faults.add("missing-key", f"{_SINGULAR[key]} number {position} is {item!r}")
                continue
            for name, kind in wanted.items():
                if not isinstance(item.get(name), kind):
                    what = f"{_SINGULAR[key]} {item.get('id', f'number {position}')}"
                    faults.add("missing-key", f"{what} has {name} {item.get(name)!r}")


def _check_ids(content: Mapping[str, Any], faults: _Faults) -> None:
    for key in _LISTS:
        seen = set()
        for item in content[key]:
            if item["id"] in seen:
                faults.add("duplicate-id", f"two {key} have the id {item['id']}")
            seen.add(item["id"])
    names = set()
    for item in content["categories"]:
        name = item.get("name")
        if not isinstance(name, str) or not name.strip():
            faults.add("category-name", f"category {item['id']} has no name")
        elif name in names:
            faults.add("category-name", f"two categories are called '{name}'")
        names.add(name)


def _check_objects(content: Mapping[str, Any], faults: _Faults) -> None:
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for one in content["annotations"]:
        size, box, mask = sizes.get(one["image_id"]), one["bbox"], one.get("segmentation")
        if size is None:
            faults.add("unknown-image", f"annotation {one['id']} has the image_id {one['image_id']}")
            continue
        if one["category_id"] not in categories:
            faults.add("unknown-category", f"annotation {one['id']} has the category_id {one['category_id']}")
        if not _is_box(box):
            faults.add("box-format", f"annotation {one['id']} has the box {box}")
        elif not _within(box, size):
            faults.add("box-outside", f"annotation {one['id']} has the box {box} in an image of {_pixels(size)}")
        if isinstance(mask, Mapping) and not _fits(mask, size):
            what = f"of size {mask.get('size')}" if mask.get("size") != size else "whose runs do not add up"
            faults.add("mask-size", f"annotation {one['id']} has a mask {what} in an image of {_pixels(size)}")


def _is_box(box: Any) -> bool:
    try:
        return len(box) == 4 and all(math.isfinite(number) for number in box) and min(box[2:]) >= 0
    except TypeError:
        return False


def _within(box: list[float], size: list[int]) -> bool:
    (x, y, width, height), (rows, columns) = box, size
    return min(x, y) >= -_SLACK and x + width <= columns + _SLACK and y + height <= rows + _SLACK


def _fits(mask: Mapping[str, Any], size: list[int]) -> bool:
    """Of run lengths; only those written as numbers are added up."""
    counts = mask.get("counts")
    return mask.get("size") == size and (not isinstance(counts, list) or sum(counts) == size[0] * size[1])


def _check_image(image: Mapping[str, Any], folder: Path) -> list[Problem]:
    path = str(folder / image["file_name"])
    read, problems = read_image(path)
    wanted = image.get("width"), image.get("height")
    if read is not None and read.size != wanted:
        found = f"image {path} is {_pixels(read.size[::-1])}, its annotation file says {_pixels(wanted[::-1])}"
        problems.append(Problem("size", path, f"{found}; both must have the same width and height"))
    return problems


def _pixels(size: Any) -> str:
    return f"{size[1]} x {size[0]} pixels"
