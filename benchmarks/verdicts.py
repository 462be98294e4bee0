"""The paper's claims beside what benchmarks.claims measured of them: the tables of docs/claims.md.

A difference is confirmed if its 95 % interval lies above 0. Two arms are as good as each other if the interval of their
difference lies above `MARGIN`. A cost is confirmed if its interval lies below the paper's bound.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import claims, common
from benchmarks.common import Row
from rmoe.analysis import LayerLoad, LayerMovement, LayerWeights, layer_means

MARGIN = -0.5  # points
CLAIMS, EXPERTS = "python -m benchmarks.claims", "rmoe analyze"
# Metric, and the paper's gains of RMoE over dense with Swin-T, CvT-13 and Swin-L (arXiv 2204.09636, abstract).
GAINS = {"mIoU": "+1.1, +0.9, +1.0", "box AP": "+1.4, +1.6, +0.6", "mask AP": "–"}
MOST_OVER_DENSE, MOST_OF_MOE = 1.03, 0.70  # "less than 3% additional training cost", "saving over 30%"
FREE = ("moe_upstream", "moe_downstream", "upcycled")  # runs whose experts are networks of their own
_YES, _NO = "confirmed", "not confirmed"


def render(folder: Path) -> str:
    """Markdown: the claims, all arms, one choice at a time, and the experts as `rmoe analyze` saw them.

    Args:
        folder: holds claims.json, claims_runs.json, ablation.json, ablation_runs.json and experts/*/analysis.json.
    """
    inside = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("experts/*/analysis.json"))}
    claimed = verdicts(json.loads((folder / "claims.json").read_text()), inside)
    parts = [f"## Claim by claim\n\n{common.markdown(claimed)}", _part(folder, "claims", "All arms")]
    if (folder / "ablation.json").exists():
        parts.append(_part(folder, "ablation", "One choice at a time"))
    parts.append(f"## Inside the experts\n\n{common.markdown(experts(inside))}")
    return "\n".join(parts)


def _part(folder: Path, part: str, title: str) -> str:
    rows = json.loads((folder / f"{part}.json").read_text())
    runs = json.loads((folder / f"{part}_runs.json").read_text())
    table = claims.table(rows) if part == "claims" else ablation(rows)
    return f"## {title}\n\n{common.circumstances(runs)}\n\n{common.markdown(table)}"


def verdicts(rows: Sequence[Row], inside: Mapping[str, Row]) -> list[Row]:
    """Claim by claim.

    Args:
        rows: of claims.json.
        inside: what `rmoe analyze` wrote, by run.
    """
    by = {(row["metric"], row["arm"]): row for row in rows}
    return [
        *(_better(by[metric, "residual"], paper) for metric, paper in GAINS.items() if (metric, "residual") in by),
        *(_as_good(by[metric, "residual"]) for metric in GAINS if (metric, "residual") in by),
        *(_cheap(by[metric, "residual"]) for metric in ("mIoU", "box AP") if (metric, "residual") in by),
        *(_saving(by[metric, "residual"]) for metric in ("mIoU", "box AP") if (metric, "residual") in by),
        *(_shared(run, found) for run, found in inside.items() if run in FREE),
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


def _row(claim: str, paper: str, measured: str, interval: str, cost: str, holds: bool, command: str = CLAIMS) -> Row:
    return {
        "claim": claim,
        "paper": paper,
        "measured": measured,
        "95 %": interval,
        "cost": cost,
        "verdict": _YES if holds else _NO,
        "command": f"`{command}`",
    }


def _better(row: Row, paper: str) -> Row:
    """RMoE against dense, in points."""
    low = row["interval95"][0] if row["interval95"] else None
    cost = f"× {row['cost_vs_dense']:.3f} dense"
    holds = low is not None and low > 0
    claim = f"RMoE is better than dense, {row['metric']}"
    return _row(claim, paper, f"{row['diff_to_dense']:+.2f}", claims.span(row["interval95"]), cost, holds)


def _as_good(row: Row) -> Row:
    """RMoE against full MoE training, in points."""
    interval = row["interval95_to_moe"]
    holds = interval is not None and interval[0] > MARGIN
    cost = f"× {row['cost_vs_moe']:.3f} MoE"
    claim = f"RMoE is as good as full MoE training, {row['metric']}"
    return _row(claim, "comparable", f"{row['diff_to_moe']:+.2f}", claims.span(interval), cost, holds)


def _cheap(row: Row) -> Row:
    """Device seconds against dense."""
    ratio, interval = row["cost_vs_dense"], row["cost_interval95"]
    claim = f"RMoE costs < 3 % more training than dense, {row['task']}"
    cost = f"finetuning alone × {row['finetune_cost_vs_dense']:.3f}; FLOPs × {row['flops_vs_dense']:.3f}"
    return _row(claim, "< +3 %", f"{_percent(ratio)} %", _percents(interval), cost, _below(interval, MOST_OVER_DENSE))


def _saving(row: Row) -> Row:
    """Device seconds against full MoE training."""
    ratio, interval = row["cost_vs_moe"], row["cost_interval95_to_moe"]
    claim = f"RMoE saves > 30 % of the training of full MoE, {row['task']}"
    cost = f"finetuning alone × {row['finetune_cost_vs_moe']:.3f}; FLOPs × {row['flops_vs_moe']:.3f}"
    return _row(claim, "< −30 %", f"{_percent(ratio)} %", _percents(interval), cost, _below(interval, MOST_OF_MOE))


def _below(interval: Sequence[float] | None, bound: float) -> bool:
    return interval is not None and interval[1] < bound


def _shared(run: str, found: Row) -> Row:
    """How much of its experts' weights is the same for all of them."""
    shares = []
    for layer in found["layers"].values():
        core, rest = layer["weights"]["core_norm"] ** 2, layer["weights"]["residual_norm"]
        shares.append(core / (core + statistics.mean(x**2 for x in rest)))
    claim = f"experts are a core and residuals: the core's share of their squared norm, {run}"
    span = f"{min(shares):.3f} … {max(shares):.3f} (layers)"
    return _row(claim, "most", f"{statistics.mean(shares):.3f}", span, "–", statistics.mean(shares) > 0.5, EXPERTS)


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}"


def _percents(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else " … ".join(map(_percent, interval))


def ablation(rows: Sequence[Row]) -> list[Row]:
    """One choice at a time, against residual finetuning as it is by default."""
    return [
        {
            "choice": row["arm"],
            "task": row["task"],
            "metric": row["metric"],
            "seeds": len(row["seeds"]),
            "mean": row["mean"],
            "− residual": row["diff_to_residual"],
            "95 %": claims.span(row["interval95_to_residual"]),
            "pipeline s × residual": row["cost_vs_residual"],
            "finetune s × residual": row["finetune_cost_vs_residual"],
            "finetune FLOPs × residual": row["finetune_flops_vs_residual"],
        }
        for row in rows
    ]


def experts(inside: Mapping[str, Row]) -> list[Row]:
    """A line for each analysed run and layer; means over its experts."""
    return [
        {"run": run, "layer": layer.removesuffix(".mlp")} | _means(parts)
        for run, found in inside.items()
        for layer, parts in found["layers"].items()
    ]


def _means(parts: Mapping[str, Row]) -> Row:
    moved = LayerMovement(**parts["movement"]) if "movement" in parts else None
    means = layer_means(LayerWeights(**parts["weights"]), LayerLoad(**parts["load"]), moved)
    return {column: value for column, value in means.items() if column not in ("‖core‖", "rank Δw2")}
