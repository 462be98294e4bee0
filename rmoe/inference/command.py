"""The words of `rmoe predict` and `rmoe test`. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rmoe.engine.command import Options, new_file
from rmoe.engine.terminal import keep_warnings, say
from rmoe.errors import UserError, printable
from rmoe.inference.printing import tell


def add_predict(groups: argparse._SubParsersAction) -> None:
    """Adds `rmoe predict`."""
    text = (
        "Predicts on images with a finished run: its best weights where it kept some, else its last ones. Writes "
        "pictures with a legend, of segmentation colours and label maps as well, and one JSON with everything; of "
        "detection its annotations are COCO's results. Images that cannot be read are named, and the exit code is 1."
    )
    parser = groups.add_parser("predict", help="predict on images with a finished run", description=text)
    _add_options(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or pattern such as 'photos/*.jpg'")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--threshold", type=float, default=0.3, metavar="T", help="score from which on objects count (%(default)s)"
    )
    parser.add_argument(
        "--opacity", type=float, default=0.55, metavar="A", help="of the colours over the images, 0 to 1 (%(default)s)"
    )
    parser.set_defaults(run=_predict)


def add_test(groups: argparse._SubParsersAction) -> None:
    """Adds `rmoe test`."""
    text = (
        "Evaluates a finished run again, by the metrics of its training: on its validation set, another split, or "
        "another data set of the same layout and classes; with flips and scales, if asked, by mmseg's and mmdet's "
        "test-time augmentation. Prints the metrics and a table of the classes."
    )
    parser = groups.add_parser("test", help="evaluate a finished run again", description=text)
    _add_options(parser)
    parser.add_argument(
        "--split", choices=("val", "test", "train"), default="val", help="whose data set (default: %(default)s)"
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder that stands in for the data set's")
    parser.add_argument("--cfg-options", nargs="+", action=Options, metavar="KEY=VALUE", help="change the config")
    parser.add_argument("--flip", action="store_true", help="evaluate flipped images as well, and merge")
    parser.add_argument("--scales", type=float, nargs="+", default=(), metavar="S", help="and images of these scales")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: the config's")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the result to FILE as well")
    parser.set_defaults(run=_test)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--precision", help="of the weights: bfloat16, or on a CPU int8 (default: float32)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16, by autocast (default: float32)")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the finished run that a command takes, and `--import`, whose modules `import_modules` imports."""
    parser.add_argument("folder", metavar="RUN", help="work dir of a finished run, or a file or checkpoint in it")
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="code of yours that it needs"
    )
    parser.add_argument("--task", metavar="NAME", help="which one, of a run of several")


def _predict(arguments: argparse.Namespace) -> int:
    keep_warnings()
    import_modules(arguments.modules)
    from rmoe.inference.files import predict
    from rmoe.inference.load import load
    from rmoe.inference.precision import share_in_int8

    say(f"loading {printable(arguments.folder)}")
    chosen = {"dtype": arguments.dtype, "precision": arguments.precision}
    predictor = load(arguments.folder, task=arguments.task, device=arguments.device, **chosen)
    if predictor.precision == "int8":
        tell(f"weights that are 8-bit integers: {share_in_int8(predictor.model):.0%}")
    tell(f"weights: {predictor.source}")
    done, failed = predict(
        predictor,
        arguments.images,
        arguments.out,
        batch_size=arguments.batch_size,
        threshold=arguments.threshold,
        opacity=arguments.opacity,
    )
    tell(f"{arguments.out}: {done} images predicted" + (f", {failed} not" if failed else ""))
    return 1 if failed else 0


def _test(arguments: argparse.Namespace) -> None:
    keep_warnings()
    import_modules(arguments.modules)
    from rmoe.engine.checkpoint.files import write_json
    from rmoe.inference.evaluate import evaluate, show

    found = evaluate(
        arguments.folder,
        task=arguments.task,
        split=arguments.split,
        data_root=arguments.data_root,
        options=arguments.cfg_options or {},
        scales=arguments.scales,
        flip=arguments.flip,
        batch_size=arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
        precision=arguments.precision,
    )
    show(found)
    if arguments.json is not None:
        write_json(arguments.json, found.content())


def import_modules(modules: Sequence[str]) -> None:
    """Imports the user's own modules, which lie in the working directory or are installed."""
    if modules:
        sys.path.insert(0, os.getcwd())
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # it is a program, which may raise anything
            raise UserError(f"--import {name}: {type(error).__name__}: {error}; see that it can be imported") from error
