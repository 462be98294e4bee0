"""What rmoe.reporting.estimate says of every training step that was measured, beside the measurement.

    python -m benchmarks.forecast

Reads step.json, training_cost.json and scaling.json (CPU) and gpu_step.json (GPU), those that are there. In each group,
one task on one machine, the dense step tells how many FLOP/s the machine reaches; nothing else is fitted. With that,
the other steps are forecast. `error` is forecast ÷ measured - 1. On a GPU `share` is the reached share of the data
sheet's peak, for `rmoe estimate --share`.

A CPU's memory is taken to move so many bytes/s for one thread as `CPU_BANDWIDTH` says, a guess; the link between two
processes is what an all-reduce alone reached in scaling.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from benchmarks import common, scaling, training
from benchmarks.common import Row
from rmoe.engine.model_config import fill_in_saved_moe
from rmoe.reporting.estimate import share_out, work_of
from rmoe.reporting.machines import GPUS, Cluster, Gpu
from rmoe.reporting.work import Setting, Work

CPU_BANDWIDTH = 10e9
_LOWEST, _HIGHEST = 1e6, 1e16  # FLOP/s between which a machine's are looked for


@dataclass(frozen=True)
class Point:
    """Is one training step that was measured.

    Attributes:
        source: name of the benchmark.
        group: of steps on one machine that one dense step calibrates.
        arm: which mixture; "dense" calibrates.
        seconds: measured.
        config: what was trained.
        setting: how.
        cluster: where; its share is looked for.
    """

    source: str
    group: str
    arm: str
    seconds: float
    config: Config
    setting: Setting
    cluster: Cluster


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = common.parse("forecast", __doc__, argv)
    rows = list(forecasts(list(points(arguments.out))))
    draw(arguments, rows)
    common.publish(arguments, {"cpu_bandwidth": CPU_BANDWIDTH}, rows, table(rows))


def points(folder: Path) -> Iterator[Point]:
    """Yields the training steps in the results of a folder."""
    for name, of in (("step", _steps), ("training_cost", _stages), ("scaling", _scaling), ("gpu_step", _gpu_steps)):
        path = folder / f"{name}.json"
        if path.exists():
            yield from of(json.loads(path.read_text()))


def _steps(found: Row) -> Iterator[Point]:
    config = found["config"]
    for row in found["rows"]:
        yield _cpu_point("step", row, config["images"], config, threads=1)


def _stages(found: Row) -> Iterator[Point]:
    config = found["config"]
    for row in found["rows"]:
        if row["part"] == "stage":
            images = config["images"][row["task"]]
            yield _cpu_point("training_cost", row, images, config, threads=found["machine"]["threads"])


def _cpu_point(source: str, row: Row, images: int, config: Row, threads: int) -> Point:
    size, arm, task = config["image_size"], row["contender"], row["task"]
    setting = Setting(1, ep_size=1, zero=0, micro_batch=images, image_size=(size, size))
    made = training.config(task, training.ARMS[arm], size, config["small"])
    return Point(source, task, arm, row["ms"] / 1e3, made, setting, Cluster(_cpu(threads)))


def _scaling(found: Row) -> Iterator[Point]:
    size, images = found["config"]["image_size"], found["config"]["images"]
    alone = {row["processes"]: row for row in found["rows"] if row["ratio"] is None}
    for row in found["rows"]:
        if row["ratio"] is None:
            continue
        processes = row["processes"]
        sent = sum(alone[processes]["sent_bytes"].values())
        peers = sent / (alone[processes]["ms"] / 1e3) or CPU_BANDWIDTH
        setting = Setting(processes, zero=2, micro_batch=images, image_size=(size, size))
        case = {name: row[name] for name in ("residual", "ep_size", "exchange")}
        cluster = Cluster(replace(_cpu(1), peers=peers), per_node=processes)
        arm = row["residual"] if row["residual"] == "dense" else f"{row['residual']} ep {row['ep_size']}"
        made = scaling.config(case, size, found["quick"])
        yield Point("scaling", f"{processes} processes", arm, row["ms"] / 1e3, made, setting, cluster)


def _gpu_steps(found: Row) -> Iterator[Point]:
    """Yields the rows that say what was trained: `config` and `moe` (its mixture, or null), `images`, `image_size`,
    `precision`, `contender` and `ms`."""
    gpu = next((gpu for name, gpu in GPUS.items() if name in found["machine"]["gpu"].lower().replace(" ", "")), None)
    for row in found["rows"]:
        if gpu is None or not {"config", "moe", "images", "image_size", "ms"} <= row.keys():
            continue
        size = row["image_size"]
        height, width = size if isinstance(size, list) else (size, size)
        made = Config.fromfile(training.CONFIGS / row["config"])
        node = made.model.get("backbone", made.model)
        node.update(core=None, moe=row["moe"], allow_random_core=True)
        fill_in_saved_moe(made.model)
        setting = Setting(1, ep_size=1, zero=0, micro_batch=row["images"], image_size=(height, width))
        setting = replace(setting, precision=row.get("precision", "bfloat16"))
        arm = "dense" if row["moe"] is None else row["contender"]
        yield Point("gpu_step", row["config"], arm, row["ms"] / 1e3, made, setting, Cluster(gpu))


def forecasts(every: Sequence[Point]) -> Iterator[Row]:
    """Yields each step's forecast, beside its measurement."""
    for source, group in dict.fromkeys((point.source, point.group) for point in every):
        mine = {point.arm: point for point in every if (point.source, point.group) == (source, group)}
        works = {arm: work_of(point.config, point.setting) for arm, point in mine.items()}
        flops = reached(works["dense"], mine["dense"])
        for arm, point in mine.items():
            seconds = share_out(works[arm], _with(point.cluster, flops)).seconds
            peak = point.cluster.gpu.peak(point.setting.precision)
            yield {
                "source": source,
                "group": group,
                "arm": arm,
                "measured_ms": 1e3 * point.seconds,
                "forecast_ms": 1e3 * seconds.step,
                "error": seconds.step / point.seconds - 1,
                "calibrates": arm == "dense",
                "reached_flops": flops,
                "share": flops / peak if source == "gpu_step" else None,
                "communication_share": seconds.communication_share,
            }


def reached(work: Work, point: Point) -> float:
    """Returns the FLOP/s with which the estimate of a step is what was measured, by bisection.

    Raises:
        ValueError: there are none: what is moved and sent alone takes longer than was measured.
    """
    low, high = _LOWEST, _HIGHEST

    def step(flops: float) -> float:
        return share_out(work, _with(point.cluster, flops)).seconds.step

    if not step(high) < point.seconds < step(low):
        raise ValueError(f"no FLOP/s explain {point.seconds:g} s of {point.source}, {point.group}")
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if step(middle) > point.seconds else (low, middle)
    return high


def _with(cluster: Cluster, flops: float) -> Cluster:
    return replace(cluster, share=1.0, gpu=replace(cluster.gpu, half=flops, tf32=flops))


def _cpu(threads: int) -> Gpu:
    """Returns a CPU's cores as if they were a GPU; `reached` finds their FLOP/s."""
    bandwidth = CPU_BANDWIDTH * threads
    return Gpu(half=1.0, tf32=1.0, bandwidth=bandwidth, memory=0.0, peers=bandwidth, watts=0.0)


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns what was measured and what was forecast."""
    return [
        {
            "of": row["source"],
            "step": row["group"],
            "arm": row["arm"],
            "measured ms": row["measured_ms"],
            "forecast ms": "calibrates" if row["calibrates"] else common.cell(row["forecast_ms"]),
            "error": "–" if row["calibrates"] else f"{row['error']:+.1%}",
            "GFLOP/s": row["reached_flops"] / 1e9,
            "share of peak": row["share"],
        }
        for row in rows
    ]


def draw(arguments: common.Arguments, rows: Sequence[Row]) -> None:
    """Draws every forecast over its measurement."""
    with common.picture(arguments, 1, "Forecast over measured, steps of all benchmarks") as (axis,):
        for source in dict.fromkeys(row["source"] for row in rows):
            mine: list[Any] = [row for row in rows if row["source"] == source and not row["calibrates"]]
            axis.plot(
                [row["measured_ms"] for row in mine], [row["forecast_ms"] for row in mine], "o", label=source, alpha=0.7
            )
        ends = [min(row["measured_ms"] for row in rows), max(row["measured_ms"] for row in rows)]
        axis.plot(ends, ends, color="black", linewidth=0.5)
        axis.set(xlabel="measured ms", ylabel="forecast ms", xscale="log", yscale="log")
        axis.legend(fontsize="small")


if __name__ == "__main__":
    main()
