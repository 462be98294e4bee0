"""Tables that are never wider than the terminal, whatever the names."""

from __future__ import annotations

import pytest
from finished_runs import finished_run
from rich.console import Console

from rmoe.errors import printable
from rmoe.inference.runs import Run
from rmoe.reporting.comparison import compare
from rmoe.reporting.terminal import counted, show, show_inside


def lines(draw, width: int) -> list[str]:
    console = Console(width=width, record=True, force_terminal=False)
    with console.capture() as capture:
        draw(console)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_cut_or_broken(width, tmp_path):
    long = "a_run_with_a_very_long_name_that_tells_everything" * 3
    folders = [finished_run(tmp_path / "x" / "dense"), finished_run(tmp_path / f"{long}é日本", "residual", 1, 41.5)]
    found = compare([Run(folder) for folder in folders])
    shown = lines(lambda console: show(found, console), width)
    assert all(len(line.rstrip()) <= width for line in shown)
    for number in ("40.00", "41.50"):
        assert len([line for line in shown if number in line]) == 2  # the run's line and the arm's
    (run,) = [line for line in shown if "日本" in line and "41.50" in line]
    assert run.startswith("…")  # the end of a name tells most
    if width >= 80:
        assert "300k" in run
        assert "100k" in run


def test_names_cannot_steer_the_terminal(tmp_path):
    folder = finished_run(tmp_path / "x", stage="[red]dense\x1b[2J")
    shown = "\n".join(lines(lambda console: show(compare([Run(folder)]), console), 80))
    assert "\x1b" not in shown
    assert "[red]dense?[2J" in shown
    assert printable("a\nb\u202e") == "a?b?"


def test_a_wide_analysis_becomes_several_tables():
    heads = {f"column {n:02}": float(n) for n in range(12)} | {"nothing": None}
    shown = lines(lambda console: show_inside({"layers.2.blocks.1": heads, "layers.3": heads}, console), 80)
    assert all(len(line.rstrip()) <= 80 for line in shown)
    text = "\n".join(shown)
    assert all(f"column {n:02}" in text for n in range(12))
    assert "nothing" not in text
    assert text.count("layers.2.blocks.1") >= 2


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (12.345, "12.3"), (2_620_000, "2.62M"), (1e15, "1e+03T"), (999, "999"), (999_999, "1M")],
)
def test_counts_are_short(number, text):
    assert counted(number) == text
