"""What training costs: the four pipelines' stages measured, and what the published schedules would take on GPUs.

    python -m benchmarks.training_cost

Measured (`stage`): Swin-T's training steps, AdamW included, upstream and with UPerNet downstream, on made-up images:
images/s, FLOPs/s, and their share of the FLOPs/s that this machine reaches in a large matrix product.

Extrapolated (`pipeline`), not measured: images of the published schedules × FLOPs of an image at the published sizes,
counted by rmoe.reporting.estimate, ÷ (a GPU's peak × the share of the peak that the same stage reached here). No GPU
was used. The absolute hours stand and fall with that share being the same there; the ratios between pipelines do less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import common, training
from benchmarks.common import Row
from rmoe.engine.cost import counted_flops
from rmoe.engine.optim import param_groups
from rmoe.reporting.estimate import Setting, estimate

# Published: Swin's 300 epochs of ImageNet-1k and 160 000 steps of 16 images (arXiv 2103.14030). The length of RMoE-I's
# intermediate finetune is this project's choice.
UPSTREAM, INTERMEDIATE, DOWNSTREAM = 300 * 1_281_167, 30 * 1_281_167, 160_000 * 16
PIPELINES = {
    "dense": (("classification", "dense", UPSTREAM), ("segmentation", "dense", DOWNSTREAM)),
    "upper bound": (("classification", "experts", UPSTREAM), ("segmentation", "experts", DOWNSTREAM)),
    "RMoE-D": (("classification", "dense", UPSTREAM), ("segmentation", "low_rank", DOWNSTREAM)),
    "RMoE-I": (
        ("classification", "dense", UPSTREAM),
        ("classification", "low_rank", INTERMEDIATE),
        ("segmentation", "low_rank", DOWNSTREAM),
    ),
}
ARMS = ("dense", "low_rank", "experts")
IMAGES = {"classification": 4, "segmentation": 2}
PUBLISHED_SIZE = {"classification": 224, "segmentation": 512}
GPU, GPU_PEAK = "A100, bfloat16, data sheet", 312e12
PACE, QUICK_PACE = {"seconds": 15.0, "rounds": (3, 10)}, {"seconds": 0.0, "rounds": (1, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = common.parse("training_cost", __doc__, argv)
    sizes = {"image_size": 64 if arguments.quick else 224, "small": arguments.quick}
    pace = QUICK_PACE if arguments.quick else PACE
    stages: list[Row] = common.in_child(
        "benchmarks.training_cost:measure", allocator="tuned", threads=arguments.threads, pace=pace, **sizes
    )
    rows = stages + extrapolate(stages)
    draw(arguments, rows)
    config = {"images": IMAGES, "pace": pace, "gpu": GPU, "gpu_peak_flops": GPU_PEAK, **sizes}
    common.publish(arguments, config, rows, table(rows))


def measure(image_size: int, small: bool, pace: dict[str, Any]) -> list[Row]:
    """Measures all stages, in a child process."""
    rows: list[Row] = []
    for task, count in IMAGES.items():
        images = training.batch(task, count, image_size)
        steps: dict[str, Callable[[], object]] = {}
        for arm in ARMS:
            model = training.build(training.config(task, training.ARMS[arm], image_size, small))
            optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5, weight_decay=0.01))
            steps[arm] = training.training_step(model, optimizer, images)
        a, b = torch.randn(2, 256 if small else 2048, 256 if small else 2048)
        times = common.alternate(steps | {"gemm": functools.partial(torch.mm, a, b)}, **pace)
        peak = 2 * len(a) ** 3 / min(times.pop("gemm"))
        for row in common.timing_rows(times, "dense"):
            flops: list[int] = []
            with counted_flops(flops):
                steps[row["contender"]]()
            rate = flops[0] / (row["ms"] / 1e3)
            row |= {"flops_per_image": flops[0] / count, "images_per_second": count / (row["ms"] / 1e3)}
            row |= {"flops_per_second": rate, "gemm_peak": peak, "share_of_peak": rate / peak}
            published = row["flops_per_image"] if small else _published_flops(task, row["contender"])
            row["published_flops_per_image"] = published
            rows.append({"part": "stage", "task": task} | row)
    return rows


def extrapolate(stages: Sequence[Row]) -> list[Row]:
    """Returns the GPU-hours of the pipelines, from what `measure` found."""
    found = {(row["task"], row["contender"]): row for row in stages}

    def hours(task: str, arm: str, images: int) -> float:
        row = found[task, arm]
        return images * row["published_flops_per_image"] / (GPU_PEAK * row["share_of_peak"]) / 3600

    total = {name: sum(hours(*stage) for stage in pipeline) for name, pipeline in PIPELINES.items()}
    return [
        {
            "part": "pipeline",
            "pipeline": name,
            "gpu_hours": value,
            "extrapolated": True,
            "to_dense": value / total["dense"],
            "to_upper_bound": value / total["upper bound"],
        }
        for name, value in total.items()
    ]


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns the stages, then the pipelines."""
    shown: list[Row] = []
    for row in rows:
        stage = row["part"] == "stage"
        name = f"{row['task']}, {row['contender']}" if stage else f"{row['pipeline']} (extrapolated)"
        shown.append(
            {
                "stage or pipeline": name,
                "images/s": row.get("images_per_second"),
                "GFLOP/image": row["flops_per_image"] / 1e9 if stage else None,
                "GFLOP/s": row["flops_per_second"] / 1e9 if stage else None,
                "of GEMM peak": row.get("share_of_peak"),
                "× dense": row["ratio"] if stage else row["to_dense"],
                "× upper bound": row.get("to_upper_bound"),
                "GPU-hours": row.get("gpu_hours"),
            }
        )
    return shown


def draw(arguments: common.Arguments, rows: Sequence[Row]) -> None:
    """Draws the time of a stage's step and the GPU-hours of a pipeline."""
    stages = [row for row in rows if row["part"] == "stage"]
    pipelines = [row for row in rows if row["part"] == "pipeline"]
    with common.picture(arguments, 2, "Cost of training") as (left, right):
        left.bar([f"{row['task'][:3]}.\n{row['contender']}" for row in stages], [row["ratio"] for row in stages])
        left.set(title="step, measured here, dense = 1")
        right.bar([row["pipeline"] for row in pipelines], [row["gpu_hours"] for row in pipelines])
        right.set(title=f"GPU-hours ({GPU}), extrapolated")


def _published_flops(task: str, arm: str) -> float:
    """Returns the FLOPs of one image in training, at the published size."""
    size = PUBLISHED_SIZE[task]
    cfg = training.config(task, training.ARMS[arm], size, small=False)
    return estimate(cfg, Setting(processes=1, ep_size=1, micro_batch=2, image_size=(size, size))).flops / 2


if __name__ == "__main__":
    main()
