"""Checks of data sets on disk: what is wrong, in which file, what is allowed.

Without `full` only folders are listed (cheap enough before every run); with it every image and label map is read.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from rmoe.data.archives import (
    IMAGE_SUFFIXES,
    LAYOUTS,
    Packed,
    archives_of,
    class_names,
    find_split,
    index_all,
    looks_whole,
)
from rmoe.errors import UserError

IGNORED = 255
_NAMED = 3  # files of one kind that a message names
_ADE20K = {"training": 20210, "validation": 2000}  # images of the official set
_CLASS_LISTS = ("classes.json", "classes.txt", "objectInfo150.txt")
_IMAGENET = {"train": 1281167, "val": 50000}
_SYNSET = re.compile(r"n\d{8}")
FETCH_ADE20K = "fetch SceneParse150, ADEChallengeData2016.zip, instead"
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Problem(NamedTuple):
    """One finding.

    Attributes:
        kind: a short name, the same for all problems of one kind, such as `missing-folder` or `label-value`.
        path: the file or folder.
        message: what was found, what is allowed and what to do, in one line; it names the path.
    """

    kind: str
    path: str
    message: str


@dataclass
class Report:
    """What a check found.

    Attributes:
        problems: what must be mended.
        counts: what is there.
        notes: what is allowed, and worth knowing; in one line each.
    """

    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, part: Report, name: str) -> None:
        """Takes in the report of the part called `name`."""
        self.problems += part.problems
        self.counts |= {f"{name} {key}": count for key, count in part.counts.items()}
        self.notes += part.notes

    def compare(self, key: str, official: int | None) -> None:
        """Notes that the official set has another number of something."""
        if official is not None and self.counts.get(key) != official:
            self.notes.append(f"{self.counts.get(key)} {key}; the official set has {official}")


def check_segmentation(
    img_dir: str | Path,
    ann_dir: str | Path,
    num_classes: int,
    reduce_zero_label: bool = False,
    full: bool = False,
    img_suffix: str = ".jpg",
    seg_map_suffix: str = ".png",
) -> Report:
    """Checks images and label maps that lie as mmseg reads them: same relative name, another folder and suffix.

    Args:
        num_classes: classes without void. With `reduce_zero_label` a label map holds 0 (void) and 1 … num_classes,
            without it 0 … num_classes - 1; 255 is ignored in both.
        full: read every file as well: unreadable ones, label maps of a wrong mode or size, label values too high.
    """
    folders = [Path(img_dir), Path(ann_dir)]
    missing = [missing_folder(folder) for folder in folders if not folder.is_dir()]
    if missing:
        return Report(missing)
    images, maps = (_stems(*pair) for pair in zip(folders, (img_suffix, seg_map_suffix), strict=True))
    if not images:
        found = f"{img_dir} has no {img_suffix} image"
        return Report([Problem("no-images", str(img_dir), f"{found}; name the folder of the images")])
    report = Report(counts={"images": len(images), "label maps": len(maps)})
    if lonely := sorted(images - maps):
        found = f"{len(lonely)} of {len(images)} images in {img_dir} have no label map in {ann_dir}: "
        todo = f"add the {seg_map_suffix} files or remove the images"
        text = f"{found}{some(lonely, img_suffix)}; {todo}"
        report.problems.append(Problem("image-without-label-map", str(img_dir), text))
    if lonely := sorted(maps - images):
        found = f"{len(lonely)} of {len(maps)} label maps in {ann_dir} have no image in {img_dir}: "
        todo = f"add the {img_suffix} files or remove the label maps"
        text = f"{found}{some(lonely, seg_map_suffix)}; {todo}"
        report.problems.append(Problem("label-map-without-image", str(ann_dir), text))
    if full:
        both = sorted(images & maps)
        pairs = [(f"{folders[0] / stem}{img_suffix}", f"{folders[1] / stem}{seg_map_suffix}") for stem in both]
        _read_pairs(pairs, num_classes, reduce_zero_label, report)
    return report


def check_image_folder(root: str | Path, full: bool = False) -> Report:
    """Checks a classification data set of the layout ROOT/CLASS/IMAGE (ImageNet's `train` or `val`), or one packed into
    archives: ROOT itself, or ROOT/CLASS.zip or .tar.
    """
    root = Path(root)
    try:
        archives = archives_of(root)
    except UserError as error:
        return Report([Problem("archive", str(root), str(error))])
    if archives:
        return _check_archives(root, archives, full)
    if not root.is_dir():
        return Report([missing_folder(root)])
    problems, images = [], []
    classes = class_names(root)
    if stray := sorted(entry.name for entry in root.iterdir() if _is_image(entry)):
        found = f"{len(stray)} images lie in {root} itself: {some(stray)}"
        problems.append(Problem("stray-file", str(root), f"{found}; put each into the folder of its class"))
    problems += _too_few(root, classes, "class folders")
    for name in classes:
        folder = root / name
        inside = sorted(path for path in folder.rglob("*") if _is_image(path))
        if not inside:
            found = f"class folder {folder} has no image ({', '.join(IMAGE_SUFFIXES)})"
            problems.append(Problem("empty-class", str(folder), f"{found}; add some or remove the folder"))
        images += inside
    if full:
        problems += [problem for _, found in each(lambda path: read_image(str(path)), images) for problem in found]
    return Report(problems, {"classes": len(classes), "images": len(images)})


def _check_archives(root: Path, archives: Sequence[Path], full: bool) -> Report:
    """Indexes all of them; with `full` also reads each image of those that are whole."""
    problems, sound, members = [], [], []
    for path, found in zip(archives, index_all(root, archives), strict=True):
        if isinstance(found, UserError):
            problems.append(Problem("archive", str(path), str(found)))
        else:
            sound.append(path)
            members.append(found)
    if not members:
        return Report(problems)
    classes = sorted({name for one in members for name in one.classes})
    problems += _too_few(root, classes, "classes")
    packed = Packed(sound, members, classes)
    if full:
        problems += [
            problem for found in each(lambda i: _check_packed(packed, i), range(len(packed))) for problem in found
        ]
    return Report(problems, {"classes": len(classes), "images": len(packed), "archives": len(archives)})


def _check_packed(packed: Packed, number: int) -> list[Problem]:
    try:
        content = packed.read(number)
    except OSError:
        content = b""
    return read_image(packed.name(number), content)[1] if read_image("", content)[1] else []


def _too_few(root: Path, classes: Sequence[str], what: str) -> list[Problem]:
    if len(classes) > 1:
        return []
    found = f"{root} has {len(classes)} {what}, a classification set has at least 2"
    return [Problem("no-images", str(root), f"{found}; the layout is {LAYOUTS}")]


def check_split(root: str | Path, split: str) -> list[Problem]:
    """A look at a split of a classification set: whether it is there, and an archive of it ends as it should."""
    place = find_split(root, split)
    try:
        archives = archives_of(place)
    except UserError as error:
        return [Problem("archive", str(place), str(error))]
    if not archives and not place.is_dir():
        return [missing_folder(place)]
    if archives == [place] and not looks_whole(place):
        return [Problem("archive", str(place), f"{place} was cut short or is something else; fetch it again")]
    return []


def read_classes(path: str | Path) -> list[str]:
    """Class names of a list file: JSON (a list, `classes` of an object, or a COCO annotation file, whose categories are
    taken in the order of their ids), ADE20K's objectInfo150.txt, or text, one name in each line.

    Raises:
        UserError: the file cannot be read or is of none of these forms.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".json":
            content = json.loads(text)
            if isinstance(content, dict) and "categories" in content:
                names = [one["name"] for one in sorted(content["categories"], key=lambda one: one["id"])]
            else:
                names = content["classes"] if isinstance(content, dict) else content
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            table = bool(lines) and lines[0].split("\t")[0].strip() == "Idx"
            names = [line.split("\t")[-1].strip() for line in lines[1:]] if table else [line.strip() for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"class list {path} cannot be read ({reason(error)}); give JSON or text, one name a line"
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


def check_ade20k(root: str | Path, num_classes: int | None = None, full: bool = True) -> Report:
    """Checks a whole data set of ADE20K's layout.

    Args:
        num_classes: by default as many as the class list has: classes.json, classes.txt or objectInfo150.txt in ROOT.
    """
    root = Path(root)
    if not root.is_dir():
        return Report([missing_folder(root)])
    if _is_full_ade20k(root):
        found = f"{root} is the full ADE20K, with a *_seg.png beside each image, whose labels are not the 150 classes'"
        return Report([Problem("wrong-archive", str(root), f"{found}; {FETCH_ADE20K}")])
    lists = [root / name for name in _CLASS_LISTS if (root / name).exists()]
    if num_classes is None:
        if not lists:
            found = f"{root} has none of {', '.join(_CLASS_LISTS)}"
            return Report(
                [Problem("class-list", str(root), f"{found}; say how many classes there are (--num-classes)")]
            )
        try:
            num_classes = len(read_classes(lists[0]))
        except UserError as error:
            return Report([Problem("class-list", str(lists[0]), str(error))])
    report = Report(check_class_list(lists[0], num_classes) if lists else [], {"classes": num_classes})
    for split, official in _ADE20K.items():
        folders = root / "images" / split, root / "annotations" / split
        report.add(check_segmentation(*folders, num_classes, reduce_zero_label=True, full=full), split)
        if lists and lists[0].name == "objectInfo150.txt":
            report.compare(f"{split} images", official)
    return report


def check_imagenet(root: str | Path, full: bool = True) -> Report:
    """Checks the splits `train` and `val` in ROOT, and that both have the same classes."""
    report, classes = Report(), []
    for split, official in _IMAGENET.items():
        place = find_split(root, split)
        found = check_image_folder(place, full)
        report.add(found, split)
        if "classes" in found.counts:
            classes.append(set(class_names(place)))
            if len(classes[-1]) == 1000 and all(_SYNSET.fullmatch(name) for name in classes[-1]):
                report.compare(f"{split} images", official)
    if len(classes) == 2 and (other := sorted(classes[0] ^ classes[1])):
        found_in = f"{len(other)} classes are in only one of {root}/train and {root}/val: {some(other)}"
        report.problems.append(Problem("other-classes", str(root), f"{found_in}; both need the same classes"))
    return report


def require(problems: Sequence[Problem]) -> None:
    """Raises one UserError of one line if there are problems: the first, and how many more."""
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise UserError(problems[0].message + more)


def _is_full_ade20k(root: Path) -> bool:
    """Whether this is the data set that ADE20K_2021_17_01.zip or ADE20K_2016_07_26.zip holds."""
    tell_tales = ("index_ade20k.pkl", "index_ade20k.mat", "images/ADE", "ADE20K_2021_17_01", "ADE20K_2016_07_26")
    if any((root / name).exists() for name in tell_tales):
        return True
    return next((root / "images" / "training").rglob("*_seg.png"), None) is not None


def _read_pairs(pairs: Sequence[tuple[str, str]], num_classes: int, reduce_zero_label: bool, report: Report) -> None:
    """Reads images and label maps, and adds to the `report` what it finds."""
    seen, empty = np.zeros(256, dtype=bool), []
    for (_, path), (problems, values) in zip(pairs, each(lambda pair: _check_pair(*pair), pairs), strict=True):
        report.problems += problems
        if values is None:
            continue
        highest, lowest = (num_classes, 1) if reduce_zero_label else (num_classes - 1, 0)
        seen[values] = True
        if not (labels := values[(values >= lowest) & (values != IGNORED)]).size:
            empty.append(path)
        elif labels[-1] > highest:
            allowed = f"0 (void), 1 to {highest}" if reduce_zero_label else f"0 to {highest}"
            found = (
                f"label map {path} has the value {labels[-1]}; with {num_classes} classes it may hold {allowed} and 255"
            )
            report.problems.append(Problem("label-value", path, f"{found} (ignored): mend it or num_classes"))
    if (present := np.flatnonzero(seen[:IGNORED])).size:
        report.counts |= {"lowest label": int(present[0]), "highest label": int(present[-1])}
    report.counts["empty label maps"] = len(empty)
    if empty:
        report.notes.append(f"{len(empty)} of {len(pairs)} label maps hold nothing but void: {some(empty)}")


def _check_pair(image_path: str, map_path: str) -> tuple[list[Problem], np.ndarray | None]:
    """What is wrong with the files, and the values of the label map, uint8 [N], sorted, if it is one."""
    image, problems = read_image(image_path)
    labels, more = read_image(map_path)
    problems += more
    if labels is None:
        return problems, None
    if labels.mode not in ("L", "P"):
        found = f"label map {map_path} has mode {labels.mode}; it must be 8-bit with one channel (L or P)"
        return [*problems, Problem("mode", map_path, f"{found}: save the class indices, not colours")], None
    if image is not None and image.size != labels.size:
        sizes = (f"{width}x{height}" for width, height in (labels.size, image.size))
        found = "label map {} is {} pixels, its image {}".format(map_path, *sizes)
        problems.append(Problem("size", map_path, f"{found}; both must have the same width and height"))
    return problems, np.unique(np.asarray(labels))


def read_image(path: str, content: bytes | None = None) -> tuple[Image.Image | None, list[Problem]]:
    """The decoded image, or None and why not; where `content` is given, `path` is only what to call it."""
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            image.load()
        return image, []
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"{path} cannot be read as an image ({reason(error)}); fetch or write it again"
        return None, [Problem("unreadable", path, message)]


def each(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """`function` of every item, on all cores (decoding does not hold Python's lock), with a bar on a terminal."""
    from tqdm import tqdm

    items = list(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc="checking", unit="file", disable=None))


def _stems(folder: Path, suffix: str) -> set[str]:
    """Relative paths, without the suffix, of the files below `folder` that end in it; links are followed."""
    return {
        os.path.relpath(os.path.join(where, name), folder)[: -len(suffix)]
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(suffix) and not name.startswith(".")
    }


def missing_folder(folder: Path) -> Problem:
    """What to say of a `folder` that is none."""
    what = "is a file, not a folder" if folder.exists() else "does not exist"
    return Problem(
        "missing-folder", str(folder), f"folder {folder} {what}; correct the path, or put the data set there"
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def some(names: Sequence[str], suffix: str = "") -> str:
    """The first of the `names`, each with `suffix`, for a message."""
    more = ", …" if len(names) > _NAMED else ""
    return ", ".join(f"{name}{suffix}" for name in names[:_NAMED]) + more


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).splitlines()[0]
