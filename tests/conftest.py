"""What tests share: a free port and a launcher of small gloo process groups that cannot be left hanging."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from rmoe.engine.ports import free_port

# Examples are the same in every run, and a slow machine is no failure.
settings.register_profile("rmoe", deadline=None, derandomize=True, database=None)
settings.load_profile("rmoe")

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, as many as there are cores
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, in numpy; read when triton is imported
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "moe")]  # for `import toy` and `import no_sync`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with long tests first: of two workers, neither is left alone with one at the end."""
    long = {item.path for item in items if any(map(item.get_closest_marker, ("distributed", "slow", "cluster")))}
    items.sort(key=lambda item: item.path not in long)


@dataclass(frozen=True)
class Finished:
    """One process of a launched group: its exit code (negative: the signal that ended it) and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Launch = Callable[..., list[Finished]]


def process_env(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a test's process: CPU only, one thread, no cache shared with other runs."""
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    env.update(
        PYTHONPATH=path,
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
        TORCH_EXTENSIONS_DIR=str(folder / "torch_extensions"),
        **more,
    )
    return env


_LAUNCHER_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_SIZE",
}


@pytest.fixture(autouse=True)
def launchers_variables() -> Iterator[None]:
    """Leaves a process the launcher's variables that it had: a run that starts in it takes a place of its own."""
    before = {name: os.environ.get(name) for name in _LAUNCHER_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """`launch(command, nproc, env={}, timeout=180, check=True)`: see `run_processes`; its files are in `tmp_path`."""

    def run(command: str | Path | Sequence[str | Path], nproc: int = 1, **options: Any) -> list[Finished]:
        return run_processes(tmp_path, command, nproc, **options)

    return run


def run_processes(
    folder: Path,
    command: str | Path | Sequence[str | Path],
    nproc: int = 1,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 180,
    grace: float = 10,
    check: bool = True,
) -> list[Finished]:
    """Runs Python on `command` (a script and its arguments, or `["-m", module, …]`) as `nproc` processes of one group.

    Past `timeout` seconds, or `grace` seconds after a rank failed, all of them and their children are killed.

    Args:
        folder: for caches and output.
        command: what to run; a single word is a script.
        nproc: number of processes; with 0, one process without the variables of a launcher.
        env: more environment variables.
        timeout: seconds for all of it.
        grace: seconds for the others once one has failed.
        check: fail the test, with the output, where a rank did not leave with 0.

    Returns:
        How each rank ended, by rank.
    """
    words = [command] if isinstance(command, (str, Path)) else list(command)
    port = str(free_port())
    logs = Path(tempfile.mkdtemp(prefix="launch_", dir=folder))  # a port may come twice, a folder may not
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(max(nproc, 1)):
            ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)}
            ranked |= {"LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with open(logs / f"{rank}.out", "wb") as out, open(logs / f"{rank}.err", "wb") as err:
                child = subprocess.Popen(
                    [sys.executable, *map(str, words)],
                    env=process_env(folder, **(ranked if nproc else {})) | dict(env or {}),
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            children.append(child)
        timed_out = not _wait(children, timeout, grace)
    finally:
        _kill_groups(children)
    done = [
        Finished(child.returncode, (logs / f"{rank}.out").read_text(), (logs / f"{rank}.err").read_text())
        for rank, child in enumerate(children)
    ]
    if timed_out or (check and any(one.returncode for one in done)):
        reason = f"still running after {timeout} s" if timed_out else "a rank failed"
        tails = [
            f"--- rank {i}: {one.returncode}\n{one.stdout[-4000:]}{one.stderr[-4000:]}" for i, one in enumerate(done)
        ]
        pytest.fail("\n".join([f"{reason}: {' '.join(map(str, words))}", *tails]))
    return done


def _wait(children: Sequence[subprocess.Popen[bytes]], timeout: float, grace: float) -> bool:
    """Waits for all to end; a failed rank leaves the others `grace` seconds. Whether all ended, or one failed."""
    deadline = time.monotonic() + timeout
    failed = False
    while any(child.poll() is None for child in children):
        if not failed and any(child.poll() for child in children):
            failed, deadline = True, time.monotonic() + grace
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.05)
    return True


def _kill_groups(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
