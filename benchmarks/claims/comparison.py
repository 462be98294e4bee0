"""What the runs of a study come to: differences of pairs, with intervals, and what they owe to the number of arms.

A pair is of one seed and one `Context` (kind of machine, core); a seed with pairs in several contexts counts once, with
their mean. Intervals are Student's, 95 %, and not corrected for the number of arms; `p_holm` is the two-sided p of the
same test after Holm's correction over all arms of a task and metric that are compared with the same reference.

Of an arm's several learning rates the best is taken, by its mean difference to dense at the usual one: of dense, which
makes the reference, of the candidates, and of their controls. It is chosen on the seeds that it is judged on, which
favours each of them; and on pairs that all rates of the arm have, since one that was tried on easier seeds would win by
these. `rates_tried` says which there were.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from scipy.stats import t as student

from benchmarks.claims.ledger import Cell, Context, Ledger, context_of
from benchmarks.claims.method import CANDIDATES, CONTROLS, CONTROLS_OF, DENSE, FAMILIES, Study
from benchmarks.claims.statistics import paired
from benchmarks.common import Row

METRICS = ("mIoU", "box AP", "mask AP")
FEW = 3
COSTS = {  # what is set in relation to dense's, by the name that `statistics.ratio` knows it by
    "cost": "pipeline_device_seconds",
    "finetune_cost": "finetune_device_seconds",
    "flops": "pipeline_flops",
    "finetune_flops": "finetune_flops",
}

Runs = Mapping[tuple[int, Context], Row]
"""The runs of an arm, by seed and context."""

Read = Callable[[Row], float | None]
"""Reads a figure of a run, None where it has none."""


class Difference(NamedTuple):
    """Compares the runs of two arms over their pairs.

    Attributes:
        seeds: that have a pair.
        mean: of the differences; None without a pair.
        interval: Student's, 95 %; None with fewer than two.
        p: two-sided, of no difference; likewise.
    """

    seeds: list[int]
    mean: float | None
    interval: list[float] | None
    p: float | None


def difference(mine: Runs, theirs: Runs, read: Read, minus: Callable[[float, float], float]) -> Difference:
    """Compares a figure of two arms: `minus` of theirs from mine, or their ratio."""
    of_seed: dict[int, list[float]] = {}
    for key in mine.keys() & theirs.keys():
        ours, others = read(mine[key]), read(theirs[key])
        if ours is not None and others is not None:
            of_seed.setdefault(key[0], []).append(minus(ours, others))
    if not of_seed:
        return Difference([], None, None, None)
    differences = [statistics.mean(of_seed[seed]) for seed in sorted(of_seed)]
    mean, interval = paired(differences)
    return Difference(sorted(of_seed), mean, interval, _p(differences))


def _p(differences: Sequence[float]) -> float | None:
    if (count := len(differences)) < 2:
        return None
    mean, error = statistics.mean(differences), statistics.stdev(differences) / count**0.5
    if error == 0:
        return 0.0 if mean else 1.0
    return float(2 * student.sf(abs(mean) / error, count - 1))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Returns p values after Holm's correction (1979): the i-th smallest times what is left, and never falling."""
    corrected: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(p, key=lambda one: p[one])):
        least = max(least, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = least
    return corrected


def subtract(mine: float, theirs: float) -> float:
    """Returns a difference."""
    return mine - theirs


def divide(mine: float, theirs: float) -> float:
    """Returns a ratio."""
    return mine / theirs


def reading(name: str) -> Read:
    """Returns what reads the figure of this name."""
    return lambda row: row.get(name)


def gather(study: Study, ledger: Ledger, cells: Iterable[Cell]) -> dict[str, Runs]:
    """Returns the runs of some cells, by arm."""
    found: dict[str, dict[tuple[int, Context], Row]] = {}
    for cell in cells:
        for row in ledger.find(cell, study.fingerprint(cell)):
            found.setdefault(cell.name, {})[cell.seed, context_of(row)] = row
    return dict(found)


def best_of(family: str, runs: Mapping[str, Runs], read: Read) -> str | None:
    """Returns the learning rate's arm that stands for a family, or an arm that has but one rate; None without a run.

    Of the rates with at least `FEW` seeds, if there are any, it is the one with the highest mean difference to dense
    finetuning, itself at its best rate, over the pairs that all of them have; where these have none in common, the one
    with the most seeds.
    """
    reference = _reference(family, runs, read)
    pairs = {name: _pairs(runs[name], reference, read) for name in _present(family, runs)}
    enough = {name: mine for name, mine in pairs.items() if len(_seeds(mine)) >= FEW} or pairs
    if not enough:
        return None
    common = set.intersection(*enough.values())
    if not common:
        return max(enough, key=lambda name: len(_seeds(enough[name])))
    dense = {key: reference[key] for key in common}
    means = {name: difference(runs[name], dense, read, subtract).mean or 0.0 for name in enough}
    return max(means, key=lambda name: means[name])


def _reference(family: str, runs: Mapping[str, Runs], read: Read) -> Runs:
    """Returns the dense runs by which a family's rates are judged: the best ones, which are found beside `dense`."""
    best = "dense" if family == "dense" else best_of("dense", runs, read)
    return runs.get(best or "dense", {})


def rates_tried(name: str, runs: Mapping[str, Runs], read: Read) -> dict[str, int]:
    """Returns, for each rate of an arm's family, by arm, on how many seeds it has pairs with dense: 0 if not tried."""
    family = family_of(name)
    dense = _reference(family, runs, read)
    return {one: len(_seeds(_pairs(runs.get(one, {}), dense, read))) for one in FAMILIES.get(family, (family,))}


def _present(family: str, runs: Mapping[str, Runs]) -> list[str]:
    return [name for name in FAMILIES.get(family, (family,)) if runs.get(name)]


def _pairs(mine: Runs, theirs: Runs, read: Read) -> set[tuple[int, Context]]:
    """Returns the seeds and contexts in which both arms have a figure."""
    return {key for key in mine.keys() & theirs.keys() if None not in (read(mine[key]), read(theirs[key]))}


def _seeds(pairs: Iterable[tuple[int, Context]]) -> set[int]:
    return {seed for seed, _ in pairs}


def measured(study: Study, ledger: Ledger) -> Iterator[tuple[str, str, dict[str, Runs]]]:
    """Yields each task and metric that there are runs of, with the arms that have them."""
    for task in dict.fromkeys(cell.where for cell in study.cells):
        runs = gather(study, ledger, (cell for cell in study.cells if cell.where == task))
        for metric in METRICS:
            of_arm = {name: runs[name] for name in runs if any(metric in run for run in runs[name].values())}
            if of_arm:
                yield task, metric, of_arm


def rows(study: Study, ledger: Ledger) -> list[Row]:
    """Returns one object for each task, metric and arm that has runs."""
    found: list[Row] = []
    for task, metric, runs in measured(study, ledger):
        place: Row = {"task": task, "metric": metric}
        of_metric = [place | _row(name, runs, study, reading(metric)) for name in runs]
        for reference in ("dense", "best_dense"):
            family = {row["arm"]: row[f"p_to_{reference}"] for row in of_metric if row["arm"] not in DENSE}
            corrected = holm({name: p for name, p in family.items() if p is not None})
            for row in of_metric:
                row |= {f"p_holm_to_{reference}": corrected.get(row["arm"]), "arms_compared": len(corrected)}
        found += of_metric
    return found


def _row(name: str, runs: Mapping[str, Runs], study: Study, read: Read) -> Row:
    mine, best = runs[name], best_of("dense", runs, read)
    values: dict[int, list[float]] = {}
    for (seed, _), run in sorted(mine.items()):
        if (value := read(run)) is not None:
            values.setdefault(seed, []).append(value)
    means = [statistics.mean(of_seed) for of_seed in values.values()]
    row: Row = {
        "arm": name,
        "kind": _kind(name),
        "upstream": study.arms[name].upstream,
        "devices": sorted({context.device for _, context in mine}),
        "seeds": [*values],
        "values": means,
        "mean": statistics.mean(means),
        "std": statistics.stdev(means) if len(means) > 1 else None,
        "rates_tried": rates_tried(name, runs, read),
        "best_dense": best,
        "rival": study.rivals.get(name),
    }
    others = {"dense": runs.get("dense", {}), "best_dense": runs[best] if best else {}}
    others["rival"] = runs.get(study.rivals[name], {}) if name in study.rivals else {}
    # Dense finetuning costs the same at every rate.
    as_dear = {key: run for rate in reversed(DENSE) for key, run in runs.get(rate, {}).items()}
    losses = [run["train_loss"] for run in mine.values() if run["train_loss"] is not None]
    loss: Row = {"mean": statistics.mean(losses) if losses else None}
    for other, theirs in others.items():
        row |= _flat(other, difference(mine, theirs, read, subtract))
        # A longer run has other images in its last steps.
        same = {key: run for key, run in theirs.items() if key in mine and run["steps"] == mine[key]["steps"]}
        loss |= _flat(other, difference(mine, same, reading("train_loss"), subtract))
    row["train_loss"] = loss
    for label, key in COSTS.items():
        cost = difference(mine, as_dear, reading(key), divide)
        row |= {key: statistics.mean(run[key] for run in mine.values()), f"{label}_vs_dense": cost.mean}
        row |= {f"{label}_interval95": cost.interval}
    parameters = difference(mine, as_dear, reading("params_total"), divide)
    return row | {"params_total_vs_dense": parameters.mean}


def _flat(other: str, found: Difference) -> Row:
    """Returns a difference under the names that `statistics.difference` reads."""
    end = "" if other == "dense" else f"_to_{other}"
    return {
        f"seeds_to_{other}": found.seeds,
        f"diff_to_{other}": found.mean,
        f"interval95{end}": found.interval,
        f"p_to_{other}": found.p,
    }


def controls(study: Study, ledger: Ledger) -> list[Row]:
    """Returns what each candidate has over each of its controls, by task and metric, both at their best rates."""
    found: list[Row] = []
    for task, metric, runs in measured(study, ledger):
        read = reading(metric)
        for candidate in CANDIDATES:
            if (mine := best_of(candidate, runs, read)) is None:
                continue
            for control in CONTROLS_OF[candidate]:
                if (theirs := best_of(control, runs, read)) is None:
                    continue
                seeds, mean, interval, p = difference(runs[mine], runs[theirs], read, subtract)
                row: Row = {"task": task, "metric": metric, "candidate": candidate, "arm": mine, "control": control}
                row |= {"control_arm": theirs, "seeds": seeds, "difference": mean, "interval95": interval, "p": p}
                found.append(row)
    return found


def family_of(name: str) -> str:
    """Returns the family of an arm: itself, where it has but one rate."""
    return next((family for family, names in FAMILIES.items() if name in names), name)


def _kind(name: str) -> str:
    """Returns what an arm is in the study: a candidate, a control or a single choice; at any rate."""
    family = family_of(name)
    if family in CANDIDATES:
        return "candidate"
    return "control" if CONTROLS.keys() & {name, *FAMILIES.get(family, ())} else "choice"


def regimes(study: Study, ledger: Ledger) -> list[Row]:
    """Returns one object for each condition and arm but dense: its difference to dense, both at their best rates."""
    found: list[Row] = []
    conditions = dict.fromkeys((cell.steps, cell.styles, cell.width) for cell in study.cells)
    for steps, styles, width in conditions:
        cells = [cell for cell in study.cells if (cell.steps, cell.styles, cell.width) == (steps, styles, width)]
        runs = gather(study, ledger, cells)
        read = reading("mIoU")
        against = best_of("dense", runs, read)
        for family in dict.fromkeys(map(family_of, runs)):
            name = best_of(family, runs, read)
            if name is None or against is None or family == "dense":
                continue
            quality, loss = (
                difference(runs[name], runs[against], reading(key), subtract) for key in ("mIoU", "train_loss")
            )
            dense = [row["mIoU"] for row in runs[against].values()]
            row: Row = {"arm": family, "run": name, "against": against, "task": "segmentation", "metric": "mIoU"}
            row |= {"steps": steps, "styles": styles.split(","), "width": width, "dense": statistics.mean(dense)}
            row |= {"seeds": quality.seeds, "diff_to_dense": quality.mean, "interval95": quality.interval}
            found.append(row | {"train_loss": {"diff_to_dense": loss.mean, "interval95": loss.interval}})
    return found
