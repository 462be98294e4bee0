"""Hooks of mmengine's runner: evaluation without communication, cost, and what a finished run leaves."""

from __future__ import annotations

import math
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
from rmoe.moe.state import local_experts, moe_layers, residual_norms
from rmoe.registry import HOOKS
from rmoe.tasks.multi_task import MultiTask

_FILE = ".pth"  # suffix of a file of weights
_EXPERTS = 16  # of a layer whose load is logged one by one


class RunningStatsHook(Hook):
    """Sets the running statistics of batch and instance norms, after each step, to the mean of the processes'.

    DeepSpeed leaves each process its own, and checkpoints and `model.safetensors` would have those of the first alone.
    Synchronised batch norm has the same ones everywhere and is left to itself.
    """

    priority = "HIGHEST"  # before the clock is stopped: its time is the step's

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

    priority = "HIGHEST"  # before the clock is stopped: its time is the step's

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

    priority = "VERY_HIGH"  # other hooks' time does not count
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

    A run may have begun when its folders were called `iter_N.pth`: `max_keep_ckpts` counts and removes those too.

    Args:
        filename_tmpl: another name for folders, with `{}` for N.
        **kwargs: those of mmengine's hook.
    """

    filename_tmpl: str

    def __init__(self, filename_tmpl: str | None = None, **kwargs: Any) -> None:
        super().__init__(filename_tmpl=filename_tmpl, **kwargs)
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


@HOOKS.register_module()
class GateBalanceHook(Hook):
    """Logs how evenly each gate spreads the tokens, as text and to the visualizer, and warns of a gate that collapses.

        custom_hooks = [dict(type="rmoe.GateBalanceHook", interval=50, share=0.8, steps=100)]

    A run has one of its own accord, at the interval of its log. A line has for every mixture the largest share of the
    tokens that one expert holds, the entropy of the load (1 is even), and the mean of the largest gate probability. The
    visualizer gets these, the share of each of the first sixteen experts, and the mean norm of the residuals as a part
    of the core's. Of several tasks there is a line for each as well, and, where gates know them, `task_information`,
    what experts tell of tasks, in nats.

    Args:
        interval: iterations from one look to the next; only then is anything computed.
        share: of the tokens, above which an expert holds too many. Gates that use all experts are not judged.
        steps: for how many iterations it holds them before the layer is named in a warning.

    Raises:
        UserError: a number out of its range.
    """

    priority = "LOW"

    def __init__(self, interval: int = 10, share: float = 0.8, steps: int = 100) -> None:
        if not (interval >= 1 and 0 < share <= 1 and steps >= 0):
            raise UserError(
                f"rmoe.GateBalanceHook: interval is {interval}, share {share} and steps {steps}; interval is at least "
                "1, share between 0 and 1, and steps not negative"
            )
        self._interval, self._share, self._steps = interval, share, steps
        self._since: dict[str, int] = {}  # layer → the iteration at which it was first seen collapsed

    def before_train(self, runner: Any) -> None:
        """Looks up the names of layers and tasks."""
        self._names = {layer: name for name, layer in moe_layers(runner.model.module).items()}
        self._tasks = [*model.tasks] if isinstance(model := runner.model.module, MultiTask) else []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Looks at the gates, whose sums over all processes are at hand, and at the residuals: see `residual_norms`."""
        if not self.every_n_train_iters(runner, self._interval) or not self._names:
            return
        records, scalars = runner.model.records, self._look(runner, None, "")
        for number, task in enumerate(self._tasks):
            scalars |= self._look(runner, number, task)
        told = records.information() if self._tasks else {}
        scalars |= {f"gate/{self._names[layer]}/task_information": float(one) for layer, one in told.items()}
        scalars |= {f"residual/{name}": float(norm) for name, norm in residual_norms(runner.model.module).items()}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def _look(self, runner: Any, number: int | None, task: str) -> dict[str, float]:
        """Logs a line, of all tokens or of those of one task, and returns what the visualizer gets."""
        found: list[str] = []
        scalars: dict[str, float] = {}
        loads, place = runner.model.records.loads(number), f"{task}/" if task else ""
        for layer, balance in runner.model.records.balance(number).items():
            name, values = self._names[layer], [float(value) for value in balance]
            found.append(f"{name} " + " / ".join(f"{value:.3f}" for value in values))
            scalars |= {f"gate/{place}{name}/{key}": value for key, value in zip(balance._fields, values, strict=True)}
            shares = loads[layer][:_EXPERTS].tolist()
            scalars |= {f"load/{place}{name}/{e}": share for e, share in enumerate(shares)}
            if not task and layer.config.router != "task" and layer.config.chooses:
                self._judge(runner, name, values[0])
        of = f" of {task}" if task else ""
        runner.logger.info(f"gates{of}, largest share / entropy of the load / confidence: {', '.join(found)}")
        return scalars

    def _judge(self, runner: Any, name: str, share: float) -> None:
        if not share > self._share:
            self._since.pop(name, None)
            return
        since = self._since.setdefault(name, runner.iter)
        if since >= 0 and runner.iter - since >= self._steps:
            self._since[name] = -1  # told; until it recovers
            runner.logger.warning(
                f"the gate of {name} has collapsed: one expert has had more than {self._share:.0%} of the tokens for "
                f"{runner.iter - since} steps, {share:.0%} now; raise moe.losses.importance or moe.noise, or lower the "
                "gate's learning rate (paramwise_cfg.gate_lr_mult)"
            )


@HOOKS.register_module()
class TemperatureHook(Hook):
    """Lets the temperature of the gates fall to that of their config, in equal steps, as MoE Jetpack does.

        custom_hooks = [dict(type="rmoe.TemperatureHook", begin=2.0, until=0.5)]

    While it falls, evaluation in training has it too; weights that are saved by then are evaluated at the end's.

    Args:
        begin: the factor of the temperature at the first step, above 0; below 1 it rises.
        until: the share of training after which it is 1.

    Raises:
        UserError: a number out of its range.
    """

    def __init__(self, begin: float = 2.0, until: float = 1.0) -> None:
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (begin, until))
        if not (numbers and 0 < begin < math.inf and 0 < until <= 1):
            raise UserError(
                f"rmoe.TemperatureHook: begin is {begin!r} and until {until!r}; begin is above 0, until above 0 and at "
                "most 1"
            )
        self._begin, self._until = begin, until

    def before_train(self, runner: Any) -> None:
        """Finds the gates."""
        self._gates = [layer.gate for layer in moe_layers(runner.model.module).values()]

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the temperature of a step, which follows from its number alone."""
        last = max(self._until * runner.max_iters - 1, 1)
        done = min(runner.iter / last, 1.0)
        for gate in self._gates:
            gate.heat = self._begin + (1.0 - self._begin) * done


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
