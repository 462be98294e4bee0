"""Checks data sets on disk and says what is wrong, in which file, and what is allowed.

Without `full` folders are listed, which is cheap enough before every run; with it every image and label map is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from rmoe.data.archives import LAYOUTS, Packed, archives_of, class_names, find_split, index_all, looks_whole
from rmoe.data.arguments import require_count
from rmoe.data.classes import class_list
from rmoe.data.files import IMAGE_SUFFIXES, class_images, is_image, list_folder, stems, walk
from rmoe.data.images import IGNORED, OtherMode, is_turned, read_image, read_label_map
from rmoe.data.progress import tracked
from rmoe.errors import UserError

_NAMED = 3  # files that a message names
_ADE20K = {"training": 20210, "validation": 2000}  # images of the official set
_CLASS_LISTS = ("classes.json", "classes.txt", "objectInfo150.txt")
_IMAGENET = {"train": 1281167, "val": 50000}  # likewise
_SYNSET = re.compile(r"n\d{8}")
FETCH_ADE20K = "fetch SceneParse150, ADEChallengeData2016.zip, instead"
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Problem(NamedTuple):
    """Describes one finding.

    Attributes:
        kind: a short name such as `missing-folder` or `label-value`, the same for all problems of one kind.
        path: the file or folder.
        message: one line with the path, what was found, what is allowed and what to do.
    """

    kind: str
    path: str
    message: str


@dataclass
class Report:
    """Collects what a check found.

    Attributes:
        problems: what must be mended.
        counts: numbers of images, classes and so on.
        notes: what is allowed but worth knowing, one line each.
    """

    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, part: Report, name: str) -> None:
        """Adds the report on the part of the data set called `name`."""
        self.problems += part.problems
        self.counts |= {f"{name} {key}": count for key, count in part.counts.items()}
        self.notes += part.notes

    def add_images(self, paths: Sequence[str], images: Sequence[ImageRead]) -> None:
        """Adds what became of images; `paths` are theirs, or empty for images in archives."""
        self.problems += [one.problem for one in images if one.problem]
        if turned := [number for number, one in enumerate(images) if one.turned]:
            first = f" ({first_few([paths[number] for number in turned])})" if paths else ""
            self.notes.append(
                f"{len(turned)} of {len(images)} images{first} have an EXIF orientation, which is not followed: "
                "images, label maps, boxes and masks are read as they are stored"
            )

    def compare(self, key: str, official: int | None) -> None:
        """Notes if the count `key` differs from that of the official set."""
        if official is not None and self.counts.get(key) != official:
            self.notes.append(f"{self.counts.get(key)} {key}; the official set has {official}")


def check_segmentation(
    img_dir: str | Path,
    ann_dir: str | Path,
    num_classes: int | None,
    reduce_zero_label: bool = False,
    full: bool = False,
    img_suffix: str = ".jpg",
    seg_map_suffix: str = ".png",
) -> Report:
    """Checks images and label maps in two folders, where a label map has its image's name but for the suffix.

    Args:
        num_classes: number of classes without void. With `reduce_zero_label` a label map holds 0 (void) and
            1 … num_classes, without it 0 … num_classes - 1; 255 is ignored in both. With None no file is read.
        full: read every file as well, and report unreadable ones, wrong modes and sizes, and label values too high.
    """
    if num_classes is not None:
        require_count("num_classes", num_classes, most=IGNORED)
    folders = [Path(img_dir), Path(ann_dir)]
    missing = [missing_folder(folder) for folder in folders if not os.path.isdir(folder)]
    if missing:
        return Report(missing)
    images, maps = (stems(*pair) for pair in zip(folders, (img_suffix, seg_map_suffix), strict=True))
    if not images:
        found = f"{img_dir} has no {img_suffix} image"
        return Report([Problem("no-images", str(img_dir), f"{found}; name the folder of the images")])
    report = Report(counts={"images": len(images), "label maps": len(maps)})
    if lonely := sorted(images - maps):
        found = f"{len(lonely)} of {len(images)} images in {img_dir} have no label map in {ann_dir}: "
        todo = f"add the {seg_map_suffix} files or remove the images"
        text = f"{found}{first_few(lonely, img_suffix)}; {todo}"
        report.problems.append(Problem("image-without-label-map", str(img_dir), text))
    if lonely := sorted(maps - images):
        found = f"{len(lonely)} of {len(maps)} label maps in {ann_dir} have no image in {img_dir}: "
        todo = f"add the {img_suffix} files or remove the label maps"
        text = f"{found}{first_few(lonely, seg_map_suffix)}; {todo}"
        report.problems.append(Problem("label-map-without-image", str(ann_dir), text))
    if full and num_classes is not None:
        both = sorted(images & maps)
        pairs = [(f"{folders[0] / stem}{img_suffix}", f"{folders[1] / stem}{seg_map_suffix}") for stem in both]
        _read_pairs(pairs, num_classes, reduce_zero_label, report)
    return report


def check_image_folder(root: str | Path, full: bool = False) -> Report:
    """Checks a split of a classification set: images ROOT/CLASS/IMAGE, as ImageNet's, or archives ROOT/CLASS.zip or
    .tar, or an archive which is ROOT itself.
    """
    root = Path(root)
    if not os.path.exists(root):
        return Report([missing_folder(root)])
    try:
        archives = archives_of(root)
        return _check_archives(root, archives, full) if archives else _check_folders(root, full)
    except UserError as error:
        return Report([Problem("archive", str(root), str(error))])


def _check_folders(root: Path, full: bool) -> Report:
    """Lists the class folders; with `full` reads each image too."""
    if not root.is_dir():
        return Report([missing_folder(root)])
    problems, images = [], []
    classes = class_names(root)
    if stray := [name for name in list_folder(root)[1] if is_image(name)]:
        found = f"{len(stray)} images lie in {root} itself: {first_few(stray)}"
        problems.append(Problem("stray-file", str(root), f"{found}; put each into the folder of its class"))
    problems += _too_few(root, classes, "class folders")
    for name in classes:
        inside = class_images(root, name)
        if not inside:
            found = f"class folder {root / name} has no image ({', '.join(IMAGE_SUFFIXES)})"
            problems.append(Problem("empty-class", str(root / name), f"{found}; add some or remove the folder"))
        images += inside
    report = Report(problems, {"classes": len(classes), "images": len(images)})
    if full:
        report.add_images(images, in_threads(try_image, images))
    return report


def _check_archives(root: Path, archives: Sequence[Path], full: bool) -> Report:
    """Indexes the archives; with `full` reads each image of the sound ones too."""
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
    report = Report(problems, {"classes": len(classes), "images": len(packed), "archives": len(archives)})
    if full:
        report.add_images([], in_threads(lambda number: _try_packed(packed, number), range(len(packed))))
    return report


def _too_few(root: Path, classes: Sequence[str], what: str) -> list[Problem]:
    if len(classes) > 1:
        return []
    found = f"{root} has {len(classes)} {what}, a classification set has at least 2"
    return [Problem("no-images", str(root), f"{found}; the layout is {LAYOUTS}")]


def check_split(root: str | Path, split: str) -> list[Problem]:
    """Checks that a split of a classification set is there, and if it is an archive, that it ends as one should."""
    place = find_split(root, split)
    try:
        archives = archives_of(place)
    except UserError as error:
        return [Problem("archive", str(place), str(error))]
    if not archives and not os.path.isdir(place):
        return [missing_folder(place)]
    if archives == [place] and not looks_whole(place):
        return [Problem("archive", str(place), f"{place} was cut short or is something else; fetch it again")]
    return []


def check_class_list(classes: str | Path | Sequence[str], num_classes: int | None) -> list[Problem]:
    """Checks that a class list, or the file with it, has the `num_classes` names that a model is built for."""
    try:
        class_list(classes, num_classes)
    except UserError as error:
        return [Problem("class-list", str(classes), str(error))]
    return []


def check_ade20k(root: str | Path, num_classes: int | None = None, full: bool = True) -> Report:
    """Checks a whole data set of ADE20K's layout.

    Args:
        num_classes: number of classes; by default that of the class list in ROOT, which is classes.json, classes.txt
            or objectInfo150.txt.
        full: read every file as well.
    """
    root = Path(root)
    if num_classes is not None:
        require_count("num_classes", num_classes, most=IGNORED)
    if not os.path.isdir(root):
        return Report([missing_folder(root)])
    if _is_full_ade20k(root):
        found = f"{root} is the full ADE20K, with a *_seg.png beside each image; its labels are not the 150 classes"
        return Report([Problem("wrong-archive", str(root), f"{found}; {FETCH_ADE20K}")])
    lists = [root / name for name in _CLASS_LISTS if (root / name).exists()]
    if num_classes is None:
        if not lists:
            found = f"{root} has none of {', '.join(_CLASS_LISTS)}; say how many classes there are (--num-classes)"
            return Report([Problem("class-list", str(root), found)])
        try:
            num_classes = len(class_list(lists[0]).names)
        except UserError as error:
            return Report([Problem("class-list", str(lists[0]), str(error))])
    report = Report(check_class_list(lists[0], num_classes) if lists else [], {"classes": num_classes})
    for split, official in _ADE20K.items():
        folders = root / "images" / split, root / "annotations" / split
        suffix = _suffix(folders[0])
        if suffix != ".jpg":
            report.notes.append(f"{folders[0]} has *{suffix}; the data set in the config needs img_suffix='{suffix}'")
        report.add(check_segmentation(*folders, num_classes, True, full=full, img_suffix=suffix), split)
        if lists and lists[0].name == "objectInfo150.txt":
            report.compare(f"{split} images", official)
    return report


def _suffix(folder: Path) -> str:
    """Returns the suffix of the images in a folder: .jpg unless the folder has images of other kinds only."""
    if not os.path.isdir(folder):
        return ".jpg"
    found = {os.path.splitext(name)[1] for _, names in walk(folder) for name in names if is_image(name)}
    return ".jpg" if ".jpg" in found or not found else min(found)


def check_imagenet(root: str | Path, full: bool = True) -> Report:
    """Checks the splits `train` and `val` in ROOT, and that both have the same classes."""
    report, classes = Report(), []
    if os.path.isfile(root):
        return Report([missing_folder(Path(root))])
    for split, official in _IMAGENET.items():
        place = find_split(root, split)
        found = check_image_folder(place, full)
        report.add(found, split)
        if "classes" in found.counts:
            classes.append(set(class_names(place)))
            if len(classes[-1]) == 1000 and all(_SYNSET.fullmatch(name) for name in classes[-1]):
                report.compare(f"{split} images", official)
    if len(classes) == 2 and (other := sorted(classes[0] ^ classes[1])):
        found_in = f"{len(other)} classes are in only one of {root}/train and {root}/val: {first_few(other)}"
        report.problems.append(Problem("other-classes", str(root), f"{found_in}; both need the same classes"))
    return report


def require(problems: Sequence[Problem]) -> None:
    """Raises a UserError of one line if there are problems: it says the first, and how many more there are."""
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise UserError(problems[0].message + more)


def _is_full_ade20k(root: Path) -> bool:
    """Returns whether `root` holds what ADE20K_2021_17_01.zip or ADE20K_2016_07_26.zip does."""
    tell_tales = ("index_ade20k.pkl", "index_ade20k.mat", "images/ADE", "ADE20K_2021_17_01", "ADE20K_2016_07_26")
    if any((root / name).exists() for name in tell_tales):
        return True
    training = root / "images" / "training"
    return training.is_dir() and any(name.endswith("_seg.png") for _, names in walk(training) for name in names)


def _read_pairs(pairs: Sequence[tuple[str, str]], num_classes: int, reduce_zero_label: bool, report: Report) -> None:
    """Reads images and label maps and adds the findings to `report`."""
    seen, empty = np.zeros(IGNORED + 1, dtype=bool), []
    results = in_threads(lambda pair: _check_pair(*pair), pairs)
    report.add_images([image for image, _ in pairs], [one for one, _, _ in results])
    for (_, path), (_, problems, values) in zip(pairs, results, strict=True):
        report.problems += problems
        if values is None:
            continue
        highest, lowest = (num_classes, 1) if reduce_zero_label else (num_classes - 1, 0)
        seen[values] = True
        if not (labels := values[(values >= lowest) & (values != IGNORED)]).size:
            empty.append(path)
        elif labels[-1] > highest:
            allowed = f"0 (void), 1 to {highest}" if reduce_zero_label else f"0 to {highest}"
            found = f"label map {path} has the value {labels[-1]}; with {num_classes} classes it may hold {allowed}"
            todo = f"and {IGNORED} (ignored): mend it or num_classes"
            report.problems.append(Problem("label-value", path, f"{found} {todo}"))
    if (present := np.flatnonzero(seen[:IGNORED])).size:
        report.counts |= {"lowest label": int(present[0]), "highest label": int(present[-1])}
    report.counts["empty label maps"] = len(empty)
    if empty:
        report.notes.append(f"{len(empty)} of {len(pairs)} label maps hold nothing but void: {first_few(empty)}")


def _check_pair(image_path: str, map_path: str) -> tuple[ImageRead, list[Problem], np.ndarray | None]:
    """Reads an image and its label map.

    Returns:
        What became of the image, the problems of the label map, and if it could be read its sorted values, uint8 [N].
    """
    image = try_image(image_path)
    try:
        labels = read_label_map(map_path)
    except UserError as error:
        return image, [_unusable(error, map_path)], None
    problems = []
    if image.size is not None and image.size != labels.shape[::-1]:
        sizes = (f"{width}x{height}" for width, height in (labels.shape[::-1], image.size))
        found = "label map {} is {} pixels, its image {}".format(map_path, *sizes)
        problems.append(Problem("size", map_path, f"{found}; both must have the same width and height"))
    return image, problems, np.unique(labels)


class ImageRead(NamedTuple):
    """Tells of an image that was read: (width, height) and whether it has an EXIF orientation, or else the problem."""

    size: tuple[int, int] | None
    turned: bool
    problem: Problem | None


def try_image(path: str) -> ImageRead:
    """Reads an image and returns what became of it, whether or not it can be read."""
    return _try(lambda: read_image(path), path)


def _try_packed(packed: Packed, number: int) -> ImageRead:
    read = _try(lambda: packed.image(number))
    return read._replace(problem=read.problem._replace(path=packed.name(number))) if read.problem else read


def _try(read: Callable[[], Image.Image], path: str = "") -> ImageRead:
    try:
        image = read()
    except UserError as error:
        return ImageRead(None, False, _unusable(error, path))
    return ImageRead(image.size, is_turned(image), None)


def _unusable(error: UserError, path: str) -> Problem:
    return Problem("mode" if isinstance(error, OtherMode) else "unreadable", path, str(error))


def in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Returns `function` of every item, computed on all cores with a bar on a terminal."""
    items = list(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads do: decoding releases Python's lock
        return list(tracked(pool.map(function, items), "checking", len(items)))


def missing_folder(folder: Path) -> Problem:
    """Returns the problem that `folder` does not exist or is a file."""
    what = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
    message = f"folder {folder} {what}; correct the path, or put the data set there"
    return Problem("missing-folder", str(folder), message)


def first_few(names: Sequence[str], suffix: str = "") -> str:
    """Returns the first of the `names`, each with `suffix`, for a message."""
    more = ", …" if len(names) > _NAMED else ""
    return ", ".join(f"{name}{suffix}" for name in names[:_NAMED]) + more
