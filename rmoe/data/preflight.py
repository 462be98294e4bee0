"""Checks before anything is built that the files which a config's data sets need are there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmoe.data.arguments import check_arguments
from rmoe.data.check import Problem, check_class_list, check_segmentation, check_split, missing_folder, require
from rmoe.data.coco import check_annotations, check_images, read_annotations
from rmoe.errors import UserError

_PAIRS = {"SegDataset", "ADE20K", "BaseSegDataset", "ADE20KDataset"}  # *.jpg and *.png are the default suffixes
_COCO = {"Coco", "DetDataset", "CocoDataset"}


def preflight(cfg: Mapping[str, Any]) -> None:
    """Checks that the files which the config's training and validation sets name are there and fit together.

    It lists folders and reads annotation files, but no images. It skips a data set of an unknown type whose keys do not
    say what to look for, and one that is not on this machine's file system.

    Raises:
        UserError: a problem was found; the message is one line about the first.
    """
    problems: list[Problem] = []
    for name in ("train_dataloader", "val_dataloader"):
        loader = cfg.get(name)
        for dataset in _leaves(loader.get("dataset") if isinstance(loader, Mapping) else None):
            problems += _check(dataset)
    require(problems)


def _leaves(node: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the data sets inside mmengine's wrappers."""
    if isinstance(node, Mapping):
        several = node.get("datasets")
        several = [*several.values()] if isinstance(several, Mapping) else several  # of several tasks
        inner = [node["dataset"]] if "dataset" in node else []
        inner += several if isinstance(several, (list, tuple)) else []
        for one in inner:
            yield from _leaves(one)
        if not inner:
            yield node


def _check(dataset: Mapping[str, Any]) -> list[Problem]:
    kind, prefix = str(dataset.get("type")).rpartition(".")[2], dataset.get("data_prefix") or {}
    if dataset.get("backend_args") or "://" in str(dataset.get("data_root")):
        return []
    if kind not in _PAIRS | _COCO | {"ImageFolder"} and not (isinstance(prefix, Mapping) and "img_path" in prefix):
        return []
    check_arguments(dataset)
    problems = _check_classes(dataset)
    if kind == "ImageFolder" and {"root", "split"} <= dataset.keys():
        for split in dict.fromkeys(("train", dataset["split"])):
            problems += check_split(dataset["root"], split)
    elif "img_path" in prefix:
        problems += _check_pairs(dataset, kind)
    elif kind in _COCO and dataset.get("ann_file"):
        problems += _check_coco(dataset)
    return problems


def _check_classes(dataset: Mapping[str, Any]) -> list[Problem]:
    classes, number = dataset.get("classes"), dataset.get("num_classes")
    if classes is None or number is None:
        return []
    return check_class_list(classes, number)


def _check_pairs(dataset: Mapping[str, Any], kind: str) -> list[Problem]:
    """Checks the images and label maps of one of mmseg's data sets."""
    given = {key: prefix for key, prefix in dataset["data_prefix"].items() if prefix is not None}
    folders = {key: _path(dataset, prefix) for key, prefix in given.items()}
    if missing := [missing_folder(Path(folder)) for folder in folders.values() if not os.path.isdir(folder)]:
        return missing
    suffixes = {key: dataset[key] for key in ("img_suffix", "seg_map_suffix") if key in dataset}
    if dataset.get("ann_file") or folders.keys() != {"img_path", "seg_map_path"}:
        return []
    if kind not in _PAIRS and len(suffixes) != 2:
        return []
    images, maps = folders["img_path"], folders["seg_map_path"]
    return check_segmentation(images, maps, num_classes=None, **suffixes).problems


def _check_coco(dataset: Mapping[str, Any]) -> list[Problem]:
    """Checks the annotation file of one of mmdet's data sets, and that its images are there."""
    path = _path(dataset, dataset["ann_file"])
    try:
        content = read_annotations(path)
    except UserError as error:
        return [Problem("annotation-file", path, str(error))]
    images = _path(dataset, (dataset.get("data_prefix") or {}).get("img") or "")
    return check_annotations(content, path).problems or check_images(content, images, full=False).problems


def _path(dataset: Mapping[str, Any], path: str) -> str:
    return os.path.join(dataset.get("data_root") or "", path)
