"""Whole training steps, dense against residual: Swin-T with UPerNet and with Mask R-CNN, in one process.

    python -m benchmarks.step
    python -m benchmarks.step --part real

The latter is at the sizes that users train at, 512 and 800 pixels, with the candidates for the default of the method
study (benchmarks/claims/method.py), at least ten rounds; step_real.json and step_real.png. It takes most of an hour for
each task and writes what it has after each: a task that is in the file already is not measured again, unless the file
is of another machine or of other arms.

Seconds: forward, losses, backward and AdamW's step of all arms in turns, on made-up images. Ratios to the dense arm.

Memory: each arm in a process of its own, with an allocator that maps every tensor by itself and gives it back at once,
so that what is resident is what lives. Two steps create the optimizer's states; then the gradients are dropped, the
kernel's mark of the highest resident size is reset, and one more step is run. `step` is what that step added to what
was resident: activations and gradients. `beyond_weights` is that and the bytes of the optimizer's states, `estimated`
what rmoe.reporting.estimate says of it. FLOPs are counted in the first of these steps.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import common, training
from benchmarks.claims.method import FULL, SOFT, SOFT_FROZEN
from benchmarks.common import JUDGED, SETTINGS, Row
from rmoe.engine.cost import counted_flops
from rmoe.engine.optim import param_groups
from rmoe.reporting.estimate import Setting, estimate


class Part(NamedTuple):
    """Says what is measured.

    Attributes:
        contenders: `moe` of a config, by arm.
        pixels: height and width of the images, by task.
        images: of a step, by task.
        pace: of `common.alternate`.
    """

    contenders: Mapping[str, dict[str, Any] | None]
    pixels: Mapping[str, int]
    images: Mapping[str, int]
    pace: Mapping[str, Any]


_TWO = {"segmentation": 2, "detection": 2}
PARTS = {
    None: Part(
        {name: training.ARMS[name] for name in ("dense", "low_rank", "full")},
        {"segmentation": 224, "detection": 224},
        _TWO,
        {"seconds": 150.0, "rounds": (5, 15)},
    ),
    "real": Part(
        {"dense": None, "full_random": FULL, "soft": SOFT, "soft_frozen": SOFT_FROZEN},
        {"segmentation": 512, "detection": 800},
        _TWO,
        {"seconds": 1200.0, "rounds": (10, 15)},
    ),
}
QUICK_SIZE, QUICK_PACE = 64, {"seconds": 0.0, "rounds": (1, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = common.parse("step", __doc__, argv, parts=("real",))
    part, file = PARTS[arguments.part], f"step_{arguments.part}" if arguments.part else "step"
    tasks = list(part.pixels)
    if arguments.quick:
        tasks, part = tasks[:1], part._replace(pixels=dict.fromkeys(tasks, QUICK_SIZE), pace=QUICK_PACE)
    config: dict[str, Any] = {"images": part.images, "image_size": part.pixels, "pace": part.pace}
    config |= {"small": arguments.quick, "contenders": part.contenders}
    rows = _begun(arguments.out / f"{file}.json", config) if arguments.part else []
    allocator, threads = SETTINGS[JUDGED]
    done = {row["task"] for row in rows}
    for task in tasks:
        if task in done:
            print(f"{task} stands in {file}.json")
            continue
        given: dict[str, Any] = {"task": task, "contenders": part.contenders, "images": part.images[task]}
        given |= {"image_size": part.pixels[task], "small": arguments.quick}
        bytes_of = common.in_child("benchmarks.step:memory", allocator="exact", threads=threads, **given)
        timed = common.in_child(
            "benchmarks.step:seconds", allocator=allocator, threads=threads, pace=part.pace, **given
        )
        found = [{"task": task, "setting": JUDGED} | row | bytes_of[row["contender"]] for row in timed]
        dense = next(row for row in found if row["contender"] == "dense")
        for row in found:
            kinds = ("step", "beyond_weights")
            row |= {f"{kind}_ratio": row[f"{kind}_bytes"] / dense[f"{kind}_bytes"] for kind in kinds}
            row["flops_ratio"] = row["flops"] / dense["flops"]
        rows += found
        draw(arguments, rows, file)
        common.publish(arguments, config, rows, table(rows), file=file)


def _begun(path: Path, config: Mapping[str, Any]) -> list[Row]:
    """Returns the rows of an earlier run with this config on such a machine; none otherwise."""
    content = json.loads(path.read_text()) if path.exists() else {}
    alike = content.get("config") == json.loads(json.dumps(config))
    return content["rows"] if alike and content["machine"]["cpu"] == common.machine()["cpu"] else []


def seconds(
    task: str,
    contenders: Mapping[str, dict[str, Any] | None],
    images: int,
    image_size: int,
    small: bool,
    pace: dict[str, Any],
) -> list[Row]:
    """Measures seconds of all arms in turns, in a child process."""
    batch = training.batch(task, images, image_size)
    steps = {
        arm: training.training_step(
            model := training.build(training.config(task, moe, image_size, small)), _optimizer(model), batch
        )
        for arm, moe in contenders.items()
    }
    return common.timing_rows(common.alternate(steps, **pace), "dense")


def memory(
    task: str, contenders: Mapping[str, dict[str, Any] | None], images: int, image_size: int, small: bool
) -> dict[str, Row]:
    """Measures bytes of every arm, each in a process forked from this child, which computes nothing itself."""
    training.preload(task)
    found: dict[str, Row] = {}
    for arm, moe in contenders.items():
        with ProcessPoolExecutor(1, get_context("fork")) as pool:
            found[arm] = pool.submit(measure_memory, task, moe, images, image_size, small).result()
    return found


def measure_memory(task: str, moe: dict[str, Any] | None, images: int, image_size: int, small: bool) -> Row:
    """Measures bytes and FLOPs of one arm."""
    model = training.build(training.config(task, moe, image_size, small))
    optimizer = _optimizer(model)
    step = training.training_step(model, optimizer, training.batch(task, images, image_size))
    flops: list[int] = []
    with counted_flops(flops):
        step()
    step()
    optimizer.zero_grad()
    gc.collect()
    resident = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    step()
    added = _status("VmHWM") - resident
    states = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    weights = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    setting = Setting(processes=1, zero=0, micro_batch=images, image_size=(image_size, image_size))
    estimated = estimate(training.config(task, moe, image_size, small), setting).memory
    return {
        "weights_bytes": weights,
        "optimizer_bytes": states,
        "step_bytes": added,
        "beyond_weights_bytes": added + states,
        "estimated_bytes": estimated.total - estimated.weights,
        "flops": flops[0],
    }


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, lr=1e-5, weight_decay=0.01))


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns ratios to the dense arm, and megabytes."""
    return [
        {
            "task": row["task"],
            "arm": row["contender"],
            "seconds": row["ms"] / 1e3,
            "× dense": row["ratio"],
            **({"FLOPs × dense": row["flops_ratio"]} if "flops_ratio" in row else {}),
            "step MB": row["step_bytes"] / 1e6,
            "× dense's step": row["step_ratio"],
            "beyond weights MB": row["beyond_weights_bytes"] / 1e6,
            "× dense's": row["beyond_weights_ratio"],
            "estimated MB": row["estimated_bytes"] / 1e6,
        }
        for row in rows
    ]


def draw(arguments: common.Arguments, rows: Sequence[Row], file: str) -> None:
    """Draws time and memory of the arms, dense = 1."""
    kinds = {"ratio": "time", "step_ratio": "memory of the step", "beyond_weights_ratio": "memory beyond weights"}
    with common.picture(arguments, len(kinds), "Training step, dense = 1", file=file) as axes:
        for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
            axis.bar([f"{row['task'][:3]}. {row['contender']}" for row in rows], [row[kind] for row in rows])
            axis.set(title=title)
            axis.tick_params("x", rotation=90)
            axis.axhline(1.0, color="black", linewidth=0.5)


def _status(field: str) -> int:
    """Returns a size in bytes that the kernel keeps of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


if __name__ == "__main__":
    main()
