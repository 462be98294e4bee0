"""The words of `rmoe deploy` and `rmoe merge`. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rmoe.engine.command import new_file
from rmoe.engine.terminal import keep_warnings, say
from rmoe.errors import UserError, printable
from rmoe.inference.command import add_run, import_modules
from rmoe.inference.printing import tell


def add_deploy(groups: argparse._SubParsersAction) -> None:
    """Adds `rmoe deploy`."""
    text = (
        "Writes a finished run as a graph for other programs: ONNX, or torch.export's archive. It takes any number of "
        "images of one size, as uint8 in red, green, blue, and gives logits at the size of the images (segmentation), "
        "logits (classification), or the maps of a backbone or neck. What was written is compared with torch."
    )
    parser = groups.add_parser("deploy", help="write a finished run as ONNX, or by torch.export", description=text)
    add_run(parser)
    parser.add_argument("--onnx", type=new_file, metavar="FILE", help="ONNX file to write")
    parser.add_argument("--pt2", type=new_file, metavar="FILE", help="archive to write, for torch.export.load")
    parser.add_argument(
        "--part", default="model", help="model, backbone or neck (with the backbone; the most of a detector)"
    )
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("H", "W"), help="in pixels (default: that of the run's inputs)"
    )
    parser.add_argument(
        "--normalised", action="store_true", help="take float32 images that are normalised as in training"
    )
    parser.add_argument("--opset", type=int, default=18, metavar="N", help="of ONNX, 18 to 23 (default: %(default)s)")
    parser.set_defaults(run=_deploy)


def add_merge(groups: argparse._SubParsersAction) -> None:
    """Adds `rmoe merge`."""
    text = (
        "Writes the dense model that computes what a mixture does, where there is one: with one expert, or with gates "
        "whose weights are all zero. --average writes the mean of the experts instead, an approximation. Both are "
        "evaluated where the run's validation set is at hand."
    )
    parser = groups.add_parser("merge", help="make a dense model of a mixture", description=text)
    add_run(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--average", action="store_true", help="the core plus the mean residual: an approximation")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGE", help="weigh experts by what gates give them on these"
    )
    parser.set_defaults(run=_merge)


def _deploy(arguments: argparse.Namespace) -> None:
    keep_warnings()
    import_modules(arguments.modules)
    if arguments.onnx is None and arguments.pt2 is None:
        raise UserError("say what to write: --onnx FILE, --pt2 FILE or both")
    if arguments.pt2 is not None and arguments.pt2.suffix != ".pt2":
        raise UserError(f"--pt2 {arguments.pt2}: torch.export's archives are called *.pt2; give such a name")
    from rmoe.deploy.export import check_opset, check_packages, traced, write_onnx, write_pt2
    from rmoe.deploy.graph import graph_of
    from rmoe.inference.load import load

    if arguments.onnx is not None:
        check_packages()
        check_opset(arguments.opset)
    say(f"loading {printable(arguments.folder)}")
    run = load(arguments.folder, task=arguments.task, device="cpu")
    size = arguments.image_size and tuple(arguments.image_size)
    graph = graph_of(run, arguments.part, size, arguments.normalised)
    program = traced(graph)
    shape = " x ".join(map(str, graph.example.shape[2:]))
    told = f"written; {shape}, {graph.about['images']}; {', '.join(graph.outputs)}; differs from torch by at most"
    if arguments.pt2 is not None:
        tell(f"{arguments.pt2}: {told} {write_pt2(program, graph, arguments.pt2):.2g}")
    if arguments.onnx is not None:
        tell(f"{arguments.onnx}: {told} {write_onnx(program, graph, arguments.onnx, arguments.opset):.2g}")


def _merge(arguments: argparse.Namespace) -> None:
    keep_warnings()
    import_modules(arguments.modules)
    from rmoe.deploy.merge import merge
    from rmoe.inference.files import find_images

    images = find_images(arguments.images) if arguments.images else []
    say(f"loading {printable(arguments.folder)}")
    found = merge(arguments.folder, arguments.out, task=arguments.task, average=arguments.average, images=images)
    kind = "computes what the mixture does" if found.exact else "an approximation of the mixture"
    tell(f"{arguments.out}: written, a dense model: {kind}")
    if found.metrics is None:
        tell(f"not evaluated: {found.not_measured}")
        return
    for name, value in found.metrics.items():
        before = (found.metrics_of_mixture or {}).get(name)
        tell(f"{name}: {value:g} (mixture: {before:g})")
