"""What tests/distributed/test_elastic.py does not reach: optimizers and states that are refused, and plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import MultiStepLR, PolyLR
from timm.layers import Mlp
from torch import nn

from rmoe.config import ResidualMoEConfig
from rmoe.engine.checkpoint import resharding, run_state
from rmoe.engine.optim import DeepSpeedOptimWrapper, change_settings, settings
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one, which DeepSpeed does not know of."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(resharding, "_replicas", lambda parameter: None)
    yield
    dist.destroy_process_group()


def engine(kind: Any = torch.optim.AdamW, stage: int = 0, **options: Any) -> Any:
    """What `gather_tensors` and `restore_tensors` ask of DeepSpeed's engine; at stage 1 one flat tensor is stepped."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})
    parameters = list(module.parameters())
    if stage == 0:
        optimizer: Any = kind(parameters, lr=0.1, **options)
    else:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        starts = np.cumsum([0, *(p.numel() for p in parameters)])
        for p, start in zip(parameters, starts, strict=False):
            p._hp_mapping = SimpleNamespace(
                hp_fragment_address=SimpleNamespace(start=int(start), numel=p.numel()),
                lp_fragment_address=SimpleNamespace(start=0),
            )
        base = kind([flat], lr=0.1, **options)
        optimizer = SimpleNamespace(
            optimizer=base,
            param_groups=base.param_groups,
            single_partition_of_fp32_groups=[flat],
            bit16_groups=[parameters],
            refresh_fp32_params=lambda: flat.data.copy_(torch.cat([p.detach().flatten() for p in parameters])),
        )
    return SimpleNamespace(
        module=module,
        optimizer=optimizer,
        device="cpu",
        zero_optimization=lambda: stage > 0,
        zero_optimization_stage=lambda: stage,
        zero_optimization_partition_weights=lambda: False,
        torch_autocast_z0_gradscaler=None,
        **dict.fromkeys(("global_steps", "global_samples", "skipped_steps", "micro_steps"), 0),
    )


def step(one: Any, names: str) -> None:
    for name, parameter in one.module.named_parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if name[0] in names else None
    one.optimizer.step()


def test_by_hand() -> None:
    """A weight of two rows and a bias, flat in one tensor of eight, and single once more."""
    first, flat, last = engine(), engine(stage=1), engine()
    step(first, "ab")
    step(first, "ab")
    first.optimizer.param_groups[0]["lr"] = 0.025
    first.global_steps = 2
    tensors, about = resharding.gather_tensors(first)
    assert set(tensors) == {
        f"{kind}/{name}.{part}"
        for kind in ("weight", "exp_avg", "exp_avg_sq", "step")
        for name in "ab"
        for part in ("weight", "bias")
    }
    assert about["numbers"] == ["step"]
    resharding.restore_tensors(flat, tensors, json.loads(json.dumps(about)))
    values = flat.optimizer.single_partition_of_fp32_groups[0]
    state = flat.optimizer.optimizer.state[values]
    assert values[:6].equal(first.module["a"].weight.detach().flatten())
    assert state["exp_avg"][6:8].equal(first.optimizer.state[first.module["a"].bias]["exp_avg"])
    assert state["step"] == 2
    assert flat.optimizer.param_groups[0]["lr"] == 0.025
    assert flat.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert flat.global_steps == 2
    resharding.restore_tensors(last, *resharding.gather_tensors(flat))
    for one in (first, last):
        step(one, "ab")
    for name, parameter in first.module.named_parameters():
        assert parameter.equal(last.module.get_parameter(name))


def test_what_was_never_trained_has_no_state() -> None:
    first, flat = engine(), engine(stage=1)
    step(first, "a")
    tensors, about = resharding.gather_tensors(first)
    assert "exp_avg/b.weight" not in tensors
    resharding.restore_tensors(flat, tensors, about)
    state = flat.optimizer.optimizer.state[flat.optimizer.single_partition_of_fp32_groups[0]]
    assert not state["exp_avg"][8:].any()
    assert state["step"] == 1


def test_counts_that_zero_cannot_keep() -> None:
    first = engine()
    step(first, "a")
    step(first, "ab")
    resharding.restore_tensors(engine(), *resharding.gather_tensors(first))
    with pytest.raises(UserError, match=r"different values of 'step', from 1 to 2.*stage 0"):
        resharding.restore_tensors(engine(stage=1), *resharding.gather_tensors(first))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RMSprop])
def test_other_optimizers(kind: Any) -> None:
    first, flat = engine(kind), engine(kind, stage=1)
    step(first, "ab")
    tensors, about = resharding.gather_tensors(first)
    resharding.restore_tensors(flat, tensors, about)
    again, _ = resharding.gather_tensors(flat)
    assert again.keys() == tensors.keys()
    assert all(again[key].equal(tensors[key]) for key in tensors)


def test_states_that_cannot_be_spread() -> None:
    one = engine(torch.optim.Adafactor)
    step(one, "ab")
    with pytest.raises(UserError, match=r"Adafactor keeps 'col_var' of shape .*a.weight.*AdamW or SGD"):
        resharding.gather_tensors(one)


def test_another_optimizer_or_model() -> None:
    tensors, about = resharding.gather_tensors(engine())
    with pytest.raises(UserError, match="optimizer AdamW, the config's is SGD"):
        resharding.restore_tensors(engine(torch.optim.SGD), tensors, about)
    group = about["groups"][0]
    halves = [group["parameters"][:2], group["parameters"][2:]]
    groups = [
        {"parameters": names, "settings": {**group["settings"], "lr": lr}}
        for names, lr in zip(halves, (0.1, 0.2), strict=True)
    ]
    with pytest.raises(UserError, match="other groups of parameters"):
        resharding.restore_tensors(engine(), tensors, about | {"groups": groups})
    del tensors["weight/a.bias"]
    with pytest.raises(UserError, match=r"another model's: 1 weights differ, such as a.bias"):
        resharding.restore_tensors(engine(), tensors, about)


def test_milestones_are_met_after_a_resume() -> None:
    """JSON has no keys that are numbers, as mmengine's milestones are."""
    rates = []
    for resumed in (False, True):
        wrapper, schedule = milestones()
        for step in range(6):
            if resumed and step == 3:
                state = {"meta": {}, "message_hub": {"runtime_info": {}, "log_scalars": {}}}
                about, history = run_state.gather_state(state, wrapper, [schedule])
                saved = settings(wrapper.param_groups[0])
                wrapper, schedule = milestones()
                change_settings(wrapper.param_groups[0], saved)
                run_state.restore_state(json.loads(json.dumps(about)), history, wrapper, [schedule])
            schedule.step()
        rates.append(wrapper.param_groups[0]["lr"])
    assert rates == [pytest.approx(0.001)] * 2


def milestones() -> tuple[DeepSpeedOptimWrapper, MultiStepLR]:
    wrapper = DeepSpeedOptimWrapper(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    return wrapper, MultiStepLR(wrapper, milestones=[2, 5], by_epoch=False)


def test_the_run_as_plain_data() -> None:
    """A hub with a logged value, numpy's numbers and something that cannot be kept; a schedule in its middle."""
    wrappers = []
    for _ in range(2):
        bias, weight = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        wrappers.append(DeepSpeedOptimWrapper(torch.optim.SGD([{"params": [bias]}, {"params": [weight]}], lr=0.1)))
    schedules = [PolyLR(wrapper, power=1.0, eta_min=0.0, begin=0, end=10, by_epoch=False) for wrapper in wrappers]
    for _ in range(4):
        schedules[0].step()
    hub = MessageHub("kept")
    hub.update_scalar("train/loss", 0.1)
    hub.update_scalar("train/loss", 0.3)
    hub.update_info("best_score", np.float64(0.7))
    hub.update_info("dataset_meta", {"palette": np.arange(2), "classes": ("x",)})
    hub.update_info("open", open)
    state = {"meta": {"iter": 4}, "message_hub": hub.state_dict()}
    about, history = run_state.gather_state(state, wrappers[0], schedules[:1])
    about = json.loads(json.dumps(about))
    for group, saved in zip(wrappers[1].optimizer.param_groups, wrappers[0].optimizer.param_groups, strict=True):
        change_settings(group, settings(saved))  # as `resharding.restore_tensors` does
    restored = run_state.restore_state(about, history, wrappers[1], schedules[1:])
    assert restored["meta"] == {"iter": 4}
    other = MessageHub("other")
    other.load_state_dict(restored["message_hub"])
    assert isinstance(other.get_scalar("train/loss"), HistoryBuffer)
    assert other.get_scalar("train/loss").mean() == pytest.approx(0.2)
    assert other.get_info("best_score") == 0.7
    assert "open" not in other.runtime_info
    assert other.state_dict()["runtime_info"].keys() == {"best_score", "dataset_meta"}
    for schedule in schedules:
        schedule.step()
    rates = [[group["lr"] for group in wrapper.param_groups] for wrapper in wrappers]
    assert rates[0] == rates[1] == [pytest.approx(0.1 * 4 / 9)] * 3


def test_gates_of_before_they_had_a_bias_are_not_resumed() -> None:
    moe = nn.Sequential(ResidualMoE(Mlp(4, 8), ResidualMoEConfig(num_experts=2, rank=1)))
    tensors = {resharding.WEIGHT + name: x.clone() for name, x in moe.state_dict().items()}
    resharding.restore_weights(moe, tensors)
    del tensors[f"{resharding.WEIGHT}0.gate.bias"]
    with pytest.raises(UserError, match="gate.bias, whose training cannot go on: start a new run.*load_from"):
        resharding.restore_weights(moe, tensors)


def test_nodes_share_what_is_to_be_written() -> None:
    everywhere, sizes = (0, 1, 2, 3), {"a": 4, "b": 3, "c": 2, "d": 2, "e": 1}
    one_node = resharding.shared_out(sizes, dict.fromkeys(sizes, everywhere), [1, 1, 1, 1])
    assert one_node == dict.fromkeys(sizes, 0)
    two_nodes = resharding.shared_out(sizes, dict.fromkeys(sizes, everywhere), [1, 1, 2, 2])
    assert two_nodes == {"a": 0, "b": 2, "c": 2, "d": 0, "e": 2}


def test_ranks_agree_on_who_writes_experts() -> None:
    nodes, shared, sizes = [1, 1, 2, 2], (0, 1, 2, 3), {"dense": 9, "w1": 5, "w2": 5}
    for ranks in ((0, 2), (1, 3)):
        writers = resharding.shared_out(sizes, {"dense": shared, "w1": ranks, "w2": ranks}, nodes)
        assert writers == {"dense": 0, "w1": ranks[0], "w2": ranks[1]}
