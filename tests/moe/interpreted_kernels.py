"""Compares the kernels, run by Triton's interpreter (TRITON_INTERPRET=1), with plain operations."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmoe.config import GateLosses, ResidualMoEConfig
from rmoe.moe import folded_passes as plain
from rmoe.moe import folded_triton as fast
from rmoe.moe import gate as gates
from rmoe.moe import gate_losses
from rmoe.moe.experts import LowRank, Network
from rmoe.moe.folded import folded_low_rank
from rmoe.moe.folded_passes import Linear
from rmoe.moe.gate import Gate
from rmoe.moe.gate_losses import gate_loss

LOSSES = GateLosses(importance=0.5, balance=0.3, z=0.1)


def everything(module: Gate, x: Tensor, upstream: Tensor, kernel: bool) -> tuple[Any, list[Tensor]]:
    """Runs the gate and its losses; returns what it decided, and gradients."""
    torch.manual_seed(1)  # the same noise
    x = x.clone().requires_grad_()
    with mock.patch.object(gates, "_has_kernel", return_value=kernel):
        routing = module(x)
    total = (routing.gate_TK * upstream).sum()
    if routing.sums is not None:
        total = total + gate_loss(routing.sums, module.config.losses)
    return routing, list(torch.autograd.grad(total, [x, module.weight, module.bias]))


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    tokens=st.integers(1, 150),
    width=st.integers(1, 140),
    experts=st.integers(1, 20),
    soft=st.booleans(),
    noise=st.sampled_from([0.0, 1.0]),
    temperature=st.sampled_from([1.0, 0.5]),
    rate=st.sampled_from([0.0, 0.1]),
    combine=st.sampled_from(["residual", "straight_through"]),
    losses=st.sampled_from([LOSSES, GateLosses(importance=0.0)]),
    training=st.booleans(),
    turned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def check(
    tokens: int,
    width: int,
    experts: int,
    soft: bool,
    rate: float,
    training: bool,
    turned: bool,
    dtype: torch.dtype,
    **config: Any,
) -> None:
    """Compares one gate."""
    torch.manual_seed(tokens + width)
    soft = soft or experts == 1
    moe = ResidualMoEConfig(
        num_experts=experts, top_k="all" if soft else 1, balance_rate=0.0 if soft else rate, gate_std=0.3, **config
    )
    module = Gate(width, moe).train(training)
    torch.nn.init.normal_(module.bias)
    if module.choice_bias is not None:
        torch.nn.init.normal_(module.choice_bias, std=0.1)
    x, upstream = torch.randn(tokens, width).to(dtype), torch.randn(tokens, moe.experts_per_token)
    x = x.T.contiguous().T if turned else x  # features first in memory
    (found, grads), (expected, exact) = (everything(module, x, upstream, kernel) for kernel in (True, False))
    assert torch.equal(found.expert_TK, expected.expert_TK)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.gate_TK, expected.gate_TK, **close)
    torch.testing.assert_close(found.probability_TE, expected.probability_TE, **close)
    assert not found.probability_TE.requires_grad
    for name in expected.sums._fields if training else ():
        if name != "load_E" and (name not in ("first_E", "z") or config["losses"].z):
            torch.testing.assert_close(getattr(found.sums, name), getattr(expected.sums, name), **close)
    half = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else close
    torch.testing.assert_close(grads[0], exact[0], **half)
    torch.testing.assert_close(grads[1:], exact[1:], rtol=1e-3, atol=1e-4)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 150),
    experts=st.integers(1, 4),
    rank=st.integers(1, 5),
    shared=st.booleans(),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def check_joined(
    outputs: int, inputs: int, experts: int, rank: int, shared: bool, biased: bool, dtype: torch.dtype
) -> None:
    """Compares the joint matrices of two layers, the second of which leads back."""
    of_a = 1 if shared else experts
    layers = [
        Linear(
            torch.randn(o, i),
            torch.randn(o) if biased else None,
            torch.randn(of_a, rank, i),
            torch.randn(experts, rank, o),
        )
        for o, i in ((outputs, inputs), (inputs, outputs))
    ]
    for layer, found, expected in zip(
        layers, fast.join(layers, dtype, None), plain.join(layers, dtype, None), strict=True
    ):
        assert torch.equal(found[: layer.outputs], expected[: layer.outputs])
        assert torch.equal(found[:, : layer.inputs], expected[:, : layer.inputs])


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    tokens=st.integers(1, 150),
    experts=st.integers(1, 6),
    choices=st.integers(1, 6),
    rank=st.integers(1, 20),
    shared=st.booleans(),
    ones=st.booleans(),
    turned=st.tuples(*[st.booleans()] * 6),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def check_weighed(
    tokens: int,
    experts: int,
    choices: int,
    rank: int,
    shared: bool,
    ones: bool,
    turned: tuple[bool, ...],
    dtype: torch.dtype,
) -> None:
    """Compares what gate values multiply, and their gradients, in any order of memory."""

    def matrix(rows: int, turn: bool) -> Tensor:
        return torch.randn(tokens, rows).to(dtype).T if turn else torch.randn(rows, tokens).to(dtype)

    choices = min(choices, experts)
    expert_TK = torch.stack([torch.randperm(experts + 1)[:choices] for _ in range(tokens)])  # E: dropped
    expert_TK = expert_TK.T.contiguous().T if turned[0] else expert_TK
    gate_TK = torch.rand(choices, tokens).T if turned[1] else torch.rand(tokens, choices)
    both = [passes.gates_of(expert_TK, gate_TK, experts, rank, True) for passes in (fast, plain)]
    rows, rows_u = experts * rank, rank if shared else experts * rank
    u_PTs = [matrix(rows_u, turn) for turn in turned[2:4]]
    v_QTs = [matrix(rows, turn) for turn in turned[4:6]]
    outs = [matrix(rows + 16 * ones, turned[5]) for _ in both]
    of_x = u_PTs[0].clone()
    if dtype == torch.float16:
        of_x[0] = torch.inf  # larger than it holds: of no account to tokens that do not use the expert
    for passes, of, out in zip((fast, plain), both, outs, strict=True):
        passes.weigh(of_x, of, out)
        assert not out.isnan().any()
    close = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(*outs, **close)
    found, expected = (passes.gate_gradient(v_QTs, u_PTs, of) for passes, of in zip((fast, plain), both, strict=True))
    # In half precision plain operations round each product.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.1 if dtype == torch.float16 else 1e-4)


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(layers=st.integers(1, 3), experts=st.integers(1, 20), stacked=st.booleans())
def check_squared_variation(layers: int, experts: int, stacked: bool) -> None:
    """Compares the loss of gates whose sums are stacked, or of one."""
    x = 5 * torch.rand(layers, experts) + 0.1 if stacked else torch.rand(experts) + 0.1
    upstream = torch.randn(layers) if stacked else torch.randn(())

    def value_and_gradient(kernel: bool) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with mock.patch.object(gate_losses, "has_triton", return_value=kernel):
            found = gate_losses._SquaredVariation.apply(leaf, 0.3)
        return [found, *torch.autograd.grad((found * upstream).sum(), leaf)]

    for found, expected in zip(value_and_gradient(True), value_and_gradient(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(soft=st.booleans(), shared=st.booleans(), biased=st.booleans())
def check_whole(soft: bool, shared: bool, biased: bool) -> None:
    """Compares the whole of a mixture, in value and gradients."""
    tokens, width, hidden, experts, rank = 70, 20, 36, 3, 4
    sizes = ((width, hidden), (hidden, width))
    core = [part for i, o in sizes for part in (torch.randn(o, i) / 4, torch.randn(o) if biased else None)]
    low = [
        torch.randn(1 if shared and half == 0 else experts, rank, (i, o)[half]) / 4 for i, o in sizes for half in (0, 1)
    ]
    k = experts if soft else 1
    expert_TK = torch.arange(experts).expand(tokens, k) if soft else torch.randint(experts + 1, (tokens, 1))
    inputs = [torch.randn(tokens, width), torch.rand(tokens, k), *core, *low]
    upstream = torch.randn(tokens, width)

    def value_and_gradients(kernel: bool) -> list[Tensor]:
        leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
        x, gate, *weights = leaves
        theta, residuals = Network(*weights[:4]), LowRank(*weights[4:])
        with mock.patch.object(plain, "has_triton", return_value=kernel):
            y = folded_low_rank(x, expert_TK, gate, theta, residuals, torch.nn.GELU(), dtype=torch.float32)
        return [y, *torch.autograd.grad((y * upstream).sum(), [x for x in leaves if x is not None])]

    for found, expected in zip(value_and_gradients(True), value_and_gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    check()
    check_joined()
    check_weighed()
    check_squared_variation()
    check_whole()
    print("equal")
