"""Moves the paths in a config to another folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOTS = ("data_root", "root")
_JOINED = ("ann_file", "data_prefix")  # a data set looks for them below its data_root
_PATHS = (*ROOTS, "classes", "core", "load_from", "work_dir", "ann_file", "img_path", "seg_map_path", "img")


def moved_paths(node: Any, old: Path, new: Path, *, beside_root: bool = False) -> Any:
    """Returns a part of a config whose paths below the folder `old` are below `new`.

    Only keys that hold paths count: with `old` the working directory, every word would be a path below it.

    Args:
        node: plain data.
        old: the folder that is moved.
        new: where to.
        beside_root: relative paths are a data set's, which go where its data_root goes.
    """
    if isinstance(node, list | tuple):
        return type(node)(moved_paths(value, old, new) for value in node)
    if not isinstance(node, dict):
        return node
    rooted = any(node.get(key) for key in ROOTS)
    found = {}
    for key, value in node.items():
        joined = beside_root or (rooted and key in _JOINED)
        if isinstance(value, str):
            path = Path(value)
            moves = key in _PATHS and value and path.is_relative_to(old) and (path.is_absolute() or not joined)
            found[key] = str(new / path.relative_to(old)) if moves else value
        else:
            found[key] = moved_paths(value, old, new, **({"beside_root": joined} if isinstance(value, dict) else {}))
    return found
