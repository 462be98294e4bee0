"""What a terminal shows of a comparison: tables as wide as it is, and no wider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmoe.errors import printable
from rmoe.reporting.comparison import Arm, Comparison, Entry, Group

_GAP = 2  # columns of the terminal between two of a table
_NARROWEST = 8  # columns of a run's or an arm's name


def show(found: Comparison, console: Console) -> None:
    """Prints the runs and the arms of each group, and the notes."""
    for group in found.groups:
        console.print(Text(printable(group.title), style="bold"))
        console.print(_of_runs(group, console.width))
        console.print()
        if len(group.entries) > 1:
            console.print(_of_arms(group, console.width))
            console.print(Text(f"difference: to {printable(group.reference)}, paired over seeds", style="dim"))
            console.print()
    for note in found.notes:
        console.print(Text(printable(f"note: {note}")))


def show_inside(lines: Mapping[str, Mapping[str, float | None]], console: Console) -> None:
    """Prints `rmoe.reporting.analysis.layer_means` by layer, in as many tables as the terminal's width takes."""
    heads = [head for head, value in next(iter(lines.values())).items() if value is not None]
    console.print(Text("means over a layer's experts", style="bold"))
    while heads:
        columns = [[head, *(f"{line[head]:.3f}" for line in lines.values())] for head in heads]
        names = max(cell_len(name) for name in lines)
        sizes = [max(map(cell_len, column)) + _GAP for column in columns]
        fitting = next((n for n in range(len(heads), 1, -1) if names + _GAP + sum(sizes[:n]) <= console.width), 1)
        cells = [[name, *(column[i] for column in columns[:fitting])] for i, name in enumerate(lines, start=1)]
        console.print(_table(["layer", *heads[:fitting]], cells, 1, console.width))
        heads = heads[fitting:]


def counted(number: float) -> str:
    """Returns a count in at most six characters, such as 2.62M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # what rounds to it
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _of_runs(group: Group, width: int) -> Table:
    heads = ["run", "arm", "seed", *group.metrics]
    if any(entry.majority for entry in group.entries):
        heads += [f"majority {metric}" for metric in group.metrics]
    heads += ["device s", "FLOP/step", "params", "active", "trained"]
    return _table(heads, [_line(entry, heads, group.metrics) for entry in group.entries], 2, width)


def _line(entry: Entry, heads: Sequence[str], metrics: Sequence[str]) -> list[str]:
    cost = entry.cost or {}
    cells = {"run": entry.name, "arm": entry.arm, "seed": str(entry.seed)}
    cells |= {metric: f"{value:.2f}" for metric, value in entry.values.items()}
    cells |= {f"majority {metric}": f"{value:.2f}" for metric, value in (entry.majority or {}).items()}
    for head, key in (
        ("device s", "device_seconds"),
        ("FLOP/step", "flops_per_step"),
        ("params", "params_total"),
        ("active", "params_active"),
        ("trained", "params_trainable"),
    ):
        if key in cost:
            cells[head] = counted(cost[key])
    return [cells.get(head, "–") for head in heads]


def _of_arms(group: Group, width: int) -> Table:
    heads = ["arm", "metric", "seeds", "mean", "std", "difference", "95 %"]
    lines = [
        [
            arm.name,
            arm.metric,
            str(len(arm.seeds)),
            f"{arm.mean:.2f}",
            "–" if arm.std is None else f"{arm.std:.2f}",
            "–" if arm.difference is None else f"{arm.difference:+.2f}",
            said_interval(arm),
        ]
        for arm in group.arms
    ]
    return _table(heads, lines, 1, width)


def said_interval(arm: Arm) -> str:
    """Returns the interval around an arm's difference in words of a table."""
    return "–" if arm.interval95 is None else f"{arm.interval95[0]:+.2f} … {arm.interval95[1]:+.2f}"


def _table(heads: list[str], lines: list[list[str]], names: int, width: int) -> Table:
    """Returns a table whose first `names` columns share what the others leave of `width`; last columns are left out
    where nothing is left.
    """
    columns = [[head, *cells] for head, *cells in zip(heads, *lines, strict=True)]
    sizes = [max(cell_len(printable(cell)) for cell in column) for column in columns]
    while len(columns) > names + 1 and sum(sizes[names:]) + _GAP * (len(sizes) - 1) + _NARROWEST * names > width:
        columns.pop()
        sizes.pop()
    room = max(_NARROWEST, (width - sum(sizes[names:]) - _GAP * (len(sizes) - 1)) // names)
    if names == 2:  # what one needs less, the other one may have
        least = min(sizes[:2])
        sizes[:2] = [min(size, max(room, 2 * room - least)) for size in sizes[:2]]
    else:
        sizes[:names] = [min(size, room) for size in sizes[:names]]
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        justify = "left" if number < names or column[0] == "metric" else "right"
        table.add_column(Text(column[0]), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for line in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*(Text(_fitted(cell, size)) for cell, size in zip(line, sizes, strict=True)))
    return table


def _fitted(text: str, size: int) -> str:
    """Returns the end of a text, with … before it, in `size` columns."""
    text = printable(text)
    if cell_len(text) <= size:
        return text
    while text and cell_len(text) > size - 1:
        text = text[1:]
    return f"…{text}"
