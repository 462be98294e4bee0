"""One network in place of a mixture: the same function where there is one, and else the mean expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_masked import WIDTH, Mlp, layer
from torch import Tensor

from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.experts import Network
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.merged import average_network, constant_values, exact_network, mean_values


def with_a_fixed_gate(moe: ResidualMoE) -> ResidualMoE:
    """A gate that reads nothing: expert 2 first, whatever the token."""
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.bias.copy_(torch.tensor([0.1, 0.0, 0.7, 0.3])[: moe.num_experts])
    return moe.eval()


def test_by_hand() -> None:
    moe = ResidualMoE(Mlp(1), ResidualMoEConfig(num_experts=2, residual="full", combine="residual"))
    residuals = moe.residuals()
    with torch.no_grad():
        for x in residuals:
            x[0], x[1] = 1, 5
    theta = average_network(moe, torch.tensor([0.5, 0.1]))  # θ0 + ½ · 1 + 0.1 · 5
    torch.testing.assert_close(theta.w1_HC, moe.core.fc1.weight + 1)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(theta.b2_C, moe.core.fc2.bias + 1)  # type: ignore[union-attr,operator]
    assert mean_values(torch.tensor([[0], [1], [1]]), torch.tensor([[0.5], [0.25], [1.0]]), 3).tolist() == [
        pytest.approx(0.5 / 3),
        pytest.approx(1.25 / 3),
        0.0,
    ]


EXACT = [
    {"num_experts": 1},
    {"num_experts": 1, "residual": "full"},
    {"num_experts": 1, "residual": "experts"},
    {"num_experts": 1, "combine": "softmax"},
    {},
    {"alpha": 3.0},
    {"top_k": "all"},
    {"top_k": 2},
    {"residual": "full"},
    {"residual": "full", "combine": "residual", "top_k": 3},
    {"residual": "experts", "gate_input": "image"},
    {"residual": "full", "combine": "softmax"},
    {"balance_rate": 0.1},
    {"shared_a": True},
    {"residual": "segments", "rank": 1, "top_k": 2},
    {"residual": "sparse", "density": 0.5},
]


@pytest.mark.parametrize("form", EXACT, ids=str)
def test_where_every_token_has_the_same_network_it_is_found(form: dict[str, Any]) -> None:
    moe = layer(**form).eval() if form.get("num_experts") == 1 else with_a_fixed_gate(layer(**form))
    x = torch.randn(3, 5, WIDTH)
    act: Any = moe.core.act
    torch.testing.assert_close(exact_network(moe)(x, act), moe(x), atol=1e-5, rtol=1e-5)
    assert not moe.training


@pytest.mark.parametrize(
    ("fixed", "form", "message"),
    [
        (False, {}, "its gate decides for each token among 4 experts"),
        (False, {"top_k": "all"}, "decides for each token among 4"),
        (True, {"residual": "full", "top_k": 2}, "adds up the outputs of 2 experts"),
        (True, {"residual": "experts", "top_k": "all"}, "adds up the outputs of 4 experts"),
    ],
)
def test_where_there_is_none_the_reason_is_told(fixed: bool, form: dict[str, Any], message: str) -> None:
    moe = layer(**form)
    with pytest.raises(UserError, match=message):
        exact_network(with_a_fixed_gate(moe) if fixed else moe)


def test_the_average_of_equal_experts_is_exact() -> None:
    moe = layer(residual="full").eval()
    for x in moe.residuals():
        x.data.copy_(x.data[:1].expand_as(x))
    x, act = torch.randn(7, WIDTH), moe.core.act
    torch.testing.assert_close(average_network(moe)(x, act), moe(x), atol=1e-5, rtol=1e-5)  # type: ignore[arg-type]


def test_measured_values_of_a_fixed_gate_are_exact_where_uniform_ones_are_not() -> None:
    moe = with_a_fixed_gate(layer())
    x, act = torch.randn(7, WIDTH), moe.core.act
    routing = moe.gate(x)
    values = mean_values(routing.expert_TK, routing.gate_TK, 4)
    torch.testing.assert_close(values, constant_values(moe))

    def apart(theta: Network) -> Tensor:
        return (theta(x, act) - moe(x)).abs().max()  # type: ignore[arg-type]

    assert apart(average_network(moe, values)) < 1e-5
    assert apart(average_network(moe)) > 1e-3


def test_scaled_outputs_have_no_average_that_was_not_measured() -> None:
    moe = layer(residual="full", combine="softmax")
    with pytest.raises(UserError, match="must be measured: give --images"):
        average_network(moe)
    assert average_network(moe, torch.full((4,), 0.1)).w1_HC.shape == (4 * WIDTH, WIDTH)
    assert average_network(layer(residual="full", combine="softmax", top_k="all")).w1_HC.shape == (4 * WIDTH, WIDTH)
