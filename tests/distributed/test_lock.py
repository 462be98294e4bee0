"""Two runs of which one comes too late, and one that comes after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, process_env
from toy import write_config, write_json

from rmoe.engine.lock import NAME

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]


def started(folder: Path, seed: int, *words: str) -> subprocess.Popen[str]:
    """A run of one process in `folder / "work"`, which takes a while."""
    hooks = [{"type": "fault_injection.MishapHook", "kind": "hang", "at": 3, "rank": 0}]
    options: dict[str, Any] = {"randomness.seed": seed, **({} if words else {"custom_hooks": hooks})}
    config = write_config(folder / f"run_{seed}{len(words)}.py", options)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), str(config), "--work-dir", str(folder / "work")]
    command += ["--deepspeed_config", str(write_json(folder / f"{seed}.json")), *words]
    return subprocess.Popen(
        command, env=process_env(folder), cwd=folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def test_the_later_of_two_runs_is_refused_and_a_killed_one_is_no_obstacle(tmp_path: Path) -> None:
    first = started(tmp_path, 3)
    try:
        while not (tmp_path / "work" / "iter_2").exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.1)
        late = started(tmp_path, 3, "--resume")
        said = late.communicate(timeout=120)[1]
        assert late.returncode == 2, said
        assert f"rmoe: error: process {first.pid} on {os.uname().nodename} is training in" in said
        assert "Traceback" not in said
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / "work" / NAME).exists()
    again = started(tmp_path, 3, "--resume")
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0, said
    assert f"the lock of process {first.pid}" in said
    assert not (tmp_path / "work" / NAME).exists()
