"""Folders that are filled beside their destination: each has a file that says whose it is and what it is made of.

A folder without that file is a user's own, whatever its name is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rmoe.errors import UserError

MARKER = ".unfinished.json"


def begin(folder: Path, about: Mapping[str, Any], keep: Callable[[Any], bool] = lambda left: False) -> None:
    """Makes a folder to fill, in place of one that an interrupted call has left.

    Args:
        folder: to make.
        about: what it will be made of; of JSON.
        keep: says of what an interrupted call was `about` whether this one goes on with what that has left.

    Raises:
        UserError: there is one already that no such call has left.
        OSError: it cannot be made or removed.
    """
    try:
        left = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        left = None
    if left is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is in the way: it is nothing that an interrupted command has left; move it away")
    if left is not None and not keep(left):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps(dict(about)))


def finish(folder: Path, out: Path) -> None:
    """Gives a folder that is complete its name; an empty folder of that name is replaced.

    Raises:
        OSError: it cannot be renamed.
    """
    (folder / MARKER).unlink()
    if out.is_dir():
        out.rmdir()
    folder.rename(out)
