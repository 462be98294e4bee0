"""Checks of data sets on disk: what is wrong, in which file, what is allowed.

Without `full` only folders are listed (cheap enough before every run); with it every image and label map is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rmoe.config import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
IGNORED = 255
_NAMED = 3  # files of one kind that a message names


class Problem(NamedTuple):
    """One finding.

    Attributes:
        kind: `missing-folder`, `no-images`, `image-without-label-map`, `label-map-without-image`, `class-list`,
            `unreadable`, `mode`, `size`, `label-value`, `empty-class`, `stray-file` or `other-classes`.
        path: the file or folder.
        message: what was found, what is allowed and what to do, in one line; it names the path.
    """

    kind: str
    path: str
    message: str


def check_segmentation(
    img_dir: str | Path,
    ann_dir: str | Path,
    num_classes: int,
    reduce_zero_label: bool = False,
    full: bool = False,
    img_suffix: str = ".jpg",
    seg_map_suffix: str = ".png",
) -> list[Problem]:
    """Checks images and label maps that lie as mmseg reads them: same relative name, another folder and suffix.

    Args:
        num_classes: classes without void. With `reduce_zero_label` a label map holds 0 (void) and 1 … num_classes,
            without it 0 … num_classes - 1; 255 is ignored in both.
        full: read every file as well: unreadable ones, label maps of a wrong mode or size, label values too high.
    """
    folders = [Path(img_dir), Path(ann_dir)]
    missing = [_missing_folder(folder) for folder in folders if not folder.is_dir()]
    if missing:
        return missing
    images, maps = (_stems(*pair) for pair in zip(folders, (img_suffix, seg_map_suffix), strict=True))
    if not images:
        return [
            Problem("no-images", str(img_dir), f"{img_dir} has no {img_suffix} image; name the folder of the images")
        ]
    problems = []
    if lonely := sorted(images - maps):
        found = f"{len(lonely)} of {len(images)} images in {img_dir} have no label map in {ann_dir}: "
        todo = f"add the {seg_map_suffix} files or remove the images"
        problems.append(Problem("image-without-label-map", str(img_dir), f"{found}{_some(lonely, img_suffix)}; {todo}"))
    if lonely := sorted(maps - images):
        found = f"{len(lonely)} of {len(maps)} label maps in {ann_dir} have no image in {img_dir}: "
        todo = f"add the {img_suffix} files or remove the label maps"
        problems.append(
            Problem("label-map-without-image", str(ann_dir), f"{found}{_some(lonely, seg_map_suffix)}; {todo}")
        )
    if full:
        pairs = [
            (f"{folders[0] / stem}{img_suffix}", f"{folders[1] / stem}{seg_map_suffix}")
            for stem in sorted(images & maps)
        ]
        problems += _all(lambda pair: _check_pair(pair[0], pair[1], num_classes, reduce_zero_label), pairs)
    return problems


def check_image_folder(root: str | Path, full: bool = False) -> list[Problem]:
    """Checks a classification data set of the layout ROOT/CLASS/IMAGE (ImageNet's `train` or `val`)."""
    root = Path(root)
    if not root.is_dir():
        return [_missing_folder(root)]
    problems, images = [], []
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir())
    if stray := sorted(entry.name for entry in root.iterdir() if _is_image(entry)):
        found = f"{len(stray)} images lie in {root} itself: {_some(stray)}"
        problems.append(Problem("stray-file", str(root), f"{found}; put each into the folder of its class"))
    if len(classes) < 2:
        found = f"{root} has {len(classes)} class folders, a classification set has at least 2"
        problems.append(Problem("no-images", str(root), f"{found}; name the folder that holds one folder per class"))
    for folder in classes:
        inside = sorted(path for path in folder.rglob("*") if _is_image(path))
        if not inside:
            found = f"class folder {folder} has no image ({', '.join(IMAGE_SUFFIXES)})"
            problems.append(Problem("empty-class", str(folder), f"{found}; add some or remove the folder"))
        images += inside
    return problems + (_all(lambda path: _read(str(path))[1], images) if full else [])


def read_classes(path: str | Path) -> list[str]:
    """Class names of a list file: JSON (a list, or `classes` of an object), ADE20K's objectInfo150.txt, or one a line.

    Raises:
        UserError: the file cannot be read or is of none of these forms.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".json":
            content = json.loads(text)
            names = content["classes"] if isinstance(content, dict) else content
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            table = bool(lines) and lines[0].split("\t")[0].strip() == "Idx"
            names = [line.split("\t")[-1].strip() for line in lines[1:]] if table else [line.strip() for line in lines]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"class list {path} cannot be read ({_reason(error)}); give JSON or text, one name a line"
        ) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"class list {path} holds no list of names; give JSON or text, one name a line")
    return names


def check_class_list(path: str | Path, num_classes: int) -> list[Problem]:
    """Checks that the list file can be read and has the `num_classes` names that a model is built for."""
    try:
        names = read_classes(path)
    except UserError as error:
        return [Problem("class-list", str(path), str(error))]
    if len(names) == num_classes:
        return []
    found = f"class list {path} has {len(names)} names, num_classes is {num_classes}"
    return [Problem("class-list", str(path), f"{found}; make them equal (void is not a class)")]


def check_ade20k(root: str | Path, num_classes: int | None = None, full: bool = True) -> list[Problem]:
    """Checks a whole data set of ADE20K's layout.

    Args:
        num_classes: by default as many as ROOT/classes.json or ROOT/objectInfo150.txt lists.
    """
    root = Path(root)
    if not root.is_dir():
        return [_missing_folder(root)]
    if num_classes is None:
        lists = [root / name for name in ("classes.json", "objectInfo150.txt") if (root / name).exists()]
        if not lists:
            found = f"{root} has neither classes.json nor objectInfo150.txt"
            return [Problem("class-list", str(root), f"{found}; say how many classes there are (--num-classes)")]
        try:
            num_classes = len(read_classes(lists[0]))
        except UserError as error:
            return [Problem("class-list", str(lists[0]), str(error))]
    problems = []
    for split in ("training", "validation"):
        folders = root / "images" / split, root / "annotations" / split
        problems += check_segmentation(*folders, num_classes, reduce_zero_label=True, full=full)
    return problems


def check_imagenet(root: str | Path, full: bool = True) -> list[Problem]:
    """Checks ROOT/train and ROOT/val, and that both have the same class folders."""
    splits = [Path(root) / split for split in ("train", "val")]
    problems = [problem for split in splits for problem in check_image_folder(split, full)]
    if all(split.is_dir() for split in splits):
        train, val = ({entry.name for entry in split.iterdir() if entry.is_dir()} for split in splits)
        if train != val:
            some = _some(sorted(train ^ val))
            found = f"{len(train ^ val)} classes are in only one of {splits[0]} and {splits[1]}: {some}"
            problems.append(Problem("other-classes", str(splits[1]), f"{found}; both need the same class folders"))
    return problems


def require(problems: Sequence[Problem]) -> None:
    """Raises one UserError of one line if there are problems: the first, and how many more."""
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise UserError(problems[0].message + more)


def _check_pair(image_path: str, map_path: str, num_classes: int, reduce_zero_label: bool) -> list[Problem]:
    image, problems = _read(image_path)
    labels, more = _read(map_path)
    problems += more
    if labels is None:
        return problems
    if labels.mode not in ("L", "P"):
        found = f"label map {map_path} has mode {labels.mode}; it must be 8-bit with one channel (L or P)"
        return [*problems, Problem("mode", map_path, f"{found}: save the class indices, not colours")]
    if image is not None and image.size != labels.size:
        sizes = (f"{width}x{height}" for width, height in (labels.size, image.size))
        found = "label map {} is {} pixels, its image {}".format(map_path, *sizes)
        problems.append(Problem("size", map_path, f"{found}; both must have the same width and height"))
    values = np.flatnonzero(np.bincount(np.asarray(labels).ravel(), minlength=256)[:IGNORED])
    highest = num_classes if reduce_zero_label else num_classes - 1
    if values.size and values[-1] > highest:
        allowed = f"0 (void), 1 to {highest}" if reduce_zero_label else f"0 to {highest}"
        found = (
            f"label map {map_path} has the value {values[-1]}; with {num_classes} classes it may hold {allowed} and 255"
        )
        problems.append(Problem("label-value", map_path, f"{found} (ignored): mend it or num_classes"))
    return problems


def _read(path: str) -> tuple[Image.Image | None, list[Problem]]:
    """The decoded image, or None and why not."""
    try:
        with Image.open(path) as image:
            image.load()
        return image, []
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"{path} cannot be read as an image ({_reason(error)}); fetch or write it again"
        return None, [Problem("unreadable", path, message)]


def _all(check: Callable, items: Iterable) -> list[Problem]:
    """Runs `check` on every item on all cores (decoding does not hold Python's lock), with a bar on a terminal."""
    from tqdm import tqdm

    items = list(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(check, items), total=len(items), desc="checking", unit="file", disable=None)
        return [problem for problems in found for problem in problems]


def _stems(folder: Path, suffix: str) -> set[str]:
    """Relative paths, without the suffix, of the files below `folder` that end in it; links are followed."""
    return {
        os.path.relpath(os.path.join(where, name), folder)[: -len(suffix)]
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(suffix) and not name.startswith(".")
    }


def _missing_folder(folder: Path) -> Problem:
    what = "is a file, not a folder" if folder.exists() else "does not exist"
    return Problem(
        "missing-folder", str(folder), f"folder {folder} {what}; correct the path, or put the data set there"
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _some(names: Sequence[str], suffix: str = "") -> str:
    more = ", …" if len(names) > _NAMED else ""
    return ", ".join(f"{name}{suffix}" for name in names[:_NAMED]) + more


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).splitlines()[0]
