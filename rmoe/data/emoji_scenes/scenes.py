"""Renders the embedded data set: OpenMoji objects on textures, in the layouts of ImageNet, ADE20K and COCO.

`render` writes

    OUT/upstream/{train,val}/CLASS/*.jpg                      one object per picture
    OUT/ade20k/{images,annotations}/{training,validation}/    scenes and label maps (8 bit; 0 = void, 1 … N classes)
    OUT/ade20k/classes.json                                   for the values 1 … N: name, colour, whether it is a thing
    OUT/coco/{train2017,val2017}/, annotations/instances_*    the same scenes; a category's id is its label value
    OUT/dataset.json                                          parameters, counts, licence, sha256 of all other files

An image depends on (seed, split, index) and the parameters of its looks alone. Letters in array names:
H height, W width in pixels; 3 is red, green, blue.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rmoe.data.arguments import require_count
from rmoe.data.emoji_scenes.dice import Dice
from rmoe.data.emoji_scenes.emoji import stamp
from rmoe.data.emoji_scenes.glyphs import CREDIT, DISTRACTORS, LICENCE, LICENCE_URL, THINGS, UPSTREAM, class_name
from rmoe.data.emoji_scenes.params import SceneParams, tail
from rmoe.data.emoji_scenes.textures import STUFF, colour_matrix, noise, recolour, texture
from rmoe.data.palette import palette
from rmoe.data.progress import tracked
from rmoe.errors import UserError

FORMAT = 1  # raise it when the bytes of any image change
MIN_VISIBLE = 16  # pixels; an object that shows fewer becomes void
_VOID = -1
_BEHIND = {"sky": 4, "brick": 2, "wood": 2}
_GROUND = {"grass": 3, "water": 2, "sand": 2, "snow": 2, "road": 3, "wood": 1}
_SPLITS = {"train": 0, "val": 1}
_FIRST_VAL_ID = 500_000  # COCO's image ids are unique over both splits


class Instance(NamedTuple):
    """Holds the visible part of an object or of a crowd: its label value and mask, bool [H, W]."""

    value: int
    crowd: bool
    mask: np.ndarray


class Scene(NamedTuple):
    """Holds a picture, uint8 [H, W, 3], its label map, uint8 [H, W], 0 for void, and its instances, back to front."""

    image: np.ndarray
    labels: np.ndarray
    instances: list[Instance]


class _Placed(NamedTuple):
    """Says where to draw a glyph: row of the foot, column of the middle, size, and its owner (None: a distractor)."""

    foot: int
    middle: int
    size: int
    char: str
    owner: int | None


def metainfo(categories: int = SceneParams.categories) -> dict[str, tuple]:
    """Returns `classes` and `palette` of the label values 1 … N, stuff first, as mmseg's data sets take them."""
    names = (*STUFF, *(thing.name for thing in THINGS[:categories]))
    return {"classes": names, "palette": palette(len(names))}


def render(out: Path, params: SceneParams, *, jobs: int = 1) -> bool:
    """Writes the data set to `out`, completely or not at all; returns False if it is there already.

    Raises:
        UserError: `out` holds something else or a data set of other parameters, or cannot be written.
    """
    require_count("jobs", jobs)
    out = Path(os.path.abspath(out))  # "." has no sibling
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        if _is_there(out, params):
            return False
        partial.mkdir(parents=True)
        _write(partial, params, jobs)
        partial.rename(out)
    except OSError as error:
        raise UserError(
            f"cannot write the data set to {out}: {error}; free the disk or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def upstream_image(params: SceneParams, split: str, rank: int, index: int) -> np.ndarray:
    """Returns picture `index` of the upstream class of `rank` in `split`, uint8 [H, W, 3]."""
    dice = Dice(params.seed, 0, _SPLITS[split], rank, index)
    style, size = dice.pick(params.styles), params.upstream_size
    image = texture(dice.pick(list(STUFF)), dice, size)
    if dice.chance(50):
        image = recolour(image, colour_matrix(dice.between(0, 359), dice.between(128, 320)))
    for _ in range(dice.between(0, 3)):
        side, piece = dice.between(size // 4, size * 3 // 4), dice.pick(UPSTREAM)
        edge, along = dice.pick((0, size)), dice.between(0, size)
        _paste(image, _drawn(dice, piece, side, 180, style), *dice.pick(((edge, along), (along, edge))))
    side = dice.between(size * 45 // 100, size * 95 // 100)
    middle = [size // 2 + dice.between(-(size - side) // 2, (size - side) // 2) for _ in range(2)]
    _paste(image, _drawn(dice, UPSTREAM[rank], side, 40, style), *middle)
    return _lit(image, dice, style)


def scene(params: SceneParams, split: str, index: int) -> Scene:
    """Returns scene `index` of `split`; its label map and its instances show the same visible pixels."""
    dice = Dice(params.seed, 1, _SPLITS[split], index)
    style, size = dice.pick(params.styles), params.scene_size
    image, labels = _backdrop(dice, size)
    placed, owners = _placed(dice, params)
    owned = np.full((size, size), len(owners), dtype=np.int16)  # the owner of each pixel; len(owners) is the backdrop
    for item in sorted(placed, key=lambda item: item.foot):
        patch = _drawn(dice, item.char, item.size, 20, style)
        window, cover = _paste(image, patch, item.foot - item.size // 2, item.middle)
        view = owned[window]
        view[cover > 96] = _VOID  # about half covered pixels are void
        if item.owner is not None:
            view[cover > 160] = item.owner
    instances = []
    for owner, (category, crowd) in enumerate(owners):
        mask = owned == owner
        if np.count_nonzero(mask) < MIN_VISIBLE:
            owned[mask] = _VOID
            continue
        value = len(STUFF) + 1 + category
        labels[mask] = value
        instances.append(Instance(value, crowd, mask))
    labels[owned == _VOID] = 0
    return Scene(_lit(image, dice, style), labels, instances)


def _backdrop(dice: Dice, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns picture, uint8 [H, W, 3], and label map, uint8 [H, W], of a wall or sky, one or two grounds, a patch."""
    values = {kind: value for value, kind in enumerate(STUFF, start=1)}
    rows, columns = np.arange(size)[:, None], np.arange(size)
    behind = list(_BEHIND)[dice.weighted(list(_BEHIND.values()))]
    image, labels = texture(behind, dice, size), np.full((size, size), values[behind], dtype=np.uint8)
    wavy = behind == "sky"
    regions, horizon = [], dice.between(size * 20 // 100, size * 60 // 100)
    for start in (horizon, dice.between(horizon + size // 8, size + size // 4)):
        bumps = (noise(dice, size, 48, 48, 2)[0] - 128) * (size // 8) // 128 if wavy else 0
        regions.append(rows >= start + bumps + (columns - size // 2) * dice.between(-10, 10) // 64)
        wavy = True
    if dice.chance(33):
        regions.append(regions[0] & (noise(dice, size, 48, 28, 2) > dice.between(150, 180)))
    for region in regions:
        ground = list(_GROUND)[dice.weighted(list(_GROUND.values()))]
        image = np.where(region[..., None], texture(ground, dice, size), image)
        labels[region] = values[ground]
    return image, labels


def _placed(dice: Dice, params: SceneParams) -> tuple[list[_Placed], list[tuple[int, bool]]]:
    """Returns the glyphs of a scene, and for each owner its category (from 0) and whether it is a crowd."""
    size = params.scene_size
    weights = [tail(rank, params.long_tail) for rank in range(params.categories)]
    placed: list[_Placed] = []
    owners: list[tuple[int, bool]] = []
    for _ in range(dice.between(3, 7)):
        category = dice.weighted(weights)
        placed.append(_somewhere(dice, size, dice.pick(THINGS[category].glyphs), len(owners)))
        owners.append((category, False))
    if dice.chance(12):
        category = dice.weighted(weights)
        char, foot, middle = dice.pick(THINGS[category].glyphs), dice.between(size // 3, size), dice.between(0, size)
        for _ in range(dice.between(6, 12)):
            near = foot + dice.between(-size // 10, size // 10), middle + dice.between(-size // 5, size // 5)
            placed.append(_Placed(*near, dice.between(size * 8 // 100, size * 13 // 100), char, len(owners)))
        owners.append((category, True))
    if dice.chance(33):
        placed.append(_somewhere(dice, size, dice.pick(DISTRACTORS), None))
    return placed, owners


def _somewhere(dice: Dice, size: int, char: str, owner: int | None) -> _Placed:
    """Places a glyph at random; the lower in the picture it stands, the nearer and larger it is."""
    foot = dice.between(size * 30 // 100, size * 105 // 100)
    return _Placed(foot, dice.between(0, size), size * dice.between(16, 34) // 100 + foot // 5, char, owner)


def _drawn(dice: Dice, char: str, side: int, turn: int, style: str) -> np.ndarray:
    """Draws a glyph turned by at most `turn` degrees, perhaps flipped, in slightly changed colours, uint8 [P, P, 4]."""
    degrees, flip = dice.between(-turn, turn), dice.chance(50)
    matrix = colour_matrix(dice.between(-20, 20), dice.between(180, 320), dice.between(190, 300))
    patch = stamp(char, size=side, degrees=degrees, flip=flip, sketch=style == "outline")
    if style != "outline":
        patch[..., :3] = np.minimum(recolour(patch[..., :3], matrix), patch[..., 3:])
    return patch


def _paste(image: np.ndarray, patch: np.ndarray, row: int, column: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Lays `patch` (uint8 [P, P, 4], colours times alpha) on `image` with its middle at (row, column).

    Returns:
        The window of `image` that the patch reaches, and its alpha there, uint8 of the window's shape.
    """
    window, inside = [], []
    for middle, extent, side in zip((row, column), image.shape, patch.shape, strict=False):
        start = middle - side // 2
        low, high = min(max(start, 0), extent), max(min(start + side, extent), 0)
        window.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    piece = patch[inside[0], inside[1]].astype(np.uint16)
    view = image[window[0], window[1]]
    view[:] = piece[..., :3] + (view * (255 - piece[..., 3:]) + 127) // 255
    return (window[0], window[1]), patch[inside[0], inside[1], 3]


def _lit(image: np.ndarray, dice: Dice, style: str) -> np.ndarray:
    """Returns the picture with the light and the grain of its `style`, uint8 [H, W, 3]."""
    contrast, offset, grain = dice.between(215, 290), np.array([dice.between(-14, 14) for _ in range(3)]), 5
    saturation = 256
    if style == "tinted":
        offset = offset + [dice.between(-70, 70) for _ in range(3)]
    elif style == "night":
        saturation, contrast, offset, grain = 110, contrast * 120 >> 8, offset // 3 + [2, 8, 30], 14
    elif style == "outline":
        saturation, offset = 0, np.full(3, offset[0])
    image = recolour(image, colour_matrix(0, saturation, contrast), offset)
    shake = dice.bytes(*image.shape[:2], 1).astype(np.int16) * (2 * grain + 1) // 256 - grain
    return (image + shake).clip(0, 255).astype(np.uint8)


# Files


def _is_there(out: Path, params: SceneParams) -> bool:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        manifest = json.loads((out / "dataset.json").read_text())
        found, files = {"format": manifest["format"], **manifest["parameters"]}, manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{out} exists and is no data set of this command; choose a folder that does not exist"
        ) from None
    wanted = {"format": FORMAT, **_plain(params)}
    other = [f"{key} {found.get(key)} (asked for: {value})" for key, value in wanted.items() if found.get(key) != value]
    if other:
        raise UserError(f"{out} holds a data set with {', '.join(other)}; choose another folder, or remove it first")
    count = sum(len(names) for _, _, names in os.walk(out)) - 1
    if count != files:
        raise UserError(f"{out} holds {count} files, but {files} were written; remove it and run again")
    return True


def _write(root: Path, params: SceneParams, jobs: int) -> None:
    for split, (ade, coco) in {"train": ("training", "train2017"), "val": ("validation", "val2017")}.items():
        for folder in (f"ade20k/images/{ade}", f"ade20k/annotations/{ade}", f"coco/{coco}", "coco/annotations"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for char in UPSTREAM[: params.upstream_classes]:
            (root / "upstream" / split / class_name(char)).mkdir(parents=True)
    tasks: list[tuple] = [
        (root, params, split, None, rank) for split in _SPLITS for rank in range(params.upstream_classes)
    ]
    scenes = {"train": params.scenes_train, "val": params.scenes_val}
    tasks += [
        (root, params, split, start, min(start + 32, n)) for split, n in scenes.items() for start in range(0, n, 32)
    ]
    annotations: dict[str, list[dict]] = {split: [] for split in _SPLITS}
    for task, made in zip(tasks, _in_order(tasks, jobs), strict=True):
        annotations[task[2]] += made
    info = metainfo(params.categories)
    things = [index >= len(STUFF) for index in range(len(info["classes"]))]
    _write_json(root / "ade20k" / "classes.json", {**info, "isthing": things})
    for split, count in scenes.items():
        _write_json(
            root / f"coco/annotations/instances_{split}2017.json", _coco(params, split, count, annotations[split])
        )
    counts = {
        f"upstream_{s}": sum(params.upstream_count(s, r) for r in range(params.upstream_classes)) for s in _SPLITS
    }
    counts |= {f"scenes_{split}": count for split, count in scenes.items()}
    counts |= {f"instances_{split}": len(annotations[split]) for split in _SPLITS}
    counts |= {f"crowds_{split}": sum(item["iscrowd"] for item in annotations[split]) for split in _SPLITS}
    files, digest = _digest(root)
    manifest = {"format": FORMAT, "parameters": _plain(params), "counts": counts, "files": files, "sha256": digest}
    _write_json(root / "dataset.json", manifest | {"licence": f"{LICENCE} ({LICENCE_URL})", "credit": CREDIT})


def _in_order(tasks: Sequence[tuple], jobs: int) -> Iterator[list[dict]]:
    """Yields the results of `_work` for each task, with a progress bar on a terminal."""
    if jobs == 1:
        yield from tracked(map(_work, tasks), "rendering", len(tasks))
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # fork is unsafe once torch has threads
        yield from tracked(pool.imap(_work, tasks), "rendering", len(tasks))


def _work(task: tuple) -> list[dict]:
    """Writes scenes `start` to `stop`, or for None the images of one upstream class; returns COCO annotations."""
    root, params, split, start, stop = task
    if start is None:
        folder = root / "upstream" / split / class_name(UPSTREAM[stop])
        for index in range(params.upstream_count(split, stop)):
            _write_jpeg(folder / f"{index:05d}.jpg", upstream_image(params, split, stop, index))
        return []
    return [item for index in range(start, stop) for item in _write_scene(root, params, split, index)]


def _write_scene(root: Path, params: SceneParams, split: str, index: int) -> Iterator[dict]:
    from pycocotools import mask as rle

    made, image_id = scene(params, split, index), _image_id(split, index)
    ade, name = {"train": "training", "val": "validation"}[split], f"ADE_{split}_{index + 1:08d}"
    jpeg = root / "ade20k" / "images" / ade / f"{name}.jpg"
    _write_jpeg(jpeg, made.image)
    # Z_RLE: the output of zlib's other strategies depends on its build.
    Image.fromarray(made.labels).save(root / "ade20k" / "annotations" / ade / f"{name}.png", compress_type=zlib.Z_RLE)
    _link(jpeg, root / "coco" / f"{split}2017" / f"{image_id:012d}.jpg")
    for number, instance in enumerate(made.instances):
        rows, columns = (np.flatnonzero(instance.mask.any(axis)) for axis in (1, 0))
        code = rle.encode(np.asfortranarray(instance.mask, dtype=np.uint8))
        yield {
            "id": image_id * 100 + number,
            "image_id": image_id,
            "category_id": instance.value,
            "iscrowd": int(instance.crowd),
            "area": int(np.count_nonzero(instance.mask)),
            "bbox": [int(part) for part in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)],
            "segmentation": {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()},
        }


def _coco(params: SceneParams, split: str, count: int, annotations: list[dict]) -> dict[str, Any]:
    side = params.scene_size
    ids = [_image_id(split, index) for index in range(count)]
    things = enumerate(THINGS[: params.categories], start=len(STUFF) + 1)
    return {
        "info": {"description": f"rmoe scenes, {split}", "contributor": CREDIT},
        "licenses": [{"id": 1, "name": LICENCE, "url": LICENCE_URL}],
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": side, "width": side, "license": 1} for i in ids],
        "categories": [{"id": value, "name": t.name, "supercategory": t.supercategory} for value, t in things],
        "annotations": annotations,
    }


def _image_id(split: str, index: int) -> int:
    return index + 1 + _SPLITS[split] * _FIRST_VAL_ID


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image).save(path, quality=90, subsampling=0)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(
        json.dumps(content, sort_keys=True, indent=1 if path.name in ("classes.json", "dataset.json") else None) + "\n"
    )


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _digest(root: Path) -> tuple[int, str]:
    """Returns the number of files under `root` and the sha256 over their names and bytes."""
    total, files = hashlib.sha256(), sorted(path for path in root.rglob("*") if path.is_file())
    for path in files:
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return len(files), total.hexdigest()


def _plain(params: SceneParams) -> dict[str, Any]:
    return {**dataclasses.asdict(params), "styles": list(params.styles)}
