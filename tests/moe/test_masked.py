"""Low-rank residuals of all experts at once, against `reference`; and what that path promises a GPU and an exporter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_mix import leaves, problem, value_and_gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rmoe.config import ResidualMoEConfig
from rmoe.engine.cost import counted_flops
from rmoe.moe import cpu_kernels, folded_passes, gate, gate_losses, masked
from rmoe.moe import mix as mixing
from rmoe.moe.experts import Activation, LowRank, Network, Residuals, reference
from rmoe.moe.folded import folded_low_rank
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.masked import masked_low_rank
from rmoe.moe.mix import mix
from rmoe.moe.records import collect


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Chooses, on a CPU, what a GPU is given."""
    with (
        mock.patch.object(mixing, "_is_on_gpu", return_value=True),
        mock.patch.object(mixing, "_masks", return_value=True),
    ):
        yield


def test_three_tokens_by_hand() -> None:
    # FFN(x) = 2 · relu(x); expert 0 adds 1 to W1, expert 1 adds 1 to W2; the third token has no expert.
    core = Network(torch.ones(1, 1), None, torch.full((1, 1), 2.0), None)
    one = torch.ones(2, 1, 1)
    low = LowRank(one, torch.tensor([[[1.0]], [[0.0]]]), one, torch.tensor([[[0.0]], [[1.0]]]))
    x_TC, expert_TK, gate_TK = torch.ones(3, 1), torch.tensor([[0], [1], [2]]), torch.full((3, 1), 0.5)
    y = masked_low_rank(x_TC, expert_TK, gate_TK, core, low, torch.relu)
    assert y.flatten().tolist() == [3.0, 2.5, 2.0]  # 2·(1 + ½), (2 + ½)·1, 2·1
    both = masked_low_rank(x_TC[:1], torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.25]]), core, low, torch.relu)
    assert both.item() == 3.125  # (2 + ½)·(1 + ¼)


@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 5),
    k=st.integers(1, 4),
    width=st.integers(1, 4),
    tile=st.integers(1, 7),
    mixes=st.booleans(),
    gpu=st.booleans(),
    masks=st.booleans(),
    shared=st.booleans(),
    wanted=st.sets(st.sampled_from(range(10)), min_size=1),
    act=st.sampled_from([torch.tanh, nn.GELU(), nn.GELU("tanh")]),
    seed=st.integers(0, 10**6),
)
def test_equals_reference_in_value_and_gradient(
    tokens: int,
    experts: int,
    k: int,
    width: int,
    tile: int,
    mixes: bool,
    gpu: bool,
    masks: bool,
    shared: bool,
    wanted: set[int],
    act: Activation,
    seed: int,
) -> None:
    x, expert_TK, gate, core, low = problem("low_rank", tokens, width, 2 * width, experts, k, seed)
    if shared:
        low = low._replace(a1_ERC=low[0][:1].clone(), a2_ERH=low[2][:1].clone())  # type: ignore[call-arg]
    every = [x, gate, *core, *low]
    inputs = [t.requires_grad_() for i, t in enumerate(every) if i in wanted and t is not None]
    arguments = (inputs, x, expert_TK, gate, core, low, act, mixes)
    with (
        mock.patch.object(masked, "TILE", tile),
        mock.patch.object(mixing, "_is_on_gpu", return_value=gpu),
        mock.patch.object(mixing, "_masks", return_value=masks),
    ):
        found = value_and_gradients(mix, *arguments)
    expected = value_and_gradients(reference, *arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, b.abs().max().item() if b.numel() else 0.0))


FORMS_OF_IT = {"cpu": masked_low_rank, "gpu": partial(folded_low_rank, dtype=torch.float64)}


@pytest.mark.parametrize("form", FORMS_OF_IT)
@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(k: int, form: str) -> None:
    x, expert_TK, gate, core, low = problem("low_rank", 4, 2, 3, 3, k)

    def function(x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
        return FORMS_OF_IT[form](x, expert_TK, gate, Network(*weights[:4]), LowRank(*weights[4:]), torch.tanh)

    assert torch.autograd.gradcheck(function, leaves(x, gate, core, low))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.02)], ids=str
)
@pytest.mark.parametrize("gpu", [False, True])
def test_other_number_formats_are_the_reference_but_for_rounding(
    dtype: torch.dtype, tolerance: float, gpu: bool
) -> None:
    x, expert_TK, gate, core, low = problem("low_rank", 40, 4, 8, 4, 2)
    inputs = leaves(x, gate, core, low)
    expected = value_and_gradients(reference, inputs, x, expert_TK, gate, core, low, torch.tanh, True)
    rounded = [t.detach().to(dtype).requires_grad_() for t in inputs]
    again = (rounded[0], expert_TK, rounded[1], Network(*rounded[2:6]), LowRank(*rounded[6:]))
    with as_on_a_gpu() if gpu else nullcontext():
        found = value_and_gradients(mix, rounded, *again, torch.tanh, True)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("form", [{}, {"top_k": "all"}, {"combine": "straight_through"}, {"alpha": 2.0}], ids=str)
def test_autocast_computes_in_its_dtype_and_leaves_float32_gradients(gpu: bool, form: dict[str, Any]) -> None:
    moe = layer(train_core=True, noise=0.0, **form)
    x = torch.randn(12, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), as_on_a_gpu() if gpu else nullcontext():
        y = moe(x)
    parameters = [x, *moe.core.parameters(), *moe.deepspeed_moe.parameters()]
    found = torch.autograd.grad(y.float().square().sum(), parameters)
    assert y.dtype == torch.bfloat16
    exact = moe(x)
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
    for a, b in zip(found, torch.autograd.grad(exact.square().sum(), parameters), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("form", ["cpu", "gpu", "sorted"])
def test_what_overflows_of_an_expert_that_is_not_used_is_of_no_account(form: str) -> None:
    torch.manual_seed(0)
    x, expert_TK, gate, core, low = problem("low_rank", 12, 3, 4, 3, 1)
    x, expert_TK = x.abs() + 1, 2 * (expert_TK % 2)  # the experts 0 and 2
    half = [t.detach().half() for t in leaves(x, gate, core, low)]
    found = []
    for factor in (1.0, 6e4):
        x, gate, *weights = (t.clone() for t in half)
        for weight in weights[4:]:
            weight[1] = factor
        inputs = [t.requires_grad_() for t in (x, gate, *weights)]
        theta, residuals = Network(*weights[:4]), LowRank(*weights[4:])
        masks, on_gpu = (
            mock.patch.object(mixing, name, return_value=value)
            for name, value in (("_masks", form != "sorted"), ("_is_on_gpu", form == "gpu"))
        )
        with masks, on_gpu:
            y = mix(x, expert_TK, gate, theta, residuals, torch.tanh, True)
        found.append([y, *torch.autograd.grad(y.sum(), inputs)])
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS_OF_IT)
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_experts_without_tokens_get_zeros(tokens: int, form: str) -> None:
    x, _, gate, core, low = problem("low_rank", tokens, 3, 4, 4, 1)
    leaves(x, gate, core, low)
    FORMS_OF_IT[form](x, torch.full((tokens, 1), 2), gate, core, low, torch.tanh).sum().backward()
    for parameter in low:
        assert parameter.grad is not None
        assert parameter.grad[2].any() == (tokens > 0)
        assert not parameter.grad[[0, 1, 3]].any()


def test_zero_residuals_are_the_core_bit_for_bit() -> None:
    x, expert_TK, gate, core, low = problem("low_rank", 8, 3, 4, 4, 3)
    zero = low._replace(b1_ERH=torch.zeros(4, 2, 4).double(), b2_ERC=torch.zeros(4, 2, 3).double())  # type: ignore[call-arg]
    assert torch.equal(masked_low_rank(x, expert_TK, gate, core, zero, torch.tanh), core(x, torch.tanh))


# ---- what it costs ---------------------------------------------------------------------------------------------------

WIDTH = 6


class Mlp(nn.Module):
    """A dense network in the layout of timm's."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def layer(width: int = WIDTH, **config: Any) -> ResidualMoE:
    """A layer of four experts whose residuals are not zero."""
    torch.manual_seed(0)
    moe = ResidualMoE(
        Mlp(width), ResidualMoEConfig(**{"num_experts": 4, "top_k": 1, "rank": 2, "train_core": False, **config})
    )
    with torch.no_grad():
        for parameter in moe.deepspeed_moe.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return moe


@pytest.mark.parametrize("train_core", [False, True])
@pytest.mark.parametrize("k", [1, 8])
def test_flops_are_those_of_the_core_and_of_one_skinny_product_more(train_core: bool, k: int) -> None:
    tokens, width, hidden, columns = 20, 12, 24, 8 * 2
    x, expert_TK, gate, core, low = problem("low_rank", tokens, width, hidden, 8, k)
    inputs = [t for t in leaves(x, gate, core, low) if train_core or not any(t is w for w in core)]
    for weight in core:
        weight.requires_grad_(train_core)  # type: ignore[union-attr]
    counted: list[int] = []
    with counted_flops(counted):
        y = masked_low_rank(x, expert_TK, gate, core, low, nn.GELU())
        torch.autograd.grad(y.sum(), inputs)
    # Forward and the gradient of x; the gradient of trained weights is half as much again. 1.25·E·R/C where H = 4C.
    dense = 4 * tokens * width * hidden * (3 if train_core else 2)
    assert counted == [dense + 12 * tokens * columns * (width + hidden)]


def saved_bytes(function: Any, x: Tensor, weights: list[Tensor]) -> int:
    """Bytes that backward keeps, but for x and the weights."""
    kept = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = function(x)
    for t in (x, *weights):
        kept.pop(t.untyped_storage().data_ptr(), None)
    y.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("gpu", [False, True])
def test_it_keeps_little_more_than_the_dense_network(gpu: bool) -> None:
    width, tokens = (160, 800) if gpu else (96, 300)
    moe = layer(width, num_experts=8, rank=8, top_k="all", train_core=True)
    x = torch.randn(tokens, width, requires_grad=True)
    routing = moe.gate(x.detach())

    def mixture(x: Tensor) -> Tensor:
        return moe._experts(x, routing._replace(gate_TK=routing.gate_TK.detach()))

    # In the number format of a GPU the dense network too keeps a copy of x and of its weights.
    with torch.autocast("cpu", torch.bfloat16, enabled=gpu):
        dense = saved_bytes(moe.core, x, list(moe.parameters()))
        with as_on_a_gpu() if gpu else mock.patch.object(masked, "TILE", 100):
            found = saved_bytes(mixture, x, list(moe.parameters()))
    assert found <= 1.3 * dense


class Launches(TorchDispatchMode):
    """Counts the operations that would start a kernel on a GPU, and refuses those that wait for it."""

    _WAITS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "repeat_interleave.Tensor")
    _FREE = ("empty", "new_empty", "detach", "lift_fresh", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(self._WAITS), f"{name} waits for the device"
        if not func.is_view and not name.startswith(self._FREE):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [{}, {"top_k": "all"}, {"combine": "straight_through"}], ids=str)
def test_few_launches_and_no_wait(form: dict[str, Any]) -> None:
    moe = layer(**form)
    x = torch.randn(24, WIDTH, requires_grad=True)
    routing = moe.gate(x.detach())
    routing = routing._replace(gate_TK=routing.gate_TK.detach().requires_grad_())
    with as_on_a_gpu(), Launches() as launches:
        moe._experts(x, routing).backward(torch.ones(24, WIDTH))
    assert len(launches.found) <= 38  # with the casts of all weights and of the gradients


class Kernel:
    """Stands for a Triton kernel: one launch, which leaves zeros where it would write."""

    def __init__(self, launches: Launches) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        self.launches.found.append("kernel")
        for x in arguments:
            if isinstance(x, Tensor) and not x.is_floating_point():
                x.numpy().fill(0)  # experts


@pytest.mark.parametrize(("kernel", "most"), [(True, 34), (False, 75)])
@pytest.mark.parametrize("form", [{}, {"top_k": "all"}], ids=str)
def test_launches_of_a_whole_layer_with_its_gate_and_losses(kernel: bool, most: int, form: dict[str, Any]) -> None:
    moe = layer(**form).train()
    x = torch.randn(24, WIDTH, requires_grad=True)
    launches = Launches()
    of_gate, of_folded = (
        {name: Kernel(launches) for name in names}
        for names in (
            ("_forward", "_backward", "_weight_gradient", "_squared_variation"),
            ("_join", "_weigh", "_gate_gradient"),
        )
    )
    with (
        as_on_a_gpu(),
        mock.patch.object(gate, "_has_kernel", return_value=kernel),
        mock.patch.object(gate_losses, "has_triton", return_value=kernel),
        mock.patch.object(folded_passes, "has_triton", return_value=kernel),
        mock.patch.multiple("rmoe.moe.gate_kernel", **of_gate),
        mock.patch.multiple("rmoe.moe.folded_triton", **of_folded),
        launches,
    ):
        with collect() as records:
            y = moe(x)
        torch.autograd.backward([y, records.loss()], [torch.ones_like(y), None])
    assert 30 < len(launches.found) <= most


# ---- which arithmetic runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "together", "experts", "masks"),
    [
        ("meta", torch.float32, 100_000, 1, 64, True),  # as a GPU
        ("meta", torch.bfloat16, 100_000, 1, 64, True),
        ("meta", torch.float32, 10, 2, 65, False),
        ("meta", torch.float32, 10, 65, 65, True),  # nothing is computed in vain
        ("cpu", torch.float32, 10, 1, 8, False),
        ("cpu", torch.float32, 100_000, 2, 8, True),
        ("cpu", torch.bfloat16, 6272, 1, 8, True),
        ("cpu", torch.bfloat16, 25088, 1, 8, False),
        ("cpu", torch.bfloat16, 6272, 1, 64, False),
    ],
)
def test_where_all_experts_are_computed_at_once(
    device: str, dtype: torch.dtype, tokens: int, together: int, experts: int, masks: bool
) -> None:
    low = LowRank(*(torch.zeros(experts, 8, 1) for _ in range(4)))
    assert mixing._masks(torch.empty(tokens, 1, device=device), dtype, together, low) == masks


@pytest.mark.parametrize("top_k", [2, "all"])
def test_several_experts_in_one_network_are_never_sorted(top_k: Any) -> None:
    moe = layer(top_k=top_k)
    with (
        mock.patch.object(cpu_kernels, "_sort_rows", side_effect=AssertionError),
        mock.patch.object(mixing, "mix_weights", side_effect=AssertionError),
    ):
        moe(torch.randn(12, WIDTH)).sum().backward()


# ---- compilers and exporters -----------------------------------------------------------------------------------------


def expected(moe: ResidualMoE, x: Tensor) -> Tensor:
    """The layer's output by the definition."""
    x_TC = x.reshape(-1, WIDTH)
    routing, core = moe.gate(x_TC), moe.core
    network = Network(core.fc1.weight, core.fc1.bias, core.fc2.weight, core.fc2.bias)  # type: ignore[union-attr,arg-type]
    residuals: Residuals = moe.residuals()
    y = reference(x_TC, routing.expert_TK, routing.gate_TK, network, residuals, core.act, moe.config.mixes_weights)  # type: ignore[arg-type]
    return y.view_as(x)


FORMS = [{}, {"top_k": "all"}, {"top_k": 2, "combine": "straight_through"}, {"shared_a": True}]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer_can_be_exported_with_any_number_of_images(form: dict[str, Any]) -> None:
    moe, images = layer(**form).eval(), torch.randn(2, 5, WIDTH)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(moe, (images,), dynamic_shapes=({0: batch},)).module()
    for x in (images, torch.randn(7, 5, WIDTH), torch.randn(1, 5, WIDTH)):
        torch.testing.assert_close(program(x), expected(moe, x))


def test_a_layer_can_be_exported_for_one_size() -> None:
    moe, x = layer().eval(), torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(torch.export.export(moe, (x,)).module()(x), expected(moe, x))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer_compiles_as_one_graph(form: dict[str, Any]) -> None:
    moe, x = layer(**form).eval(), torch.randn(2, 5, WIDTH)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(moe, fullgraph=True, backend="aot_eager")(x), expected(moe, x))


def test_its_compiled_gradient_is_the_reference() -> None:
    x, expert_TK, gate, core, low = problem("low_rank", 8, 3, 4, 4, 2)
    arguments = (leaves(x, gate, core, low), x, expert_TK, gate, core, low, torch.tanh, True)
    torch._dynamo.reset()
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, *arguments), value_and_gradients(reference, *arguments))


@pytest.mark.parametrize("form", [*FORMS, {"residual": "full"}], ids=str)
def test_a_layer_that_is_compiled_trains_as_it_is(form: dict[str, Any]) -> None:
    moe, x = layer(**form, noise=0.0), torch.randn(4, 5, WIDTH)
    torch._dynamo.reset()
    found = []
    for module in (moe, torch.compile(moe, backend="aot_eager")):
        moe.zero_grad()
        with collect() as records:
            y = module(x)
        (y.square().sum() + records.loss()).backward()
        found.append([y.detach(), records.loss().detach(), *(p.grad for p in moe.parameters() if p.requires_grad)])
    torch.testing.assert_close(*found)


def test_experts_that_choose_train_while_compiled() -> None:
    moe, x = layer(router="expert_choice", top_k=1), torch.randn(2, 5, WIDTH)
    torch._dynamo.reset()
    with collect() as records:
        torch.compile(moe, backend="eager")(x)
    assert records.sums[moe, 0].chosen_E.tolist() == [2.5] * moe.num_experts


@pytest.mark.parametrize("top_k", [1, "all"])
def test_gradients_of_many_tiles_are_not_rounded_at_each(top_k: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (masked, cpu_kernels):
        monkeypatch.setattr(module, "TILE", 16)
    torch.manual_seed(0)
    moe, x = layer(top_k=top_k, noise=0.0, train_core=True), torch.rand(4096, WIDTH)
    found = []
    for enabled in (False, True):
        moe.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            moe(x).float().sum().backward()
        found.append([p.grad for name, p in moe.named_parameters() if name.startswith("core")])
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.008 * exact.norm()
