"""Configs and DeepSpeed JSONs that come with the package, found by their names."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from rmoe.errors import UserError

PACKAGE = Path(__file__).parents[1]
CONFIGS, JSONS = PACKAGE / "configs", PACKAGE / "ds_configs"
_CLOSE = 0.5


def find_config(path: Path) -> Path:
    """Returns the config that `path` is, or the shipped one that it names, such as demo/residual.py.

    Raises:
        UserError: neither.
    """
    return _find(path, CONFIGS, "config", "give the path of a config file, or a name that `rmoe configs` lists")


def find_json(path: Path) -> Path:
    """Returns the DeepSpeed JSON that `path` is, or the shipped one that it names, such as zero2.json.

    Raises:
        UserError: neither.
    """
    names = ", ".join(sorted(one.name for one in JSONS.glob("*.json")))
    return _find(path, JSONS, "DeepSpeed JSON", f"give the path of a file, or one of {names}")


def _find(path: Path, folder: Path, what: str, advice: str) -> Path:
    if os.path.lexists(path) or "\0" in str(path):
        return path
    if os.path.isfile(folder / path):
        return folder / path
    known = [str(one.relative_to(folder)) for one in folder.rglob("*.*") if "_base_" not in one.parts]
    close = difflib.get_close_matches(str(path), sorted(known), n=2, cutoff=_CLOSE)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise UserError(f"there is no {what} {path}; {hint}{advice}")
