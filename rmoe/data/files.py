"""Lists the folders and files of a data set, and tells in words why one cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rmoe.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def list_folder(folder: str | Path) -> tuple[list[str], list[str]]:
    """Returns the sorted names of the folders and of the files in a folder; links are followed.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            folders = {entry.name: _is_folder(entry) for entry in entries}
    except OSError as error:
        raise _unreadable(folder, error) from error
    return sorted(name for name in folders if folders[name]), sorted(name for name in folders if not folders[name])


def walk(folder: str | Path, outside: str | Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yields a folder and all folders below it with the sorted names of their files, each once however it is linked.

    Args:
        folder: the folder to begin with.
        outside: a folder above it, which is left out if a link leads back to it.

    Raises:
        UserError: one of the folders cannot be read.
    """
    seen = {_identity(outside)} if outside is not None else set()
    waiting = [str(folder)]
    while waiting:
        where = waiting.pop()
        if (identity := _identity(where)) in seen:
            continue
        seen.add(identity)
        folders, names = list_folder(where)
        waiting += [os.path.join(where, name) for name in reversed(folders)]
        yield where, names


def stems(folder: str | Path, suffix: str) -> set[str]:
    """Returns the relative paths of the files below a folder that end in `suffix`, without the suffix."""
    return {
        os.path.relpath(os.path.join(where, name), folder)[: -len(suffix)]
        for where, names in walk(folder)
        for name in names
        if name.endswith(suffix) and not name.startswith(".")
    }


def class_folders(root: str | Path) -> list[str]:
    """Returns the names of the folders in a split's folder, sorted; a link to the split itself is no class."""
    own = _identity(root)
    return [name for name in list_folder(root)[0] if _identity(os.path.join(root, name)) != own]


def class_images(root: str | Path, name: str) -> list[str]:
    """Returns the paths of the images of the class `name` in a split's folder, at any depth."""
    return [
        os.path.join(where, file)
        for where, files in walk(os.path.join(root, name), outside=root)
        for file in files
        if is_image(file)
    ]


def is_image(name: str) -> bool:
    """Returns whether a name is an image's; hidden files, such as those that macOS adds, are no images."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def reason(error: Exception) -> str:
    """Returns in one line why a file could not be read."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).splitlines()[0]


def _unreadable(folder: str | Path, error: OSError) -> UserError:
    return UserError(f"folder {folder} cannot be read ({error.strerror}); see that it exists and that you may read it")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # the entry is a link to itself
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino
