"""Networks of all experts at once, as graphs have them, against `reference`; and a layer of such as a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_masked import WIDTH, layer
from test_mix import problem

from rmoe.moe.experts import Full, Network, reference
from rmoe.moe.unsorted import unsorted_networks


def test_three_tokens_by_hand() -> None:
    # FFN(x) = 2 · relu(x); expert 0 adds 1 to W1, expert 1 adds 1 to W2, and inside the third token has no expert.
    core = Network(torch.ones(1, 1), None, torch.full((1, 1), 2.0), None)
    zeros, one_each = torch.zeros(2, 1), torch.eye(2)[:, :, None, None]
    full = Full(one_each[0], zeros, one_each[1], zeros)
    x_TC, expert_TK, gate_TK = torch.ones(3, 1), torch.tensor([[0], [1], [2]]), torch.full((3, 1), 0.5)
    inside = unsorted_networks(x_TC, expert_TK, gate_TK, core, full, torch.relu, True)
    assert inside.flatten().tolist() == [3.0, 2.5, 2.0]  # 2·(1 + ½), (2 + ½)·1, 2·1
    outside = unsorted_networks(x_TC[:2], expert_TK[:2], gate_TK[:2], core, full, torch.relu, False)
    assert outside.flatten().tolist() == [2.0, 1.5]  # ½ · 2·(1 + 1), ½ · (2 + 1)·1


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("has_core", [True, False])
@pytest.mark.parametrize(("tokens", "k"), [(0, 1), (5, 1), (4, 3)])
def test_equals_reference(has_core: bool, mixes: bool, tokens: int, k: int) -> None:
    x, expert_TK, gate, core, full = problem("full", tokens, 3, 5, 3, k)
    assert isinstance(full, Full)
    if has_core:
        expert_TK = expert_TK.clamp(max=2)  # a choice that is dropped gets the core
    given: Any = core if has_core else Network(*(None,) * 4)  # type: ignore[arg-type]
    found = unsorted_networks(x, expert_TK, gate, given, full, torch.tanh, mixes)
    expected = reference(x, expert_TK, gate, core if has_core else None, full, torch.tanh, mixes)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [{"residual": "full"}, {"residual": "full", "combine": "residual", "top_k": 2}, {"residual": "experts"}],
    ids=str,
)
def test_a_layer_can_be_exported_with_any_number_of_images(form: dict[str, Any]) -> None:
    moe, images = layer(**form).eval(), torch.randn(2, 5, WIDTH)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(moe, (images,), dynamic_shapes=({0: batch},)).module()
    for x in (images, torch.randn(7, 5, WIDTH), torch.randn(1, 5, WIDTH)):
        torch.testing.assert_close(program(x), moe(x))
