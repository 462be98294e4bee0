"""The subcommand `rmoe estimate`.

Nothing heavy is imported before it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rmoe.engine.command import Options, new_file
from rmoe.errors import UserError

_MOST = 65536  # processes, images of one, pixels of a side


def add_estimate(groups: argparse._SubParsersAction) -> None:
    """Adds `rmoe estimate`."""
    text = (
        "Says what a training step of a config costs on each GPU: FLOPs, memory, traffic, seconds; and the hours of "
        "its whole pipeline on 8, 64 and 512 GPUs. Nothing of it needs a GPU."
    )
    parser = groups.add_parser("estimate", help="what a training will cost", description=text)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="config of a classifier, a segmentor or a detector")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="processes, one for each GPU")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: %(default)s)")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="which (default: %(default)s)")
    parser.add_argument(
        "--link",
        type=float,
        default=50.0,
        metavar="GB/s",
        help="that a node sends to the others, all its network cards together (default: %(default)g)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.4,
        help="of the GPU's peak that matrix products reach (default: %(default)s, a guess until you have measured it)",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.0,
        help="share of the gradients' reduction that is hidden by the backward pass (default: %(default)s, the worst)",
    )
    parser.add_argument("--ep-size", type=int, metavar="N", help="GPUs that share the experts (default: the config's)")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2), default=2, help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="images of each GPU (default: the config's)")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="in pixels (default: the config's)")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of matrix products (default: %(default)s, as zero2.json has it on a GPU; float32 is TF32 there)",
    )
    parser.add_argument("--cfg-options", nargs="+", action=Options, metavar="KEY=VALUE", help="change the config")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers to FILE as well")
    parser.set_defaults(run=_estimate)


def _estimate(arguments: argparse.Namespace) -> None:
    from rmoe.engine.building import user_errors
    from rmoe.engine.read_config import read_config
    from rmoe.inference.load import quiet
    from rmoe.reporting.budget import costs, show, steps_of
    from rmoe.reporting.estimate import Setting, share_out, work_of
    from rmoe.reporting.machines import Cluster, find_gpu

    for name in ("gpus", "nodes", "ep_size", "micro_batch", "image_size"):
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if not 1 <= value <= _MOST:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it is at least 1 and at most {_MOST}")
    per_node, left = divmod(arguments.gpus, arguments.nodes)
    if left or not per_node:
        raise UserError(
            f"--nodes {arguments.nodes} does not divide --gpus {arguments.gpus}: every node has as many; change either"
        )
    gpu, link = find_gpu(arguments.gpu), 1e9 * arguments.link
    cluster = Cluster(gpu, arguments.nodes, per_node, link, arguments.share, arguments.overlap)
    setting = Setting(
        processes=arguments.gpus,
        ep_size=arguments.ep_size,
        zero=arguments.zero,
        micro_batch=arguments.micro_batch,
        precision=arguments.precision,
        image_size=arguments.image_size and tuple(arguments.image_size),
    )
    with quiet():
        cfg = read_config(arguments.config, arguments.cfg_options or {})
    with user_errors(str(arguments.config)), quiet():
        work = work_of(cfg, setting)
        found = share_out(work, cluster)
        pipeline = list(costs(arguments.config, cfg, work, cluster))
    show(found, pipeline, steps_of(cfg))
    if arguments.json:
        content = dataclasses.asdict(found) | {"pipeline": [dataclasses.asdict(one) for one in pipeline]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
