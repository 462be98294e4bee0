"""The passes between grouped products: each Triton kernel, interpreted on the CPU, against torch's operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grouped import Launches, as_on_hopper, problem, value_and_gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rmoe.moe import grouped, passes, triton_here
from rmoe.moe.experts import Full, Network, reference
from rmoe.moe.mix import mix

fast: Any = pytest.importorskip("rmoe.moe.passes_triton", reason="Triton is not installed")
# Half precision is float16 here: the interpreter cuts to bfloat16 where a GPU rounds.
FEW = settings(max_examples=6)
SEED = st.integers(0, 10**6)


def same(found: Any, expected: Any, **tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, check_dtype=True, **tolerance)


def places(pairs: int, groups: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_P = torch.randint(0, groups, (pairs,), generator=torch.Generator().manual_seed(seed))
    return expert_P, *passes.place_pairs(expert_P, groups)


@FEW
@given(pairs=st.integers(1, 2100), groups=st.integers(1, 70), seed=SEED)
def test_pairs_are_sorted_by_counting(pairs: int, groups: int, seed: int) -> None:
    expert_P, place_P, end_G = places(pairs, groups, seed)
    found_P, found_G = fast.place_pairs(expert_P, groups)
    assert found_G.dtype == torch.int32
    assert torch.equal(found_P.long(), place_P)
    assert torch.equal(found_G, end_G)


def test_all_pairs_of_one_expert_and_several_blocks() -> None:
    expert_P = torch.full((3000,), 2)
    place_P, end_G = fast.place_pairs(expert_P, 4)
    assert torch.equal(place_P, torch.arange(3000, dtype=torch.int32))
    assert end_G.tolist() == [0, 0, 3000, 3000]


@FEW
@given(tokens=st.integers(1, 200), k=st.integers(1, 3), width=st.sampled_from([8, 24, 130]), seed=SEED)
def test_rows_move_and_are_weighed(tokens: int, k: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    expert_P, place_P, _ = places(tokens * k, 5, seed)
    x_TC, grad_TC = torch.randn(tokens, width), torch.randn(tokens, width)
    y_NC, gate_P, bias_GC = torch.randn(tokens * k, width), torch.rand(tokens * k), torch.randn(5, width)
    place = place_P.int()
    for columns, dtype in ((0, torch.float32), (8, torch.float16)):
        same([fast.to_experts(x_TC, place, columns, dtype)], [passes.to_experts(x_TC, place_P, columns, dtype)])
    same([fast.from_experts(y_NC, place, k, torch.float32)], [passes.from_experts(y_NC, place_P, k, torch.float32)])
    weighed = (gate_P, bias_GC, expert_P)
    same(
        [fast.from_experts(y_NC, place, k, torch.float32, weighed)],
        [passes.from_experts(y_NC, place_P, k, torch.float32, weighed)],
    )
    same(
        fast.from_experts_backward(grad_TC, y_NC, place, gate_P, bias_GC, expert_P),
        passes.from_experts_backward(grad_TC, y_NC, place_P, gate_P, bias_GC, expert_P),
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.parametrize(("core", "core_bias", "drops"), [*product([True], [True, False], [0, 1]), (False, False, 1)])
@pytest.mark.parametrize("columns", [0, 8])
@pytest.mark.parametrize("inputs", [16, 1032])
def test_weights_are_formed_and_rounded_once(
    core: bool, core_bias: bool, drops: int, columns: int, inputs: int
) -> None:
    delta = (torch.randn(3, 11, inputs), torch.randn(3, 11))
    theta = (torch.randn(11, inputs), torch.randn(11) if core_bias else None) if core else None
    of = (delta, theta, 3 + drops, columns, torch.float16)
    found, expected = fast.weights_of(*of), passes.weights_of(*of)
    same(found, expected, rtol=0, atol=0)
    assert found[0].stride() == expected[0].stride()


@pytest.mark.parametrize("wanted", list(product([0, 1], repeat=4)))
@pytest.mark.parametrize("columns", [0, 8])
def test_gradients_are_cast_and_those_of_empty_experts_are_zero(wanted: tuple[int, ...], columns: int) -> None:
    grad_GOJ, inputs = torch.randn(4, 7, 24 + columns).half(), 24
    grad_bias_GO = grad_GOJ[..., inputs] if columns else torch.randn(4, 8, 7).half()[:, 0]
    end_G = torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    for empty in (0, 2):
        grad_GOJ[empty], grad_bias_GO[empty] = torch.nan, torch.nan
    dtypes = [torch.float32 if want else None for want in wanted]
    of = (grad_GOJ, grad_bias_GO, end_G, 3, inputs, dtypes)
    found = fast.gradients_of(*of)
    same(found, passes.gradients_of(*of), rtol=0, atol=1e-6)
    for grad in found[:2]:
        assert grad is None or (not grad[[0, 2]].any() and grad[1].any() and grad.is_contiguous())


@pytest.mark.parametrize(("kind", "k"), [("full", 1), ("full", 2), ("experts", 2)])
def test_the_whole_path_equals_reference(kind: str, k: int) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, 20, 3, k, seed=k)
    exact = [t.requires_grad_() for t in (x, gate, *(core or ()), *residuals) if t is not None]
    expected = value_and_gradients(reference, exact, x, expert_TK, gate, core, residuals, torch.tanh, False)
    single = [t.detach().float().requires_grad_() for t in exact]
    theta = core and Network(*single[2:6])
    of = (single[0], expert_TK, single[1], theta, Full(*single[-4:]), torch.tanh, False)
    with as_on_hopper(), mock.patch.object(grouped, "passes_on", return_value=fast):
        found = value_and_gradients(mix, single, *of)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("kind", "k"), [("full", 1), ("full", 2), ("experts", 1)])
def test_launches(kind: str, k: int) -> None:
    _, expert_TK, gate, core, residuals = problem(kind, 48, 4, k, seed=0, drops=False)
    x = torch.randn(48, 8, requires_grad=True)
    gate = gate.float().requires_grad_()
    theta = core and Network(*(None if t is None else t.float() for t in core))
    experts = Full(*(t.float().requires_grad_() for t in residuals))
    ours: list[str] = []

    def counted(name: str) -> Any:
        kernel = getattr(fast, name)

        def launch(grid: Any, *of: Any) -> None:
            ours.append(name)
            with _disable_current_modes():
                kernel[grid](*of)

        of_grid = mock.MagicMock()
        of_grid.__getitem__.side_effect = lambda grid: partial(launch, grid)
        return of_grid

    names = ("_count", "_place", "_to_experts", "_from_experts", "_from_experts_backward")
    kernels = {name: counted(name) for name in (*names, "_weights_of", "_gradients_of")}
    with (
        mock.patch.multiple(fast, **kernels),
        as_on_hopper(F.grouped_mm),
        mock.patch.object(grouped, "passes_on", return_value=fast),
        torch.autocast("cpu", torch.bfloat16),
        Launches() as launches,
    ):
        y = mix(x, expert_TK, gate, theta, experts, nn.GELU(), False, None, False)
        y.backward(torch.ones_like(y))
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in (x, gate, *experts))
    # a product takes two launches, the second for its arguments, and so does the scan
    total = len(ours) + len(launches.names) + sum(launches.names.count(name) for name in ("_grouped_mm", "cumsum"))
    assert total <= 29, (ours, launches.names)


def test_a_cpu_and_a_machine_without_triton_take_torchs_operators() -> None:
    cuda = torch.device("cuda")
    assert passes.passes_on(torch.device("cpu")) is passes
    for runs, module in ((True, fast), (False, passes)):
        with mock.patch.object(passes, "triton_runs", return_value=runs):
            assert passes.passes_on(cuda) is module


def test_a_kernel_is_tried_on_the_device_that_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    tried: list[list[torch.device]] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(fast, "place_pairs", lambda *_: tried.append([*current]))
    assert triton_here.triton_runs.__wrapped__(torch.device("cpu"))  # interpreted
    assert tried == [[torch.device("cpu")]]


def test_a_triton_that_cannot_compile_is_named_and_left_alone() -> None:
    runs, here = triton_here.triton_runs.__wrapped__, torch.device("cpu")  # interpreted
    assert runs(here)
    with (
        mock.patch.object(fast, "place_pairs", side_effect=RuntimeError("no C compiler\nat all")),
        pytest.warns(UserWarning, match=r"RuntimeError: no C compiler\).*install a C compiler"),
    ):
        assert not runs(here)
    with mock.patch.object(triton_here, "find_spec", return_value=None):
        assert not runs(here)
