"""Reading a config: a program of OpenMMLab's kind or plain data, with what the command line changes in it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import FlexibleRunner

from rmoe.engine import safe_config
from rmoe.engine.building import described, user_errors
from rmoe.engine.check_values import SECTIONS
from rmoe.engine.shipped import find_config
from rmoe.engine.task_config import join_tasks
from rmoe.errors import UserError, nearest

_SURE = 0.8  # how alike, by difflib, a name is to one that is read before it is taken for a misspelt one


def read_config(path: Path, options: Mapping[str, Any], safe: bool = False) -> Config:
    """Returns the config with `options` (dotted keys) set in it, and its `tasks` joined.

    Args:
        path: of the config, or the name of a shipped one.
        options: what to change in it.
        safe: run no code on the config's behalf, see `rmoe.engine.safe_config`.

    Raises:
        UserError: no such file, one that Python or mmengine cannot read, a section whose name is misspelt, or an option
            whose key nobody reads.
    """
    path = find_config(path)
    try:
        if path.is_file() and b"\0" in path.read_bytes():
            raise UserError(f"{path} has a null byte: it is no text; give the path of a config file")
        cfg = Config(safe_config.read(path), filename=str(path)) if safe else Config.fromfile(path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no config {error.filename or path}; give the path of a config file") from error
    except RecursionError as error:
        raise UserError(
            f"{path} cannot be read as a config: it inherits from itself, or is nested without end"
        ) from error
    except (Exception, SystemExit) as error:  # a config is a program, which may raise anything
        raise UserError(f"{path} cannot be read as a config: {described(error)}") from error
    _check_names(cfg)
    change(cfg, options)
    if safe and cfg.get("tasks") is not None:
        raise UserError(f"--safe-config: {path} names configs of tasks, which are programs; dump the whole config")
    join_tasks(cfg)
    return cfg


def _read_names() -> set[str]:
    """Returns the top-level names of a config that training reads."""
    return {*SECTIONS, *inspect.signature(FlexibleRunner.__init__).parameters} - {"self", "cfg"}


def _check_names(cfg: Config) -> None:
    """Checks that no section is misspelt. A config has variables of its own, too: what is like no section, or is beside
    the one that it is like, is let pass.
    """
    known = _read_names()
    for name in sorted({*cfg} - known):
        if close := difflib.get_close_matches(name, known - {*cfg}, n=1, cutoff=_SURE):
            raise UserError(
                f"the config has '{name}', which training does not read; did you mean '{close[0]}'? A variable of its "
                "own needs a name that is less like it"
            )


def change(cfg: Config, options: Mapping[str, Any]) -> None:
    """Sets `options` (dotted keys) in a config.

    Raises:
        UserError: a key that nobody reads, or that does not fit the config.
    """
    known = {*cfg, *_read_names()}
    for key in options:
        first, *others = key.split(".")
        if first not in known:
            raise UserError(f"--cfg-options: the config has no '{first}'{_hint(first, known)}")
        if "" in others:
            raise UserError(f"--cfg-options: '{key}' has an empty part; write names and numbers with one dot between")
    with user_errors("--cfg-options do not fit the config"):
        cfg.merge_from_dict(dict(options))


def _hint(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else nearest(key, known)
