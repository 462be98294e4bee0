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


def draw_method(arguments: common.Arguments, rows: Sequence[Row], file: str = "method") -> None:
    """Draws, for each task, every arm's difference to the best dense one with its interval, and the same over FLOPs."""
    told = [row for row in rows if row["arm"] != "dense" and row["metric"] != "mask AP"]
    metrics = [*dict.fromkeys((row["task"], row["metric"]) for row in told or rows)]
    height = 1.5 + 0.25 * max(sum((row["task"], row["metric"]) == one for row in rows) for one in metrics)
    title = "Difference to best dense, 95 % of paired seeds"
    with common.picture(arguments, 2 * len(metrics), title, height, file=file) as axes:
        for panels, (task, metric) in zip(zip(axes[::2], axes[1::2], strict=True), metrics, strict=True):
            by_arm, by_cost = panels
            shown = [
                row
                for row in rows
                if (row["task"], row["metric"]) == (task, metric) and difference(row, "best_dense").mean is not None
            ]
            shown.reverse()
            for place, row in enumerate(shown):
                mean, interval = difference(row, "best_dense")
                color = _COLORS[row["kind"]]
                by_arm.plot(interval or [mean, mean], [place, place], color=color)
                by_arm.plot(mean, place, "o", color=color)
                by_cost.plot(ratio(row, "finetune_flops").mean, mean, "o", color=color)
                if row["kind"] == "candidate":
                    by_cost.annotate(row["arm"], (ratio(row, "finetune_flops").mean, mean), fontsize="small")
            by_arm.axvline(0.0, color="black", linewidth=0.5)
            by_arm.set(xlabel=f"{task}: {metric} − best dense", yticks=range(len(shown)))
            by_arm.set_yticklabels([f"{row['arm']} ({len(row['seeds_to_best_dense'])})" for row in shown])
            by_arm.grid(axis="y", alpha=0.3)
            by_cost.axhline(0.0, color="black", linewidth=0.5)
            by_cost.margins(0.2)  # room for the names
            by_cost.set(xlabel="FLOPs of the finetune, × dense", ylabel=f"{metric} − best dense")


_COLORS = {"candidate": "tab:red", "choice": "tab:blue", "control": "tab:gray"}


def draw_regime(arguments: common.Arguments, rows: Sequence[Row], usual: tuple[int, int, float]) -> None:
    """Draws each arm's difference to dense, with its interval, over one condition at a time.

    Args:
        arguments: the benchmark's.
        rows: of `comparison.regimes`.
        usual: steps, number of styles and width where the other two conditions stand in each panel.
    """
    labels = ("steps", "styles of drawing in the data", "width of the backbone, × the miniature's")
    with common.picture(arguments, len(labels), "Where residual experts pay", file="regime") as axes:
        for place, (axis, label) in enumerate(zip(axes, labels, strict=True)):
            for name in dict.fromkeys(row["arm"] for row in rows):
                points = []
                for row in (row for row in rows if row["arm"] == name and row["diff_to_dense"] is not None):
                    at = (row["steps"], len(row["styles"]), row["width"])
                    if at[:place] + at[place + 1 :] == usual[:place] + usual[place + 1 :]:
                        mean = row["diff_to_dense"]
                        low, high = row["interval95"] or [mean, mean]
                        points.append((at[place], mean, mean - low, high - mean))
                if points:
                    where, means, below, above = zip(*sorted(points), strict=True)
                    axis.errorbar(where, means, yerr=[below, above], fmt="o-", capsize=3, label=name)
            axis.axhline(0.0, color="black", linewidth=0.5)
            axis.set(xlabel=label, xscale="log", ylabel="mIoU − dense")
            axis.minorticks_off()
            axis.set_xticks(ticks := sorted({(r["steps"], len(r["styles"]), r["width"])[place] for r in rows}))
            axis.set_xticklabels([f"{tick:g}" for tick in ticks])
        axes[-1].legend(fontsize="small")
