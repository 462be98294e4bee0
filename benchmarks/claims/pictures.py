"""Tables and pictures of the rows that `benchmarks.claims.statistics.results` makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from benchmarks import common
from benchmarks.claims.statistics import difference, ratio
from benchmarks.common import Row


def table(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows as people read them: quality against cost."""
    return [
        {
            "task": row["task"],
            "arm": row["arm"],
            "metric": row["metric"],
            "seeds": len(row["seeds"]),
            "mean": row["mean"],
            "std": row["std"],
            "− dense": difference(row).mean,
            "95 %": span(difference(row).interval),
            "pipeline s × dense": ratio(row, "cost").mean,
            "× moe": ratio(row, "cost", "moe").mean,
            "pipeline FLOPs × dense": ratio(row, "flops").mean,
            "finetune s × dense": ratio(row, "finetune_cost").mean,
        }
        for row in rows
    ]


def span(interval: Sequence[float] | None, digits: int = 2) -> str:
    """Returns an interval of differences for print."""
    return "–" if interval is None else " … ".join(f"{end:+.{digits}f}" for end in interval)


def draw(arguments: common.Arguments, rows: Sequence[Row], file: str) -> None:
    """Draws the difference to dense, with its interval, over the pipeline's cost."""
    metrics = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    with common.picture(arguments, len(metrics), "Quality against cost, dense = 0 and 1", file=file) as axes:
        for axis, (task, metric) in zip(axes, metrics, strict=True):
            for row in (row for row in rows if (row["task"], row["metric"]) == (task, metric)):
                mean, interval = difference(row)
                low, high = interval or [mean, mean]
                error = [[mean - low], [high - mean]]
                axis.errorbar(ratio(row, "cost").mean, mean, yerr=error, fmt="o", capsize=3, label=row["arm"])
            axis.axhline(0.0, color="black", linewidth=0.5)
            axis.set(title=f"{task}: {metric} − dense", xlabel="device seconds of the pipeline, × dense")
        axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_choices(arguments: common.Arguments, rows: Sequence[Row], file: str) -> None:
    """Draws each choice's difference to the defaults, and its cost, with intervals; the defaults are the line."""
    shown = rows[::-1]
    panels = (
        (partial(difference, other="residual"), f"{rows[0]['metric']} − residual", 0.0),
        (partial(ratio, kind="finetune_cost", other="residual"), "finetune, seconds × residual", 1.0),
        (partial(ratio, kind="cost", other="residual"), "pipeline, seconds × residual", 1.0),
    )
    height = 1.0 + 0.25 * len(rows)
    with common.picture(arguments, len(panels), "One choice at a time", height, file=file) as axes:
        for axis, (compare, label, same) in zip(axes, panels, strict=True):
            for place, row in enumerate(shown):
                mean, interval = compare(row)
                axis.plot(interval or [mean, mean], [place, place], color="tab:blue")
                axis.plot(mean, place, "o", color="tab:blue")
            axis.axvline(same, color="black", linewidth=0.5)
            axis.set(xlabel=label, yticks=range(len(shown)), yticklabels=[])
            axis.grid(axis="y", alpha=0.3)
        axes[0].set_yticklabels([row["arm"] for row in shown])
