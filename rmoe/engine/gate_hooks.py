"""Hooks of mmengine's runner for mixtures: what gates decide is told, how sharply they decide, how far experts part."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from mmengine.hooks import Hook

from rmoe.engine.check_values import between, check_arguments, whole
from rmoe.engine.hooks import CHANGES
from rmoe.errors import UserError
from rmoe.moe.exchange import expert_group
from rmoe.moe.experts import Full
from rmoe.moe.state import moe_layers, residual_norms
from rmoe.registry import HOOKS
from rmoe.tasks.multi_task import MultiTask

_EXPERTS = 16  # of a layer whose load is logged one by one


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
        share: of the tokens, above which an expert holds too many; of the gate's values, where all experts are used.
        steps: for how many iterations it holds them before the layer is named in a warning.

    Raises:
        UserError: a number out of its range.
    """

    priority = "LOW"

    def __init__(self, interval: int = 10, share: float = 0.8, steps: int = 100) -> None:
        numbers = {"interval": (interval, whole(1)), "share": (share, between(0, 1)), "steps": (steps, whole(0))}
        check_arguments("rmoe.GateBalanceHook", **numbers)
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
        sharded = runner.model.zero_optimization_partition_weights()
        norms = residual_norms(
            runner.model.module, lambda layer: deepspeed.zero.GatheredParameters([*layer.parameters()], enabled=sharded)
        )
        scalars |= {f"residual/{name}": float(norm) for name, norm in norms.items()}
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
            if not task and layer.config.router != "task" and layer.num_experts > 1:
                self._judge(runner, layer, values[0])
        of = f" of {task}" if task else ""
        runner.logger.info(f"gates{of}, largest share / entropy of the load / confidence: {', '.join(found)}")
        return scalars

    def _judge(self, runner: Any, layer: Any, share: float) -> None:
        name = self._names[layer]
        if not share > self._share:
            self._since.pop(name, None)
            return
        since = self._since.setdefault(name, runner.iter)
        if since >= 0 and runner.iter - since >= self._steps:
            self._since[name] = -1  # told; until it recovers
            runner.logger.warning(
                f"the gate of {name} has collapsed: one expert has had more than {self._share:.0%} of the load for "
                f"{runner.iter - since} steps, {share:.0%} now; raise moe.losses.importance"
                f"{' or moe.noise' if layer.config.chooses else ''}, or lower the gate's learning rate "
                "(paramwise_cfg.gate_lr_mult)"
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
        check_arguments("rmoe.TemperatureHook", begin=(begin, between(0)), until=(until, between(0, 1)))
        self._begin, self._until = begin, until

    def before_train(self, runner: Any) -> None:
        """Finds the gates, those of an average of the weights too, which is what is evaluated."""
        models = {runner.model.module, runner.model.evaluated}
        self._gates = [layer.gate for model in models for layer in moe_layers(model).values()]

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the temperature of a step, which follows from its number alone."""
        last = max(self._until * runner.max_iters - 1, 1)
        done = min(runner.iter / last, 1.0)
        for gate in self._gates:
            gate.heat = self._begin + (1.0 - self._begin) * done


@HOOKS.register_module()
class AverageExpertsHook(Hook):
    """Draws the experts to their mean after each step of the optimizer, Δ_e ← Δ_e + rate · (mean Δ − Δ_e).

        custom_hooks = [dict(type="rmoe.AverageExpertsHook", rate=0.1)]

    The closer the experts are at the end, the less is changed by `rmoe merge --average`, which makes one dense network
    of them (Experts Weights Averaging, arXiv 2308.06093). The mean is of all experts, on however many processes they
    are, in float32. Under ZeRO each step sends the experts' weights once more.

    Experts that are frozen stay as they are.

    Args:
        rate: above 0; with 1 all experts are the same after each step.

    Raises:
        UserError: the rate is out of its range; at the start, residuals are not of the core's shape, whose mean would
            be no mean of networks, all are frozen, or ZeRO's stage is 3.
    """

    priority = CHANGES

    def __init__(self, rate: float = 0.1) -> None:
        check_arguments("rmoe.AverageExpertsHook", rate=(rate, between(0, 1)))
        self._rate = float(rate)

    def before_train(self, runner: Any) -> None:
        """Finds the experts."""
        layers: dict[str, Any] = {**moe_layers(runner.model.module)}
        for name, layer in layers.items():
            if not isinstance(layer.residuals(), Full):
                raise UserError(
                    f"rmoe.AverageExpertsHook: the experts of {name} are residuals of kind '{layer.config.residual}', "
                    "whose mean is no network's; take residual='full' or 'experts', or leave the hook out"
                )
        if runner.model.zero_optimization_stage() == 3:
            raise UserError("rmoe.AverageExpertsHook works at ZeRO stages 0, 1 and 2; give another DeepSpeed JSON")
        self._experts = [
            (parameter, layer.ep_size)
            for layer in layers.values()
            for parameter in layer.deepspeed_moe.experts.own().values()
            if parameter.requires_grad
        ]
        if layers and not self._experts:
            raise UserError("rmoe.AverageExpertsHook: all experts are frozen; train some, or leave the hook out")

    @torch.no_grad()
    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Changes the weights, and the copy of them that DeepSpeed's optimizer keeps. Collective."""
        if (runner.iter + 1) % runner.strategy.layout.accumulation:
            return
        for parameter, ep_size in self._experts:
            kept = safe_get_full_fp32_param(parameter)  # None where there is no copy
            experts = parameter.float() if kept is None else kept
            mean = experts.mean(0)
            if ep_size > 1:
                dist.all_reduce(mean, group=expert_group(ep_size))
                mean /= ep_size
            nearer = torch.lerp(experts, mean, self._rate)
            parameter.copy_(nearer)
            if kept is not None:
                safe_set_full_fp32_param(parameter, nearer)
