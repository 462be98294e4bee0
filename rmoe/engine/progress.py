"""What a run shows of itself: what is about to be trained, and a bar with the time left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from rich.file_proxy import FileProxy
from rich.progress import Progress

from rmoe.engine.ds_json import zero_stage
from rmoe.engine.precision import precision
from rmoe.engine.terminal import progress_bar, show_all
from rmoe.moe.state import moe_layers

_REFRESH = 0.1  # seconds from one drawing to the next, at least


class StartHook(Hook):
    """Says, before the first step, what was read, what became a mixture of experts, and where the output goes.

    Args:
        read: the files that describe the run.
    """

    priority = "VERY_LOW"  # before the bar takes the terminal

    def __init__(self, read: str) -> None:
        self._read = read

    def before_train(self, runner: Any) -> None:
        """Logs it, and lets the terminal have all lines from now on."""
        config, parameters, folder = runner.strategy.config, runner.strategy.parameters, Path(runner.work_dir)
        count = get_world_size()
        lines = [
            f"read {self._read}: ZeRO {zero_stage(config)}, {precision(config)}, {config['train_batch_size']} images "
            f"for each update on {count} {'process' if count == 1 else 'processes'}",
            f"parameters: {parameters.total:,} in all, {parameters.active:,} active, {parameters.trainable:,} trained",
            *_mixtures(runner.model.module),
            f"output: {folder}, config: {folder / Path(runner.cfg.filename or 'run').name}, "
            f"log: {getattr(runner.logger, 'log_file', None)}",
            f"training: {runner.max_iters} steps, {runner.iter} of them done",
        ]
        for line in lines:
            runner.logger.info(line)
        show_all(runner.logger)


def _mixtures(model: Any) -> list[str]:
    """Returns a line for each kind of mixture, with the names of its layers."""
    names: dict[str, list[str]] = {}
    for name, layer in moe_layers(model).items():
        one = layer.config
        core = "trained" if any(weight.requires_grad for weight in layer.core.parameters()) else "frozen"
        kind = f"{one.num_experts} experts ({one.residual}), {one.used}, core {core}, ep_size {one.ep_size}"
        names.setdefault(kind, []).append(name)
    return [f"mixtures of {kind}: {', '.join(layers)}" for kind, layers in names.items()] or [
        "mixtures: none, the network is dense"
    ]


class ProgressHook(Hook):
    """Shows bars of training and of each evaluation, with the time left, where standard error is a terminal.

    The log file has plain lines anyway; elsewhere standard output has them, too.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._shown = 0.0

    def before_train(self, runner: Any) -> None:
        """Shows the bar, keeps plain lines off the terminal, and puts warnings above the bar."""
        if not is_main_process() or not sys.stderr.isatty():
            return
        self._bar = progress_bar()
        self._train = self._bar.add_task("train", total=runner.max_iters, completed=runner.iter, note="")
        self._quiet = {one: one.stream for one in runner.logger.handlers if type(one) is logging.StreamHandler}
        for handler, stream in self._quiet.items():
            handler.setLevel(logging.WARNING)
            handler.setStream(FileProxy(self._bar.console, stream))
        self._bar.start()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Moves one step on."""
        if self._bar is not None:
            self._bar.advance(self._train)
            if self._due():
                self._bar.update(self._train, note=f"loss {float(outputs['loss']):.4g}", refresh=True)

    def before_val_epoch(self, runner: Any) -> None:
        """Adds a bar of this evaluation."""
        if self._bar is not None:
            self._val = self._bar.add_task("evaluate", total=len(runner.val_dataloader), note="")

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Moves one batch on."""
        if self._bar is not None:
            self._bar.update(self._val, advance=1, refresh=self._due())

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Removes the evaluation's bar and prints its result above."""
        if self._bar is not None:
            self._bar.remove_task(self._val)
            values = (f"{name} {value:.4g}" for name, value in (metrics or {}).items() if isinstance(value, float))
            self._bar.console.print(f"step {runner.iter}: {', '.join(values)}", highlight=False)

    def _due(self) -> bool:
        """Returns whether it is time to draw the bar again."""
        if time.monotonic() - self._shown < _REFRESH:
            return False
        self._shown = time.monotonic()
        return True

    def at_end(self, runner: Any) -> None:
        """Gives the terminal back; our runner calls it at the end, whatever that was."""
        if self._bar is not None:
            self._bar.stop()
            for handler, stream in self._quiet.items():
                handler.setLevel(logging.INFO)
                handler.setStream(stream)
