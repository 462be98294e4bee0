"""The method study's targets, each met or not, and its tables in docs/claims.md.

A target about quality is judged with at least `ENOUGH` seeds, the headline's with `ENOUGH_HEADLINE`. A gain is met if
its 95 % interval lies above 0; "not worse" if it lies above `MARGIN`. Costs are those of steps at real sizes: medians
of paired ratios, from `python -m benchmarks.step --part real`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.claims.ideas import IDEAS, ideas, run_as
from benchmarks.claims.method import CANDIDATES, HEADLINE
from benchmarks.claims.pictures import span
from benchmarks.claims.statistics import difference, ratio
from benchmarks.claims.verdicts import MARGIN
from benchmarks.common import Row

ENOUGH, ENOUGH_HEADLINE = 5, 8
FLOPS, FROZEN_FLOPS, SECONDS = 1.02, 1.00, 1.03  # at most, × dense
FROZEN = ("full_calibrated", "full_random", "soft_frozen")
UPPER_BOUNDS, ONE_EXPERT = ("upper_bound_all", "upper_bound_alternate"), ("one_full", "one_low_rank")
MET, MISSED, FEW, NOT_RUN = "met", "not met", "not enough seeds", "not run"
SAME_STEP = {"full_calibrated": "full_random"}  # what gates begin with costs no step anything
COMMAND, STEP_COMMAND = "python -m benchmarks.claims --part method", "python -m benchmarks.step --part real"


def verdicts(controls: Sequence[Row], steps: Sequence[Row]) -> list[Row]:
    """Returns every target for every candidate.

    Args:
        controls: of `comparison.controls`.
        steps: rows of step_real.json; none if it was not run.
    """
    found: list[Row] = []
    for name in CANDIDATES:
        mine = [row for row in controls if row["candidate"] == name]
        fewest = ENOUGH_HEADLINE if name in HEADLINE else ENOUGH
        for metric in ("mIoU", "box AP"):
            over = _versus(mine, ("dense",), metric)
            found.append(_gain(name, f"candidate − best dense control, {metric}", over, 0.0, fewest))
        for metric in ("mIoU", "box AP"):
            over = _versus(mine, UPPER_BOUNDS, metric)
            found.append(_gain(name, f"candidate − upper bound, {metric}", over, MARGIN, ENOUGH))
            over = _versus(mine, ONE_EXPERT, metric)
            found.append(_gain(name, f"candidate − one expert, {metric}", over, 0.0, ENOUGH))
        for task in ("segmentation", "detection"):
            contender = SAME_STEP.get(name, name)
            step = next((row for row in steps if (row["task"], row["contender"]) == (task, contender)), None)
            most = FROZEN_FLOPS if name in FROZEN else FLOPS
            found.append(_cost(name, f"FLOPs of a step at real size, {task}", most, step, "flops_ratio"))
            found.append(_cost(name, f"seconds of a step at real size, {task}", SECONDS, step, "ratio"))
    return found


def _versus(controls: Iterable[Row], names: Sequence[str], metric: str) -> Row | None:
    return next((row for row in controls if row["metric"] == metric and row["control"] in names), None)


def _gain(name: str, target: str, compared: Row | None, above: float, fewest: int) -> Row:
    """Judges a difference in points."""
    seeds = len(compared["seeds"]) if compared else 0
    interval = compared["interval95"] if compared else None
    verdict = FEW if seeds < fewest or interval is None else MET if interval[0] > above else MISSED
    return {
        "target": target,
        "candidate": name,
        "limit": f"interval above {above:g}",
        "against": compared["control_arm"] if compared else "–",
        "measured": compared["difference"] if compared else None,
        "95 %": span(interval),
        "seeds": seeds,
        "verdict": verdict,
        "command": f"`{COMMAND}`",
    }


def _cost(name: str, target: str, most: float, step: Row | None, key: str) -> Row:
    """Judges a ratio to dense. FLOPs are counted, so they have no spread."""
    quartiles = [step["ratio_low"], step["ratio_high"]] if step and key == "ratio" else None
    return {
        "target": target,
        "candidate": name,
        "limit": f"at most {most:.2f} × dense",
        "against": "dense",
        "measured": step[key] if step else None,
        "95 %": "quartiles {:.3f} … {:.3f}".format(*quartiles) if quartiles else "–",
        "seeds": None,
        "verdict": NOT_RUN if step is None else MET if round(step[key], 3) <= most else MISSED,
        "command": f"`{STEP_COMMAND}`",
    }


def choose(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Returns what each candidate gains over the best dense control and what it costs, for who has to choose.

    Args:
        found: content of method.json.
    """
    arms = {(row["task"], row["metric"], row["arm"]): row for row in found["arms"]}
    return [
        {
            "task": row["task"],
            "metric": row["metric"],
            "candidate": row["arm"],
            "against": row["control_arm"],
            "candidate − dense": row["difference"],
            "95 %": span(row["interval95"]),
            "seeds": len(row["seeds"]),
            "− its upper bound": _mean(found["controls"], row, UPPER_BOUNDS),
            "− one expert": _mean(found["controls"], row, ONE_EXPERT),
            "finetune FLOPs × dense": ratio(one, "finetune_flops").mean,
            "parameters × dense": one["params_total_vs_dense"],
        }
        for row in found["controls"]
        if row["control"] == "dense" and (one := arms[row["task"], row["metric"], row["arm"]])
    ]


def _mean(controls: Iterable[Row], row: Row, names: Sequence[str]) -> float | None:
    mine = (one for one in controls if (one["candidate"], one["task"]) == (row["candidate"], row["task"]))
    compared = _versus(mine, names, row["metric"])
    return compared["difference"] if compared else None


def arms_table(rows: Sequence[Row]) -> list[Row]:
    """Returns all arms as people read them."""
    return [
        {
            "task": row["task"],
            "arm": row["arm"],
            "metric": row["metric"],
            "seeds": len(row["seeds"]),
            "rates tried (seeds)": _rates(row["rates_tried"]),
            "mean": row["mean"],
            "− dense": difference(row).mean,
            "95 %": span(difference(row).interval),
            "p (Holm)": row["p_holm_to_dense"],
            "− best dense": difference(row, "best_dense").mean,
            "its 95 %": span(difference(row, "best_dense").interval),
            "loss − dense": difference(row["train_loss"]).mean,
            "loss 95 %": span(difference(row["train_loss"]).interval, digits=3),
            "finetune FLOPs × dense": ratio(row, "finetune_flops").mean,
            "finetune s × dense": ratio(row, "finetune_cost").mean,
        }
        for row in rows
    ]


def _rates(tried: Mapping[str, int]) -> str:
    """Returns the rates of an arm with their seeds, as people read them."""
    if len(tried) == 1:
        return "has one"
    return ", ".join(f"{name} ({seeds})" if seeds else f"{name} not tried" for name, seeds in tried.items())


def ideas_table(rows: Sequence[Row]) -> list[Row]:
    """Returns what ideas of other papers gain, as people read it."""
    of_arm = {row["arm"]: row for row in rows if row["metric"] == "mIoU"}
    found = []
    for name, idea in IDEAS.items():
        row = of_arm.get(run_as(name))
        compared = row and idea.of != "dense"
        found.append(
            {
                "arm": f"`{name}`",
                "idea": idea.words,
                "source": idea.source,
                "keys": changed(name),
                "seeds": len(row["seeds_to_best_dense"]) if row else 0,
                "mIoU − best dense": difference(row, "best_dense").mean if row else None,
                "95 %": span(difference(row, "best_dense").interval) if row else "–",
                "compared with": f"`{idea.of}`" if idea.of != "dense" else "–",
                "− that": difference(row, "rival").mean if row and compared else None,
                "its 95 %": span(difference(row, "rival").interval) if row and compared else "–",
                "its loss": difference(row["train_loss"], "best_dense").mean if row else None,
                "finetune FLOPs × dense": ratio(row, "finetune_flops").mean if row else None,
                "parameters × dense": row["params_total_vs_dense"] if row else None,
            }
        )
    return found


def changed(name: str) -> str:
    """Returns the keys of a config by which an idea differs from the arm that it changes."""
    arms = ideas().arms
    mine, theirs = (arms[run_as(one)] for one in (name, IDEAS[name].of))
    before = {**(theirs.moe or {}), **theirs.options}
    now = {**(mine.moe or {}), **mine.options}
    if theirs.moe is None:
        return "see benchmarks/claims/method.py"
    new = [f"`{key.rpartition('.')[2]}={value!r}`" for key, value in now.items() if before.get(key) != value]
    return ", ".join([*new, *(f"no `{key}`" for key in before if key not in now)]) or "–"


def controls_table(rows: Sequence[Row]) -> list[Row]:
    """Returns what candidates have over their controls, as people read it."""
    return [
        {
            "task": row["task"],
            "metric": row["metric"],
            "candidate": row["arm"],
            "control": row["control_arm"],
            "seeds": len(row["seeds"]),
            "candidate − control": row["difference"],
            "95 %": span(row["interval95"]),
        }
        for row in rows
    ]


def regime_table(rows: Sequence[Row]) -> list[Row]:
    """Returns the difference to dense under each condition, as people read it."""
    return [
        {
            "steps": row["steps"],
            "styles": len(row["styles"]),
            "width": row["width"],
            "arm": row["run"],
            "against": row["against"],
            "seeds": len(row["seeds"]),
            "its mIoU": row["dense"],
            "− dense": row["diff_to_dense"],
            "95 %": span(row["interval95"]),
            "loss − dense": row["train_loss"]["diff_to_dense"],
        }
        for row in rows
    ]


def render(folder: Path) -> str:
    """Returns Markdown of the study's tables: targets, arms, controls, regimes; only of what was run.

    Args:
        folder: may hold method.json and regime.json.
    """
    parts = []
    for file, key, title, table in _TABLES:
        path = folder / file
        rows = json.loads(path.read_text())[key] if path.exists() else []
        if rows:
            parts.append(f"\n## {title}\n\n{common.markdown(table(rows))}")
    return "".join(parts)


def _as_it_is(rows: Sequence[Row]) -> list[Row]:
    return list(rows)


_TABLES: tuple[tuple[str, str, str, Callable[[Sequence[Row]], list[Row]]], ...] = (
    ("method.json", "verdicts", "Method study: targets", _as_it_is),
    ("method.json", "arms", "Method study: all arms", arms_table),
    ("method.json", "controls", "Method study: candidates against their controls", controls_table),
    ("regime.json", "rows", "Method study: where residual experts pay", regime_table),
)


def opening(folder: Path) -> str:
    """Returns Markdown of the table that docs/claims.md opens with; nothing before a candidate was run."""
    path = folder / "method.json"
    rows = choose(json.loads(path.read_text())) if path.exists() else []
    return common.markdown(rows) if rows else ""
