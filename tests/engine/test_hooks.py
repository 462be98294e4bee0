"""The order around an evaluation, the average of the weights, and the balance of the gates."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.runner import get_priority
from timm.layers import Mlp
from torch import nn
from toy import ToyModel, ToyTokens

from rmoe.config import ResidualMoEConfig
from rmoe.engine import hooks
from rmoe.engine.gate_hooks import AverageExpertsHook, GateBalanceHook, TemperatureHook
from rmoe.engine.hooks import CostHook, EMAHook, LocalExpertsHook, RunningStatsHook
from rmoe.engine.strategy import Engine
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect


class Runner:
    """What the hooks look at."""

    max_iters, iter = 3, 0

    def __init__(self) -> None:
        self.logger = logging.Logger("test")
        self.logger.addHandler(logging.StreamHandler(sys.stdout))
        self.model = self


def noted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Returns a list that notes each time when experts become local, True, and cease to be, False."""
    inside = []

    @contextmanager
    def local(module: Any) -> Any:
        inside.append(True)
        yield
        inside.append(False)

    monkeypatch.setattr(hooks, "local_experts", local)
    return inside


def test_experts_are_local_while_evaluating_and_not_while_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = noted(monkeypatch)
    runner = Runner()
    runner.evaluated = None  # type: ignore[attr-defined]
    hook = LocalExpertsHook()
    for _ in range(2):
        hook.before_val_epoch(runner)
        assert inside[-1]
        hook.after_val_epoch(runner, metrics={})
        assert not inside[-1]
    from mmengine.hooks import CheckpointHook

    assert get_priority(hook.priority) < get_priority(CheckpointHook.priority)


def test_an_evaluation_that_fails_leaves_no_local_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = noted(monkeypatch)
    runner, hook = Runner(), LocalExpertsHook()
    runner.evaluated = None  # type: ignore[attr-defined]
    hook.before_val_epoch(runner)
    hook.at_end(runner)
    assert inside == [True, False]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)])
def test_every_running_statistic_is_shared(norm: nn.Module) -> None:
    runner, hook = Runner(), RunningStatsHook()
    plain = [nn.InstanceNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2)]
    runner.module = nn.Sequential(norm, *plain)  # type: ignore[attr-defined]
    hook.before_train(runner)
    assert [id(one) for one in hook._stats] == [id(norm.running_mean), id(norm.running_var)]


def test_the_average_by_hand() -> None:
    """After steps of one and two iterations: the first weights, then 0.75 of the average and 0.25 of the weights."""
    runner = Runner()
    runner.module = nn.BatchNorm1d(1)  # type: ignore[attr-defined]
    runner.global_steps, runner.strategy = 0, SimpleNamespace(layout=SimpleNamespace(accumulation=2))  # type: ignore[attr-defined]
    hook = EMAHook(momentum=0.25)
    hook.before_resume(runner)
    hook.before_train(runner)
    averaged = runner.averaged  # type: ignore[attr-defined]
    seen = []
    for step, weight in enumerate([5.0, 8.0, 6.0, 16.0]):
        runner.iter = step
        with torch.no_grad():
            runner.module.weight.fill_(weight)  # type: ignore[attr-defined]
            runner.module.running_mean.fill_(weight)  # type: ignore[attr-defined]
        hook.after_train_iter(runner, step)
        seen.append((averaged.weight.item(), averaged.running_mean.item()))
    assert seen == [(1.0, 0.0), (8.0, 8.0), (8.0, 8.0), (10.0, 16.0)]
    assert not averaged.training
    assert averaged.weight.dtype == torch.float32
    for momentum in (0, 1, -0.1):
        with pytest.raises(UserError, match="momentum"):
            EMAHook(momentum=momentum)


def test_the_average_is_evaluated() -> None:
    plain, averaged = (ToyModel() for _ in range(2))
    for model in (plain, averaged):
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    with torch.no_grad():
        averaged.head.bias[1] = 1.0
    engine = Engine(model=SimpleNamespace(module=plain))
    samples = [ToyTokens()[0]]
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    assert engine.val_step(batch)[0].guess == 0
    engine.averaged = averaged
    assert engine.val_step(batch)[0].guess == 1


class Balanced(Runner):
    """A runner whose model has one mixture of four experts, with a visualizer that remembers."""

    def __init__(self, top_k: int = 1, experts: int = 4) -> None:
        super().__init__()
        config = ResidualMoEConfig(num_experts=experts, top_k=top_k, noise=0.0, gate_std=0.0)
        self.module = nn.Sequential(nn.Identity(), ResidualMoE(Mlp(2, 4), config))
        self.zero_optimization_partition_weights = lambda: False
        self.visualizer = SimpleNamespace(add_scalars=lambda scalars, step: self.scalars.append((step, scalars)))
        self.scalars: list[tuple[int, dict[str, float]]] = []

    def run(self, hook: GateBalanceHook, collapsed: Sequence[bool]) -> None:
        hook.before_train(self)
        for self.iter, alone in enumerate(collapsed):
            with torch.no_grad():
                first = torch.eye(4)[: self.module[1].num_experts, :2]
                self.module[1].gate.weight.copy_(first[:, :1].expand(-1, 2) if alone else first)
            with collect() as self.records:
                self.module(torch.tensor([[4.0, 1.0], [1.0, 4.0]]).repeat(3, 1))
            hook.after_train_iter(self, self.iter)


def test_the_balance_of_every_gate_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    runner = Balanced()
    runner.run(GateBalanceHook(interval=2), [False] * 4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "1 0.500 / 0.500 / 0.9" in lines[0]
    assert [step for step, _ in runner.scalars] == [2, 4]
    gates, loads = {"gate/1/largest_share", "gate/1/entropy", "gate/1/confidence"}, {f"load/1/{e}" for e in range(4)}
    assert set(runner.scalars[0][1]) == gates | loads | {"residual/1"}
    assert runner.scalars[0][1]["residual/1"] == 0


@pytest.mark.parametrize(
    ("collapsed", "top_k", "warnings"),
    [
        ([True] * 3, 1, 0),  # not for long enough
        ([True] * 9, 1, 1),  # once
        ([True, True, False] * 3, 1, 0),  # it recovers each time
        ([True] * 4 + [False] + [True] * 4, 1, 2),  # again after it has recovered
        ([True] * 9, 4, 1),  # every token has all experts, and next to nothing of three
        ([False] * 9, 4, 0),
    ],
)
def test_a_collapsed_gate_is_named(
    collapsed: list[bool], top_k: int, warnings: int, capsys: pytest.CaptureFixture[str]
) -> None:
    Balanced(top_k).run(GateBalanceHook(interval=1, share=0.8, steps=3), collapsed)
    said = "the gate of 1 has collapsed: one expert has had more than 80% of the load for 3 steps"
    assert capsys.readouterr().out.count(said) == warnings


def test_an_only_expert_is_no_collapse(capsys: pytest.CaptureFixture[str]) -> None:
    Balanced(1, experts=1).run(GateBalanceHook(interval=1, share=0.8, steps=3), [True] * 9)
    assert "has collapsed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        *({"interval": value} for value in (0, 1.5, True, "1")),
        *({"share": value} for value in (0.0, float("nan"), True, "0.5", 1.5)),
        *({"steps": value} for value in (-1, 0.5, None)),
    ],
)
def test_numbers_of_the_balance(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=f"rmoe.GateBalanceHook: {name} is .*; it takes a"):
        GateBalanceHook(**wrong)


@pytest.mark.parametrize(("until", "heats"), [(1.0, [3.0, 2.5, 2.0, 1.5, 1.0]), (0.6, [3.0, 2.0, 1.0, 1.0, 1.0])])
def test_the_temperature_falls(until: float, heats: list[float]) -> None:
    runner = Runner()
    runner.module = nn.Sequential(ResidualMoE(Mlp(4, 8), ResidualMoEConfig(num_experts=2, temperature=0.5)))  # type: ignore[attr-defined]
    runner.evaluated = copy.deepcopy(runner.module)  # type: ignore[attr-defined]
    runner.max_iters = 5
    gate = runner.module[0].gate  # type: ignore[attr-defined]
    logits = gate.logits(torch.eye(4))
    hook = TemperatureHook(begin=3.0, until=until)
    hook.before_train(runner)
    for runner.iter, heat in enumerate(heats):
        hook.before_train_iter(runner, runner.iter)
        assert gate.temperature == runner.evaluated[0].gate.temperature == pytest.approx(0.5 * heat)  # type: ignore[attr-defined]
        torch.testing.assert_close(gate.logits(torch.eye(4)), logits / heat)


@pytest.mark.parametrize(
    "values", [{"begin": 0}, {"begin": "2"}, {"begin": True}, {"begin": float("nan")}, {"until": 0}, {"until": 1.5}]
)
def test_a_temperature_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="TemperatureHook.*above 0"):
        TemperatureHook(**values)


def averaged(rate: float, accumulation: int = 1, stage: int = 0, **moe: Any) -> tuple[AverageExpertsHook, Runner]:
    """A hook at the start of a run of one process, whose experts are random."""
    runner = Runner()
    layer = ResidualMoE(Mlp(4, 8), ResidualMoEConfig(**({"num_experts": 3, "residual": "full"} | moe)))
    for parameter in layer.deepspeed_moe.parameters():
        torch.nn.init.normal_(parameter)
    runner.module = nn.Sequential(layer)  # type: ignore[attr-defined]
    runner.strategy = SimpleNamespace(layout=SimpleNamespace(accumulation=accumulation))  # type: ignore[attr-defined]
    runner.zero_optimization_stage = lambda: stage  # type: ignore[attr-defined]
    return AverageExpertsHook(rate), runner


@pytest.mark.parametrize("residual", ["full", "experts"])
def test_experts_are_drawn_to_their_mean(residual: str) -> None:
    hook, runner = averaged(0.25, accumulation=2, residual=residual)
    weights = dict(runner.module.named_parameters())  # type: ignore[attr-defined]
    before = {name: x.detach().clone() for name, x in weights.items()}
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)  # of two that are one step
    for name, x in weights.items():
        torch.testing.assert_close(x, before[name], atol=0, rtol=0)
    runner.iter = 1
    hook.after_train_iter(runner, 1)
    experts = [name for name in weights if "experts" in name]
    assert experts
    for name, x in weights.items():
        old = before[name]
        expected = old + 0.25 * (old.mean(0) - old) if name in experts else old
        torch.testing.assert_close(x, expected)


def test_frozen_experts_stay() -> None:
    hook, runner = averaged(1.0)
    frozen, *others = runner.module[0].deepspeed_moe.experts.own().values()  # type: ignore[attr-defined]
    frozen.requires_grad_(False)
    before = frozen.clone()
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    assert torch.equal(frozen, before)
    for x in others:
        torch.testing.assert_close(x, x[:1].expand_as(x))
        x.requires_grad_(False)
    with pytest.raises(UserError, match="all experts are frozen"):
        hook.before_train(runner)


def test_weights_are_changed_before_they_are_averaged_and_the_clock_stops() -> None:
    order = [AverageExpertsHook, EMAHook, CostHook]
    assert sorted(order, key=lambda hook: get_priority(hook.priority)) == order
    assert len({get_priority(hook.priority) for hook in order}) == 3
    assert get_priority(RunningStatsHook.priority) < get_priority(EMAHook.priority)


def test_what_has_no_mean_is_refused() -> None:
    for options, words in (
        ({"residual": "low_rank"}, "kind 'low_rank'.*no network"),
        ({"stage": 3}, "stages 0, 1 and 2"),
    ):
        hook, runner = averaged(0.5, **options)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=words):
            hook.before_train(runner)


@pytest.mark.parametrize("rate", [0, -1.0, 1.5, True, "0.1", float("nan"), None])
def test_rates_of_averaging(rate: Any) -> None:
    with pytest.raises(UserError, match="AverageExpertsHook: rate is .*above 0"):
        AverageExpertsHook(rate)
