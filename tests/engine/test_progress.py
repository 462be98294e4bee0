"""What a run shows: bars on a terminal, plain lines elsewhere, and what is about to be trained."""

from __future__ import annotations

import logging
import os
import pty
import sys
import termios
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy import ToyModel

from rmoe.engine.cost import count_parameters
from rmoe.engine.progress import ProgressHook, StartHook
from rmoe.engine.terminal import keep_short, progress_bar


class Runner:
    """What the hooks look at."""

    max_iters, iter, val_dataloader = 3, 0, "seven"

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
    hook.before_val_epoch(runner)
    hook.after_val_iter(runner, 0)
    runner.logger.warning("a gate has collapsed")
    hook.after_val_epoch(runner, metrics={"mIoU": 12.5})
    hook.at_end(runner)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, work: Any) -> str:
    """What a terminal shows of `work`."""
    monkeypatch.setattr("rmoe.engine.progress._REFRESH", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
        shown = os.read(ours, 10**5).decode()
    os.close(ours)
    return shown


def test_a_terminal_gets_bars_and_no_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runner = Runner()
    streams = [handler.stream for handler in runner.logger.handlers]
    shown = on_a_terminal(monkeypatch, lambda: steps(runner))
    assert "3/3" in shown
    assert "loss 0.25" in shown
    assert "eta" in shown
    assert "0:00:00" in shown
    assert "evaluate" in shown
    assert "1/5" in shown  # batches of the evaluation
    assert "mIoU 12.5" in shown
    assert "a gate has collapsed" in shown
    assert "plain line" not in capsys.readouterr().out + shown
    assert [handler.stream for handler in runner.logger.handlers] == streams
    assert runner.logger.handlers[0].level == logging.INFO


def test_a_file_gets_lines_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    steps(Runner())
    out, err = capsys.readouterr()
    assert out.count("plain line") == 3
    assert not err


def test_no_bar_leaves_a_trace_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as bar:
        bar.update(bar.add_task("train", total=None, note=""), completed=1, total=2, refresh=True)
    assert capsys.readouterr() == ("", "")


def test_what_is_trained_is_said_before_the_first_step(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    model, runner = ToyModel(moe={"num_experts": 4}), Runner()
    runner.model = SimpleNamespace(module=model)
    runner.work_dir, runner.cfg = str(tmp_path), SimpleNamespace(filename="configs/toy.py")
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}
    runner.strategy = SimpleNamespace(config=config, parameters=count_parameters(model))
    keep_short(runner.logger)
    StartHook("toy.py, zero2.json").before_train(runner)
    runner.logger.info("a\ntable")
    out = capsys.readouterr().out
    assert "read toy.py, zero2.json: ZeRO 2, float32, 8 images for each update on 1 process\n" in out
    assert "core trained" in out
    for name, weight in model.named_parameters():
        weight.requires_grad_(".core." not in name)  # as train_only does
    StartHook("toy.py, zero2.json").before_train(runner)
    assert "core frozen" in capsys.readouterr().out
    assert "mixtures of 4 experts" in out
    assert "backbone.1.mlp, backbone.2.mlp" in out
    assert f"{tmp_path}/toy.py" in out
    assert "training: 3 steps, 0 of them done" in out
    assert "a\ntable" in out  # from now on
    assert len(out.splitlines()) < 10
