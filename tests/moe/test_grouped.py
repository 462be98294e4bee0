"""The arithmetic of a Hopper GPU, on the CPU: against `reference`, without a wait for the device, in few launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rmoe.engine.cost import _MORE_FORMULAS
from rmoe.moe import cpu_kernels, grouped
from rmoe.moe import mix as mixing
from rmoe.moe.experts import Full, LowRank, Network, Residuals, reference
from rmoe.moe.mix import mix

KINDS = ("low_rank", "full", "experts")


def problem(
    kind: str, tokens: int, experts: int, k: int, seed: int, drops: bool = True
) -> tuple[Tensor, Tensor, Tensor, Network | None, Residuals]:
    """Random float64 tokens, experts (some pairs without one), gate values, core and residuals; 8 wide, 16 hidden."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    core = Network(random(16, 8), random(16), random(8, 16), random(8))
    residuals: Residuals
    if kind == "low_rank":
        residuals = LowRank(*(random(experts, 8, size) for size in (8, 16, 16, 8)))
    else:
        residuals = Full(random(experts, 16, 8), random(experts, 16), random(experts, 8, 16), random(experts, 8))
    expert_TK = torch.randint(0, experts + drops, (tokens, k), generator=g)
    gate_TK = torch.rand(tokens, k, generator=g, dtype=torch.float64)
    return random(tokens, 8), expert_TK, gate_TK, None if kind == "experts" else core, residuals


def checked_grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` in any dtype, with what it asks for on a GPU and what it leaves as memory was.

    Rows beyond the last group, and in a gradient of weights the experts without rows, are NaN.
    """
    assert offs.dtype == torch.int32
    for operand in (a, b):
        assert min(operand.stride()[-2:]) == 1, operand.stride()
        row = max(operand.stride()[-2:]) * max(operand.element_size(), 2)
        assert row % 16 == 0, f"rows of {row} bytes"
        assert operand.data_ptr() % 16 == 0
    ends = [0, *offs.tolist()]
    parts = list(pairwise(ends))
    if b.dim() == 3:
        y = a.new_full((len(a), b.shape[2]), float("nan"))
        for e, (start, end) in enumerate(parts):
            y[start:end] = a[start:end] @ b[e]
        return y
    outer = [a[:, start:end] @ b[start:end] if end > start else torch.nan for start, end in parts]
    y = a.new_empty(len(parts), len(a), b.shape[1])
    for y_e, found in zip(y, outer, strict=True):
        y_e.copy_(torch.as_tensor(found))
    return y


@contextmanager
def as_on_hopper(product: Any = checked_grouped_mm) -> Iterator[mock.Mock]:
    """Takes the path of a Hopper GPU, and no other."""
    with (
        mock.patch.object(mixing, "has_grouped_gemm", side_effect=lambda x, *_: len(x) > 0),
        mock.patch.object(grouped, "has_grouped_gemm", return_value=True),
        mock.patch.object(cpu_kernels, "_sort_rows", side_effect=AssertionError("waits for the device")),
        mock.patch.object(F, "grouped_mm", wraps=product) as called,
    ):
        yield called


def value_and_gradients(function: Any, inputs: list[Tensor], *arguments: Any) -> list[Tensor]:
    y = function(*arguments)
    grads = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))]


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 20),
    experts=st.integers(1, 5),
    k=st.integers(1, 3),
    mixes=st.booleans(),
    train_core=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_reference_in_value_and_gradient(
    kind: str, tokens: int, experts: int, k: int, mixes: bool, train_core: bool, seed: int
) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, tokens, experts, k, seed)
    mixes = mixes and core is not None
    trained = core if core is not None and train_core else ()
    inputs = [t.requires_grad_() for t in (x, gate, *trained, *residuals) if t is not None]
    arguments = (inputs, x, expert_TK, gate, core, residuals, torch.tanh, mixes)
    expected = value_and_gradients(reference, *arguments)
    with as_on_hopper() as product:
        found = value_and_gradients(mix, *arguments)
    assert product.called
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_torchs_grouped_gemm_is_the_checked_one() -> None:
    x, w, grad = torch.randn(10, 8), torch.randn(3, 8, 16), torch.randn(10, 16)
    offs = torch.tensor([4, 4, 10], dtype=torch.int32)
    torch.testing.assert_close(F.grouped_mm(x, w, offs=offs), checked_grouped_mm(x, w, offs=offs))
    outer, checked = (product(x.mT, grad, offs=offs) for product in (F.grouped_mm, checked_grouped_mm))
    torch.testing.assert_close(outer[[0, 2]], checked[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2])
def test_torchs_own_product_in_bfloat16(kind: str, k: int) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, 40, 4, k, seed=k)
    inputs = [t.requires_grad_() for t in (x, gate, *(core or ()), *residuals) if t is not None]
    expected = value_and_gradients(reference, inputs, x, expert_TK, gate, core, residuals, torch.tanh, False)
    half = [t.detach().bfloat16().requires_grad_() for t in inputs]
    theta = core and Network(*half[2:6])
    arguments = (half[0], expert_TK, half[1], theta, type(residuals)(*half[-4:]), torch.tanh, False)
    with as_on_hopper(F.grouped_mm):
        found = value_and_gradients(mix, half, *arguments)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() < 0.03 * b.norm()


def test_weights_are_summed_before_they_are_rounded() -> None:
    # Δ is a hundredth of what bfloat16 tells apart at θ0: four of them are seen, and would not be if each were rounded.
    x, expert_TK, gate, core, residuals = problem("full", 12, 2, 1, seed=0, drops=False)
    assert core is not None
    single = Network(*(t.float() for t in core if t is not None))
    delta = Full(*(torch.full_like(t.float(), 2**-7) for t in residuals))
    ones = Network(*(torch.full_like(t, 1 + 2**-8) for t in single if t is not None))
    with torch.autocast("cpu", torch.bfloat16), as_on_hopper(F.grouped_mm):
        found = mix(x.float(), expert_TK, gate.float(), ones, delta, torch.relu, False, None, False)
    expected = Network(*(t.bfloat16() for t in map(torch.add, ones, (t[0] for t in delta))))
    torch.testing.assert_close(
        found, (expected(x.bfloat16(), torch.relu) * gate.bfloat16()).to(found.dtype), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_to_one_expert_leaves_zeros_for_the_others(kind: str) -> None:
    x, _, gate, core, residuals = problem(kind, 6, 4, 1, seed=0)
    trained = [t.requires_grad_() for t in residuals]
    with as_on_hopper():
        y = mix(x, torch.full((6, 1), 2), gate, core, residuals, torch.tanh, False)
        grads = torch.autograd.grad(y.sum(), trained)
    for grad in grads:
        assert grad[2].abs().sum() > 0
        assert torch.equal(grad[[0, 1, 3]], torch.zeros_like(grad[[0, 1, 3]]))


@pytest.mark.parametrize("kind", ["full", "experts"])
def test_a_group_for_dropped_choices_is_there_only_where_choices_are_dropped(kind: str) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, 9, 3, 2, seed=1, drops=False)
    expected = reference(x, expert_TK, gate, core, residuals, torch.tanh, False)
    for drops, groups in ((True, 4), (False, 3)):
        with as_on_hopper() as product:
            found = mix(x, expert_TK, gate, core, residuals, torch.tanh, False, None, drops)
        assert {call.args[1].shape[0] for call in product.call_args_list} == {groups}
        torch.testing.assert_close(found, expected)


def test_a_frozen_core_and_fixed_experts_cost_no_product() -> None:
    x, expert_TK, gate, core, residuals = problem("full", 9, 3, 1, seed=1)
    assert core is not None
    products = {}
    for name, trained in (("input", ()), ("experts", residuals), ("core too", (*core, *residuals))):
        inputs = [t.detach().requires_grad_(any(t is one for one in trained)) for t in (*core, *residuals)]  # type: ignore[union-attr]
        arguments = (expert_TK, gate, Network(*inputs[:4]), Full(*inputs[4:]), torch.tanh, False)
        with as_on_hopper() as product:
            mix(x.detach().requires_grad_(), *arguments).sum().backward()
        products[name] = product.call_count
        assert all((t.grad is not None) == t.requires_grad for t in inputs)
    assert products == {"input": 4, "experts": 7, "core too": 7}


@pytest.mark.parametrize("kind", ["full", "experts"])
def test_no_token_at_all_takes_the_path_without_a_kernel(kind: str) -> None:
    x, expert_TK, gate, core, residuals = problem(kind, 0, 3, 1, seed=1)
    trained = [t.requires_grad_() for t in residuals]
    with mock.patch.object(grouped, "_is_hopper", return_value=True):
        assert not grouped.has_grouped_gemm(x, residuals, torch.bfloat16)
        y = mix(x, expert_TK, gate, core, residuals, torch.tanh, False)
    assert all(not grad.any() for grad in torch.autograd.grad(y.sum(), trained))


VIEWS = {"view", "_unsafe_view", "t", "transpose", "slice", "select", "unsqueeze", "expand", "detach", "alias"}
VIEWS |= {"empty", "empty_like", "new_empty", "reshape", "unflatten", "permute", "squeeze", "promote_types"}
VIEWS |= {"lift_fresh"}
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "item", "unique", "masked_select", "is_nonzero"}


def test_flops_are_those_of_a_dense_network_of_as_many_rows() -> None:
    x, expert_TK, gate, _, residuals = problem("experts", 20, 3, 2, seed=0, drops=False)
    single = [t.float().requires_grad_() for t in (x, gate, *residuals)]
    counter = FlopCounterMode(display=False)
    counter.flop_registry.update(_MORE_FORMULAS)
    with as_on_hopper(F.grouped_mm), counter:
        mix(single[0], expert_TK, single[1], None, Full(*single[2:]), torch.tanh, False, None, False).sum().backward()
    columns, rows = 16 // 4, 20 * 2  # of ones, beside 8
    first, second = 2 * rows * (8 + columns) * 16, 2 * rows * 8 * 16
    assert counter.get_total_flops() == 2 * first + second + 3 * second + 2 * rows * columns * 8


class Launches(TorchDispatchMode):
    """Counts calls that launch kernels, and refuses those that wait for the device or whose size depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITS, f"{name} waits for the device"
        if name not in VIEWS and "::" not in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "k", "most"), [("full", 1, 67), ("full", 2, 72), ("experts", 1, 67)])
def test_launches_on_a_gpu_without_triton(kind: str, k: int, most: int) -> None:
    # FakeTensors: the rules of torch on a GPU for its grouped GEMM hold, in shape, stride and dtype.
    experts = 4
    with FakeTensorMode(), as_on_hopper(F.grouped_mm), Launches() as launches:
        launches.names.clear()

        def weights(*shapes: tuple[int, ...], trained: bool) -> list[Tensor]:
            return [torch.empty(shape, requires_grad=trained) for shape in shapes]

        core = Network(*weights((64, 16), (64,), (16, 64), (16,), trained=False))
        shapes = [(experts, *t.shape) for t in core if t is not None]
        x = torch.empty(48, 16, dtype=torch.bfloat16, requires_grad=True)
        expert_TK = torch.empty(48, k, dtype=torch.int64)
        gate = torch.empty(48, k, requires_grad=True)
        residuals = Full(*weights(*shapes, trained=True))
        theta = None if kind == "experts" else core
        y = mix(x, expert_TK, gate, theta, residuals, nn.GELU(), False, None, False)
        y.backward(torch.empty_like(y))
    assert y.dtype == torch.bfloat16
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in residuals)
    # sort takes six launches and each product two, the second for its arguments
    total = len(launches.names) + 5 * launches.names.count("sort") + launches.names.count("_grouped_mm")
    assert total <= most, f"{total}: {launches.names}"


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "expected"),
    [
        ((9, 0), torch.bfloat16, 16, True),
        ((9, 0), torch.float16, 16, False),
        ((9, 0), torch.bfloat16, 12, False),
        ((8, 0), torch.bfloat16, 16, False),
        ((10, 0), torch.bfloat16, 16, False),
    ],
)
def test_the_guard(capability: tuple[int, int], dtype: torch.dtype, width: int, expected: bool) -> None:
    grouped._is_hopper.cache_clear()
    with FakeTensorMode(), mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        residuals = Full(*(torch.empty(2, *shape) for shape in ((32, width), (32,), (width, 32), (width,))))
        assert grouped.has_grouped_gemm(torch.empty(3, width, device="cuda"), residuals, dtype) is expected
    grouped._is_hopper.cache_clear()
