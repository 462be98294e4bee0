"""`mix`, the fast arithmetic, against `reference`, which is the definition, and against what can be done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rmoe.engine.cost import counted_flops
from rmoe.moe import cpu_kernels
from rmoe.moe.experts import Full, LowRank, Network, Residuals, reference
from rmoe.moe.mix import mix

KINDS = ("low_rank", "full")


def problem(
    kind: str, tokens: int, width: int, hidden: int, experts: int, k: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Network, Residuals]:
    """Random float64 tokens, experts (some pairs without one), gate values, core and residuals."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    core = Network(random(hidden, width), random(hidden), random(width, hidden), random(width))
    residuals: Residuals
    if kind != "low_rank":
        residuals = Full(
            random(experts, hidden, width),
            random(experts, hidden),
            random(experts, width, hidden),
            random(experts, width),
        )
    else:
        residuals = LowRank(
            random(experts, 2, width), random(experts, 2, hidden), random(experts, 2, hidden), random(experts, 2, width)
        )
    expert_TK = torch.randint(0, experts + 1, (tokens, k), generator=g)
    return random(tokens, width), expert_TK, torch.rand(tokens, k, generator=g, dtype=torch.float64), core, residuals


def leaves(x: Tensor, gate: Tensor, core: Network, residuals: Residuals) -> list[Tensor]:
    return [t.requires_grad_() for t in (x, gate, *core, *residuals)]  # type: ignore[union-attr]


def value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor], *arguments: Any) -> list[Tensor]:
    """y, and the gradients of its squared norm; zeros for what y does not depend on."""
    y = function(*arguments)
    grads = (
        torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) if y.requires_grad else [None] * len(inputs)
    )
    return [y.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))]


def test_three_tokens_by_hand() -> None:
    # FFN(x) = 2 · relu(x); expert 0 adds 1 to W1, expert 1 adds 1 to W2; the third token has no expert.
    core = Network(torch.ones(1, 1), None, torch.full((1, 1), 2.0), None)
    residuals = Full(
        torch.tensor([[[1.0]], [[0.0]]]), torch.zeros(2, 1), torch.tensor([[[0.0]], [[1.0]]]), torch.zeros(2, 1)
    )
    x_TC, expert_TK = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[0], [1], [2]])
    gate_TK = torch.full((3, 1), 0.5)
    inside = mix(x_TC, expert_TK, gate_TK, core, residuals, torch.relu, mixes_weights=True)
    assert inside.flatten().tolist() == [3.0, 2.5, 2.0]  # 2·(1 + ½), (2 + ½)·1, 2·1
    outside = mix(x_TC, expert_TK, gate_TK, core, residuals, torch.relu, mixes_weights=False)
    assert outside.flatten().tolist() == [2.0, 1.5, 1.0]  # ½·2·2, ½·3·1, ½·2·1


@given(
    kind=st.sampled_from(KINDS),
    mixes=st.booleans(),
    tokens=st.integers(0, 9),
    experts=st.integers(1, 5),
    k=st.integers(1, 3),
    width=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_equals_reference_in_value_and_gradient(
    kind: str, mixes: bool, tokens: int, experts: int, k: int, width: int, seed: int
) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, tokens, width, 2 * width, experts, k, seed)
    inputs = leaves(x, gate, core, residuals)
    arguments = (inputs, x, expert_TK, gate, core, residuals, torch.tanh, mixes)
    torch.testing.assert_close(value_and_gradients(mix, *arguments), value_and_gradients(reference, *arguments))


@given(
    joined=st.booleans(),
    rows=st.integers(1, 7),
    tokens=st.integers(0, 20),
    experts=st.integers(1, 5),
    mixes=st.booleans(),
    train_core=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_low_rank_in_any_tiles_equals_reference(
    joined: bool, rows: int, tokens: int, experts: int, mixes: bool, train_core: bool, seed: int
) -> None:
    x, expert_TK, gate, core, residuals = problem("low_rank", tokens, 3, 4, experts, 1, seed)
    inputs = [t for t in leaves(x, gate, core, residuals) if train_core or not any(t is c for c in core)]
    expected = value_and_gradients(reference, inputs, x, expert_TK, gate, core, residuals, torch.tanh, mixes)
    with (
        mock.patch.object(cpu_kernels, "TILE", rows),
        mock.patch.object(cpu_kernels, "_joins_experts", return_value=joined),
    ):
        found = value_and_gradients(mix, inputs, x, expert_TK, gate, core, residuals, torch.tanh, mixes)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixes", [True, False])
def test_bfloat16_is_the_reference_but_for_rounding(kind: str, mixes: bool) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, 40, 4, 8, 4, 1)
    inputs = leaves(x, gate, core, residuals)
    expected = value_and_gradients(reference, inputs, x, expert_TK, gate, core, residuals, torch.tanh, mixes)
    half = [t.detach().bfloat16().requires_grad_() for t in inputs]
    again = (half[0], expert_TK, half[1], Network(*half[2:6]), type(residuals)(*half[6:]))
    for a, b in zip(value_and_gradients(mix, half, *again, torch.tanh, mixes), expected, strict=True):
        assert (a.double() - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_gradcheck(kind: str, mixes: bool, k: int) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, 4, 2, 3, 3, k)

    def function(x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
        return mix(x, expert_TK, gate, Network(*weights[:4]), type(residuals)(*weights[4:]), torch.tanh, mixes)

    assert torch.autograd.gradcheck(function, leaves(x, gate, core, residuals))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixes", [True, False])
def test_all_tokens_to_one_expert_leaves_zeros_for_the_others(kind: str, mixes: bool) -> None:
    x, _, gate, core, residuals = problem(kind, 6, 3, 4, 4, 1)
    leaves(x, gate, core, residuals)
    mix(x, torch.full((6, 1), 2), gate, core, residuals, torch.tanh, mixes).sum().backward()
    for parameter in residuals:
        assert parameter.grad is not None
        assert parameter.grad[2].abs().sum() > 0
        assert not parameter.grad[[0, 1, 3]].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixes", [True, False])
def test_no_token_at_all_still_gives_every_residual_a_gradient(kind: str, mixes: bool) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, 0, 3, 4, 4, 1)
    leaves(x, gate, core, residuals)
    mix(x, expert_TK, gate, core, residuals, torch.tanh, mixes).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in residuals)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixes", [True, False])
def test_permuting_tokens_permutes_outputs(kind: str, mixes: bool) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, 8, 3, 4, 4, 2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    y = mix(x, expert_TK, gate, core, residuals, torch.tanh, mixes)
    permuted = mix(x[order], expert_TK[order], gate[order], core, residuals, torch.tanh, mixes)
    torch.testing.assert_close(permuted, y[order])


@pytest.mark.parametrize("k", [1, 2])
def test_zero_low_rank_residual_is_the_core_bit_for_bit(k: int) -> None:
    x, expert_TK, gate, core, residuals = problem("low_rank", 8, 3, 4, 4, k)
    zero = residuals._replace(b1_ERH=torch.zeros(4, 2, 4).double(), b2_ERC=torch.zeros(4, 2, 3).double())  # type: ignore[call-arg]
    assert torch.equal(mix(x, expert_TK, gate, core, zero, torch.tanh, True), core(x, torch.tanh))


def test_core_without_biases() -> None:
    x, expert_TK, gate, core, residuals = problem("full", 5, 3, 4, 4, 2)
    bare = core._replace(b1_H=None, b2_C=None)
    for mixes in (True, False):
        arguments = (x, expert_TK, gate, bare, residuals, torch.tanh, mixes)
        torch.testing.assert_close(mix(*arguments), reference(*arguments))


@pytest.mark.parametrize("fixed", ["", "a", "b", "ab"])
def test_no_gradient_is_computed_of_low_rank_factors_that_are_fixed(fixed: str) -> None:
    tokens, width, hidden, rank = 24, 4, 8, 2
    x, expert_TK, gate, core, low = problem("low_rank", tokens, width, hidden, 4, 1)
    trained = [w for name, w in low._asdict().items() if name[0] not in fixed]
    inputs = [t.requires_grad_() for t in (x, gate, *trained)]
    arguments = (inputs, x, expert_TK, gate, core, low, torch.tanh, True)
    counted: list[int] = []
    with counted_flops(counted):
        found = value_and_gradients(mix, *arguments)
    torch.testing.assert_close(found, value_and_gradients(reference, *arguments))
    factor = 2 * tokens * rank * (width + hidden)  # of a product with A of both layers, or with B of both
    assert counted == [8 * tokens * width * hidden + (6 - len(fixed)) * factor]


@pytest.mark.parametrize("train_core", [False, True])
def test_a_full_residual_costs_what_the_dense_network_does(train_core: bool) -> None:
    # Trained or not, the core adds no product: its gradient is the sum of its experts'.
    x, expert_TK, gate, core, residuals = problem("full", 24, 4, 8, 4, 1)
    expert_TK[:8] = 4  # without an expert
    inputs = leaves(x, gate, core, residuals)
    counted: list[int] = []
    for weight in core:
        weight.requires_grad_(train_core)  # type: ignore[union-attr]
    with counted_flops(counted):
        mix(x, expert_TK, gate, core, residuals, torch.tanh, False).sum().backward()
    dropped = int((expert_TK == 4).sum())
    without = 0 if train_core else 4 * dropped * 4 * 8  # products of rows whose weights have no gradient
    assert counted == [12 * len(x) * 4 * 8 - without]
    assert all(w.grad is not None for w in inputs if w.requires_grad)


@pytest.mark.parametrize("k", [1, 2])
def test_experts_without_a_core(k: int) -> None:
    x, expert_TK, gate, _, residuals = problem("full", 7, 3, 4, 4, k)
    inputs = [t.requires_grad_() for t in (x, gate, *residuals)]
    results = []
    for function in (mix, reference):
        y = function(x, expert_TK, gate, None, residuals, torch.tanh, False)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    torch.testing.assert_close(*results)
