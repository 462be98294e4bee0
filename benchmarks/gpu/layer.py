"""One feed-forward network with its gate on a GPU: tokens × width × experts × precision, against its peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Row
from benchmarks.gpu.contenders import ARMS, OTHERS, Arm, Cell, core_flops
from benchmarks.gpu.measure import (
    Arguments,
    Report,
    Step,
    attempt,
    captured,
    copy_peak,
    finish,
    gemm_peak,
    launches,
    time_in_turns,
)

TOKENS, WIDTHS, EXPERTS = (6272, 25088, 100352), (96, 192, 384, 768, 1536), (8, 64)
PROFILED = (25088, 384)  # tokens and width at which launches are counted
SLOW = {"loop", "deepspeed"}  # their launches cost seconds with many experts: timed up to a size
GRAPHED = (25088, 8)  # tokens and experts
GRAPHED_ARMS = ("dense", "dense_frozen", "low_rank_8", "soft_8", "full", "upper_bound", "torch_grouped")
GRAPH_SECONDS = 25.0  # kept for them
ROUNDS = 9


def measure(arguments: Arguments) -> Report:
    """Measures all cells, the ones that answer a target first, until the minutes are spent."""
    torch.manual_seed(torch.seed() % 2**31)
    device, small = arguments.device, arguments.dry
    rounds = 2 if small else ROUNDS
    config = {"rounds": rounds, "gate_std": 1.0, "hidden": "4C", "input_sets": 3}
    report = Report(arguments, "layer", config)
    peak = gemm_peak(device, 64 if small else 8192)
    bandwidth = copy_peak(device, 2**16 if small else 2**31)
    report.add({"part": "ceiling", "gemm_tflops": peak / 1e12, "copy_gb_s": bandwidth / 1e9})
    for name in OTHERS:
        there = "is installed, and this benchmark does not know how to run it" if find_spec(name) else "not installed"
        report.add({"part": "layer", "contender": name, "skipped": there})
    for cell in _cells(arguments):
        place = {"part": "layer", "mode": cell.mode, "tokens": cell.tokens}
        place |= {"width": cell.width, "experts": cell.experts}
        if report.out_of_time(reserved=0 if small else GRAPH_SECONDS):
            report.add({**place, "skipped": f"the {arguments.minutes:g} minutes were spent"})
            continue
        _measure_cell(report, cell, place, rounds, peak)
    # Last, and none after a capture that failed: such a process may not be what it was.
    cells = [cell for cell in _cells(arguments) if cell.mode == "autocast"]
    all(_measure_graphs(report, cell, rounds) for cell in cells if small or (cell.tokens, cell.experts) == GRAPHED)
    return report


def _cells(arguments: Arguments) -> Iterator[Cell]:
    if arguments.dry:
        yield from (Cell(64, 16, 4, mode, arguments.device) for mode in ("autocast", "bfloat16"))
        return
    if arguments.quick:
        yield from (Cell(25088, width, 8, "autocast", arguments.device) for width in (96, 384, 1536))
        return
    sizes = [(tokens, width) for tokens in (25088, 100352, 6272) for width in (384, 768, 1536, 192, 96)]
    for experts, mode in ((8, "autocast"), (64, "autocast"), (8, "bfloat16")):
        for tokens, width in sizes:
            if experts == 64 and tokens != 25088:
                continue  # what many experts change is told by one number of tokens
            yield Cell(tokens, width, experts, mode, arguments.device)


def _measure_graphs(report: Report, cell: Cell, rounds: int) -> bool:
    """Times forward + backward of the arms that wait for nothing, each as one CUDA graph; says whether all became one.

    Such a row tells what the device takes; where the host is slower, that of part "layer" is longer.
    """
    place: Row = {"part": "graph", "mode": cell.mode, "tokens": cell.tokens}
    place |= {"width": cell.width, "experts": cell.experts, "pass": "forward + backward, CUDA graph"}
    inputs = cell.inputs()
    steps: dict[str, Step] = {}
    for name in GRAPHED_ARMS:
        here = {**place, "contender": name}
        if report.out_of_time():
            report.add({**here, "skipped": f"the {report.arguments.minutes:g} minutes were spent"})
            continue
        arm = attempt(report, here, ARMS[name], cell, inputs)
        if arm is None:
            continue
        try:
            steps[name] = captured(arm.step, cell.device)
        except RuntimeError as error:
            report.add({**here, "skipped": f"no graph of it: {str(error).splitlines()[0]}"})
            return False
    for row in time_in_turns(report, place, steps, "dense", rounds, cell.device).values():
        report.add({**place, **row, "peak_bytes": None})  # a graph has its own memory
    steps.clear()
    if cell.device.type == "cuda":
        torch.cuda.empty_cache()
    return True


def _measure_cell(report: Report, cell: Cell, place: Row, rounds: int, peak: float) -> None:
    inputs = cell.inputs()
    names = [name for name in ARMS if name not in SLOW or cell.experts == 8 or report.arguments.dry]
    if cell.mode == "bfloat16" and not report.arguments.dry:
        names = [name for name in names if name not in SLOW]
    made: dict[str, Arm] = {}
    for name in names:
        arm = attempt(report, {**place, "contender": name}, ARMS[name], cell, inputs)
        if arm is not None:
            made[name] = arm
    profiled = report.arguments.dry or (cell.tokens, cell.width) == PROFILED
    steps = {name: arm.step for name, arm in made.items()}
    for name, row in time_in_turns(report, place, steps, "dense", rounds, cell.device).items():
        share = core_flops(cell, name) / (row["ms"] / 1e3) / peak
        row |= {"pass": "forward + backward", "share_of_gemm_peak": share}
        if profiled and cell.mode == "autocast":
            row |= launches(made[name].step, cell.device)
        report.add({**place, **row})
    forwards = {name: arm.forward for name, arm in made.items()}
    for row in time_in_turns(report, place, forwards, "dense", max(2, rounds // 2), cell.device).values():
        report.add({**place, **row, "pass": "forward"})
    made.clear()
    del inputs, steps, forwards
    if cell.device.type == "cuda":
        torch.cuda.empty_cache()


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns ratios to the trained dense network, forward + backward, and its milliseconds."""
    return _ratios([row for row in rows if row.get("pass") == "forward + backward"])


def graphs(rows: Sequence[Row]) -> list[Row]:
    """Returns the same of CUDA graphs."""
    return _ratios([row for row in rows if row["part"] == "graph" and "ms" in row])


def _ratios(timed: Sequence[Row]) -> list[Row]:
    index = ("mode", "experts", "tokens", "width")
    found = common.pivot([row for row in timed if row["contender"] != "dense"], index, "contender", "ratio")
    dense = {tuple(row[key] for key in index): row for row in timed if row["contender"] == "dense"}
    for line in found:
        mine = dense[tuple(line[key] for key in index)]
        line |= {"dense ms": mine["ms"], "dense of peak": mine.get("share_of_gemm_peak")}
    return found


def counts(rows: Sequence[Row]) -> list[Row]:
    """Returns launches and waits of each contender, where they were counted."""
    keys = ("experts", "contender", "launches", "syncs", "to_host", "busy_ms", "ms", "peak_bytes")
    return [{key: row.get(key) for key in keys} for row in rows if "launches" in row]


def draw(arguments: Arguments, rows: Sequence[Row]) -> None:
    """Draws ratios to the dense network over the width, for each number of tokens, 8 experts under autocast."""
    mine = [row for row in rows if row.get("pass") == "forward + backward" and row["mode"] == "autocast"]
    fewest = min((row["experts"] for row in mine), default=0)
    mine = [row for row in mine if row["experts"] == fewest]
    tokens = sorted({row["tokens"] for row in mine})
    if not tokens:
        return
    shared: Any = common.Arguments("gpu", arguments.quick, 1, arguments.out)
    title = f"Forward + backward of one layer, {fewest} experts, bfloat16 autocast, trained dense = 1"
    with common.picture(shared, len(tokens), title, file="gpu_layer") as axes:
        for axis, count in zip(axes, tokens, strict=True):
            for name in dict.fromkeys(row["contender"] for row in mine):
                points = [row for row in mine if (row["contender"], row["tokens"]) == (name, count)]
                points.sort(key=lambda row: row["width"])
                axis.plot([row["width"] for row in points], [row["ratio"] for row in points], marker="o", label=name)
            axis.set(title=f"{count:,} tokens", xlabel="width C", ylabel="× dense", xscale="log", ylim=(0, 4))
            axis.set_xticks(widths := sorted({row["width"] for row in mine}), widths, minor=False)
        axes[-1].legend(fontsize="x-small")


def main(arguments: Arguments) -> Report:
    """Measures, draws and prints."""
    report = measure(arguments)
    draw(arguments, report.rows)
    if counted := counts(report.rows):
        common.show(counted, "launches and waits of a step, forward + backward")
    if captured_rows := graphs(report.rows):
        common.show(captured_rows, "forward + backward as one CUDA graph")
    finish(report, table(report.rows))
    return report
