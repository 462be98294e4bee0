"""New folders for what is written at once: complete under their name, or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rmoe.backbones.load_core import checked_path
from rmoe.data.partial import begin, finish
from rmoe.engine.checkpoint.files import PARTIAL
from rmoe.engine.lock import check_folder
from rmoe.errors import UserError


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yields a folder to write into, which gets the name `out` once the block has ended without an error.

    Raises:
        UserError: `out` is no path, is there and not an empty folder, or cannot be written; a folder of a user's own is
            in the way.
    """
    path = checked_path(out, "the folder to write")
    check_folder(path, "--out")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"the folder {path} is not empty; give another --out, or remove it first")
    partial = path.absolute().with_name(path.absolute().name + PARTIAL)
    try:
        begin(partial, {"for": path.absolute().name})
        try:
            yield partial
            finish(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); make room, or give another --out") from error
