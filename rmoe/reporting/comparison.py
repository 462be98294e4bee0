"""Sets runs side by side: which are comparable, which are one arm at other seeds, and by how much arms differ.

Runs of one task on one data set are comparable: a group. Runs of a group that were treated alike are one arm, see
`rmoe.reporting.arms`. A group's arms are compared with that of the first run that was given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmoe.errors import UserError
from rmoe.inference.runs import Run
from rmoe.reporting.arms import leaves, settings
from rmoe.reporting.statistics import paired

_ABSENT = "–"
_LONG = 32  # characters of one of them
_NAMED = 2  # differing keys that the name of an arm has


@dataclass(frozen=True)
class Entry:
    """Describes one run among others.

    Attributes:
        run: the run.
        name: its folder, with as many of the folders above as tell it from the others.
        arm: stage, and what tells it from other arms of that stage.
        values: metrics in percent; those that were logged.
        cost: content of cost.json; None while there is none.
        majority: what the metrics give to always answering the commonest class, if that was asked for.
    """

    run: Run
    name: str
    arm: str
    values: dict[str, float]
    cost: dict[str, Any] | None
    majority: dict[str, float] | None = None

    @property
    def seed(self) -> int:
        """Returns the seed of the run."""
        return self.run.seed

    @property
    def label(self) -> str:
        """Returns what tells the run from all others."""
        return f"{self.name} ({self.arm}, seed {self.seed})"

    def as_json(self) -> dict[str, Any]:
        """Returns the run in plain data."""
        return {
            "run": self.name,
            "folder": str(self.run.folder),
            "arm": self.arm,
            "stage": self.run.stage,
            "seed": self.seed,
            "task": self.run.task.name,
            "metrics": self.values,
            "majority": self.majority,
            "train_loss": self.run.train_loss(),
            "cost": self.cost,
        }


@dataclass(frozen=True)
class Arm:
    """Says what an arm reaches in one metric.

    Attributes:
        name: of the arm.
        metric: its name; `values` are in percent.
        seeds: those of its runs, in order; `values` has the mean of the runs of each.
        values: see `seeds`.
        mean: over the seeds.
        std: over the seeds; None for one.
        pairs: seeds that the arm which it is compared with has, too.
        difference: mean, over `pairs`, of this arm's values less the other's; None without pairs, and of that arm.
        interval95: Student's interval around it; None for fewer than two pairs.
    """

    name: str
    metric: str
    seeds: list[int]
    values: list[float]
    mean: float
    std: float | None
    pairs: list[int] = field(default_factory=list)
    difference: float | None = None
    interval95: list[float] | None = None


@dataclass(frozen=True)
class Group:
    """Holds comparable runs.

    Attributes:
        title: task and data set.
        entries: the runs, in the order in which they were given.
        arms: each arm in each metric.
        differences: by dotted key of the configs that is not the same in all runs: the value, as text, of each run.
    """

    title: str
    entries: list[Entry]
    arms: list[Arm]
    differences: dict[str, dict[str, str]]

    @property
    def reference(self) -> str:
        """Returns the arm that the others are compared with."""
        return self.entries[0].arm

    @property
    def metrics(self) -> list[str]:
        """Returns the metrics that some run has, in the task's order."""
        known = [one.metric for one in self.entries[0].run.task.measures]
        return [metric for metric in known if any(metric in entry.values for entry in self.entries)]

    def arm_names(self) -> list[str]:
        """Returns the names of the arms, in the order of their first runs."""
        return list(dict.fromkeys(entry.arm for entry in self.entries))


@dataclass(frozen=True)
class Comparison:
    """Holds all groups of a report, and what a reader has to know of the runs."""

    groups: list[Group]
    notes: list[str]

    @property
    def entries(self) -> list[Entry]:
        """Returns all runs."""
        return [entry for group in self.groups for entry in group.entries]

    def as_json(self) -> dict[str, Any]:
        """Returns everything in plain data, with None in place of what is not finite."""
        groups = [
            {
                "title": group.title,
                "reference": group.reference,
                "runs": [entry.as_json() for entry in group.entries],
                "arms": [vars(arm) for arm in group.arms],
                "config_differences": group.differences,
            }
            for group in self.groups
        ]
        found: dict[str, Any] = finite({"groups": groups, "notes": self.notes})
        return found


def finite(value: Any) -> Any:
    """Returns plain data with None in place of every float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(runs: Sequence[Run], majorities: Sequence[dict[str, float]] | None = None) -> Comparison:
    """Groups the runs and compares their arms.

    Args:
        runs: in the order of a user's interest.
        majorities: for each run, what its metrics give to the commonest class.

    Raises:
        UserError: the logs of a run are damaged.
    """
    names = _names([run.left("") for run in runs])
    notes: list[str] = []
    configs = [dict(leaves(run.config.to_dict())) for run in runs]
    members: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        members.setdefault(_data(run), []).append(number)
    groups = []
    for mine in members.values():
        arms = _arm_names([runs[i].stage for i in mine], settings([runs[i] for i in mine]))
        entries = []
        for i, arm in zip(mine, arms, strict=True):
            cost = None
            if (runs[i].folder / "cost.json").exists():
                try:
                    cost = runs[i].cost()
                except UserError as error:
                    notes.append(f"{error}; it is left out")
            majority = majorities[i] if majorities else None
            entries.append(Entry(runs[i], names[i], arm, runs[i].logged_values(), cost, majority))
        shown = {entry.name: configs[i] for entry, i in zip(entries, mine, strict=True)}
        groups.append(Group(_title(runs[mine[0]]), entries, _arms(entries), differing(shown)))
        for entry in entries:
            notes += _notes(entry)
        notes += _repeated(entries)
    if len(groups) > 1:
        titles = "; ".join(group.title for group in groups)
        notes.insert(0, f"These runs are of {len(groups)} tasks or data sets and not comparable across them: {titles}.")
    return Comparison(groups, notes)


def _notes(entry: Entry) -> Iterable[str]:
    if not (entry.run.folder / "cost.json").exists():
        yield f"{entry.name} has no cost.json: it is not finished."
    if not entry.values:
        yield f"{entry.name} has no {entry.run.task.measures[0].logged} in its logs: it was not evaluated yet."
    if wrong := [step for step, loss in entry.run.scalars.get("loss", []) if not math.isfinite(loss)]:
        yield f"{entry.name}: the loss is not finite, first at step {wrong[0]}."
    if metrics := [metric for metric, value in entry.values.items() if not math.isfinite(value)]:
        yield f"{entry.name}: {metrics[0]} is not finite; it does not count."


def _repeated(entries: Sequence[Entry]) -> Iterable[str]:
    found: dict[tuple[str, int], list[str]] = {}
    for entry in entries:
        found.setdefault((entry.arm, entry.seed), []).append(entry.name)
    for (arm, seed), names in found.items():
        if len(names) > 1:
            yield f"{', '.join(names)} are of one arm, {arm}, and one seed, {seed}: their mean counts as one."


def _data(run: Run) -> str:
    """Returns what runs must share to be comparable, as text."""
    config = run.config.to_dict()
    return repr((run.task.name, (config.get("val_dataloader") or {}).get("dataset"), config.get("val_evaluator")))


def _title(run: Run) -> str:
    dataset = (run.config.get("val_dataloader") or {}).get("dataset") or {}
    place = dataset.get("data_root") or dataset.get("root")
    return f"{run.task.name}{f' on {place}' if place else ''}"


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell them apart; the same folder twice gets a number."""
    parts = [folder.absolute().parts for folder in folders]
    names = [""] * len(parts)
    for i, mine in enumerate(parts):
        others = [other for other in parts if other != mine]
        depth = next(
            (n for n in range(1, len(mine) + 1) if all(other[-n:] != mine[-n:] for other in others)), len(mine)
        )
        name = "/".join(mine[-depth:]).replace("//", "/")
        names[i] = name if parts.index(mine) == i else f"{name} [{parts[:i].count(mine) + 1}]"
    return names


def differing(configs: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Returns the keys whose value is not the same in all of `configs`, and that value in each."""
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    rows = {key: {name: config.get(key, _ABSENT) for name, config in configs.items()} for key in keys}
    return {key: row for key, row in rows.items() if len(set(row.values())) > 1}


def _arm_names(stages: Sequence[str], own: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the stage of each run, with what of its settings tells it from the other arms of its stage."""
    names, known = [], {}  # type: ignore[var-annotated]
    for stage, config in zip(stages, own, strict=True):
        if stage not in known:
            same = [x for name, x in zip(stages, own, strict=True) if name == stage]
            known[stage] = [*differing({str(i): x for i, x in enumerate(same)})], []
        keys, arms = known[stage]
        if config not in arms:
            arms.append(config)
        words = [f"{key.rpartition('.')[2]}={config.get(key, _ABSENT)}" for key in keys]
        if len(words) > _NAMED or any(len(word) > _LONG for word in words):
            words = [f"{word:.{_LONG}}" for word in words[:_NAMED]] + [f"… ({arms.index(config) + 1})"]
        names.append(" ".join([stage, *words]))
    return names


def _arms(entries: Sequence[Entry]) -> list[Arm]:
    metrics = (one.metric for one in entries[0].run.task.measures)
    return [
        arm
        for metric in metrics
        for arm in arms_in(metric, [(x, x.values[metric]) for x in entries if metric in x.values], entries[0].arm)
    ]


def arms_in(metric: str, values: Iterable[tuple[Entry, float]], reference: str) -> list[Arm]:
    """Returns what each arm reaches in a metric, compared with the arm `reference`; values that are not finite do not
    count, and runs of one arm and seed count as one, with their mean.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for entry, value in values:
        if math.isfinite(value):
            found.setdefault(entry.arm, {}).setdefault(entry.seed, []).append(value)
    means = {name: {seed: statistics.mean(some) for seed, some in of_arm.items()} for name, of_arm in found.items()}
    return [
        _arm(name, metric, mine, means.get(reference, {}) if name != reference else {}) for name, mine in means.items()
    ]


def _arm(name: str, metric: str, values: Mapping[int, float], reference: Mapping[int, float]) -> Arm:
    """Returns an arm's values, by seed, compared with those of another arm."""
    seeds = sorted(values)
    pairs = [seed for seed in seeds if seed in reference]
    difference, interval = paired([values[seed] - reference[seed] for seed in pairs]) if pairs else (None, None)
    ordered = [values[seed] for seed in seeds]
    std = statistics.stdev(ordered) if len(ordered) > 1 else None
    return Arm(name, metric, seeds, ordered, statistics.mean(ordered), std, pairs, difference, interval)
