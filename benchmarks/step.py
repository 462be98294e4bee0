"""Whole training steps, dense against residual: Swin-T with UPerNet and with Mask R-CNN, in one process.

    python -m benchmarks.step

Seconds: forward, losses, backward and AdamW's step of all arms in turns, on made-up images. Ratios to the dense arm.

Memory: each arm in a process of its own, with an allocator that maps every tensor by itself and gives it back at once,
so that what is resident is what lives. Two steps create the optimizer's states; then the gradients are dropped, the
kernel's mark of the highest resident size is reset, and one more step is run. `step` is what that step added to what
was resident: activations and gradients. `beyond_weights` is that and the bytes of the optimizer's states, `estimated`
what rmoe.reporting.estimate says of it.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import common, training
from benchmarks.common import JUDGED, SETTINGS, Row
from rmoe.engine.optim import param_groups
from rmoe.reporting.estimate import Setting, estimate

TASKS, MEASURED = ("segmentation", "detection"), ("dense", "low_rank", "full")
IMAGES, SIZE, QUICK_SIZE = 2, 224, 64
PACE, QUICK_PACE = {"seconds": 150.0, "rounds": (5, 15)}, {"seconds": 0.0, "rounds": (1, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = common.parse("step", __doc__, argv)
    tasks = TASKS[:1] if arguments.quick else TASKS
    pace = QUICK_PACE if arguments.quick else PACE
    sizes = {"image_size": QUICK_SIZE if arguments.quick else SIZE, "small": arguments.quick}
    rows: list[Row] = []
    allocator, threads = SETTINGS[JUDGED]
    for task in tasks:
        bytes_of = common.in_child("benchmarks.step:memory", allocator="exact", threads=threads, task=task, **sizes)
        timed = common.in_child(
            "benchmarks.step:seconds", allocator=allocator, threads=threads, task=task, pace=pace, **sizes
        )
        rows += [{"task": task, "setting": JUDGED} | row | bytes_of[row["contender"]] for row in timed]
    for row in rows:
        dense = next(other for other in rows if (other["task"], other["contender"]) == (row["task"], "dense"))
        row |= {f"{kind}_ratio": row[f"{kind}_bytes"] / dense[f"{kind}_bytes"] for kind in ("step", "beyond_weights")}
    draw(arguments, rows)
    common.publish(arguments, {"images": IMAGES, "pace": pace, **sizes}, rows, table(rows))


def seconds(task: str, image_size: int, small: bool, pace: dict[str, Any]) -> list[Row]:
    """Measures seconds of all arms in turns, in a child process."""
    images = training.batch(task, IMAGES, image_size)
    steps = {
        arm: training.training_step(
            model := training.build(training.config(task, training.ARMS[arm], image_size, small)),
            _optimizer(model),
            images,
        )
        for arm in MEASURED
    }
    return common.timing_rows(common.alternate(steps, **pace), "dense")


def memory(task: str, image_size: int, small: bool) -> dict[str, Row]:
    """Measures bytes of every arm, each in a process forked from this child, which computes nothing itself."""
    training.preload(task)
    found: dict[str, Row] = {}
    for arm in MEASURED:
        with ProcessPoolExecutor(1, get_context("fork")) as pool:
            found[arm] = pool.submit(measure_memory, task, arm, image_size, small).result()
    return found


def measure_memory(task: str, arm: str, image_size: int, small: bool) -> Row:
    """Measures bytes of one arm."""
    model = training.build(training.config(task, training.ARMS[arm], image_size, small))
    optimizer = _optimizer(model)
    step = training.training_step(model, optimizer, training.batch(task, IMAGES, image_size))
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
    found = {"weights_bytes": weights, "step_bytes": added, "beyond_weights_bytes": added + states}
    return found | {"estimated_bytes": _estimated(task, arm, image_size, small)}


def _estimated(task: str, arm: str, image_size: int, small: bool) -> int:
    """Returns what rmoe.reporting.estimate says of `beyond_weights`."""
    setting = Setting(processes=1, zero=0, micro_batch=IMAGES, image_size=(image_size, image_size))
    memory = estimate(training.config(task, training.ARMS[arm], image_size, small), setting).memory
    return memory.total - memory.weights


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
            "step MB": row["step_bytes"] / 1e6,
            "× dense's step": row["step_ratio"],
            "beyond weights MB": row["beyond_weights_bytes"] / 1e6,
            "× dense's": row["beyond_weights_ratio"],
            "estimated MB": row["estimated_bytes"] / 1e6,
        }
        for row in rows
    ]


def draw(arguments: common.Arguments, rows: Sequence[Row]) -> None:
    """Draws time and memory of the arms, dense = 1."""
    kinds = {"ratio": "time", "step_ratio": "memory of the step", "beyond_weights_ratio": "memory beyond weights"}
    with common.picture(arguments, len(kinds), "Training step, dense = 1") as axes:
        for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
            axis.bar([f"{row['task'][:3]}.\n{row['contender']}" for row in rows], [row[kind] for row in rows])
            axis.set(title=title)
            axis.axhline(1.0, color="black", linewidth=0.5)


def _status(field: str) -> int:
    """Returns a size in bytes that the kernel keeps of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


if __name__ == "__main__":
    main()
