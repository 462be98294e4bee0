"""Differences between arms, paired over seeds, and what their pipelines cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.claims.arms import Arm, Size
from benchmarks.claims.runs import Key
from benchmarks.common import Row
from rmoe.inference.runs import Run
from rmoe.pipelines import Training
from rmoe.reporting.statistics import paired

REFERENCES = ("dense", "moe", "residual", "dense_core_longer")  # what arms are compared with


def results(runs: Mapping[Key, Training], size: Size, arms: Mapping[str, Arm]) -> list[Row]:
    """Returns one object for each task, metric and arm."""
    rows: list[Row] = []
    for task in size.tasks:
        values: dict[str, dict[str, dict[int, float]]] = {}
        losses: dict[str, dict[int, float]] = {}
        costs: dict[str, dict[int, dict[str, float]]] = {}
        for (name, where, seed), training in runs.items():
            if where == task:
                run = Run(training.folder)
                if (loss := run.train_loss()) is not None:
                    losses.setdefault(name, {})[seed] = loss
                for metric, value in run.values().items():
                    values.setdefault(metric, {}).setdefault(name, {})[seed] = value
                costs.setdefault(name, {})[seed] = pipeline_cost(training)
        for metric, of_arm in values.items():
            for name in of_arm:
                row: Row = {"arm": name, "task": task, "metric": metric, "upstream": arms[name].upstream}
                fit = quality(losses, name) if name in losses else None
                rows.append(row | quality(of_arm, name) | {"train_loss": fit} | cost(costs, name))
    return rows


def quality(of_arm: Mapping[str, Mapping[int, float]], name: str) -> Row:
    """Returns mean and spread of an arm's values, and their differences to the `REFERENCES` over the seeds of both."""
    mine = dict(sorted(of_arm[name].items()))
    row: Row = {
        "seeds": [*mine],
        "values": [*mine.values()],
        "mean": statistics.mean(mine.values()),
        "std": statistics.stdev(mine.values()) if len(mine) > 1 else None,
    }
    for other in REFERENCES:
        theirs = of_arm.get(other, {})
        shared = [seed for seed in mine if seed in theirs]
        mean, interval = paired([mine[seed] - theirs[seed] for seed in shared]) if shared else (None, None)
        row |= {f"diff_to_{other}": mean, _interval("interval95", other): interval}
    return row


def cost(of_arm: Mapping[str, Mapping[int, Mapping[str, float]]], name: str) -> Row:
    """Returns the means of an arm's costs, and their mean ratios to the `REFERENCES` over the seeds of both."""
    mine = of_arm[name]
    row: Row = {key: statistics.mean(one[key] for one in mine.values()) for key in next(iter(mine.values()))}
    for other in REFERENCES:
        theirs = of_arm.get(other, {})
        shared = [seed for seed in mine if seed in theirs]
        for key, label in (
            ("pipeline_device_seconds", "cost"),
            ("finetune_device_seconds", "finetune_cost"),
            ("pipeline_flops", "flops"),
            ("finetune_flops", "finetune_flops"),
        ):
            ratios = [mine[seed][key] / theirs[seed][key] for seed in shared]
            mean, interval = paired(ratios) if ratios else (None, None)
            row[f"{label}_vs_{other}"] = mean
            if key.endswith("seconds"):
                row[_interval(f"{label}_interval95", other)] = interval
    return row


class Compared(NamedTuple):
    """Compares two arms over the seeds of both; None where there is none, or one for an interval."""

    mean: Any
    interval: list[float] | None


def difference(row: Row, other: str = "dense") -> Compared:
    """Returns what a row of `results` (or of `quality`) says of its arm's values less those of another arm."""
    return Compared(row[f"diff_to_{other}"], row[_interval("interval95", other)])


def ratio(row: Row, kind: str, other: str = "dense") -> Compared:
    """Returns what a row of `results` says of its arm's cost as a multiple of another arm's.

    Args:
        row: of one arm.
        kind: "cost" or "finetune_cost", device seconds; "flops" or "finetune_flops", which have no interval.
        other: the other arm, one of `REFERENCES`.
    """
    return Compared(row[f"{kind}_vs_{other}"], row.get(_interval(f"{kind}_interval95", other)))


def _interval(name: str, other: str) -> str:
    """Returns the key of an interval; that of a difference to dense has no further name."""
    return name if other == "dense" else f"{name}_to_{other}"


def pipeline_cost(training: Training) -> dict[str, float]:
    """Returns device seconds and FLOPs of a run, and of it and all that it starts from."""
    own = json.loads((training.folder / "cost.json").read_text())
    seconds, flops = own["device_seconds"], own["flops_per_step"] * own["steps"]
    before = [pipeline_cost(one) for one in training.after]
    return {
        "finetune_device_seconds": seconds,
        "finetune_flops": flops,
        "pipeline_device_seconds": seconds + sum(one["pipeline_device_seconds"] for one in before),
        "pipeline_flops": flops + sum(one["pipeline_flops"] for one in before),
    }


def again(first: Sequence[Row], second: Sequence[Row], published: Sequence[Row]) -> list[Row]:
    """Sets every figure of `first` beside that of `second` and of `published`; all as `describe` says it."""
    by_run = [{(row["arm"], row["where"], row["seed"]): row for row in rows} for rows in (second, published)]
    rows = []
    for row in first:
        repeated, known = (found[row["arm"], row["where"], row["seed"]] for found in by_run)
        rows += [
            {"arm": row["arm"], "where": row["where"], "seed": row["seed"], "metric": metric}
            | {"first": row[metric], "again": repeated[metric], "equal": row[metric] == repeated[metric]}
            | {"claims_runs": known[metric]}
            for metric in ("top1", "mIoU", "box AP", "mask AP")
            if metric in row
        ]
    return rows
