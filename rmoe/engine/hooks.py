"""Hooks of mmengine's runner: evaluation without communication, cost, and what a finished run leaves."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmengine.dist import all_reduce_params, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook as MMCheckpointHook
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rmoe.engine import cost
from rmoe.engine.checkpoint import export
from rmoe.engine.checkpoint.files import PARTIAL, all_or_none, write_json
from rmoe.engine.ds_json import zero_stage
from rmoe.engine.precision import precision
from rmoe.engine.task_config import config_of, model_tasks
from rmoe.errors import UserError
from rmoe.moe.state import local_experts
from rmoe.registry import HOOKS

# The order of hooks behind a step of the optimizer, as mmengine's priorities, the smallest first: what changes weights
# or statistics, what averages them, and what stops the clock. All others come later.
CHANGES, AVERAGES, STOPS = 0, 5, 10
_FILE = ".pth"  # suffix of a file of weights


class RunningStatsHook(Hook):
    """Sets the running statistics of batch and instance norms, after each step, to the mean of the processes'.

    DeepSpeed leaves each process its own, and checkpoints and `model.safetensors` would have those of the first alone.
    Synchronised batch norm has the same ones everywhere and is left to itself.
    """

    priority = CHANGES

    def before_train(self, runner: Any) -> None:
        """Finds the norms that keep statistics."""
        norms = [x for x in runner.model.module.modules() if isinstance(x, _NormBase) and x.running_mean is not None]
        own = [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm)]
        self._stats = [stat for norm in own for stat in (norm.running_mean, norm.running_var)]

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Averages all of them by one all-reduce."""
        if self._stats:
            all_reduce_params(self._stats, coalesce=True, op="mean")


class LocalExpertsHook(Hook):
    """Gives every process all experts while it evaluates, so that processes may run different batches."""

    priority = "HIGHEST"  # the first after an evaluation: the best checkpoint is saved by a later hook

    def __init__(self) -> None:
        self._open = ExitStack()

    def before_val_epoch(self, runner: Any) -> None:
        """Gathers the experts; collective over the expert groups."""
        self._open.enter_context(local_experts(runner.model.evaluated))

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Releases them, so that processes may train again."""
        self._open.close()

    def at_end(self, runner: Any) -> None:
        """Releases them at the end, whatever that was: an evaluation may have failed. Our runner calls it."""
        self._open.close()

    before_test_epoch, after_test_epoch = before_val_epoch, after_val_epoch


@HOOKS.register_module()
class EMAHook(Hook):
    """Keeps an exponential moving average of the weights, which is what is evaluated and exported.

        custom_hooks = [dict(type="rmoe.EMAHook", momentum=1e-4)]

    After the first step of the optimizer the average is the weights; after each later one,
    average ← (1 - momentum) · average + momentum · weights, in float32. Buffers, such as batch norm's statistics, are
    those of the weights. Each process averages the experts that it holds. Evaluation, the best checkpoint and
    `model.safetensors` have the average; training checkpoints have both, and go on exactly at any number of processes
    and any ep_size. Works at ZeRO stages 0, 1 and 2.

    Args:
        momentum: 1 - decay: a decay of 0.9999 in timm is 1e-4 here.

    Raises:
        UserError: `momentum` is not between 0 and 1.
    """

    priority = AVERAGES

    def __init__(self, momentum: float = 1e-4) -> None:
        if not isinstance(momentum, float) or not 0 < momentum < 1:
            raise UserError(f"rmoe.EMAHook: momentum is {momentum!r}; it is a number between 0 and 1, such as 1e-4")
        self._momentum = momentum

    def before_resume(self, runner: Any) -> None:
        """Makes the average. Our runner calls it before it loads a checkpoint, which may have one."""
        self._average = ExponentialMovingAverage(runner.model.module, self._momentum)
        runner.model.averaged = self._average.module.eval()

    def before_train(self, runner: Any) -> None:
        """Tells the average how many steps are in it already."""
        self._average.steps.fill_(runner.model.global_steps)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Updates the average once for each step of the optimizer."""
        if (runner.iter + 1) % runner.strategy.layout.accumulation == 0:
            self._average.update_parameters(runner.model.module)


class CostHook(Hook):
    """Adds up what training costs and writes `cost.json` at its end. A resumed run goes on adding.

    Args:
        stage: of the pipeline, as the config says.
    """

    priority = STOPS  # other hooks' time does not count
    _KEY = "cost"  # in the message hub, whose content is part of a checkpoint

    def __init__(self, stage: str | None = None) -> None:
        self._stage = stage
        self._counting = ExitStack()
        self._flops: list[int] = []

    def before_train(self, runner: Any) -> None:
        """Goes on from the sums of the checkpoint, if there is one."""
        empty = {"train_seconds": 0.0, "steps": 0, "images": 0, "flops_per_step": None, "flops_step": None}
        self._sums: dict[str, Any] = dict(runner.message_hub.runtime_info.get(self._KEY, empty))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Starts the clock; the first step of a run is counted."""
        self._start = time.perf_counter()
        if self._sums["flops_per_step"] is None:
            self._counting.enter_context(cost.counted_flops(self._flops))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Adds the step up."""
        if self._sums["flops_per_step"] is None:
            self._counting.close()
            self._sums |= {"flops_per_step": self._flops[0], "flops_step": runner.iter + 1}
        self._sums["train_seconds"] += time.perf_counter() - self._start
        self._sums["steps"] += 1
        self._sums["images"] += _samples(data_batch) * get_world_size()
        runner.message_hub.update_info(self._KEY, dict(self._sums))

    def after_train(self, runner: Any) -> None:
        """Writes `cost.json`; collective, and the first process writes.

        Raises:
            UserError: a file cannot be written.
        """
        peak, parameters, strategy = cost.peak_memory(), runner.strategy.parameters, runner.strategy
        devices, seconds = get_world_size(), self._sums["train_seconds"]
        content = {
            "stage": self._stage,
            "device": cost.device_kind(),
            "devices": devices,
            "train_seconds": seconds,
            "device_seconds": seconds * devices,
            **{key: value for key, value in self._sums.items() if key != "train_seconds"},
            "params_total": parameters.total,
            "params_active": parameters.active,
            "params_trainable": parameters.trainable,
            "params_by_part": {name: one._asdict() for name, one in strategy.parts.items()},
            "peak_memory_bytes": peak,
            "zero_stage": zero_stage(strategy.config),
            "precision": precision(strategy.config),
            "ep_size": strategy.layout.ep_size,
            "command": [word for word in sys.argv if not word.startswith("--local_rank")],
            "software": cost.software(),
        }
        path = Path(runner.work_dir) / "cost.json"
        with all_or_none(path.with_name(path.name + PARTIAL)):
            if is_main_process():
                write_json(path, content)


@HOOKS.register_module()
class CheckpointHook(MMCheckpointHook):
    """Saves as mmengine's hook does, and calls a training checkpoint, which is a folder, `iter_N` or `epoch_N`, and a
    file of the best weights `best_METRIC_iter_N.pth`.

    Two checkpoints are kept at least, as mmengine removes the old one before it writes the new one. A run may have
    begun when its folders were called `iter_N.pth`: `max_keep_ckpts` counts and removes those too.

    Args:
        filename_tmpl: another name for folders, with `{}` for N.
        max_keep_ckpts: how many are kept; -1 for all.
        **kwargs: those of mmengine's hook.
    """

    filename_tmpl: str

    def __init__(self, filename_tmpl: str | None = None, max_keep_ckpts: int = -1, **kwargs: Any) -> None:
        if max_keep_ckpts == 1:
            said = "max_keep_ckpts 1 could leave no checkpoint when a run is killed: keeping 2"
            print_log(said, logger="current", level=logging.WARNING)
            max_keep_ckpts = 2
        super().__init__(filename_tmpl=filename_tmpl, max_keep_ckpts=max_keep_ckpts, **kwargs)
        if filename_tmpl is None and self.save_optimizer:
            self.filename_tmpl = self.filename_tmpl.removesuffix(_FILE)
        self._template = self.filename_tmpl

    def before_train(self, runner: Any) -> None:
        """Prepares to save; removes what is kept no longer where `max_keep_ckpts` is smaller than before."""
        kept = [*runner.message_hub.runtime_info.get("keep_ckpt_ids", ())]
        super().before_train(runner)
        self._remove_old_names(kept)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        kept = [*getattr(self, "keep_ckpt_ids", ())]
        self.filename_tmpl = self._template
        super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_old_names(kept)

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        self.filename_tmpl = self._template.removesuffix(_FILE) + _FILE
        super()._save_best_checkpoint(runner, metrics)
        self.filename_tmpl = self._template

    def _remove_old_names(self, kept: Iterable[int]) -> None:
        """Removes the folder `iter_N.pth` of every N of `kept` that is not kept any more."""
        if self.max_keep_ckpts > 0 and is_main_process():
            for step in set(kept).difference(self.keep_ckpt_ids):
                shutil.rmtree(Path(self.out_dir) / (self._template.format(step) + _FILE), ignore_errors=True)


class ExportHook(Hook):
    """Leaves in the work dir `model.safetensors`, the whole model, `model.json`, what it is, and of a dense timm model
    `backbone.safetensors`; see `rmoe.engine.checkpoint.export`.

    Args:
        stage: of the pipeline, as the config says.
    """

    _KEY = "core_sha256"  # in the message hub, whose content is part of a checkpoint

    def __init__(self, stage: str | None = None) -> None:
        self._stage = stage

    def before_train(self, runner: Any) -> None:
        """Notes which core the run has started from; the file may be another one at its end, or when it is resumed."""
        known = self._KEY in runner.message_hub.runtime_info or not is_main_process()
        if not known and (digest := export.core_sha256(runner.cfg.model)):
            runner.message_hub.update_info(self._KEY, digest)

    def after_train(self, runner: Any) -> None:
        """Writes the model; collective, and the first process writes.

        Raises:
            UserError: a file cannot be written.
        """
        state, folder = runner.strategy.whole_state_dict(), Path(runner.work_dir)
        with all_or_none(folder / f"{export.MODEL}{PARTIAL}"):
            if is_main_process():
                config = _plain(runner.cfg.model.to_dict())
                metainfo = getattr(runner.train_loop.dataloader.dataset, "metainfo", None) or {}
                told: dict[str, Any]
                if names := model_tasks(config):
                    told = {"tasks": {name: _about(metainfo[name], config_of(runner.cfg, name)) for name in names}}
                else:
                    told = _about(metainfo, runner.cfg)
                digest = runner.message_hub.runtime_info.get(self._KEY)
                export.write_model(folder, state, config, stage=self._stage, core_sha256=digest, **told)
                about = {"stage": self._stage, "iterations": runner.iter, "model": config}
                write_json(folder / "model.json", about)


def _about(metainfo: Mapping[str, Any], cfg: Any) -> dict[str, Any]:
    """Returns what a run's file of weights says of classes and inputs, from the data set's metainfo and the config."""
    palette = metainfo.get("palette")
    return {
        "classes": metainfo.get("classes"),
        "palette": None if palette is None else [[int(shade) for shade in colour] for colour in palette],
        "inputs": _plain(export.inputs_of(cfg)),
    }


def _samples(batch: Any) -> int:
    """Returns the number of samples of a collated batch: a dict of lists or tensors, or a sequence of them; or of the
    batches of several tasks, in a dict.
    """
    if isinstance(batch, Mapping) and all(isinstance(one, Mapping) for one in batch.values()):
        return sum(map(_samples, batch.values()))
    first = (
        next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0] if isinstance(batch, Sequence) else batch
    )
    return len(first)


def _plain(value: Any) -> Any:
    """Returns `value` as JSON can hold it, and classes by their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return (
        value if value is None or isinstance(value, (str, int, float, bool)) else getattr(value, "__name__", str(value))
    )
