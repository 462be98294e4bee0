"""The command `rmoe`. Each subcommand is a function that adds its parser and names the function to run.

Nothing heavy is imported before a subcommand runs, so that `rmoe --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import rmoe
from rmoe.deploy.command import add_deploy, add_merge
from rmoe.engine import command
from rmoe.errors import UserError, exit_code
from rmoe.inference.command import add_predict, add_test
from rmoe.inference.export_command import add_attach, add_export
from rmoe.inference.printing import tell
from rmoe.reporting.estimate_command import add_estimate

_LAYOUTS = ("ade20k", "coco", "imagenet")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's); returns its exit code: 0, or 2 after a user's error."""
    parser = argparse.ArgumentParser(prog="rmoe", description="Residual mixture-of-experts vision transformers.")
    parser.add_argument("--version", action="version", version=f"rmoe {rmoe.__version__}")
    parser.add_argument("--debug", action="store_true", help="show where in the program an error comes from")
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_train,
        _add_configs,
        _add_data,
        _add_import,
        _add_split,
        add_predict,
        add_test,
        add_deploy,
        add_merge,
        add_export,
        add_attach,
        add_estimate,
        _add_report,
        _add_analyze,
        _add_verify,
    ):
        add(groups)
    arguments = parser.parse_args(argv)
    return exit_code(lambda: arguments.run(arguments), parser.prog, arguments.debug)


def console() -> NoReturn:
    """Runs the installed command and ends the process."""
    sys.exit(main())


def _add_train(groups: argparse._SubParsersAction) -> None:
    text = f"{command.DESCRIPTION} The same as launch/train.py, which DeepSpeed's launcher and srun start."
    parser = groups.add_parser("train", help="train what a config describes", description=text)
    command.add_arguments(parser)
    parser.set_defaults(run=command.start)


def _add_configs(groups: argparse._SubParsersAction) -> None:
    text = (
        "Lists the shipped configs: task, backbone, pipeline, published figure, hardware, whether anybody has run it."
    )
    parser = groups.add_parser("configs", help="list the shipped configs", description=text)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only those that have all of these in what is told")
    parser.add_argument("--json", type=command.new_file, metavar="FILE", help="write the list to FILE as well")
    parser.set_defaults(run=_configs)


def _configs(arguments: argparse.Namespace) -> None:
    from rmoe.reporting.catalogue import entries, show

    found = entries(arguments.words)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(one) for one in found], indent=1) + "\n")


def _add_data(groups: argparse._SubParsersAction) -> None:
    data = groups.add_parser("data", help="make and check data sets").add_subparsers(metavar="ACTION", required=True)
    _add_scenes(data)
    _add_prepare(data)
    _add_check(data)


def _add_scenes(actions: argparse._SubParsersAction) -> None:
    from rmoe.data.emoji_scenes.params import STYLES, SceneParams

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
    from rmoe.data.emoji_scenes.params import SceneParams
    from rmoe.data.emoji_scenes.scenes import render

    if arguments.jobs < 1:
        raise UserError(f"--jobs is {arguments.jobs}; it is at least 1")
    names = [field.name for field in dataclasses.fields(SceneParams)]
    params = SceneParams(**{name: getattr(arguments, name) for name in names})
    made = render(arguments.out, params, jobs=arguments.jobs)
    tell(f"{arguments.out}: {'written' if made else 'there already, with these parameters'}")


def _add_prepare(actions: argparse._SubParsersAction) -> None:
    text = (
        "Unpacks ADEChallengeData2016.zip; or train2017.zip, val2017.zip and annotations_trainval2017.zip; or "
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz; then checks what came out. "
        "Interrupted, it goes on where it stopped."
    )
    parser = actions.add_parser("prepare", help="unpack a data set's official archives", description=text)
    parser.add_argument("layout", choices=_LAYOUTS)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with the archives")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--synsets", type=Path, metavar="FILE", help="imagenet: synset of each validation image, instead of the devkit"
    )
    parser.set_defaults(run=_prepare, num_classes=None, json=None)


def _prepare(arguments: argparse.Namespace) -> int:
    from rmoe.data.prepare import prepare

    if arguments.synsets is not None and arguments.layout != "imagenet":
        raise UserError(f"--synsets is for imagenet; {arguments.layout} has none: leave it out")
    prepare(arguments.layout, arguments.source, arguments.out, arguments.synsets)
    arguments.path = arguments.out
    return _check(arguments)


def _add_check(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("check", help="read a whole data set and list what is wrong with it")
    parser.add_argument("layout", choices=_LAYOUTS)
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="folder with images/ and annotations/, with train2017/ and annotations/, or with train/ or train.zip",
    )
    parser.add_argument(
        "--num-classes", type=int, help="ade20k: classes without void (default: as its class list says)"
    )
    parser.add_argument("--json", type=command.new_file, metavar="FILE", help="write what was found to FILE as well")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from rmoe.data.check import check_ade20k, check_imagenet
    from rmoe.data.coco import check_coco

    if arguments.num_classes is not None and arguments.layout != "ade20k":
        raise UserError(
            f"--num-classes is for ade20k; {arguments.layout} says itself which classes it has: leave it out"
        )
    if arguments.layout == "ade20k":
        report = check_ade20k(arguments.path, arguments.num_classes)
    else:
        report = {"coco": check_coco, "imagenet": check_imagenet}[arguments.layout](arguments.path)
    for key, count in report.counts.items():
        tell(f"{key}: {count}")
    for note in report.notes:
        tell(f"note: {note}")
    for problem in report.problems:
        tell(problem.message)
    number = len(report.problems)
    tell(f"{arguments.path}: {number or 'no'} problem{'' if number == 1 else 's'} found")
    if arguments.json:
        content = {
            "path": str(arguments.path),
            "layout": arguments.layout,
            "counts": report.counts,
            "notes": report.notes,
        }
        content["problems"] = [problem._asdict() for problem in report.problems]
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 2 if report.problems else 0


def _add_import(groups: argparse._SubParsersAction) -> None:
    text = (
        "Writes an official checkpoint (Swin, CvT or ViT of Microsoft, mmseg, mmdet, Hugging Face or timm; Swin-MoE of "
        "any number of processes) under timm's names and says what became of every key. `core=` in a config reads such "
        "files as they are, too."
    )
    parser = groups.add_parser("import", help="bring a checkpoint to timm's names", description=text)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help=".pth or .safetensors file, a folder with model.safetensors, or NAME.pth for NAME.pth.rank0, …",
    )
    parser.add_argument("model", metavar="MODEL", help="timm's name of the model, such as cvt_13")
    parser.add_argument("out", type=Path, metavar="OUT", help=".safetensors file to write; must not exist")
    parser.set_defaults(run=_import_core)


def _import_core(arguments: argparse.Namespace) -> None:
    from rmoe.backbones.build import import_core

    for line in str(import_core(arguments.source, arguments.model, arguments.out)).splitlines():
        tell(line)
    tell(f"{arguments.out}: written")


def _add_split(groups: argparse._SubParsersAction) -> None:
    text = (
        "Writes a Swin mixture whose experts are networks of their own in the layout of Swin-MoE (Tutel): OUT.rank0, "
        "OUT.rank1, … with the experts of each process, and OUT.master with all else."
    )
    parser = groups.add_parser("split", help="write a mixture as Swin-MoE's files", description=text)
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="as for `rmoe import`, or the work dir of a run with residual=experts"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="NAME.pth; no such files may exist")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="processes")
    parser.set_defaults(run=_split)


def _split(arguments: argparse.Namespace) -> None:
    from rmoe.backbones.build import split_experts

    for note in split_experts(arguments.source, arguments.out, arguments.ranks):
        tell(f"note: {note}")
    tell(f"{arguments.out}.master and .rank0 to .rank{arguments.ranks - 1}: written")


def _add_report(groups: argparse._SubParsersAction) -> None:
    text = (
        "Sets runs side by side: what they achieved and cost, and arms over seeds, with paired differences to the arm "
        "of the first RUN. --html writes a page with curves, classes, predictions, routing and how to reproduce."
    )
    parser = groups.add_parser("report", help="compare runs", description=text)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="work dir of a run")
    parser.add_argument(
        "--html", type=command.new_file, metavar="FILE", help="write a page, which needs no network, to FILE"
    )
    parser.add_argument("--json", type=command.new_file, metavar="FILE", help="write everything that is told to FILE")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for summary.json and new pictures on validation images"
    )
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from rmoe.reporting.report import report

    report(arguments.runs, arguments.out, arguments.html, arguments.json)
    for path in filter(None, (arguments.html, arguments.json, arguments.out)):
        tell(f"{path}: written")


def _add_analyze(groups: argparse._SubParsersAction) -> None:
    text = (
        "Looks into a trained mixture: norms of core and residuals, cosines between experts, effective ranks, the load "
        "of experts and the classes that go to them; with an earlier run, what training moved. Writes analysis.json "
        "and pictures."
    )
    parser = groups.add_parser("analyze", help="look into a trained mixture of experts", description=text)
    parser.add_argument("work_dir", type=Path, metavar="RUN", help="work dir of a finished run")
    parser.add_argument("--task", metavar="NAME", help="which one, of a run of several")
    parser.add_argument("--before", type=Path, metavar="RUN", help="work dir of the run that it started from")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="for the load (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: analysis/ in RUN, where a report finds it)",
    )
    parser.set_defaults(run=_analyze)


def _analyze(arguments: argparse.Namespace) -> None:
    from rmoe.reporting.report import analyze

    analyze(arguments.work_dir, arguments.out, arguments.before, arguments.images, arguments.task)


def _add_verify(groups: argparse._SubParsersAction) -> None:
    text = "Compares small expert-parallel trainings with plain PyTorch. In several processes: launch/verify.py."
    parser = groups.add_parser("verify", help="check this machine or cluster", description=text)
    parser.add_argument("--work-dir", default="work_dirs/verify", metavar="DIR", help="default: %(default)s")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from rmoe.engine.verify import main as verify

    return verify(["--work-dir", arguments.work_dir])


if __name__ == "__main__":
    console()
