"""What the gates of a model decided in a forward pass: their losses, their balance and their routing.

    with collect() as records:
        loss = criterion(model(images), labels)
    loss = loss + records.loss()
    ...  # backward, the optimizer's step
    records.balance_experts()  # for gates with a balance_rate

`collect` is the one way to it. Outside of it nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from rmoe.config import GateLosses
from rmoe.moe.exchange import SumOverProcesses
from rmoe.moe.gate import Routing
from rmoe.moe.gate_losses import Balance, GateSums, gate_balance, gate_load, gate_loss
from rmoe.moe.tasks import current_task, task_information

if TYPE_CHECKING:
    from rmoe.moe.layer import ResidualMoE


class Records:
    """Holds what the gates decided while `collect` was on.

    Attributes:
        routing: the last routing of each layer that ran.
        sums: of each layer that ran in training, by the task of the pass (0 outside of `rmoe.task`), what its losses
            need. Several forward passes in one block add up, as the parts of one batch would. All processes run the
            same layers and tasks in the same order.
    """

    def __init__(self) -> None:
        self.routing: dict[ResidualMoE, Routing] = {}
        self.sums: dict[tuple[ResidualMoE, int], GateSums] = {}
        self._over_processes: dict[tuple[ResidualMoE, int], GateSums] | None = None

    def add(self, layer: ResidualMoE, routing: Routing) -> None:
        """Takes in the decisions of one forward pass of `layer`."""
        self.routing[layer] = routing
        if routing.sums is not None:
            key = layer, current_task() or 0
            self.sums[key] = _added([self.sums[key], routing.sums]) if key in self.sums else routing.sums
            self._over_processes = None

    def loss(self) -> Tensor:
        """Returns the gates' losses over the global batch, weighted and summed over layers: a float32 scalar.

        It is 0 where no gate ran in training: for a dense model, and in evaluation. One all-reduce for all layers:
        every process must call it.

        Raises:
            RuntimeError: the gates ran without gradient, as under reentrant activation checkpointing.
        """
        trained = torch.is_grad_enabled() and any(layer.gate.weight.requires_grad for layer, _ in self.sums)
        if trained and not any(part.requires_grad for sums in self.sums.values() for part in sums):
            raise RuntimeError("the gates ran without gradient: checkpoint activations with use_reentrant=False")
        alike: dict[tuple[int, GateLosses], list[GateSums]] = {}  # layers whose losses are one computation
        for layer, sums in self._totals().items():
            alike.setdefault((layer.num_experts, layer.config.losses), []).append(sums)
        losses = [
            gate_loss(group[0], weights) if len(group) == 1 else gate_loss(_stacked(group), weights).sum()
            for (_, weights), group in alike.items()
        ]
        if any(layer.config.losses.task_information for layer, _ in self.sums):
            losses += [-layer.config.losses.task_information * one for layer, one in self.information().items()]
        return sum(losses[1:], losses[0]) if losses else torch.zeros(())

    def average(self, values_N: Tensor) -> Tensor:
        """Returns the mean over the processes of `values_N`, in float32 and without gradient.

        It is for what else is told of a step: the values travel with what `loss` needs, in one all-reduce, if this is
        called before `loss`.
        """
        processes = dist.get_world_size() if dist.is_initialized() else 1
        return self._add_up(values_N.detach().float()) / processes

    def information(self) -> dict[ResidualMoE, Tensor]:
        """Returns what the experts of each layer with `tasks` tell of the tasks of the global batch, see
        `rmoe.moe.tasks.task_information`: scalars; collective as `loss`.
        """
        shares: dict[ResidualMoE, list[Tensor]] = {}
        for (layer, _), sums in self._by_task().items():
            if layer.config.tasks > 1:
                shares.setdefault(layer, []).append(sums.probability_E / sums.tokens)
        return {layer: task_information(torch.stack(found)) for layer, found in shares.items()}

    def join(self, losses: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the task's `losses` and, where a gate ran in training, the gates' as `loss_moe_aux`; see `loss`."""
        return {**losses, "loss_moe_aux": self.loss()} if self.sums else dict(losses)

    @torch.no_grad()
    def balance(self, task: int | None = None) -> dict[ResidualMoE, Balance]:
        """Returns how evenly the gate of each layer spread the tokens of the global batch, or those of one task.

        It reuses the sums of `loss`; called alone it is collective as that is.
        """
        return {layer: gate_balance(sums) for layer, sums in self._totals(task).items()}

    def balance_experts(self, step: bool = True) -> None:
        """Moves the biases by which gates with a `balance_rate` choose (loss-free balancing, arXiv 2408.15664).

        Call it after each training step: nothing else moves them. It is the same on every process, reuses the sums of
        `loss`, and alone it is collective as that is.

        Args:
            step: whether the optimizer makes a step with this batch; False for the parts of one that accumulates
                gradients, save the last.
        """
        if any(layer.config.balance_rate for layer, _ in self.sums):
            for layer, sums in self._totals().items():
                layer.gate.balance(sums.chosen_E.detach(), step)

    @torch.no_grad()
    def loads(self, task: int | None = None) -> dict[ResidualMoE, Tensor]:
        """Returns the share of the global batch's tokens that use each expert, [E], by layer; as `balance`."""
        return {layer: gate_load(sums) for layer, sums in self._totals(task).items()}

    def _totals(self, task: int | None = None) -> dict[ResidualMoE, GateSums]:
        """Returns the sums over all processes, and over the tasks unless one is named."""
        found: dict[ResidualMoE, list[GateSums]] = {}
        for (layer, number), sums in self._by_task().items():
            if task in (None, number):
                found.setdefault(layer, []).append(sums)
        return {layer: _added(parts) for layer, parts in found.items()}

    def _by_task(self) -> dict[tuple[ResidualMoE, int], GateSums]:
        """Returns the sums over all processes, communicated once."""
        if self._over_processes is None:
            self._add_up(torch.zeros(0))
        assert self._over_processes is not None
        return self._over_processes

    def _add_up(self, values_N: Tensor) -> Tensor:
        """Sums over all processes, in one all-reduce, what the losses need, for `_by_task`, and `values_N`."""
        with torch.enable_grad():  # whoever asks first: `loss` needs the gradient
            return self._summed(values_N)

    def _summed(self, values_N: Tensor) -> Tensor:
        parts = [part for sums in self.sums.values() for part in sums]
        parts += [values_N] if len(values_N) else []
        if parts and dist.is_initialized() and dist.get_world_size() > 1:
            flat = SumOverProcesses.apply(torch.cat([part.reshape(-1) for part in parts]))
            summed = flat.split([part.numel() for part in parts])
            parts = [total.view_as(part) for total, part in zip(summed, parts, strict=True)]
        every = iter(parts)
        self._over_processes = {key: GateSums(*(next(every) for _ in GateSums._fields)) for key in self.sums}
        return next(every, values_N).detach()


def _added(parts: list[GateSums]) -> GateSums:
    return (
        parts[0] if len(parts) == 1 else GateSums(*(sum(column[1:], column[0]) for column in zip(*parts, strict=True)))
    )


def _stacked(group: list[GateSums]) -> GateSums:
    return GateSums(*map(torch.stack, zip(*group, strict=True)))


_RECORDS: ContextVar[Records | None] = ContextVar("rmoe_records", default=None)
_open, _counting = 0, Lock()  # blocks of `collect` in all threads of the process


@contextmanager
def collect() -> Iterator[Records]:
    """Collects what the gates decide inside the block, in this thread, and yields it as `Records`.

        with rmoe.collect() as records:
            loss = criterion(model(images), labels)
        loss = loss + records.loss()

    A layer that activation checkpointing runs again counts once; a model that runs twice counts twice. A model that is
    compiled leaves nothing in evaluation.
    """
    global _open
    records = Records()
    token = _RECORDS.set(records)
    with _counting:
        _open += 1
    try:
        yield records
    finally:
        with _counting:
            _open -= 1
        _RECORDS.reset(token)


def record(layer: ResidualMoE, routing: Routing) -> None:
    """Adds the decisions of `layer` to the `collect` block that it runs in, if it runs in one.

    Raises:
        RuntimeError: the layer trains in another thread than the one that opened the block, where its losses would
            be lost.
    """
    if routing.sums is None and torch.compiler.is_compiling():
        return  # evaluation, in a graph that is compiled or exported: it has tensors alone
    if torch._C._current_graph_task_id() != -1:
        return  # a backward pass: activation checkpointing runs the layer again
    if (records := _RECORDS.get()) is not None:
        records.add(layer, routing)
    elif _open and routing.sums is not None and torch.is_grad_enabled():
        raise RuntimeError("a gate trains in a thread without collect(), another has it open; open it in each of them")
