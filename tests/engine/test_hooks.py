"""The progress bar, and the order around an evaluation."""

from __future__ import annotations

import logging
import os
import pty
import sys
import termios
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rmoe.engine import hooks
from rmoe.engine.hooks import LocalExpertsHook, ProgressHook


class Runner:
    """What the hooks look at."""

    max_iters, iter = 3, 0

    def __init__(self) -> None:
        self.logger = logging.Logger("test")
        self.logger.addHandler(logging.StreamHandler(sys.stdout))
        self.model = self


def steps(runner: Any) -> None:
    hook = ProgressHook()
    hook.before_train(runner)
    for step in range(3):
        runner.iter = step
        runner.logger.info("plain line")
        hook.after_train_iter(runner, step, outputs={"loss": torch.tensor(0.25)})
    hook.after_val_epoch(runner, metrics={"mIoU": 12.5})
    hook.restore_terminal(runner)


def test_a_terminal_gets_a_bar_and_no_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        steps(Runner())
        shown = os.read(ours, 10**5).decode()
    os.close(ours)
    assert "3/3" in shown
    assert "loss=0.25" in shown
    assert "<00:00" in shown
    assert "mIoU 12.5" in shown
    assert "plain line" not in capsys.readouterr().out


def test_a_file_gets_lines_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    steps(Runner())
    out, err = capsys.readouterr()
    assert out.count("plain line") == 3
    assert not err


def test_experts_are_local_while_evaluating_and_not_while_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = []

    @contextmanager
    def local(module: Any) -> Any:
        inside.append(True)
        yield
        inside.append(False)

    monkeypatch.setattr(hooks, "local_experts", local)
    runner = Runner()
    runner.module = None  # type: ignore[attr-defined]
    hook = LocalExpertsHook()
    for _ in range(2):
        hook.before_val_epoch(runner)
        assert inside[-1]
        hook.after_val_epoch(runner, metrics={})
        assert not inside[-1]
    from mmengine.hooks import CheckpointHook
    from mmengine.runner import get_priority

    assert get_priority(hook.priority) < get_priority(CheckpointHook.priority)
