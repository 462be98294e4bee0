"""Compares the kernels, run by Triton's interpreter, with plain operations."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from typing import Any
from unittest import mock

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmoe.config import GateLosses, ResidualMoEConfig
from rmoe.moe import folded
from rmoe.moe import gate as gates
from rmoe.moe.gate import Gate, gate_loss

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
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def check(
    tokens: int, width: int, experts: int, soft: bool, rate: float, training: bool, dtype: torch.dtype, **config: Any
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
    """Compares one joint matrix."""
    w_OI, bias_O = torch.randn(outputs, inputs), torch.randn(outputs) if biased else None
    a_ERI, b_ERO = torch.randn(1 if shared else experts, rank, inputs), torch.randn(experts, rank, outputs)
    arguments = (w_OI, bias_O, a_ERI, b_ERO, dtype, None)
    with mock.patch.object(folded, "has_triton", return_value=True):
        found = folded._joined(*arguments)
    expected = folded._joined(*arguments)
    assert torch.equal(found[:outputs], expected[:outputs])
    assert torch.equal(found[:, :inputs], expected[:, :inputs])


if __name__ == "__main__":
    check()
    check_joined()
    print("equal")
