"""Latency of a finished model on a CPU: dense, low rank, soft, full, and merged to a dense one; torch and onnxruntime.

    python -m benchmarks.inference

The model is Swin-T as a classifier at 224 x 224, where all but the mixtures is as little as can be: with a head for
segmentation or detection behind it, ratios are nearer to 1. It has 8 experts in every other block of the last two
stages and random weights, and gets one image and eight. All contenders take turns; ratios are to the dense model in the
same program. `merged` is the average of the low-rank experts; a model that is merged exactly is of the same shape.
`dense_bfloat16`, `dense_int8` and `low_rank_int8` are what `precision` of `rmoe.load` makes of them; a CPU without
instructions for bfloat16, which takes minutes for an image in it, leaves it out. In onnxruntime `full` computes every
expert for every token (rmoe/moe/unsorted.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, training
from benchmarks.common import JUDGED, SETTINGS, Row
from benchmarks.training import ARMS
from rmoe.inference.precision import lacks_bfloat16
from rmoe.inference.predictor import Predictor

SIZE, QUICK_SIZE = 224, 64
BATCHES = (1, 8)
PACE, QUICK_PACE = {"seconds": 120.0, "rounds": (5, 15)}, {"seconds": 0.0, "rounds": (1, 1)}
MIXTURES = {"low_rank": ARMS["low_rank"], "soft": {"residual": "low_rank", "top_k": "all"}, "full": ARMS["full"]}
LOWERED = {
    "dense_bfloat16": ("dense", "bfloat16"),
    "dense_int8": ("dense", "int8"),
    "low_rank_int8": ("low_rank", "int8"),
}
RUNTIMES = ("torch", "onnxruntime")
Answer = Callable[[Tensor], object]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = common.parse("inference", __doc__, argv)
    given: dict[str, Any] = {
        "size": QUICK_SIZE if arguments.quick else SIZE,
        "small": arguments.quick,
        "exported": ["dense"] if arguments.quick else ["dense", *MIXTURES, "merged"],
        "pace": QUICK_PACE if arguments.quick else PACE,
    }
    allocator, threads = SETTINGS[JUDGED]
    rows = common.in_child("benchmarks.inference:seconds", allocator=allocator, threads=threads, **given)
    draw(arguments, rows)
    common.publish(arguments, given | {"batches": BATCHES, "mixtures": MIXTURES}, rows, table(rows))


def seconds(size: int, small: bool, exported: Sequence[str], pace: dict[str, Any]) -> list[Row]:
    """Measures seconds of all contenders in turns, in a child process."""
    runs = {"dense": run_of(None, size, small)}
    runs |= {name: run_of(moe, size, small) for name, moe in MIXTURES.items()}
    runs["merged"] = merged(runs["low_rank"])
    answers: dict[tuple[str, str], Answer] = {("torch", name): in_torch(run) for name, run in runs.items()}
    for name, (of, precision) in LOWERED.items():
        if precision == "bfloat16" and lacks_bfloat16(torch.device("cpu")):
            continue
        answers["torch", name] = in_torch(brought_to(runs[of], precision))
    with TemporaryDirectory() as folder:
        for name in exported:
            answers["onnxruntime", name] = in_onnxruntime(runs[name], size, Path(folder, f"{name}.onnx"))
        rows = []
        for batch in BATCHES:
            images = torch.randn(batch, 3, size, size)
            calls = {"/".join(key): partial(answer, images) for key, answer in answers.items()}
            times = common.alternate(calls, **pace)
            for runtime in RUNTIMES:
                own = {name: times["/".join((at, name))] for at, name in answers if at == runtime}
                rows += [
                    {"runtime": runtime, "batch": batch, "setting": JUDGED} | row
                    for row in common.timing_rows(own, "dense")
                ]
    return rows


def run_of(moe: dict[str, Any] | None, size: int, small: bool) -> Predictor:
    """Returns a model of random weights as a loaded run."""
    cfg = training.config("classification", moe, size, small)
    scope = {"scope": cfg.default_scope}
    model = training.build(cfg).eval()
    for name, x in model.named_parameters():
        if ".deepspeed_moe." in name:
            torch.nn.init.normal_(x, std=0.02)
    return Predictor(model, None, (), (), Path("random weights"), {"model": cfg.model.to_dict(), "inputs": scope})


def merged(run: Predictor) -> Predictor:
    """Returns a run's average of its experts."""
    from rmoe.deploy.merge import dense_model
    from rmoe.moe.merged import average_network
    from rmoe.moe.state import moe_layers

    networks = {name: average_network(layer) for name, layer in moe_layers(run.model).items()}
    return Predictor(dense_model(run, networks), None, (), (), run.source, {})


def brought_to(run: Predictor, precision: Any) -> Predictor:
    """Returns a copy of a run in fewer bits."""
    from rmoe.inference.precision import lowered

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return Predictor(lowered(copy.deepcopy(run.model), precision), None, (), (), run.source, {}, dtype, precision)


def in_torch(run: Predictor) -> Answer:
    """Returns a run's function of normalised images, as `rmoe.load` computes it."""
    from rmoe.deploy.graph import function_of

    function = function_of(run)

    def answer(images: Tensor) -> object:
        with torch.inference_mode(), torch.autocast("cpu", run.dtype, enabled=run.dtype != torch.float32):
            return function(run.model, images)

    return answer


def in_onnxruntime(run: Predictor, size: int, path: Path) -> Answer:
    """Returns the same function of what is exported."""
    import onnxruntime

    from rmoe.deploy.export import traced, write_onnx
    from rmoe.deploy.graph import INPUT, graph_of

    graph = graph_of(run, image_size=(size, size), normalised=True)
    write_onnx(traced(graph), graph, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images.numpy()})


def table(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns milliseconds of an image, and ratios to the dense model in the same program."""
    return [
        {
            "program": row["runtime"],
            "model": row["contender"],
            "images": row["batch"],
            "ms / image": row["ms"] / row["batch"],
            "× dense": row["ratio"],
            "low": row["ratio_low"],
            "high": row["ratio_high"],
        }
        for row in rows
    ]


def draw(arguments: common.Arguments, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws milliseconds of an image."""
    with common.picture(arguments, len(BATCHES), "Latency on a CPU, ms / image") as axes:
        for axis, batch in zip(axes, BATCHES, strict=True):
            own = [row for row in rows if row["batch"] == batch]
            names = list(dict.fromkeys(row["contender"] for row in own))
            for number, runtime in enumerate(RUNTIMES):
                found = {row["contender"]: row["ms"] / batch for row in own if row["runtime"] == runtime}
                places = [place + 0.4 * number for place, name in enumerate(names) if name in found]
                axis.bar(places, list(found.values()), 0.4, label=runtime)
            axis.set_xticks([place + 0.2 for place in range(len(names))], names, rotation=60)
            axis.set(title=f"{batch} image{'s' * (batch > 1)} at once")
            axis.legend()


if __name__ == "__main__":
    main()
