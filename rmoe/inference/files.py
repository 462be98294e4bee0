"""The command `rmoe predict`: from images on disk to pictures, label maps and one JSON."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

import rmoe
from rmoe.data.files import is_image, walk
from rmoe.engine.checkpoint.files import PARTIAL, write_json
from rmoe.engine.lock import check_folder
from rmoe.engine.terminal import progress_bar
from rmoe.errors import UserError
from rmoe.inference.pictures import class_shares, colour_map, draw
from rmoe.inference.predictor import Classification, Detection, Prediction, Predictor, Segmentation, opened
from rmoe.inference.printing import tell

RESULTS = "predictions.json"
_FOLDERS = _PICTURES, _COLOURS, _LABELS = "pictures", "colours", "labels"
_LONGEST = 200  # bytes of a file's name without suffix
_WILD = "*?["


def predict(
    predictor: Predictor,
    words: Sequence[str],
    out: Path,
    *,
    batch_size: int = 8,
    threshold: float = 0.3,
    opacity: float = 0.55,
) -> tuple[int, int]:
    """Predicts on images; writes OUT/pictures, of segmentation OUT/colours and OUT/labels, and OUT/predictions.json.

    Args:
        predictor: what `rmoe.load` returned.
        words: image files, folders, which are searched, and patterns such as "photos/*.jpg".
        out: folder to make; one that holds earlier predictions has them replaced.
        batch_size: images of one shape that go through the model together.
        threshold: score from which on a detector's objects count.
        opacity: of the classes' colours over the images.

    Returns:
        How many images were done, and how many could not be; each of those is named on standard error.

    Raises:
        UserError: there is no image; `out` holds something else or cannot be written; see also `Predictor.answers`.
    """
    if not 0 <= opacity <= 1:
        raise UserError(f"--opacity is {opacity}; it is a number from 0 to 1")
    paths = find_images(words, out)
    names = _names(paths)
    folders = (_PICTURES, _COLOURS, _LABELS) if predictor.task == "segmentation" else (_PICTURES,)
    answers = predictor.answers(paths, batch_size, threshold)
    content: dict[str, Any] = {
        "rmoe": rmoe.__version__,
        "complete": False,
        "weights": str(predictor.source),
        "task": predictor.task,
        **({"threshold": threshold} if predictor.task == "detection" else {}),
        "categories": [
            {"id": number, "name": name, "color": list(predictor.palette[number - 1])}
            for number, name in enumerate(predictor.classes, start=1)
        ],
        "files": [f"{folder}/{name}.png" for name in names for folder in folders],
    }
    first = next(answers)  # what is wrong with the model or the numbers is told before anything is written
    earlier = _earlier(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RESULTS, {**content, "files": list(dict.fromkeys([*content["files"], *earlier]))})
        content, counts = _written(content, first, answers, paths, names, predictor, out, opacity, threshold)
        for name in set(earlier) - set(content["files"]):
            (out / name).unlink(missing_ok=True)
        write_json(out / RESULTS, content)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); make room, or give another --out") from error
    return counts


def _written(
    content: dict[str, Any],
    first: Any,
    answers: Iterator[Any],
    paths: Sequence[str],
    names: Sequence[str],
    predictor: Predictor,
    out: Path,
    opacity: float,
    threshold: float,
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Writes the pictures; returns the whole content of predictions.json, and how many images were done and were not.

    Raises:
        OSError: a picture cannot be written.
    """
    images: dict[int, dict[str, Any]] = {}
    objects: dict[int, list[dict[str, Any]]] = {}
    failed: dict[int, str] = {}
    with progress_bar() as bar:
        task = bar.add_task("predict", total=len(paths), note="")
        for index, answer in _chain(first, answers):
            if isinstance(answer, UserError):
                failed[index] = str(answer)
                tell(f"rmoe: {answer}", bar.console)
            else:
                image = opened(paths[index])
                files = _draw(image, answer, predictor, out, names[index], opacity, threshold)
                about = {"id": index + 1, "file_name": paths[index], "width": image.width, "height": image.height}
                images[index] = about | {"files": files} | _summary(answer, predictor.classes)
                objects[index] = _coco(answer, index + 1)
            bar.update(task, advance=1, refresh=True)
    content |= {"complete": True, "images": [images[i] for i in sorted(images)]}
    if predictor.task == "detection":
        content["annotations"] = [one for i in sorted(objects) for one in objects[i]]
    content["failed"] = [{"file_name": paths[i], "why": failed[i]} for i in sorted(failed)]
    content["files"] = [file for i in sorted(images) for file in images[i]["files"].values()]
    return content, (len(images), len(failed))


def find_images(words: Sequence[str], out: Path | None = None) -> list[str]:
    """Returns the paths that files, folders and patterns stand for, each once, in their order.

    Args:
        words: of the command line.
        out: a folder in which nothing is searched, since results are written there.

    Raises:
        UserError: a folder has no image, or a pattern matches none.
    """
    found: dict[str, str] = {}
    for word in words:
        for path in _matches(word, out):
            found.setdefault(os.path.realpath(path) if "\0" not in path else path, path)
    if not found:
        raise UserError("no image is given; give files, folders or patterns such as 'photos/*.jpg'")
    return list(found.values())


def _matches(word: str, out: Path | None) -> list[str]:
    results = None if out is None else Path(os.path.realpath(out))

    def is_input(path: str) -> bool:
        if results is not None and Path(os.path.realpath(path)).is_relative_to(results):
            return False
        return is_image(os.path.basename(path))

    if os.path.isdir(word):
        if results is not None and Path(os.path.realpath(word)).is_relative_to(results):
            raise UserError(f"{word} lies in --out {out}, where results are written; give another --out")
        inside = [path for where, names in walk(word) for name in names if is_input(path := os.path.join(where, name))]
        if not inside:
            raise UserError(f"the folder {word} has no image; give one that has, or files")
        return inside
    if os.path.lexists(word) or not any(sign in word for sign in _WILD):
        return [word]
    inside = sorted(path for path in glob.glob(word, recursive=True) if is_input(path))
    if not inside:
        raise UserError(f"no image matches {word!r}; quote patterns, and see that the folder is right")
    return inside


def _names(paths: Sequence[str]) -> list[str]:
    """Returns a name for each path, unlike all others: the path below the folder that all are in, without suffix."""
    absolute = [Path(os.path.abspath(path.replace("\0", ""))) for path in paths]
    common = os.path.commonpath([path.parent for path in absolute])
    below = [path.relative_to(common) for path in absolute]
    short = [path.with_name(_cut(path.stem)).as_posix() for path in below]
    often = Counter(short)
    folders = {parent.as_posix().casefold() for path in below for parent in path.parents}
    taken: set[str] = set()
    names = []
    for path, name in zip(absolute, short, strict=True):
        if often[name] > 1:  # of another suffix
            name = f"{name}_{path.suffix[1:]}"
        while name.casefold() in taken or f"{name}.png".casefold() in folders:
            name += "_"
        taken.add(name.casefold())
        names.append(name)
    return names


def _cut(name: str) -> str:
    """Returns a file's name no longer than that a suffix still fits into what file systems take."""
    return os.fsdecode(os.fsencode(name)[:_LONGEST]) if len(os.fsencode(name)) > _LONGEST else name


def _earlier(out: Path) -> list[str]:
    """Returns the files of the predictions that an earlier call has left in a folder; none where it is new or empty.

    Raises:
        UserError: the folder holds something else.
    """
    check_folder(out, "--out")
    half_written = RESULTS + PARTIAL  # by a call that was killed before it had written anything else
    if not out.is_dir() or not {one.name for one in out.iterdir()} - {half_written}:
        return []
    try:
        content = json.loads((out / RESULTS).read_text())
        files = content["files"]
        if "rmoe" not in content or not all(_is_ours(name, out) for name in files):
            raise ValueError
    except Exception as error:  # whatever it is, it is not ours
        raise UserError(f"{out} holds files that are no predictions of ours; give another --out") from error
    return [*files]


def _is_ours(name: Any, out: Path) -> bool:
    """Returns whether a word in predictions.json names a picture that `predict` may have written into `out`."""
    known = isinstance(name, str) and name.endswith(".png") and name.partition("/")[0] in _FOLDERS
    return known and (out / name).resolve().is_relative_to(out.resolve()) and not (out / name).is_dir()


def _draw(
    image: Image.Image,
    answer: Prediction,
    predictor: Predictor,
    out: Path,
    name: str,
    opacity: float,
    threshold: float,
) -> dict[str, str]:
    """Writes the pictures of an image; returns their paths below `out` by their kind."""
    palette = predictor.palette
    made = {_PICTURES: draw(image, answer, predictor.classes, palette, opacity=opacity, threshold=threshold)}
    if isinstance(answer, Segmentation):
        made |= {_COLOURS: colour_map(answer, palette), _LABELS: Image.fromarray(answer.labels)}
    for kind, picture in made.items():
        path = out / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        picture.save(partial, format="png")
        partial.replace(path)
    return {kind: f"{kind}/{name}.png" for kind in made}


def _summary(answer: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    if isinstance(answer, Segmentation):
        return {"classes": {classes[label]: round(share, 6) for label, share in class_shares(answer)}}
    if isinstance(answer, Classification):
        return {"top": [{"class": classes[label], "probability": share} for label, share in answer.top()]}
    return {"objects": len(answer.scores)}


def _coco(answer: Prediction, image: int) -> list[dict[str, Any]]:
    """Returns a detector's objects in COCO's format of results; no others'."""
    if not isinstance(answer, Detection):
        return []
    objects = []
    for number, (left, top, right, bottom) in enumerate(answer.boxes.tolist()):
        one = {
            "image_id": image,
            "category_id": int(answer.labels[number]) + 1,
            "bbox": [left, top, right - left, bottom - top],
            "score": float(answer.scores[number]),
        }
        if answer.masks is not None:
            packed = rle.encode(np.asfortranarray(answer.masks[number].astype(np.uint8)))
            one["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
        objects.append(one)
    return objects


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
