"""The command `rmoe`. Each subcommand is a function that adds its parser and names the function to run.

Nothing heavy is imported before a subcommand runs, so that `rmoe --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rmoe.config import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's); returns its exit code: 0, or 2 after a user's error."""
    parser = argparse.ArgumentParser(prog="rmoe", description="Residual mixture-of-experts vision transformers.")
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_data,):
        add(groups)
    arguments = parser.parse_args(argv)
    return _exit_code(lambda: arguments.run(arguments), parser.prog)


def console() -> NoReturn:
    """The installed command."""
    sys.exit(main())


def run_guarded(run: Callable[[], int | None], program: str = "rmoe") -> NoReturn:
    """Runs `run` and ends the process with its exit code (None is 0).

    A UserError becomes one line on stderr, without a traceback, and exit code 2.
    """
    sys.exit(_exit_code(run, program))


def _exit_code(run: Callable[[], int | None], program: str) -> int:
    try:
        return run() or 0
    except UserError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def _add_data(groups: argparse._SubParsersAction) -> None:
    data = groups.add_parser("data", help="make and check data sets").add_subparsers(metavar="ACTION", required=True)
    _add_scenes(data)
    _add_check(data)


def _add_scenes(actions: argparse._SubParsersAction) -> None:
    from rmoe.data.params import STYLES, SceneParams

    text = "Renders the embedded data set (OpenMoji glyphs, CC BY-SA 4.0) in the layouts of ImageNet, ADE20K and COCO."
    parser = actions.add_parser("scenes", help="render the embedded data set", description=text)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; left alone if the same set is there")
    add = parser.add_argument_group("what it looks like; equal values give equal bytes").add_argument
    add("--seed", type=int, help="of all random choices")
    add("--size", type=int, dest="scene_size", help="height and width of the scenes in pixels")
    add("--upstream-size", type=int, help="height and width of the upstream images in pixels")
    add("--upstream-classes", type=int, help="number of upstream classes")
    add("--upstream-train", type=int, help="training images of each upstream class")
    add("--upstream-val", type=int, help="validation images of each upstream class")
    add("--scenes-train", type=int, help="training scenes")
    add("--scenes-val", type=int, help="validation scenes")
    add("--categories", type=int, help="kinds of things in the scenes")
    add(
        "--styles",
        type=lambda text: tuple(text.split(",")),
        help=f"one or more of {','.join(STYLES)}; each image has one",
    )
    add("--long-tail", type=float, help="exponent a: the r-th category is drawn in proportion to r^-a")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; they do not change the bytes"
    )
    parser.set_defaults(run=_scenes, **{field.name: field.default for field in dataclasses.fields(SceneParams)})
    for action in parser._action_groups[-1]._group_actions:
        shown = ",".join(SceneParams.styles) if action.dest == "styles" else "%(default)s"
        action.help = f"{action.help} (default: {shown})"


def _scenes(arguments: argparse.Namespace) -> None:
    from rmoe.data.params import SceneParams
    from rmoe.data.scenes import render

    if arguments.jobs < 1:
        raise UserError(f"--jobs is {arguments.jobs}; it is at least 1")
    names = [field.name for field in dataclasses.fields(SceneParams)]
    params = SceneParams(**{name: getattr(arguments, name) for name in names})
    made = render(arguments.out, params, jobs=arguments.jobs)
    print(f"{arguments.out}: {'written' if made else 'there already, with these parameters'}")


def _add_check(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("check", help="read a whole data set and list what is wrong with it")
    parser.add_argument("layout", choices=("ade20k", "imagenet"))
    parser.add_argument("path", type=Path, help="folder with images/ and annotations/, or with train/ and val/")
    parser.add_argument(
        "--num-classes", type=int, help="ade20k: classes without void (default: as its class list says)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the problems to FILE as well")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from rmoe.data.check import check_ade20k, check_imagenet

    if arguments.layout == "ade20k":
        problems = check_ade20k(arguments.path, arguments.num_classes)
    else:
        problems = check_imagenet(arguments.path)
    for problem in problems:
        print(problem.message)
    print(f"{arguments.path}: {len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'} found")
    if arguments.json:
        content = {"path": str(arguments.path), "problems": [problem._asdict() for problem in problems]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 2 if problems else 0


if __name__ == "__main__":
    console()
