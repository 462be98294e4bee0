"""The command line of training: its words, and the way from them to the run.

Nothing heavy is imported before the terminal has been told.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmoe.engine.shipped import find_config, find_json
from rmoe.engine.terminal import keep_warnings, say, speaks

DESCRIPTION = "Trains what a config describes."
_TIMEOUT = 300.0  # seconds
_LONGEST = 10 * 24 * 3600.0  # seconds
_MOST_STEPS = 10**9


def parser() -> argparse.ArgumentParser:
    """Returns the parser of a training's command line alone; `rmoe train` has the same words."""
    words = argparse.ArgumentParser(prog="train.py", description=DESCRIPTION)
    add_arguments(words)
    return words


def add_arguments(words: argparse.ArgumentParser) -> None:
    """Adds the words of a training's command line."""
    words.add_argument(
        "config", type=Path, metavar="CONFIG", help="OpenMMLab config file, or the name of a shipped one"
    )
    words.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="JSON",
        default=Path("zero2.json"),
        help="DeepSpeed's own keys: a file, or the name of a shipped one (default: %(default)s)",
    )
    words.add_argument(
        "--steps",
        type=number_of_steps,
        metavar="N",
        help="train for N steps: schedule, warm-up and the intervals of validation, checkpoints and log lines change "
        "in proportion",
    )
    words.add_argument("--work-dir", type=folder_name, metavar="DIR", help="default: work_dirs/ and the config's name")
    words.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint, if any")
    words.add_argument(
        "--timeout",
        type=seconds,
        default=_TIMEOUT,
        metavar="SECONDS",
        help="without progress, after which every process ends; longer than a step, an evaluation's metrics and a "
        "checkpoint take (default: %(default)g)",
    )
    words.add_argument(
        "--safe-config", action="store_true", help="refuse a CONFIG that is a Python program: only JSON or YAML"
    )
    words.add_argument("--cfg-options", nargs="+", action=Options, metavar="KEY=VALUE", help="change the config")
    words.add_argument(
        "--debug", dest="trace", action="store_true", help="show where in the program an error comes from"
    )
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it


def start(arguments: argparse.Namespace) -> int:
    """Imports what training needs, says so, and trains; see `rmoe.engine.launch.run`."""
    if speaks():  # a wrong name is told before anything is imported
        find_config(arguments.config)
        find_json(arguments.deepspeed_config)
    keep_warnings()
    say("importing PyTorch, DeepSpeed and OpenMMLab (some seconds)")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it had to guess
    from rmoe.engine.launch import run

    return run(arguments)


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


def new_file(text: str) -> Path:
    """Returns the path of a file to write, once it is clear that it can be written when the work is done."""
    path = Path(text)
    try:
        fits = not path.is_dir() and path.absolute().parent.is_dir() and os.access(path.absolute().parent, os.W_OK)
    except (OSError, ValueError):
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: its folder must be there; make it first")
    return path


def number_of_steps(text: str) -> int:
    """Returns the number of steps that a word of the command line says."""
    if not (text.isdecimal() and 1 <= int(text) <= _MOST_STEPS):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps; it is a whole number, at least 1")
    return int(text)


class Options(argparse.Action):
    """Reads `--cfg-options` as mmengine does, and refuses words without `=` as any other mistake of a command line."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, *rest: Any) -> None:
        """See `argparse.Action`."""
        words: Sequence[str] = values
        if bad := [word for word in words if not word.partition("=")[0] or "=" not in word]:
            parser.error(f"argument --cfg-options: {bad[0]!r} is not KEY=VALUE, such as randomness.seed=1")
        from mmengine.config import DictAction

        DictAction(self.option_strings, self.dest, nargs="+")(parser, namespace, values, *rest)
