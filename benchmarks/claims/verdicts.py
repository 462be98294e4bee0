"""The paper's claims beside what benchmarks.claims measured of them: the tables of docs/claims.md.

A difference is confirmed if its 95 % interval lies above 0. Two arms are as good as each other if the interval of their
difference lies above `MARGIN`. A cost is confirmed if its interval lies below the paper's bound. Experts have a core if
it holds more than `MOST` of their squared norm, and more than chance would give.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.claims.arms import INSIDE, LONGER
from benchmarks.claims.pictures import span, table
from benchmarks.claims.statistics import difference, ratio
from benchmarks.common import Row
from rmoe.reporting.analysis import LayerLoad, layer_means
from rmoe.reporting.weights import LayerMovement, LayerWeights

MARGIN = -0.5  # points
MOST = 0.5
CLAIMS, EXPERTS = "python -m benchmarks.claims", "rmoe analyze"
# Metric, and the paper's gains of RMoE over dense with Swin-T, CvT-13 and Swin-L (arXiv 2204.09636, abstract).
GAINS = {"mIoU": "+1.1, +0.9, +1.0", "box AP": "+1.4, +1.6, +0.6", "mask AP": "–"}
MOST_OVER_DENSE, MOST_OF_MOE = 1.03, 0.70  # "less than 3% additional training cost", "saving over 30%"
# Arms that the claims are about; with the short schedule only the first, the default.
RMOE = {"residual": "RMoE", "full_residual": "RMoE (full residuals)", "intermediate_residual": "RMoE-I"}
FREE = ("moe_upstream", "moe_downstream", "upcycled")  # runs whose experts are networks of their own
_YES, _NO = "confirmed", "not confirmed"
_LONGER = f", {LONGER} × the steps downstream"


def render(folder: Path) -> str:
    """Returns Markdown: the claims, all arms, the longer schedule, one choice at a time, and the experts' insides.

    Args:
        folder: holds claims.json, long.json and ablation.json, each with its runs in *_runs.json, and analysis.json of
            runs in experts/ and experts_long/.
    """
    inside = _inside(folder / INSIDE["claims"][0])
    longer = {f"{run}{_LONGER}": found for run, found in _inside(folder / INSIDE["long"][0]).items()}
    claimed = verdicts(_read(folder, "claims"), _read(folder, "long"), inside)
    parts = [
        f"## Claim by claim\n\n{common.markdown(claimed)}",
        *_part(folder, "claims", "All arms", table),
        *_part(folder, "long", "A longer schedule", longer_table),
        *_part(folder, "ablation", "One choice at a time", ablation),
    ]
    if seen := inside | longer:
        parts.append(f"## Inside the experts\n\n{common.markdown(experts(seen))}")
    return "\n".join(parts)


def _read(folder: Path, part: str) -> Any:
    """Reads a part's rows; there are none of a part that was not run."""
    path = folder / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else []


def _inside(folder: Path) -> dict[str, Row]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/analysis.json"))}


def _part(folder: Path, part: str, title: str, table: Callable[[Sequence[Row]], list[Row]]) -> Iterator[str]:
    if rows := _read(folder, part):
        circumstances = common.circumstances(_read(folder, f"{part}_runs"))
        yield f"## {title}\n\n{circumstances}\n\n{common.markdown(table(rows))}"


def verdicts(rows: Sequence[Row], longer: Sequence[Row], inside: Mapping[str, Row]) -> list[Row]:
    """Returns a verdict on every claim.

    Args:
        rows: of claims.json.
        longer: of long.json.
        inside: what `rmoe analyze` wrote, by run.
    """
    cases = [_Case(row, "", CLAIMS) for row in rows if row["arm"] == "residual"]
    cases += [_Case(row, _LONGER, f"{CLAIMS} --part long") for row in longer if row["arm"] in RMOE]
    of_tasks = [case for case in cases if case.row["metric"] != "mask AP"]  # costs are a task's
    return [
        *map(_better, cases),
        *map(_as_good, cases),
        *map(_cheap, of_tasks),
        *map(_saving, of_tasks),
        *(row for run, found in inside.items() if run in FREE for row in _shared(run, found)),
        {
            "claim": "ImageNet-22k pretraining; Swin-T, CvT-13, Swin-L; ADE20K and COCO at full size",
            "paper": "as above",
            "measured": None,
            "95 %": "–",
            "cost": "–",
            "verdict": "not testable at this size",
            "command": "–",
        },
    ]


class _Case(NamedTuple):
    """Holds an arm's row of one table, what to add to the words of its claims, and the command that made it."""

    row: Row
    words: str
    command: str

    def verdict(self, claim: str, paper: str, measured: str, interval: str, cost: str, holds: bool) -> Row:
        return _verdict(
            f"{RMOE[self.row['arm']]} {claim}{self.words}", paper, measured, interval, cost, holds, self.command
        )


def _verdict(claim: str, paper: str, measured: str, interval: str, cost: str, holds: bool, command: str) -> Row:
    return {
        "claim": claim,
        "paper": paper,
        "measured": measured,
        "95 %": interval,
        "cost": cost,
        "verdict": _YES if holds else _NO,
        "command": f"`{command}`",
    }


def _better(case: _Case) -> Row:
    """Judges the gain over dense, in points."""
    metric, (mean, interval) = case.row["metric"], difference(case.row)
    return case.verdict(
        f"is better than dense, {metric}",
        GAINS[metric],
        f"{mean:+.2f}",
        span(interval),
        f"× {ratio(case.row, 'cost').mean:.3f} dense",
        interval is not None and interval[0] > 0,
    )


def _as_good(case: _Case) -> Row:
    """Judges the difference to full MoE training, in points."""
    mean, interval = difference(case.row, "moe")
    return case.verdict(
        f"is as good as full MoE training, {case.row['metric']}",
        "comparable",
        f"{mean:+.2f}",
        span(interval),
        f"× {ratio(case.row, 'cost', 'moe').mean:.3f} MoE",
        interval is not None and interval[0] > MARGIN,
    )


def _cheap(case: _Case) -> Row:
    """Judges device seconds against dense."""
    claim = f"costs < 3 % more training than dense, {case.row['task']}"
    return _cost(case, claim, "< +3 %", "dense", MOST_OVER_DENSE)


def _saving(case: _Case) -> Row:
    """Judges device seconds against full MoE training."""
    claim = f"saves > 30 % of the training of full MoE, {case.row['task']}"
    return _cost(case, claim, "< −30 %", "moe", MOST_OF_MOE)


def _cost(case: _Case, claim: str, paper: str, other: str, bound: float) -> Row:
    (mean, interval), (finetune, _), (flops, _) = (
        ratio(case.row, kind, other) for kind in ("cost", "finetune_cost", "flops")
    )
    return case.verdict(
        claim,
        paper,
        f"{_percent(mean)} %",
        _percents(interval),
        f"finetuning alone × {finetune:.3f}; FLOPs × {flops:.3f}",
        interval is not None and interval[1] < bound,
    )


def _shared(run: str, found: Row) -> Iterator[Row]:
    """Judges how much of the experts' weights is the same for all, as they stand and with units in one order."""
    layers = [LayerWeights(**layer["weights"]) for layer in found["layers"].values()]
    claim = "experts are a core and residuals: the core's share of their squared norm"
    shares = [x.core_norm**2 / (x.core_norm**2 + statistics.mean(y**2 for y in x.residual_norm)) for x in layers]
    yield _share(f"{claim}, {run}", shares, "–", MOST)
    matched = [(x.matched, x.by_chance) for x in layers if x.matched is not None and x.by_chance is not None]
    if matched:
        ordered, chance = zip(*matched, strict=True)
        by_chance = statistics.mean(chance)
        words = f"{claim}, hidden units matched, {run}"
        yield _share(words, ordered, f"by chance {by_chance:.3f}", max(MOST, by_chance))


def _share(claim: str, shares: Sequence[float], cost: str, at_least: float) -> Row:
    span, mean = f"{min(shares):.3f} … {max(shares):.3f} (layers)", statistics.mean(shares)
    return _verdict(claim, "most", f"{mean:.3f}", span, cost, mean > at_least, EXPERTS)


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}"


def _percents(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else " … ".join(map(_percent, interval))


def longer_table(rows: Sequence[Row]) -> list[Row]:
    """Returns what `table` shows, and the loss at the end of training."""
    return [
        shown
        | {
            "finetune FLOPs × dense": ratio(row, "finetune_flops").mean,
            "loss − dense": difference(row["train_loss"]).mean,
            "its 95 %": span(difference(row["train_loss"]).interval, digits=3),
        }
        for shown, row in zip(table(rows), rows, strict=True)
    ]


def ablation(rows: Sequence[Row]) -> list[Row]:
    """Returns one choice at a time, against residual finetuning as it is by default."""
    return [
        {
            "choice": row["arm"],
            "task": row["task"],
            "metric": row["metric"],
            "seeds": len(row["seeds"]),
            "mean": row["mean"],
            "− residual": difference(row, "residual").mean,
            "95 %": span(difference(row, "residual").interval),
            "pipeline s × residual": ratio(row, "cost", "residual").mean,
            "finetune s × residual": ratio(row, "finetune_cost", "residual").mean,
            "finetune FLOPs × residual": ratio(row, "finetune_flops", "residual").mean,
        }
        for row in rows
    ]


def experts(inside: Mapping[str, Row]) -> list[Row]:
    """Returns a line for each analysed run and layer, with means over its experts."""
    return [
        {"run": run, "layer": layer.removesuffix(".mlp")} | _means(parts)
        for run, found in inside.items()
        for layer, parts in found["layers"].items()
    ]


def _means(parts: Mapping[str, Row]) -> Row:
    moved = LayerMovement(**parts["movement"]) if "movement" in parts else None
    means = layer_means(LayerWeights(**parts["weights"]), LayerLoad(**parts["load"]), moved)
    return {column: value for column, value in means.items() if column not in ("‖core‖", "rank Δw2")}
