"""The charts of a report's page, as plotly.js takes them: plain dicts of data. Colours of axes and text are the page's.

Names are written by whoever made the runs; plotly.js reads a few of HTML's tags in texts, so they are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rmoe.reporting.comparison import Comparison, Entry, Group, arms_in

Chart = dict[str, Any]
# Okabe and Ito's colours, which people who see colours differently can tell apart, on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_POINTS = 400  # of a curve
_CLASSES = 30  # of a chart
_NAME = 42  # characters of a name in a legend
_COSTS = {
    "device seconds": lambda cost: cost["device_seconds"],
    "training FLOPs": lambda cost: cost["flops_per_step"] * (cost.get("steps") or math.nan),
    "parameters trained": lambda cost: cost["params_trainable"],
    "parameters active": lambda cost: cost["params_active"],
}
_FIRST = ("loss", "lr", "grad_norm")  # of the curves, after the metrics


def plain(text: str, most: int = _NAME) -> str:
    """Returns a text that plotly.js shows as it is, cut in its middle where it is long."""
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[len(text) - most // 2 + 1 :]}"
    return html.escape("".join(x if x.isprintable() else "?" for x in text), quote=False)


def colours(found: Comparison) -> dict[str, str]:
    """Returns the colour of each arm by its name; arms beyond the eighth begin anew."""
    names = dict.fromkeys(entry.arm for entry in found.entries)
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def curves(found: Comparison) -> Chart:
    """Returns the curves of all runs, by what was logged: metrics first, then loss and learning rate, then the rest."""
    metrics = [one.logged for group in found.groups for one in group.entries[0].run.task.measures]
    logged = dict.fromkeys(name for entry in found.entries for name in entry.run.scalars)
    skipped = ("time", "data_time", "step", "iter")
    names = [name for name in (*metrics, *_FIRST, *logged) if name in logged and name not in skipped]
    return {name: _curve(found, name) for name in dict.fromkeys(names)}


def _curve(found: Comparison, name: str) -> Chart:
    colour, told = colours(found), set()
    traces = []
    many = len(found.entries) > 2 * len(COLOURS)  # then a legend has arms, not runs
    for number, entry in enumerate(found.entries):
        if points := thinned(entry.run.scalars.get(name, [])):
            trace = {
                "x": [step for step, _ in points],
                "y": [_short(value) for _, value in points],
                "name": plain(entry.arm if many else entry.label),
                "text": plain(entry.label, 120),
                "hovertemplate": "%{text}<br>step %{x}: %{y}<extra></extra>",
                "mode": "lines+markers" if len(points) < 12 else "lines",
                "line": {"color": colour[entry.arm], "dash": ("solid", "dash", "dot", "dashdot")[entry.seed % 4]},
                "legendgroup": f"arm {number}" if not many else plain(entry.arm),
                "showlegend": not many or entry.arm not in told,
            }
            told.add(entry.arm)
            traces.append(trace)
    return {"data": traces, "layout": {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": plain(name)}}}}


def thinned(points: Sequence[tuple[int, float]], most: int = _POINTS) -> Sequence[tuple[int, float]]:
    """Returns at most about `most` of the points, evenly spread, the last one among them."""
    stride = math.ceil(len(points) / most) or 1
    return [*points[: len(points) - 1 : stride], *points[-1:]]


def cost_and_quality(group: Group, metric: str, colour: Mapping[str, str]) -> Chart:
    """Returns, by kind of cost, a point for each run of a group that has both cost and metric."""
    charts = {}
    for kind, of_cost in _COSTS.items():
        traces = []
        for arm in group.arm_names():
            mine = [
                entry
                for entry in group.entries
                if entry.arm == arm and entry.cost and math.isfinite(entry.values.get(metric, math.nan))
            ]
            if mine:
                traces.append(
                    {
                        "x": [_short(of_cost(entry.cost or {})) for entry in mine],
                        "y": [_short(entry.values[metric]) for entry in mine],
                        "customdata": [plain(entry.label, 120) for entry in mine],
                        "hovertemplate": "%{customdata}<br>%{x}, %{y}<extra></extra>",
                        "name": plain(arm),
                        "mode": "markers",
                        "marker": {"color": colour[arm], "size": 11},
                    }
                )
        axes = {"xaxis": {"title": {"text": kind}, "rangemode": "tozero"}, "yaxis": {"title": {"text": f"{metric}, %"}}}
        charts[kind] = {"data": traces, "layout": axes}
    return charts


def differences(group: Group, colour: Mapping[str, str]) -> Chart | None:
    """Returns the differences of the arms to the first one with their intervals; None where there is none."""
    arms = [arm for arm in group.arms if arm.difference is not None]
    if not arms:
        return None
    half = [0.0 if arm.interval95 is None else arm.interval95[1] - (arm.difference or 0.0) for arm in arms]
    trace = {
        "x": [arm.difference for arm in arms],
        "y": [plain(f"{arm.name}: {arm.metric}") for arm in arms],
        "error_x": {"type": "data", "array": half, "color": "#888"},
        "mode": "markers",
        "marker": {"color": [colour[arm.name] for arm in arms], "size": 11},
        "hovertemplate": "%{y}: %{x:+.2f}<extra></extra>",
        "showlegend": False,
    }
    title = plain(f"difference to {group.reference}, points; bars: 95 %")
    layout = {
        "xaxis": {"title": {"text": title}, "zeroline": True, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed"},
    }
    return {"data": [trace], "layout": layout, "height": 130 + 34 * len(arms)}


def per_class(group: Group) -> tuple[str, list[dict[str, Any]]]:
    """Returns what was measured of each class, and a row for each class: the means of the arms that have it, and the
    paired differences to the first arm; classes with the largest differences first.
    """
    kind, by_class = "", dict[str, list[tuple[Entry, float]]]()
    for entry in group.entries:
        kind, values = entry.run.per_class()
        for name, value in values.items():
            by_class.setdefault(name, []).append((entry, value))
    rows = []
    for name, measured in by_class.items():
        if arms := {arm.name: arm for arm in arms_in(kind, measured, group.reference)}:
            rows.append({"name": name, "arms": arms, "largest": max(abs(x.difference or 0.0) for x in arms.values())})
    return kind, sorted(rows, key=lambda row: -row["largest"])


def classes(
    group: Group, kind: str, rows: Sequence[Mapping[str, Any]], colour: Mapping[str, str]
) -> tuple[Chart | None, str]:
    """Returns the differences of the arms by class, and what is left out of the chart."""
    shown = rows[:_CLASSES]
    traces = []
    for arm in group.arm_names()[1:]:
        mine = [(row["name"], row["arms"][arm].difference) for row in shown if arm in row["arms"]]
        if any(difference is not None for _, difference in mine):
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [difference for _, difference in mine],
                    "y": [plain(name, 28) for name, _ in mine],
                    "name": plain(arm),
                    "marker": {"color": colour[arm]},
                }
            )
    if not traces:
        return None, ""
    layout = {
        "xaxis": {"title": {"text": plain(f"{kind}, difference to {group.reference}")}},
        "yaxis": {"autorange": "reversed", "dtick": 1},
        "barmode": "group",
    }
    more = f"The {len(shown)} of {len(rows)} classes that differ most." if len(rows) > len(shown) else ""
    return {"data": traces, "layout": layout, "height": 140 + len(shown) * max(18, 10 * len(traces))}, more


def classes_by_expert(load: Mapping[str, Any]) -> Chart:
    """Returns where the commonest classes' tokens go in one layer, from what `rmoe analyze` has written of it."""
    by_class = load["by_class"]
    names = sorted(by_class, key=lambda name: -sum(by_class[name]))[:_CLASSES]
    shares = [[_short(count / max(1, sum(by_class[name]))) for count in by_class[name]] for name in names]
    experts = range(len(load["load"]))
    trace = {
        "type": "heatmap",
        "z": shares,
        "x": [f"expert {e}" for e in experts],
        "y": [plain(name, 28) for name in names],
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "share"}, "thickness": 12},
        "hovertemplate": "%{y}, %{x}: %{z:.0%}<extra></extra>",
    }
    return {
        "data": [trace],
        "layout": {"yaxis": {"autorange": "reversed", "dtick": 1}},
        "height": 160 + 18 * len(names),
    }


def gates(entry: Entry) -> list[dict[str, Any]]:
    """Returns, for each mixture of a run, what its gate was like when it was logged last."""
    rows: dict[str, dict[str, Any]] = {}
    for name, points in entry.run.scalars.items():
        kind, _, rest = name.partition("/")
        if kind == "gate" and "/" in rest:
            layer, _, key = rest.rpartition("/")
            rows.setdefault(layer, {"loads": {}})[key] = points[-1][1]
        elif kind == "load" and rest.rpartition("/")[2].isdecimal():
            layer, _, expert = rest.rpartition("/")
            rows.setdefault(layer, {"loads": {}})["loads"][int(expert)] = points[-1][1]
        elif kind == "residual":
            rows.setdefault(rest, {"loads": {}})["norm"] = points[-1][1]
    return [
        {"layer": layer, **row, "loads": [x for _, x in sorted(row["loads"].items())]} for layer, row in rows.items()
    ]


def _short(value: float) -> float | None:
    """Returns five digits of a number; None of what JSON cannot hold."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
