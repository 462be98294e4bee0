"""Throughput of training over gloo processes: ep_size, number of experts, tokens or weights on the way.

    python -m benchmarks.scaling

A small Swin classifier under DeepSpeed with ZeRO 2; each process has as many images, whatever their number. All cases
of one number of processes take turns. `exchanged` is what one process sends for the experts' sake in a step, beside the
reduction of gradients. On a machine with fewer cores than processes, these numbers compare the cases of one number of
processes; they say nothing about scaling to more of them, and nothing about a GPU's network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks import common, training
from benchmarks.common import Row
from rmoe.moe import exchange

PROCESSES, EXPERTS, MANY = (1, 2, 4), 8, (4, 16, 32)
IMAGES, SIZE = 8, 64
PACE, QUICK_PACE = {"seconds": 0.0, "rounds": (5, 5)}, {"seconds": 0.0, "rounds": (1, 1)}
Case = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = common.parse("scaling", __doc__, argv)
    pace = QUICK_PACE if arguments.quick else PACE  # as many rounds in every process
    rows: list[Row] = []
    for processes in PROCESSES[1:2] if arguments.quick else PROCESSES:
        found = common.in_child(
            "benchmarks.scaling:measure",
            allocator="tuned",
            threads=1,
            processes=processes,
            named=cases(processes)[:3] if arguments.quick else cases(processes),
            pace=pace,
        )
        rows += [{"processes": processes} | row for row in found]
    draw(arguments, rows)
    common.publish(
        arguments._replace(threads=1), {"images": IMAGES, "image_size": SIZE, "pace": pace}, rows, table(rows)
    )


def cases(processes: int) -> list[Case]:
    """Returns what is compared among so many processes: the dense model, and `moe` settings."""
    found: list[Case] = [{"residual": "dense", "num_experts": 0, "ep_size": 1, "exchange": "none"}]
    sizes = [size for size in (1, 2, 4) if size <= processes]
    for residual in ("low_rank", "full"):
        for ep_size in reversed(sizes):
            for way in ("weights", "tokens") if ep_size > 1 else ("none",):
                found.append({"residual": residual, "num_experts": EXPERTS, "ep_size": ep_size, "exchange": way})
    for residual, way in (("low_rank", "weights"), ("full", "tokens")):
        way = way if processes > 1 else "none"
        many = ({"residual": residual, "num_experts": n, "ep_size": processes, "exchange": way} for n in MANY)
        found += list(many)
    return found


def measure(named: Sequence[Case], pace: dict[str, Any]) -> list[Row]:
    """Measures all cases in turns, in each process of a group."""
    common.join_group()
    steps = {str(number): _step(case) for number, case in enumerate(named)}
    times = common.alternate(steps, **pace)
    rows = []
    for case, row in zip(named, common.timing_rows(times, "0"), strict=True):
        throughput = dist.get_world_size() * IMAGES / (row["ms"] / 1e3)
        sent = exchanged(steps[row.pop("contender")])
        rows.append(case | row | {"images_per_second": throughput, "exchanged_bytes": sent})
    return rows


def exchanged(step: Callable[[], object]) -> int:
    """Counts the bytes that this process sends to others for the experts' sake while `step` runs."""
    with mock.patch.object(exchange, "dist", mock.Mock(wraps=dist)) as spy:
        step()
    sent = 0.0
    for name, arguments, options in spy.method_calls:
        if name in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor"):
            whole = max(arguments[:2], key=lambda x: x.nbytes) if name != "all_to_all_single" else arguments[1]
            sent += whole.nbytes * (1 - 1 / dist.get_world_size(options["group"]))
    return round(sent)


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns the throughput of all cases."""
    return [
        {
            "processes": row["processes"],
            "layer": row["residual"],
            "experts": row["num_experts"],
            "ep_size": row["ep_size"],
            "exchange": row["exchange"],
            "images/s": row["images_per_second"],
            "× dense": row["ratio"],
            "exchanged MB": row["exchanged_bytes"] / 1e6,
        }
        for row in rows
    ]


def draw(arguments: common.Arguments, rows: Sequence[Row]) -> None:
    """Draws throughput over ep_size, for the largest number of processes, and over the number of experts."""
    most = max(row["processes"] for row in rows)
    mine = [row for row in rows if row["processes"] == most and row["residual"] != "dense"]
    with common.picture(arguments, 2, f"Training throughput, {most} processes") as axes:
        for axis, key, other in zip(axes, ("ep_size", "num_experts"), ("num_experts", "ep_size"), strict=True):
            kept = [row for row in mine if row[other] == (EXPERTS if other == "num_experts" else most)]
            for name in sorted({(row["residual"], row["exchange"]) for row in kept}):
                line = sorted(
                    (row[key], row["images_per_second"]) for row in kept if (row["residual"], row["exchange"]) == name
                )
                axis.plot(*zip(*line, strict=True), marker="o", label=" ".join(name))
            axis.set(xlabel=key, ylabel="images/s", ylim=(0, None))
            axis.legend(fontsize="small")


def _step(case: Case) -> Callable[[], None]:
    import deepspeed

    from rmoe.engine.ds_json import resolve
    from rmoe.engine.optim import param_groups
    from rmoe.reporting.tracing import training_loss

    moe = None
    if case["residual"] != "dense":
        moe = case | {"exchange": "auto" if case["exchange"] == "none" else case["exchange"]}
    model = training.build(training.config("classification", moe, SIZE, small=True))
    images = training.batch("classification", IMAGES, SIZE)
    stage = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5_000_000}, "steps_per_print": 10**9}
    content = resolve(stage, batch_size=IMAGES, accumulation=1, max_norm=0.0, processes=dist.get_world_size())
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5, weight_decay=0.01))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=content)

    def step() -> None:
        engine.backward(training_loss(engine, images))
        engine.step()

    return step


if __name__ == "__main__":
    main()
