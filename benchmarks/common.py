"""What all benchmarks share: paired timing, fresh processes with a chosen allocator, JSON, tables, pictures.

Ratios come from one process in which the contenders take turns: what else the machine does then hits all of them alike.
A ratio is the median over the rounds of (time in that round) / (the reference's time in the same round).

The C library's allocator decides part of a ratio on a CPU: with glibc's defaults, large tensors are mapped and given
back at every step, and the page faults slow the dense network most. So do threads: a small product that is spread over
two cores may wait longer for the second one than it computes. So ratios are taken in several `SETTINGS`, each in a
process of its own, since glibc reads its settings once. The first is judged: one thread, as each process of a training
has on a CPU with as many processes as cores, and the allocator in which the dense network is fastest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "work_dirs" / "benchmarks"

# What glibc reads at start. "tuned": huge pages, nothing mapped for a single tensor, nothing given back; "exact": a
# mapping for every tensor, given back with it.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_TOP_PAD_": "268435456",
    },
    "exact": {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_MMAP_MAX_": "1000000"},
}
CORES = len(os.sched_getaffinity(0))


class Conditions(NamedTuple):
    """Is what ratios depend on besides their contenders: a key of `ALLOCATORS`, and the threads of torch."""

    allocator: str
    threads: int


JUDGED, DEFAULT, ALL_CORES = "judged", "default allocator", "all cores"
SETTINGS = {JUDGED: Conditions("tuned", 1), DEFAULT: Conditions("default", 1), ALL_CORES: Conditions("tuned", CORES)}
_ALLOCATOR_VARIABLES = {name for settings in ALLOCATORS.values() for name in settings}

Row = dict[str, Any]
Times = dict[str, list[float]]


class Ratio(NamedTuple):
    """Holds the median of paired ratios, between their quartiles."""

    median: float
    low: float
    high: float


def alternate(
    contenders: Mapping[str, Callable[[], object]], *, seconds: float, rounds: tuple[int, int], warmup: int = 1
) -> Times:
    """Times calls that take turns.

    Args:
        contenders: what to call, by name.
        seconds: no further round begins once the timed ones took so long, …
        rounds: … but at least the first and at most the second number of rounds are run.
        warmup: rounds before that are not timed.

    Returns:
        For each contender its seconds, one entry for each round; entry i of all of them is of the same round.
    """
    names = list(contenders)
    times: Times = {name: [] for name in names}
    fewest, most = rounds
    start = time.perf_counter()
    for number in range(-warmup, most):
        if number == 0:
            start = time.perf_counter()
        if number >= fewest and time.perf_counter() - start > seconds:
            break
        # Everyone comes first, and after each other contender, in turn.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            before = time.perf_counter()
            contenders[name]()
            if number >= 0:
                times[name].append(time.perf_counter() - before)
    return times


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Returns the ratio of `times` to `reference`, whose entries are of the same rounds."""
    ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def timing_rows(times: Times, reference: str) -> list[Row]:
    """Returns one row for each contender: its median milliseconds and its ratio to `reference`."""
    return [
        {
            "contender": name,
            "ratio": (ratio := paired_ratio(seconds, times[reference])).median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "ms": 1e3 * statistics.median(seconds),
            "rounds": len(seconds),
        }
        for name, seconds in times.items()
    ]


def in_child(function: str, *, allocator: str, threads: int, processes: int = 1, **arguments: Any) -> Any:
    """Calls a function in fresh interpreters under one of the `ALLOCATORS` and returns what it returned.

    Args:
        function: "module:name"; its arguments and what it returns are plain data.
        allocator: key of `ALLOCATORS`.
        threads: of torch, in each process.
        processes: of one gloo group; more than one only for functions that join it. The answer is the first one's.
        **arguments: of the function.

    Raises:
        RuntimeError: a process did not end with 0; its own words are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", __name__, function, json.dumps(arguments), str(answer)]
        shared = _environment(allocator, threads, processes)
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in map(str, range(processes)):
                ranked = shared | {"RANK": rank, "LOCAL_RANK": rank}
                children.append(subprocess.Popen(command, env=ranked, cwd=ROOT, stdout=sys.stderr))
            while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
                time.sleep(0.05)
            if codes := [child.returncode for child in children if child.poll()]:
                raise RuntimeError(f"{function} with {arguments} ended with exit code {codes[0]}")
        finally:
            for child in children:
                child.kill()
                child.wait()
        return json.loads(answer.read_text())


def _environment(allocator: str, threads: int, processes: int) -> dict[str, str]:
    from rmoe.engine.ports import free_port

    kept = {name: value for name, value in os.environ.items() if name not in _ALLOCATOR_VARIABLES}
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # These numbers are a CPU's, also where there is a GPU.
    own = {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    return kept | ALLOCATORS[allocator] | group | own


def join_group() -> None:
    """Makes this child one of its gloo group."""
    import deepspeed
    import deepspeed.ops

    # Compiled for a minute, into a folder that all share, for a function that nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)


class Arguments(NamedTuple):
    """Holds the command line of a benchmark.

    Attributes:
        name, quick, threads, out: of every benchmark.
        part: of one that has parts.
        minutes, only: of one that goes on over several sittings: when to begin no more, and a regular expression.
        device: likewise, "cpu" or "cuda".
    """

    name: str
    quick: bool
    threads: int
    out: Path
    part: str | None = None
    minutes: float | None = None
    only: str = ""
    device: str = "cpu"

    def command(self) -> str:
        """Returns the line itself."""
        part = f" --part {self.part}" if self.part else ""
        return f"python -m benchmarks.{self.name}{part}{' --quick' * self.quick}"


def parse(
    name: str,
    description: str | None,
    argv: Sequence[str] | None = None,
    parts: Sequence[str] = (),
    *,
    sittings: bool = False,
) -> Arguments:
    """Reads the command line that all benchmarks share.

    Args:
        name: of the benchmark; its files are called so.
        description: its module's docstring.
        argv: default: the process's.
        parts: what it can do instead of what it does by default.
        sittings: whether it can be stopped and goes on.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    names = ("--threads", *["--jobs"] * sittings)
    parser.add_argument(*names, type=int, help="default: all cores, quick 1; layer and step have their own")
    parser.add_argument("--out", type=Path, help=f"default: {_relative(RESULTS)}, quick {_relative(QUICK_RESULTS)}")
    if parts:
        parser.add_argument("--part", choices=parts, help="something else than the whole")
    if sittings:
        parser.add_argument("--minutes", type=_minutes, help="begin no run that would not end by then")
        parser.add_argument(
            "--only", type=_pattern, default="", help="runs whose task/arm/seed/steps/styles/width matches"
        )
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where runs train; default: cpu")
    given = parser.parse_args(argv)
    threads = given.threads or (1 if given.quick else CORES)
    out = given.out or (QUICK_RESULTS if given.quick else RESULTS)
    more = {"minutes": given.minutes, "only": given.only, "device": given.device} if sittings else {}
    return Arguments(name, given.quick, threads, out, given.part if parts else None, **more)


def _minutes(text: str) -> float:
    if not 0 <= (minutes := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} minutes; it takes a number of 0 or more, 0 to run nothing")
    return minutes


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression ({error})") from error
    return text


def publish(
    arguments: Arguments,
    config: Mapping[str, Any],
    rows: Sequence[Row],
    table: Sequence[Row],
    *,
    file: str | None = None,
) -> None:
    """Prints `table` and writes NAME.json, or FILE.json: the rows, the config, and all that a number depends on."""
    file = file or arguments.name
    from rmoe.engine.cost import software

    versions = software()
    commit = versions.pop("commit") or ""
    content = {
        "benchmark": arguments.name,
        "command": arguments.command(),
        "quick": arguments.quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"threads": arguments.threads, "allocators": ALLOCATORS, "settings": SETTINGS},
        "versions": versions,
        "commit": commit.removesuffix("-dirty") or None,
        "dirty": commit.endswith("-dirty"),
        "config": dict(config),
        "rows": list(rows),
    }
    show(table, title=f"{file}, {arguments.threads} threads")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{file}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"{_relative(path)} written")


def machine() -> Row:
    """Describes the CPU on which this runs."""
    from rmoe.engine.cost import device_kind

    return {"cpu": device_kind(), "cores": CORES, "gpu": None}


def show(rows: Sequence[Row], title: str) -> None:
    """Prints rows as a table; its columns are the keys of the first."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def markdown(rows: Sequence[Row]) -> str:
    """Returns rows as a Markdown table; its columns are the keys of the first."""
    lines = [list(rows[0]), ["---" if isinstance(value, str) else "---:" for value in rows[0].values()]]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def circumstances(found: Mapping[str, Any]) -> str:
    """Returns what `publish` wrote a result with: command, date, machine, versions, commit."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    machine = found["machine"]["gpu"] or "{cpu}, {cores} cores, {threads} threads, no GPU".format(**found["machine"])
    commit = f"{found['commit']}{' with changes' * found['dirty']}"
    return f"`{found['command']}`, {found['date']}: {machine}; {versions}; commit {commit}."


def cell(value: Any) -> str:
    """Returns a value as tables show it: three significant digits of a number, − for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 100):
        return f"{value:,.0f}"
    return f"{value:#.3g}" if isinstance(value, float) else str(value)


def pivot(rows: Sequence[Row], index: Sequence[str], column: str, value: str) -> list[Row]:
    """Makes a row for each combination of `index` and a column for each value of `column`; None where there is none."""
    columns = dict.fromkeys(row[column] for row in rows)
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in index)
        line = found.setdefault(key, dict(zip(index, key, strict=True)) | dict.fromkeys(columns))
        line[row[column]] = row[value]
    return list(found.values())


@contextmanager
def picture(
    arguments: Arguments, columns: int, title: str, height: float = 4.0, file: str | None = None
) -> Iterator[Sequence[Any]]:
    """Opens axes side by side, `height` inches high; saves them afterwards as FILE.png, or NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(5 * columns, height), squeeze=False, layout="constrained")
    yield axes[0]
    figure.suptitle(title)
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / f"{file or arguments.name}.png", dpi=110)
    pyplot.close(figure)


def _relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _answer(function: str, arguments: str, answer: str) -> None:
    """Does the child's side of `in_child`."""
    module, name = function.split(":")
    run = getattr(importlib.import_module(module), name)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    result = run(**json.loads(arguments))
    if torch and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if os.environ["RANK"] == "0":
        Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
