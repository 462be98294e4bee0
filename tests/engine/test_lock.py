"""One run in a work dir at a time, and a dead one is no obstacle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rmoe.engine import faults, lock
from rmoe.engine.lock import NAME, Lock
from rmoe.errors import UserError


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NAME).read_text())


def held_by(folder: Path, process: int, **about: Any) -> None:
    """A lock as that process has left it."""
    (folder / NAME).write_text(json.dumps({**lock._identity(process), "token": "other", **about}))


def test_the_second_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with Lock(tmp_path / "work"):
        about = content(tmp_path / "work")
        with pytest.raises(UserError, match=f"process {os.getpid()} on {about['host']} is training"):
            Lock(tmp_path / "work").__enter__()
        assert content(tmp_path / "work") == about
    assert list((tmp_path / "work").iterdir()) == []


def test_it_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError), Lock(tmp_path):
        raise ArithmeticError
    assert not (tmp_path / NAME).exists()


def test_a_killed_process_is_no_obstacle_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    held_by(tmp_path, child.pid)
    with pytest.raises(UserError, match=f"process {child.pid} on"):
        Lock(tmp_path).__enter__()
    child.kill()
    for reaped in (False, True):  # a zombie is dead, too
        if reaped:
            child.wait()
        else:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        held_by(tmp_path, child.pid, started=1)
        start = time.monotonic()
        with Lock(tmp_path):
            assert content(tmp_path)["process"] == os.getpid()
        assert time.monotonic() - start < 1
        assert f"the lock of process {child.pid}" in capsys.readouterr().err


def test_a_number_used_again_is_another_process(tmp_path: Path) -> None:
    held_by(tmp_path, os.getppid(), started=1)
    with Lock(tmp_path):
        assert content(tmp_path)["process"] == os.getpid()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_STALE", 0.2)
    monkeypatch.setattr(lock, "_POLL", 0.05)
    monkeypatch.setattr(lock, "_RENEWED", 0.05)


def test_another_machine_s_is_waited_for(impatient: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_by(tmp_path, 1, machine="another", host="node7")
    with Lock(tmp_path):
        assert content(tmp_path)["process"] == os.getpid()
    said = capsys.readouterr().err
    assert "process on another machine: waiting up to" in said
    assert "the lock of process 1 on node7, which is gone, has been removed" in said


def test_another_machine_s_that_lives_is_refused(impatient: None, tmp_path: Path) -> None:
    with Lock(tmp_path):
        (tmp_path / NAME).write_text(json.dumps(content(tmp_path) | {"machine": "another", "host": "node7"}))
        with pytest.raises(UserError, match="on node7 is training"):
            Lock(tmp_path).__enter__()


def test_an_old_one_of_another_machine_needs_no_wait(tmp_path: Path) -> None:
    held_by(tmp_path, 1, machine="another")
    os.utime(tmp_path / NAME, (1.0, 1.0))
    start = time.monotonic()
    with Lock(tmp_path):
        assert time.monotonic() - start < 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 3}', "\0\0"])
def test_one_that_cannot_be_read_is_waited_for(impatient: None, text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with Lock(tmp_path):
        assert content(tmp_path)["process"] == os.getpid()


def test_only_the_lock_that_was_judged_is_removed(tmp_path: Path) -> None:
    held_by(tmp_path, 1, token="new")
    Lock(tmp_path)._remove({"token": "old"})
    assert content(tmp_path)["token"] == "new"


def test_a_run_that_has_been_replaced_ends(impatient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(faults, "leave", said.append)
    with Lock(tmp_path):
        held_by(tmp_path, 1)
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "another run has taken over" in said[0]
    assert content(tmp_path)["token"] == "other"


def test_a_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be written.*give another --work-dir"):
        Lock(tmp_path / "file").__enter__()
    monkeypatch.setattr(lock, "_ROOM", 2**80)
    with pytest.raises(UserError, match="is full; make room"):
        Lock(tmp_path / "work").__enter__()
