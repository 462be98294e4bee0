"""Hooks of mmengine's runner: evaluation without communication, cost, and what a finished run leaves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmengine.dist import all_reduce_params, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import ExponentialMovingAverage
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rmoe.engine import cost
from rmoe.engine.checkpoint.files import PARTIAL, all_or_none
from rmoe.engine.ds_json import precision, zero_stage
from rmoe.errors import UserError
from rmoe.moe.state import local_experts, moe_layers
from rmoe.registry import HOOKS


class RunningStatsHook(Hook):
    """After each step, the running statistics of batch and instance norms are the mean of the processes'.

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
        """One all-reduce of all of them."""
        if self._stats:
            all_reduce_params(self._stats, coalesce=True, op="mean")


class LocalExpertsHook(Hook):
    """Every process holds all experts while it evaluates, so that processes may run different batches."""

    priority = "HIGHEST"  # the first after an evaluation: the best checkpoint is saved by a later hook

    def __init__(self) -> None:
        self._open = ExitStack()

    def before_val_epoch(self, runner: Any) -> None:
        """Collective over the expert groups."""
        self._open.enter_context(local_experts(runner.model.evaluated))

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Processes may train again."""
        self._open.close()

    def restore_terminal(self, runner: Any) -> None:
        """Called by our runner at the end, whatever that was: an evaluation may have failed."""
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
        """Called by our runner before it loads a checkpoint, which also loads the average."""
        self._average = ExponentialMovingAverage(runner.model.module, self._momentum)
        runner.model.averaged = self._average.module.eval()

    def before_train(self, runner: Any) -> None:
        """How many steps are in the average already."""
        self._average.steps.fill_(runner.model.global_steps)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Once for each step of the optimizer."""
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
        """From where the checkpoint left off, if there is one."""
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
        """Collective; the first process writes.

        Raises:
            UserError: it cannot.
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
            "peak_memory_bytes": peak,
            "zero_stage": zero_stage(strategy.config),
            "precision": precision(strategy.config),
            "ep_size": strategy.layout.ep_size,
            "software": cost.software(),
        }
        path = Path(runner.work_dir) / "cost.json"
        with all_or_none(path.with_name(path.name + PARTIAL)):
            if is_main_process():
                write_json(path, content)


class ExportHook(Hook):
    """Leaves `model.safetensors`, the whole model, and `model.json`, what it is, in the work dir.

    Args:
        stage: of the pipeline, as the config says.
    """

    def __init__(self, stage: str | None = None) -> None:
        self._stage = stage

    def after_train(self, runner: Any) -> None:
        """Collective; the first process writes.

        Raises:
            UserError: it cannot.
        """
        state, folder = runner.strategy.whole_state_dict(), Path(runner.work_dir)
        partial = folder / f"model.safetensors{PARTIAL}"
        with all_or_none(partial):
            if is_main_process():
                save_file({key: x.contiguous() for key, x in state.items()}, partial)
                os.replace(partial, folder / "model.safetensors")
                about = {"stage": self._stage, "iterations": runner.iter, "model": _plain(runner.cfg.model.to_dict())}
                write_json(folder / "model.json", about)


@HOOKS.register_module()
class GateBalanceHook(Hook):
    """Logs how evenly each gate spreads the tokens, as text and to the visualizer, and warns of a gate that collapses.

        custom_hooks = [dict(type="rmoe.GateBalanceHook", interval=50, share=0.8, steps=100)]

    A run has one of its own accord, at the interval of its log. A line has for every mixture the largest share of the
    tokens that one expert holds, the entropy of the load (1 is even), and the mean of the largest gate probability.

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
        """Looks up the layers' names."""
        self._names = {layer: name for name, layer in moe_layers(runner.model.module).items()}

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Looks at the gates. Nothing is communicated: the losses' sums over all processes are at hand."""
        if not self.every_n_train_iters(runner, self._interval) or not self._names:
            return
        found: list[str] = []
        scalars: dict[str, float] = {}
        for layer, balance in runner.model.records.balance().items():
            name, values = self._names[layer], [float(value) for value in balance]
            found.append(f"{name} " + " / ".join(f"{value:.3f}" for value in values))
            scalars |= {f"gate/{name}/{key}": value for key, value in zip(balance._fields, values, strict=True)}
            if 1 <= layer.config.top_k < layer.num_experts:
                self._judge(runner, name, values[0])
        runner.logger.info(f"gates, largest share / entropy of the load / confidence: {', '.join(found)}")
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes aside, then renames."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def _samples(batch: Any) -> int:
    """Of a collated batch: a dict of lists or tensors, or a sequence of them."""
    first = (
        next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0] if isinstance(batch, Sequence) else batch
    )
    return len(first)


def _plain(value: Any) -> Any:
    """As JSON can hold it; classes by their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return (
        value if value is None or isinstance(value, (str, int, float, bool)) else getattr(value, "__name__", str(value))
    )
