"""What tests share: a free port and a launcher of small gloo process groups that cannot be left hanging."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# Examples are the same in every run, and a slow machine is no failure.
settings.register_profile("rmoe", deadline=None, derandomize=True, database=None)
settings.load_profile("rmoe")

ROOT = Path(__file__).resolve().parents[1]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    """A TCP port on loopback that nobody listens on at the moment."""
    return _free_port()


@dataclass(frozen=True)
class Finished:
    """One process of a launched group: its exit code (negative: the signal that ended it) and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Launch = Callable[..., list[Finished]]


def process_env(tmp_path: Path, **more: str) -> dict[str, str]:
    """The environment of a test's process: CPU only, one thread, no cache shared with other runs."""
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env.update(
        PYTHONPATH=path,
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
        TORCH_EXTENSIONS_DIR=str(tmp_path / "torch_extensions"),
        **more,
    )
    return env


_LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE"}


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """`launch_in` the test's own folder."""
    return _launch_in(tmp_path)


@pytest.fixture(scope="session")
def launch_in() -> Callable[[Path], Launch]:
    """`launch_in(folder)`: the launcher with its logs and caches in `folder`, for what several tests share."""
    return _launch_in


def _launch_in(tmp_path: Path) -> Launch:
    """`launch(command, nproc, env={}, timeout=180, check=True)`: runs Python on `command` (a script and its arguments,
    or `["-m", module, …]`) as `nproc` processes of one group and returns a `Finished` for each, by rank.

    Past `timeout` seconds, or as soon as one rank fails, all of them and their children are killed. With `check` a
    rank that did not leave with 0 fails the test with its output.
    """

    def run(
        command: str | Path | Sequence[str | Path],
        nproc: int = 1,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 180,
        check: bool = True,
    ) -> list[Finished]:
        words = [command] if isinstance(command, (str, Path)) else command
        port = str(_free_port())
        logs = tmp_path / f"launch_{port}"
        logs.mkdir()
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(nproc):
                ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)}
                ranked |= {"LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                with open(logs / f"{rank}.out", "wb") as out, open(logs / f"{rank}.err", "wb") as err:
                    child = subprocess.Popen(
                        [sys.executable, *map(str, words)],
                        env=process_env(tmp_path, **ranked) | dict(env or {}),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
                children.append(child)
            timed_out = not _wait(children, timeout)
        finally:
            _kill_groups(children)
        done = [
            Finished(child.returncode, (logs / f"{rank}.out").read_text(), (logs / f"{rank}.err").read_text())
            for rank, child in enumerate(children)
        ]
        if timed_out or (check and any(one.returncode for one in done)):
            reason = f"still running after {timeout} s" if timed_out else "a rank failed"
            tails = "\n".join(f"--- rank {i}: {d.returncode}\n{d.stdout[-4000:]}{d.stderr[-4000:]}" for i, d in enumerate(done))
            pytest.fail(f"{reason}: {' '.join(map(str, words))}\n{tails}")
        return done

    return run


def _wait(children: Sequence[subprocess.Popen[bytes]], timeout: float, grace: float = 10) -> bool:
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
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
