"""Reading a config: a program of OpenMMLab's kind or plain data, with what the command line changes in it."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.runner import FlexibleRunner

from rmoe.engine import safe_config
from rmoe.engine.building import described, user_errors
from rmoe.errors import UserError, nearest

_LONGEST = 10 * 24 * 3600.0  # seconds


def read_config(path: Path, options: Mapping[str, Any], safe: bool = False) -> Config:
    """Returns the config with `options` (dotted keys) set in it.

    Args:
        path: of the config.
        options: what to change in it.
        safe: run no code on the config's behalf, see `rmoe.engine.safe_config`.

    Raises:
        UserError: no such file, one that Python or mmengine cannot read, or an option whose key nobody reads.
    """
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
    known = {*cfg, *inspect.signature(FlexibleRunner.__init__).parameters, "stage"} - {"self", "cfg"}
    for key in options:
        first, *others = key.split(".")
        if first not in known:
            raise UserError(f"--cfg-options: the config has no '{first}'{_hint(first, known)}")
        if "" in others:
            raise UserError(f"--cfg-options: '{key}' has an empty part; write names and numbers with one dot between")
    with user_errors("--cfg-options do not fit the config"):
        cfg.merge_from_dict(dict(options))
    return cfg


def _hint(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else nearest(key, known)


def seconds(text: str) -> float:
    """Returns the time that a word of the command line says."""
    if not 0 < (value := float(text)) <= _LONGEST:
        raise argparse.ArgumentTypeError(f"{text} is no time; it is more than 0 and at most {_LONGEST:g} seconds")
    return value


def folder_name(text: str) -> Path:
    """Returns the folder that a word of the command line names."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(text)


class Options(DictAction):
    """Reads `--cfg-options` as mmengine does, and refuses words without `=` as any other mistake of a command line."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, *rest: Any) -> None:
        """See `argparse.Action`."""
        words: Sequence[str] = values
        if bad := [word for word in words if not word.partition("=")[0] or "=" not in word]:
            parser.error(f"argument --cfg-options: {bad[0]!r} is not KEY=VALUE, such as randomness.seed=1")
        super().__call__(parser, namespace, values, *rest)
