"""What may befall one process of a run, brought about at the end of a step by a hook of the run's config."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from torch import nn

from rmoe.engine.faults import HEARTBEATS, PreemptionHook
from rmoe.moe.gate import Routing
from rmoe.moe.state import moe_layers

MARK = "mishap"  # file in the work dir, written just before


class MishapHook(Hook):
    """Does `kind` to process `rank` at the end of step `at`, the first time that the run comes there."""

    priority = 80  # after what the end of a step asks of all processes, before checkpoints

    def __init__(self, kind: str, at: int, rank: int = 1) -> None:
        self.kind, self.at, self.rank = kind, at, rank

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        mark = Path(runner.work_dir) / MARK
        if (runner.iter + 1, get_rank()) == (self.at, self.rank) and not mark.exists():
            mark.write_text(str(time.time()))
            getattr(self, self.kind)(runner)

    def kill(self, runner: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self, runner: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def hang(self, runner: Any) -> None:
        time.sleep(3600)

    def hang_unheard(self, runner: Any) -> None:
        """Somebody has cleared up in the work dir meanwhile."""
        shutil.rmtree(Path(runner.work_dir) / HEARTBEATS)
        time.sleep(3600)

    def fail(self, runner: Any) -> None:
        raise ArithmeticError("a mishap of its own")

    def terminate(self, runner: Any) -> None:
        """As a scheduler does: the loader's workers get it as well."""
        subprocess.run(["kill", "-s", "TERM", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)

    def slurm_wants_the_node(self, runner: Any) -> None:
        """What --signal=B:USR1@… does when the time is nearly up."""
        subprocess.run(["scancel", "--batch", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
        self.wait_for_the_signal(runner)

    def slurm_preempts(self, runner: Any) -> None:
        """Another job, of a partition that goes before this one, wants both nodes."""
        words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
        subprocess.run(["sbatch", *words], check=True)
        self.wait_for_the_signal(runner)

    @staticmethod
    def wait_for_the_signal(runner: Any) -> None:
        hook = next(hook for hook in runner.hooks if isinstance(hook, PreemptionHook))
        while not hook._signals.caught:
            time.sleep(0.05)

    def cut(self, runner: Any) -> None:
        """Takes away the network of this process's host."""
        subprocess.run(["ip", "link", "set", os.environ["MISHAP_LINK"], "down"], check=True)


class InfiniteGradientHook(Hook):
    """Makes the gradient of the head infinite in iteration `at`; the loss stays what it is."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.at:
            runner.model.module.head.weight.register_hook(lambda gradient: gradient * float("inf"))


class OneExpertHook(Hook):
    """Sends every token to expert 0 of every layer, and sees to it that all trained weights get a gradient."""

    def before_train(self, runner: Any) -> None:
        model = runner.model.module
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.seen: set[str] = set()
        for name, parameter in self.trained.items():
            parameter.register_hook(lambda gradient, name=name: self.seen.add(name))
        for layer in moe_layers(model).values():
            layer.gate.register_forward_hook(self.choose_the_first)

    @staticmethod
    def choose_the_first(gate: nn.Module, inputs: Any, routing: Routing) -> Routing:
        return routing._replace(expert_TK=torch.zeros_like(routing.expert_TK))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        assert self.seen == self.trained.keys()
        self.seen.clear()


class SameStatsHook(Hook):
    """Batch norms have moved from where they began, and to the same place on every process."""

    priority = "LOWEST"

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        mean = runner.model.module.head[0].running_mean
        everywhere = [torch.empty_like(mean) for _ in range(get_world_size())]
        torch.distributed.all_gather(everywhere, mean)
        assert mean.any()
        assert all(torch.equal(mean, other) for other in everywhere)
