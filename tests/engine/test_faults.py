"""Who is named as the cause, from heartbeats alone; and what signals do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop
from torch.distributed import distributed_c10d

from rmoe.engine import faults
from rmoe.engine.strategy import Diverged
from rmoe.errors import UserError

OTHER = {"beat": 9, "step": 7, "host": "b", "process": 2, "waits": True, "at": "x.py:3", "ended": ""}


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[faults.Watch]:
    """That of the first of two processes, which hurries."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    watch = faults.Watch(tmp_path, 1000.0)
    watch._interval = 0.01
    with watch:
        watch.step(7)
        yield watch


def beat(watch: faults.Watch, **state: Any) -> None:
    (watch._folder / "1.json").write_text(json.dumps(OTHER | state))


def test_a_process_without_heartbeat(watch: faults.Watch) -> None:
    assert "ends after step 7: rank 1 has no heartbeat in" in watch.explain()


def test_a_heart_that_stops(watch: faults.Watch) -> None:
    beat(watch)
    said = watch.explain(RuntimeError("peer lost\nand more"))
    assert "rank 1 (process 2 on b, last seen after step 7) is gone or stopped (peer lost); --resume" in said


def test_the_reason_that_a_process_left_behind(watch: faults.Watch) -> None:
    beat(watch, ended="KeyError: 'x'")
    assert "last seen after step 7) ended (KeyError: 'x')" in watch.explain()


def living(**state: Any) -> dict[int, dict[str, Any]]:
    """Two heartbeats, of a process that waits after step 7 and of another."""
    return {0: OTHER | {"beat": 1, "host": "a"}, 1: OTHER | state}


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({"step": 6, "waits": False}, "rank 1 (process 2 on b, last seen after step 6) hangs at x.py:3"),
        ({"waits": False}, "rank 1 (process 2 on b, last seen after step 7) hangs at x.py:3"),
        ({}, "all ranks wait for each other after step 7; look at the network of a, b"),
    ],
)
def test_all_hearts_beat(watch: faults.Watch, state: dict[str, Any], cause: str) -> None:
    after = living(**state)
    before = {rank: one | {"beat": 0} for rank, one in after.items()}
    assert watch._cause(before, after) == cause


def test_a_heartbeat_is_read_by_others(watch: faults.Watch) -> None:
    watch._beat()
    mine = watch._read()[0]
    assert (mine["step"], mine["process"], mine["waits"]) == (7, os.getpid(), False)


def test_a_standstill_ends_the_process(watch: faults.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    left, said = threading.Event(), []
    monkeypatch.setattr(faults, "leave", lambda text: (said.append(text), left.set(), watch.rest()))
    watch.rest()
    watch.timeout = 0.05
    assert not left.wait(0.2)  # nobody counts on progress
    watch.step(8)
    assert left.wait(5)
    assert "ends after step 8" in said[0]
    assert "no progress for 0.05 s" in said[0]


def break_folder(watch: faults.Watch, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What befalls the folder of the heartbeats while the run goes on."""
    if harm in ("removed", "a file", "the work dir a file"):
        shutil.rmtree(watch._folder if harm != "the work dir a file" else watch._folder.parent)
    if harm == "a file":
        watch._folder.write_text("")
    if harm == "the work dir a file":
        watch._folder.parent.write_text("")
    error = {"read-only": OSError(30, "Read-only"), "full": OSError(28, "No space"), "unknown": KeyError("x")}.get(harm)
    if error:
        monkeypatch.setattr(os, "write", Mock(side_effect=error))
    if harm == "a broken search":
        monkeypatch.setattr(watch, "_cause", Mock(side_effect=KeyError("x")))
    if harm == "foreign heartbeats":
        (watch._folder / "1.json").write_text('[1, {"beat": null}]')


@pytest.mark.parametrize(
    "harm",
    [
        "removed",
        "a file",
        "the work dir a file",
        "read-only",
        "full",
        "unknown",
        "a broken search",
        "foreign heartbeats",
    ],
)
def test_a_standstill_is_seen_whatever_befalls_the_heartbeats(
    watch: faults.Watch, harm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left, said = threading.Event(), []
    monkeypatch.setattr(faults, "leave", lambda text: (said.append(text), watch.rest(), left.set()))
    with watch._lock:
        break_folder(watch, harm, monkeypatch)
    time.sleep(0.1)  # some beats
    assert watch._thread.is_alive()
    watch.timeout = 0.05
    watch.step(8)
    assert left.wait(5)
    assert "ends after step 8" in said[0]
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == (harm not in ("a broken search", "foreign heartbeats"))
    if harm == "removed":
        assert "heartbeats was removed while the run goes on; it is made again" in warned[0]
        assert watch._read()[0]["step"] == 8
    monkeypatch.undo()


def test_heartbeats_that_cannot_be_written_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("get_rank", 0), ("get_world_size", 1)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    (tmp_path / faults.HEARTBEATS).write_text("")
    with pytest.raises(UserError, match=r"heartbeats cannot be written \(.*give a --work-dir"):
        faults.Watch(tmp_path, 10.0).__enter__()


def test_a_run_that_is_over_does_not_mind(watch: faults.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=OSError(30, "Read-only")))
    watch.__exit__(None, None, None)


def test_a_process_leaves_without_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit))
    monkeypatch.setattr(sys, "stderr", Mock(write=Mock(side_effect=OSError(28, "No space"))))
    with pytest.raises(SystemExit):
        faults.leave("why")
    os._exit.assert_called_once_with(faults.FAULT)  # type: ignore[attr-defined]


def test_signals_are_remembered_and_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with faults.Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.caught == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("loop", "saver", "saves"),
    [
        (object(), {}, "no CheckpointHook with save_optimizer: --resume starts anew"),
        (object(), {"save_optimizer": False}, "no CheckpointHook with save_optimizer: --resume starts anew"),
        (object.__new__(EpochBasedTrainLoop), {"save_optimizer": True}, "--resume goes on from the last checkpoint"),
    ],
)
def test_where_nothing_can_be_saved(
    loop: object, saver: dict[str, bool], saves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run leaves all the same, but not between two parts of an accumulated step."""
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **options: None)
    signals = faults.Signals()
    hook = faults.PreemptionHook(signals)
    savers = [CheckpointHook(**saver)] if saver else []
    runner = SimpleNamespace(iter=4, epoch=0, hooks=[hook, *savers], train_loop=loop)
    runner.strategy = SimpleNamespace(layout=SimpleNamespace(accumulation=2))
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    signals.caught, runner.iter = signal.SIGUSR1, 5
    hook.before_train_iter(runner, 0)
    runner.iter = 6
    with pytest.raises(faults.Preempted, match=f"SIGUSR1 after step 6: .*{saves}"):
        hook.before_train_iter(runner, 0)


def test_new_groups_wait_as_long_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    faults.limit_groups(7.5)
    for backend in ("gloo", "nccl"):
        assert distributed_c10d._get_default_timeout(dist.Backend(backend)).total_seconds() == 7.5


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("[…/gloo/transport/tcp/pair.cc:538] Connection closed by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("shapes of /data/gloo/peer.jpg differ [/data/gloo/x.cc:3]"), False),
        (Diverged("[/runs/gloo/peer_review/iter_4:3] is the last good checkpoint"), False),
        (UserError("there is no /runs/NCCL/peer"), False),
        (ValueError("gloo"), False),
    ],
)
def test_errors_of_a_collective(error: Exception, is_one: bool) -> None:
    assert faults.of_a_collective(error) == is_one


def test_an_error_that_a_collective_raises_is_one_whatever_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_c10d, "_get_default_group", Mock(side_effect=RuntimeError("closed")))
    with pytest.raises(RuntimeError) as caught:
        dist.barrier()
    assert faults.of_a_collective(caught.value)


@pytest.mark.parametrize("text", ["é" * 2000, '"' * 2000, "\0" * 2000])
def test_a_heartbeat_is_overwritten_as_a_whole(watch: faults.Watch, text: str) -> None:
    """Whatever the error that a process leaves behind, and whatever an earlier run has left."""
    for said in (text, ""):
        watch._beat(said)
        assert watch._file.stat().st_size == faults._RECORD
        assert watch._read()[0]["ended"] in (text[:62], text[:125], text[:250], text[:500], said)
    watch.__exit__(KeyError, KeyError(), None)
    watch._file.write_text("x" * 5000)
    watch.__enter__()
    assert 0 in watch._read()
