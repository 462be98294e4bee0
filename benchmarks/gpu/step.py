"""Whole training steps on a GPU: forward, losses, backward and fused AdamW, bfloat16 autocast, dense against mixtures.

It is a plain loop, not DeepSpeed's engine. The networks with heads are those of the shipped configs, on made-up images;
they need mmseg and mmdet. The bare backbones, timm's with `rmoe.upcycle`, need neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

import rmoe
from benchmarks import common
from benchmarks.common import Row
from benchmarks.gpu.measure import Arguments, Report, Step, attempt, finish, gemm_peak, launches, time_in_turns
from rmoe.config import ResidualMoEConfig
from rmoe.engine.cost import counted_flops
from rmoe.moe.records import collect

ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "low_rank": {"residual": "low_rank", "top_k": 1, "train_core": False},
    "soft": {"residual": "low_rank", "top_k": "all", "train_core": True},
    "full": {"residual": "full"},
    "upper_bound": {"residual": "experts"},
}
ROUNDS = 7


class Task(NamedTuple):
    """Holds a network, its image size and the images of a step; `config` is None for a bare backbone of timm."""

    name: str
    model: str
    size: int
    images: int
    config: str | None = None


# What answers a target first.
TASKS = (
    Task("Swin-L + UPerNet", "", 640, 2, "segmentation/upernet_swin_large_dense_ade20k_640_160k.py"),
    Task("Swin-T + UPerNet", "", 512, 4, "segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py"),
    Task("Swin-T + Mask R-CNN", "", 800, 2, "detection/mask_rcnn_swin_tiny_dense_coco_1x.py"),
    Task("Swin-L, bare", "swin_large_patch4_window12_384", 640, 2),
    Task("Swin-T, bare", "swin_tiny_patch4_window7_224", 512, 4),
)
DRY_TASKS = (Task("Swin, bare", "swin_tiny_patch4_window7_224", 64, 2), TASKS[1]._replace(size=64, images=2))


def main(arguments: Arguments) -> Report:
    """Measures, draws and prints."""
    device = arguments.device
    rounds = 2 if arguments.dry else 3 if arguments.quick else ROUNDS
    report = Report(arguments, "step", {"rounds": rounds, "loop": "plain torch", "precision": "bfloat16 autocast"})
    peak = gemm_peak(device, 64 if arguments.dry else 8192)
    report.add({"part": "ceiling", "gemm_tflops": peak / 1e12})
    for task in DRY_TASKS if arguments.dry else TASKS:
        place = {
            "part": "step",
            "task": task.name,
            "image_size": task.size,
            "images": task.images,
            "precision": "bfloat16",
        }
        if task.config is not None:
            place["config"] = task.config
        if report.out_of_time():
            report.add({**place, "skipped": f"the {arguments.minutes:g} minutes were spent"})
            continue
        _measure_task(report, task, place, rounds, peak)
    draw(arguments, report.rows)
    finish(report, table(report.rows))
    return report


def _measure_task(report: Report, task: Task, place: Row, rounds: int, peak: float) -> None:
    device, small = report.arguments.device, report.arguments.dry
    steps: dict[str, Step] = {}
    for arm, moe in ARMS.items():
        make = _bare if task.config is None else _with_heads
        step = attempt(report, {**place, "contender": arm}, make, task, moe, device, small)
        if step is None and arm == "dense":
            return  # the others would say the same
        if step is not None:
            steps[arm] = step
    for arm, row in time_in_turns(report, place, steps, "dense", rounds, device).items():
        flops = attempt(report, {**place, "contender": arm}, _flops, steps[arm])
        if flops is not None:
            row |= {"flops": flops, "share_of_gemm_peak": flops / (row["ms"] / 1e3) / peak}
        report.add({**place, **row, "moe": _moe(ARMS[arm]), **launches(steps[arm], device)})
    steps.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _moe(arm: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the mixture of an arm; None for the dense network."""
    return None if arm is None else {"num_experts": 8, **arm}


def _bare(task: Task, moe: dict[str, Any] | None, device: torch.device, small: bool) -> Step:
    """Makes a step of a backbone whose loss is the mean square of its last map."""
    tiny: dict[str, Any] = (
        {"embed_dim": 16, "depths": (1, 1, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4} if small else {}
    )
    model: nn.Module = timm.create_model(
        task.model, img_size=task.size, num_classes=0, global_pool="", drop_path_rate=0.2, **tiny
    )
    if (given := _moe(moe)) is not None:
        model = rmoe.upcycle(model, ResidualMoEConfig(**given)).model
    model = model.to(device).train()
    images = torch.randn(task.images, 3, task.size, task.size, device=device)

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16), collect() as records:
            value = model(images).float().square().mean()
        return value + records.loss()

    return _step(model, loss, device)


def _with_heads(task: Task, moe: dict[str, Any] | None, device: torch.device, small: bool) -> Step:
    """Makes a step of a shipped config's network.

    Raises:
        ModuleNotFoundError: OpenMMLab's packages are not installed.
    """
    import mmengine  # noqa: F401

    kind = "segmentation" if task.config and task.config.startswith("segmentation") else "detection"
    if kind == "segmentation":
        import mmseg  # noqa: F401
    else:
        import mmdet  # noqa: F401
    from benchmarks import training
    from rmoe.reporting.tracing import training_loss

    given = _moe(moe)
    cfg = training.config(kind, given, task.size, small, file=task.config)
    cfg.model.backbone.pop("with_cp", None)  # 80 GB do without
    model: Any = training.build(cfg).to(device)
    batch = training.batch(kind, task.images, task.size)

    def loss() -> torch.Tensor:
        images = model.data_preprocessor(batch, True)
        with torch.autocast(device.type, torch.bfloat16):
            return training_loss(model, images)

    return _step(model, loss, device)


def _step(model: nn.Module, loss: Callable[[], torch.Tensor], device: torch.device) -> Step:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01, fused=True)

    def step(_: int) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _flops(step: Step) -> int:
    found: list[int] = []
    with counted_flops(found):
        step(0)
    return found[0]


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns what was timed."""
    return [
        {
            "network": row["task"],
            "pixels": row["image_size"],
            "images": row["images"],
            "arm": row["contender"],
            "ms": row["ms"],
            "× dense": row["ratio"],
            "peak GB beyond weights": row["peak_bytes"] and row["peak_bytes"] / 1e9,
            "of GEMM peak": row.get("share_of_gemm_peak"),
            "launches": row["launches"],
            "waits": row["syncs"],
        }
        for row in rows
        if "ms" in row
    ]


def draw(arguments: Arguments, rows: Sequence[Row]) -> None:
    """Draws the time of the arms, dense = 1, for each network."""
    timed = [row for row in rows if "ms" in row]
    names = list(dict.fromkeys(row["task"] for row in timed))
    if not names:
        return
    shared: Any = common.Arguments("gpu", arguments.quick, 1, arguments.out)
    with common.picture(shared, len(names), "Training step on a GPU, dense = 1", file="gpu_step") as axes:
        for axis, name in zip(axes, names, strict=True):
            mine = [row for row in timed if row["task"] == name]
            axis.bar([row["contender"] for row in mine], [row["ratio"] for row in mine])
            axis.set(title=name)
            axis.tick_params(axis="x", rotation=45)
            axis.axhline(1.0, color="black", linewidth=0.5)
