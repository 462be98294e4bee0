"""What docs/design.md shows of a gate, a balance and a residual of one's own runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor

from rmoe import config as configuration
from rmoe import fields
from rmoe.config import ResidualMoEConfig
from rmoe.moe import kinds, routers
from rmoe.moe.experts import reference
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "design.md").read_text()
SECTION = PAGE.partition("## A gate, a residual, a balance of your own")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
WIDTH, HIDDEN, EXPERTS = 6, 10, 4


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs each block in the module that the page names, and does in the configuration what the page says."""
    monkeypatch.setattr(routers, "ROUTERS", dict(routers.ROUTERS))
    monkeypatch.setattr("rmoe.moe.layer.ROUTERS", routers.ROUTERS)
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))
    monkeypatch.setattr("rmoe.moe.stacked.KINDS", kinds.KINDS)
    for block in BLOCKS:
        module: Any = kinds if "KINDS" in block else routers
        exec(compile(block, "docs/design.md", "exec"), vars(module).copy())
    said = re.search(r'`("biases": Kind\(.*?\))`', SECTION)
    assert said
    new = eval("{" + said[1] + "}", {"Kind": configuration.Kind})
    monkeypatch.setattr(configuration, "KINDS", {**configuration.KINDS, **new})
    monkeypatch.setattr(configuration, "Router", Literal["linear", "scaled", "proportional"])
    monkeypatch.setattr(configuration, "Residual", Literal["low_rank", "biases"])
    fields._hints.cache_clear()
    yield
    fields._hints.cache_clear()


def layer(**config: Any) -> ResidualMoE:
    torch.manual_seed(0)
    return ResidualMoE(
        Mlp(WIDTH, HIDDEN), ResidualMoEConfig(**{"num_experts": EXPERTS, "top_k": 1, "noise": 0.0, **config})
    )


def tokens(count: int = 20) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


def test_a_gate_of_ones_own() -> None:
    assert len(BLOCKS) == 3
    moe, x = layer(router="scaled", combine="straight_through"), tokens()
    torch.testing.assert_close(moe(x), moe.core(x))
    plain = moe.gate.logits(x)
    moe.gate.log_scale.data.fill_(1.0)  # type: ignore[operator,union-attr]
    torch.testing.assert_close(moe.gate.logits(x), torch.e * plain)
    moe(x).square().sum().backward()
    assert moe.gate.log_scale.grad.abs() > 0  # type: ignore[operator,union-attr]
    again = layer(router="scaled", combine="straight_through")
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again.eval()(x), moe.eval()(x))


def test_a_balance_of_ones_own() -> None:
    moe = layer(router="proportional", balance_rate=0.1)
    with collect() as records:
        moe(tokens())
    (sums,) = records.sums.values()
    counted_E = sums.chosen_E
    records.balance_experts()
    torch.testing.assert_close(moe.gate.choice_bias, 0.1 * (1 - counted_E / 5))


def test_a_residual_of_ones_own() -> None:
    moe, x = layer(residual="biases").eval(), tokens()
    torch.testing.assert_close(moe(x), moe.core(x))
    assert [name for name, _ in moe.deepspeed_moe.named_parameters()] == ["experts.b1_EH", "experts.b2_EC"]
    for parameter in moe.deepspeed_moe.parameters():
        parameter.data.normal_()
    with collect() as records:
        y = moe(x)
    routing: Any = records.routing[moe]
    expected = reference(x, routing.expert_TK, routing.gate_TK, moe.theta(), moe.residuals(), moe.core.act, False)  # type: ignore[union-attr,arg-type]
    torch.testing.assert_close(y, expected)
    assert "deepspeed_moe.experts.deepspeed_experts.3.b1_EH" in moe.state_dict()
