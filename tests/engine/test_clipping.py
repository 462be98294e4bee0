"""The scale of the loss moves as torch's does; what float16 cannot be combined with is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmoe.engine.clipping import LossScaler, check_precision
from rmoe.errors import UserError

FLOAT16 = {"torch_autocast": {"enabled": True, "dtype": "float16"}}


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 12))
def test_the_scale_moves_as_torchs(overflows: list[bool], resumed_at: int) -> None:
    """Over a resume too, into the other's state."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, torchs, ours = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu", growth_interval=3), LossScaler()
    ours.growth_interval = 3
    for step, overflow in enumerate(overflows):
        torchs.scale(weight.sum()).backward()
        if overflow:
            weight.grad = torch.full((1,), torch.inf)
        torchs.step(optimizer)
        torchs.update()
        optimizer.zero_grad()
        ours.update_scale(overflow)
        ours.update()  # after each group, to no effect
        ours.finish()
        assert ours.cur_scale == torchs.get_scale()
        assert ours.state_dict() == torchs.state_dict()
        if step == resumed_at:
            state, ours = torchs.state_dict(), LossScaler()
            torchs.load_state_dict(state)
            ours.load_state_dict(state)
            ours.growth_interval = 3


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 1, "compute_grad_norm": False}, "compute_grad_norm"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload"),
    ],
)
def test_float16_needs_a_norm(zero: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_precision(FLOAT16 | {"zero_optimization": zero})
    check_precision({"zero_optimization": zero})
    check_precision({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": zero})
    check_precision(FLOAT16 | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
