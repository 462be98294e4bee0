"""What the parts share: time by events in turns, memory, launches, and a report that is whole after every row."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.common import ROOT, Row

Step = Callable[[int], object]  # one step on the input set of this number
INPUT_SETS = 3
_PACKAGES = ("torch", "triton", "timm", "peft", "deepspeed", "mmengine", "mmcv", "mmsegmentation", "mmdet")
_SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class Arguments(NamedTuple):
    """Holds the command line. `dry` means tiny sizes on the CPU, `quick` few cells."""

    parts: tuple[str, ...]
    dry: bool
    quick: bool
    minutes: float
    out: Path

    @property
    def device(self) -> torch.device:
        """Returns what is measured."""
        return torch.device("cpu" if self.dry else "cuda")

    def command(self, part: str) -> str:
        """Returns the line for one part."""
        return f"python -m benchmarks.gpu --part {part}{' --quick' * self.quick}{' --dry-run' * self.dry}"


class Report:
    """Collects the rows of one part; its file is whole after each of them: a killed run leaves what it has."""

    def __init__(self, arguments: Arguments, part: str, config: Mapping[str, Any]) -> None:
        self.arguments, self.part = arguments, part
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self._head = {
            "benchmark": f"gpu_{part}",
            "command": arguments.command(part),
            "quick": arguments.quick or arguments.dry,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _machine(arguments.device),
            "versions": _versions(),
            **_commit(),
            "config": {**config, "float32_matmul_precision": torch.get_float32_matmul_precision()},
        }
        arguments.out.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        """Returns the file of this part."""
        return self.arguments.out / f"gpu_{self.part}.json"

    def out_of_time(self, reserved: float = 0.0) -> bool:
        """Says whether the minutes of the command line are spent but for so many seconds."""
        return time.monotonic() > self.deadline - reserved

    def add(self, row: Row) -> None:
        """Takes in one row and writes all of them."""
        self.rows.append(row)
        if "failed" in row:
            self.failures.append(f"{row.get('contender', row)}: {row['failed']}")
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({**self._head, "rows": self.rows}, indent=1, ensure_ascii=False) + "\n")
        new.replace(self.path)


def attempt(report: Report, place: Row, make: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what `make` makes of `arguments`; where it does not fit, or fails, a row says so and None is returned.

    A failure ends the command with exit code 1 after all else was measured: the time on a GPU is short.
    """
    try:
        return make(*arguments)
    except torch.OutOfMemoryError:
        report.add({**place, "skipped": "does not fit into the memory of the GPU"})
    except ModuleNotFoundError as error:
        report.add({**place, "skipped": f"{error.name or error} is not installed"})
    except Exception as error:
        report.add({**place, "failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def time_in_turns(
    report: Report, place: Row, arms: Mapping[str, Step], reference: str, rounds: int, device: torch.device
) -> dict[str, Row]:
    """Times arms that take turns; the milliseconds of one step are medians over rounds.

    A round of an arm is several steps between two events, each on another input set, as many as take about 5 ms: so
    that a host that runs ahead of the GPU may do so, as in training.

    Returns:
        For each arm that ran: ms, ratio to `reference` with its quartiles, rounds, and the peak of bytes in a step
        beyond what was there before.
    """
    ready: dict[str, tuple[Step, int, int | None]] = {}
    for name, step in arms.items():
        if attempt(report, {**place, "contender": name}, _warm_up, step) is None:
            continue
        peak = _peak_bytes(step, device)
        once = min(_milliseconds(step, 1, device) for _ in range(2))
        ready[name] = (step, max(1, min(10, round(5 / max(once, 1e-3)))), peak)
    times: dict[str, list[float]] = {name: [] for name in ready}
    names = list(ready)
    for number in range(rounds):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            step, repeats, _ = ready[name]
            times[name].append(_milliseconds(step, repeats, device))
    if reference not in times:
        return {}
    found = {}
    for name, ms in times.items():
        ratio = common.paired_ratio(ms, times[reference])
        found[name] = {
            "contender": name,
            "ms": statistics.median(ms),
            "ratio": ratio.median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "rounds": rounds,
            "peak_bytes": ready[name][2],
        }
    return found


def _warm_up(step: Step) -> bool:
    """Runs steps so that what is timed has compiled, allocated and chosen its kernels."""
    for number in range(INPUT_SETS):
        step(number)
    return True


def _milliseconds(step: Step, repeats: int, device: torch.device) -> float:
    if device.type == "cpu":
        before = time.perf_counter()
        for number in range(repeats):
            step(number % INPUT_SETS)
        return 1e3 * (time.perf_counter() - before) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for number in range(repeats):
        step(number % INPUT_SETS)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def _peak_bytes(step: Step, device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(step: Step, device: torch.device) -> Step:
    """Returns a step that replays, as one CUDA graph, what a step on the first input set launches.

    What it takes is what the device takes: the host launches once. On a CPU it is the step itself.

    Raises:
        RuntimeError: the step waits for the device, or launches what a graph cannot hold.
    """
    if device.type == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(INPUT_SETS):
            step(0)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    return partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Step, _: int) -> None:
    graph.replay()  # of the memory that the step owns


def launches(step: Step, device: torch.device) -> Row:
    """Counts what one step launches and how often the host waits, and names the kernels that take longest."""
    if device.type == "cpu":
        return {"launches": None, "syncs": None, "to_host": None, "kernels": []}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step(0)
    torch.cuda.synchronize()
    on_device: dict[str, tuple[float, int]] = {}
    names: list[str] = []
    for event in found.events():
        if event.is_user_annotation:
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA:
            microseconds, count = on_device.get(event.name, (0.0, 0))
            on_device[event.name] = (microseconds + event.device_time_total, count + 1)
        else:
            names.append(event.name)
    longest = sorted(on_device.items(), key=lambda item: -item[1][0])
    return {
        "launches": sum(count for _, count in on_device.values()),
        "syncs": sum(name in _SYNCS for name in names),
        "to_host": sum(count for name, (_, count) in on_device.items() if "DtoH" in name),
        "busy_ms": sum(microseconds for microseconds, _ in on_device.values()) / 1e3,
        "kernels": [{"name": name[:90], "us": us, "count": count} for name, (us, count) in longest[:10]],
    }


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Lets float32 products run in TF32 in the block, as the engine does unless told otherwise, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gemm_peak(device: torch.device, size: int) -> float:
    """Returns the FLOP/s of a square bfloat16 product of random numbers, the median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def step(_: int) -> None:
        torch.mm(a, b, out=out)

    for _ in range(3):
        step(0)
    return 2 * size**3 / (statistics.median(_milliseconds(step, 1, device) for _ in range(10)) / 1e3)


def copy_peak(device: torch.device, size: int) -> float:
    """Returns the bytes a second, read and written, of a copy within device memory."""
    a = torch.randn(size // 4, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * a.nbytes / (statistics.median(_milliseconds(lambda _: b.copy_(a), 1, device) for _ in range(5)) / 1e3)


def finish(report: Report, table: Sequence[Row]) -> None:
    """Prints the table of a part, and what failed."""
    if table:
        common.show(table, f"gpu {report.part}, {report._head['machine']['gpu'] or 'CPU, dry run'}")
    for row in report.rows:
        if "skipped" in row or "failed" in row:
            words = " ".join(str(value) for key, value in row.items() if key not in ("part", "skipped", "failed"))
            print(f"not measured: {words}: {row.get('skipped') or row['failed']}")
    print(f"{report.path} written, {len(report.rows)} rows")


def _machine(device: torch.device) -> Row:
    if device.type == "cpu":
        return {"gpu": None, "cpu": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> Row:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": answer.removesuffix("-dirty"), "dirty": answer.endswith("-dirty")}
