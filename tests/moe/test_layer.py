"""The rules that the layer keeps, in one process; tests/distributed/test_placement.py has the sixth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from timm.layers import Mlp, SwiGLU
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rmoe.config import GateLosses, ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect
from rmoe.moe.state import global_state_dict, load_global_state_dict, local_experts, roles

WIDTH = 6
KINDS = ("low_rank", "full")
PRESERVING = ("residual", "straight_through")


def layer(seed: int = 0, spread: float = 0.0, **config: object) -> ResidualMoE:
    """A layer of four experts; `spread` moves its residuals away from zero."""
    torch.manual_seed(seed)
    moe = ResidualMoE(
        Mlp(WIDTH, 2 * WIDTH),
        ResidualMoEConfig(**{"num_experts": 4, "top_k": 1, "rank": 2, "train_core": False, **config}),
    )  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in moe.deepspeed_moe.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return moe


def tokens(count: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "combine", "k"), list(product(KINDS, PRESERVING, (1, 2))))
@pytest.mark.parametrize("training", [True, False])
def test_preserves_the_dense_function(kind: str, combine: str, k: int, training: bool) -> None:
    moe = layer(residual=kind, combine=combine, top_k=k, noise=0.0, gate_std=3.0).train(training)
    x = tokens().view(2, 2, 3, WIDTH)
    torch.testing.assert_close(moe(x), moe.core(x), rtol=0, atol=1e-6)
    if combine == "residual" and kind == "low_rank":
        assert torch.equal(moe(x), moe.core(x))


def test_softmax_combine_scales_as_v_moe_does() -> None:
    moe = layer(combine="softmax", residual="full").eval()
    x = tokens()
    with collect() as records:
        y = moe(x)
    torch.testing.assert_close(y, records.routing[moe].gate_TK * moe.core(x))


@pytest.mark.parametrize(("kind", "combine", "k"), list(product(KINDS, PRESERVING, (1, 2))))
def test_the_gate_learns_as_soon_as_residuals_differ(kind: str, combine: str, k: int) -> None:
    moe = layer(spread=0.5, residual=kind, combine=combine, top_k=k)
    moe(tokens()).square().sum().backward()
    assert moe.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_token_gets_the_core_alone(kind: str) -> None:
    moe = layer(spread=0.5, residual=kind, capacity_factor=0.5, noise=0.0)
    x = tokens()
    with collect() as records:
        y = moe(x)
    dropped = records.routing[moe].expert_TK[:, 0] == 4
    assert 0 < dropped.sum() < len(x)
    torch.testing.assert_close(y[dropped], moe.core(x)[dropped])
    assert not torch.isclose(y, moe.core(x)).all(-1)[~dropped].any()


@pytest.mark.parametrize("kind", KINDS)
def test_order_free_also_with_a_capacity(kind: str) -> None:
    moe = layer(spread=0.5, residual=kind, capacity_factor=0.5, noise=0.0, top_k=2)
    x, order = tokens(), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moe(x[order]), moe(x)[order])


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_an_image_does_not_depend_on_its_batchmates(kind: str) -> None:
    moe = layer(spread=0.5, residual=kind, capacity_factor=0.5).eval()
    images = tokens().view(3, 4, WIDTH)
    torch.testing.assert_close(moe(images)[1], moe(images[1:2])[0])


@pytest.mark.parametrize(("kind", "train_core"), list(product(KINDS, (False, True))))
def test_frozen_is_bit_identical_and_trainable_changes(kind: str, train_core: bool) -> None:
    moe = layer(residual=kind, train_core=train_core)
    before = copy.deepcopy(moe.state_dict())
    optimizer = torch.optim.AdamW([p for p in moe.parameters() if p.requires_grad], lr=1e-2)
    for step in range(5):
        with collect() as records:
            loss = (moe(tokens(40, step)) - 1).square().sum()
        optimizer.zero_grad()
        (loss + records.loss()).backward()
        optimizer.step()
    for name, x in moe.state_dict().items():
        is_core = name.startswith("core.")
        assert torch.equal(x, before[name]) == (is_core and not train_core), name


def test_weights_are_float32_masters_of_a_bfloat16_pass() -> None:
    moe = layer(spread=0.5, noise=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(tokens())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), moe.eval()(tokens()), rtol=0.1, atol=0.1)


def test_bfloat16_weights() -> None:
    moe = layer(spread=0.5, residual="full").to(torch.bfloat16)
    y = moe(tokens().to(torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None for p in moe.parameters() if p.requires_grad)


def test_more_experts_than_tokens() -> None:
    with pytest.raises(UserError, match="3 tokens for its 4 experts"):
        layer()(tokens(3))
    assert layer().eval()(tokens(3)).shape == (3, WIDTH)


def test_one_of_several_processes_may_have_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for count in (0, 1):
        assert layer()(tokens(count)).shape == (count, WIDTH)


# ---- experts of their own, the upper bound ---------------------------------------------------------------------------


def test_copied_experts_are_the_dense_network() -> None:
    torch.manual_seed(0)
    dense = Mlp(WIDTH, 2 * WIDTH)
    config = ResidualMoEConfig(num_experts=4, residual="experts", top_k=2)
    moe = ResidualMoE(dense, config).eval()
    torch.testing.assert_close(moe(tokens()), dense(tokens()))
    softmax = ResidualMoE(dense, ResidualMoEConfig(num_experts=4, residual="experts", combine="softmax")).eval()
    with collect() as records:
        y = softmax(tokens())
    torch.testing.assert_close(y, records.routing[softmax].gate_TK * dense(tokens()))


def test_experts_have_no_core_and_differ_when_drawn() -> None:
    moe = layer(residual="experts", expert_init="random")
    assert not [key for key in moe.state_dict() if key.startswith("core")]
    w1_EHC = moe.residuals().w1_EHC
    assert (w1_EHC[0] - w1_EHC[1]).abs().min() > 0
    moe(tokens()).sum().backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_a_dropped_choice_of_experts_without_core_is_zero() -> None:
    moe = layer(residual="experts", capacity_factor=0.5, noise=0.0)
    with collect() as records:
        y = moe(tokens())
    dropped = records.routing[moe].expert_TK[:, 0] == 4
    assert 0 < dropped.sum() < len(y)
    assert not y[dropped].any()
    assert y[~dropped].any(-1).all()


def test_fixed_residuals_do_not_train() -> None:
    moe = layer(spread=0.5, residual="full", train_residual=False)
    moe(tokens()).sum().backward()
    assert moe.gate.weight.grad is not None
    assert all(p.grad is None for p in moe.deepspeed_moe.parameters())


# ---- losses --------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers, checkpointed or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        weights = GateLosses(importance=1.0, balance=0.5, z=0.1)
        self.layers = nn.ModuleList(layer(seed, spread=0.3, losses=weights, noise=0.0) for seed in (1, 2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for moe in self.layers:
            x = moe(x) if self.reentrant is None else checkpoint(moe, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointed_layers_count_once_with_gradient(inside: bool) -> None:
    results = []
    for reentrant in (None, False):
        model = Two(reentrant)
        with collect() as records:
            loss = model(tokens().requires_grad_()).sum()
            if inside:
                (loss + records.loss()).backward()
        if not inside:
            (loss + records.loss()).backward()
        results.append([records.loss(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_the_experts_keeps_less_and_routes_once(kind: str) -> None:
    results = []
    for recompute in (False, True):
        moe = layer(spread=0.5, residual=kind, recompute=recompute, noise=1.0)
        calls, kept = [], []
        moe.gate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        moe.core.act.register_forward_hook(lambda *_, kept=kept: kept.append(1))
        torch.manual_seed(0)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            y = moe(tokens(64))
        y.square().sum().backward()
        results.append((y, [p.grad for p in moe.parameters() if p.requires_grad], sum(saved), len(calls), len(kept)))
    (y, grads, size, gates, runs), (again_y, again_grads, again_size, again_gates, again_runs) = results
    torch.testing.assert_close(again_y, y)
    torch.testing.assert_close(again_grads, grads)
    assert again_size < 0.7 * size
    assert (gates, again_gates) == (1, 1)
    assert (runs, again_runs) == (1, 2)


def test_reentrant_checkpointing_is_refused() -> None:
    with collect() as records:
        Two(True)(tokens().requires_grad_())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        records.loss()


def test_losses_sum_over_layers_and_only_in_training() -> None:
    model = Two(None)
    with collect() as records:
        model(tokens())
    assert list(records.routing) == list(model.layers)
    parts = []
    for moe in model.layers:
        with collect() as alone:
            alone.add(moe, records.routing[moe])
        parts.append(alone.loss())
    torch.testing.assert_close(records.loss(), sum(parts))
    with collect() as records:
        model.eval()(tokens())
    assert records.loss() == 0
    assert len(records.routing) == 2


def test_nothing_is_collected_outside_the_block() -> None:
    moe = layer()
    with collect() as records:
        pass
    moe(tokens())
    assert records.loss() == 0


# ---- modes, devices and cores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_in_the_mode_of_its_core(training: bool) -> None:
    moe = ResidualMoE(Mlp(WIDTH, 2 * WIDTH).train(training), ResidualMoEConfig(num_experts=4))
    assert {module.training for module in moe.modules()} == {training}
    if not training:
        assert torch.equal(moe(tokens()), moe(tokens()))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_made_on_meta_takes_a_state_by_assignment(kind: str) -> None:
    made = layer(spread=0.5, residual=kind)
    with torch.device("meta"):
        moe = layer(residual=kind)
    with pytest.raises(RuntimeError, match="is on the meta device: use assign=True"):
        moe.load_state_dict(made.state_dict())
    moe.load_state_dict(made.state_dict(), assign=True)
    assert not any(parameter.is_meta for parameter in moe.parameters())
    assert {n for n, p in moe.named_parameters() if p.requires_grad} == {
        n for n, p in made.named_parameters() if p.requires_grad
    }
    assert torch.equal(moe.eval()(tokens()), made.eval()(tokens()))


def test_a_layer_made_on_meta_takes_a_state_in_place() -> None:
    made = layer(spread=0.5)
    with torch.device("meta"):
        moe = layer()
    moe.to_empty(device="cpu").load_state_dict(made.state_dict())
    assert torch.equal(moe.eval()(tokens()), made.eval()(tokens()))


def mlp(act: Callable[[], nn.Module] = nn.GELU, **changed: nn.Module) -> Mlp:
    network = Mlp(WIDTH, 2 * WIDTH, act_layer=act)
    for name, module in changed.items():
        setattr(network, name, module)
    return network


def swiglu(**changed: nn.Module) -> SwiGLU:
    network = SwiGLU(WIDTH, 2 * WIDTH)
    for name, module in changed.items():
        setattr(network, name, module)
    return network


class OtherWeights(nn.Linear):
    """A linear layer with weights of a dtype that no core has."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(WIDTH, 2 * WIDTH)
        self.weight = nn.Parameter(torch.zeros(2 * WIDTH, WIDTH).to(dtype), requires_grad=False)


@pytest.mark.parametrize(
    ("core", "message"),
    [
        (lambda: mlp(nn.RReLU), "activation is RReLU.*chance"),
        (lambda: mlp(fc1=OtherWeights(torch.int8)), "fc1.weight is int8; .*dense tensors"),
        (lambda: mlp(fc1=OtherWeights(torch.bool)), "fc1.weight is bool"),
        (lambda: mlp(fc1=OtherWeights(torch.complex64)), "fc1.weight is complex64"),
        (lambda: mlp(fc1=OtherWeights(torch.float8_e4m3fn)), "fc1.weight is float8"),
        (lambda: mlp(fc2=nn.Linear(2 * WIDTH, WIDTH + 1)), "lead back"),
        (lambda: mlp(fc2=nn.Identity()), "a Mlp without fc2"),
        (lambda: nn.Linear(WIDTH, WIDTH), "a Linear without fc1"),
        (lambda: Mlp(WIDTH, 2 * WIDTH, drop=0.1), "dropout inside"),
        (lambda: MlpWithDepthwiseConv(WIDTH, 2 * WIDTH), "has 'dwconv'"),
        (lambda: swiglu(fc1_x=nn.Linear(WIDTH, 2 * WIDTH, bias=False)), "fc1_g' has a bias and the other half"),
        (lambda: swiglu(fc1_g=nn.Linear(WIDTH, 2 * WIDTH, bias=False)), "fc1_x' has a bias and the other half"),
    ],
)
def test_cores_that_the_layer_would_not_compute(core: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResidualMoE(core(), ResidualMoEConfig(num_experts=4))


@pytest.mark.parametrize("config", [{"num_experts": 4}, None, "low_rank"])
def test_a_config_that_is_none(config: object) -> None:
    with pytest.raises(UserError, match="build it by ResidualMoEConfig"):
        ResidualMoE(mlp(), config)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_in_place_has_the_gradient_of_one_that_is_not(kind: str) -> None:
    grads = []
    for inplace in (True, False):
        torch.manual_seed(0)
        core = mlp(lambda inplace=inplace: nn.SiLU(inplace))
        moe = ResidualMoE(core, ResidualMoEConfig(num_experts=4, residual=kind, noise=0.0))  # type: ignore[arg-type]
        x = tokens().requires_grad_()
        moe(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


# ---- records -------------------------------------------------------------------------------------------------------


def test_two_passes_in_one_block_are_one_batch() -> None:
    model = Two(None)
    with collect() as whole:
        model.layers[0](tokens(24))
    with collect() as parts:
        for part in tokens(24).split([7, 17]):
            model.layers[0](part)
    torch.testing.assert_close(parts.loss(), whole.loss())
    torch.testing.assert_close([*parts.balance().values()], [*whole.balance().values()])


def test_values_that_travel_with_the_sums_change_nothing() -> None:
    moe = layer(losses=GateLosses(importance=0.1, z=0.01))
    values = torch.tensor([1.0, 2.5], requires_grad=True)
    losses = []
    for together in (False, True):
        torch.manual_seed(1)  # of the gate's noise
        with collect() as records:
            moe(tokens())
        if together:
            average = records.average(values)
            assert torch.equal(average, values)
            assert not average.requires_grad
        losses.append(records.loss())
    assert torch.equal(*losses)
    assert losses[0] > 0
    gradients = [torch.autograd.grad(loss, moe.gate.weight)[0] for loss in losses]
    assert torch.equal(*gradients)


def test_a_dense_model_and_evaluation_have_no_loss() -> None:
    for model in (mlp(), Two(None).eval()):
        with collect() as records:
            loss = model(tokens()).sum()
        assert torch.equal(loss + records.loss(), loss)
        assert records.join({"loss": loss}) == {"loss": loss}
        assert torch.equal(records.average(torch.ones(2)), torch.ones(2))
        assert records.balance() == {}


def test_a_thread_without_collect_is_refused_while_another_has_it() -> None:
    moe = layer()
    with ThreadPoolExecutor(1) as pool, collect() as records:
        with pytest.raises(RuntimeError, match="open it in each of them"):
            pool.submit(moe, tokens()).result()
        pool.submit(moe.eval(), tokens()).result()
    assert not records.routing
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(moe.train(), tokens()).result().shape == (12, WIDTH)


def test_threads_collect_on_their_own() -> None:
    def loss(moe: ResidualMoE) -> Tensor:
        with collect() as records:
            moe(tokens())
        return records.loss()

    layers = [layer(seed, noise=0.0) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(loss, layers))
    torch.testing.assert_close(found, [loss(moe) for moe in layers])


def test_the_balance_by_hand() -> None:
    moe = layer(noise=0.0, gate_std=0.0)
    with torch.no_grad():
        moe.gate.weight[:, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    x = torch.zeros(8, WIDTH)
    x[:6, 0], x[6:, 0] = 1.0, -1.0  # six tokens for expert 3, two for expert 0
    with collect() as records:
        moe(x)
    (balance,) = records.balance().values()
    assert balance.largest_share.item() == 0.75
    assert balance.entropy.item() == pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4))
    assert balance.confidence.item() == pytest.approx(math.exp(3) / sum(math.exp(i) for i in range(4)))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_even_and_a_collapsed_gate(k: int) -> None:
    moe = layer(noise=0.0, gate_std=0.0, top_k=k)
    with torch.no_grad():
        moe.gate.weight[:, 0] = torch.tensor([50.0, 40.0, 0.0, 0.0])
    with collect() as records:
        moe(torch.ones(8, WIDTH))
    (balance,) = records.balance().values()
    assert balance.largest_share.item() == pytest.approx(1.0, abs=1e-3)
    assert balance.entropy.item() == pytest.approx(0.5 if k == 2 else 0.0, abs=1e-3)
    assert balance.confidence.item() == pytest.approx(1.0, abs=1e-3)


def test_one_expert_is_balanced() -> None:
    moe = layer(num_experts=1)
    with collect() as records:
        moe(tokens())
    (balance,) = records.balance().values()
    assert (balance.largest_share.item(), balance.entropy.item()) == (1.0, 1.0)


# ---- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_stands_alone_in_the_state_dict(kind: str) -> None:
    moe = layer(spread=0.5, residual=kind)
    keys = [key for key in moe.state_dict() if "deepspeed_experts" in key]
    assert len(keys) == 4 * 4
    assert all(key.startswith("deepspeed_moe.experts.deepspeed_experts.") for key in keys)
    other = layer(seed=5, spread=0.5, residual=kind)
    other.load_state_dict(moe.state_dict())
    torch.testing.assert_close(other.eval()(tokens()), moe.eval()(tokens()), rtol=0, atol=0)


def test_state_dict_is_strict() -> None:
    moe = layer()
    state = moe.state_dict()
    missing = {key: x for key, x in state.items() if "experts.3.b1" not in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.3\.b1"):
        layer().load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.4"):
        layer().load_state_dict(state | {"deepspeed_moe.experts.deepspeed_experts.4.a1_ERC": torch.zeros(2, 6)})
    with pytest.raises(RuntimeError, match="in the file"):
        layer(rank=3).load_state_dict(state)


def test_global_state_dict_round_trip_and_refusal() -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"mlp": layer(spread=0.5), "norm": nn.LayerNorm(WIDTH)})})
    state = global_state_dict(model)
    assert set(state) == set(model.state_dict())
    other = nn.ModuleDict({"block": nn.ModuleDict({"mlp": layer(seed=9), "norm": nn.LayerNorm(WIDTH)})})
    load_global_state_dict(other, state)
    for name, x in other.state_dict().items():
        assert torch.equal(x, state[name]), name
    eight = nn.ModuleDict({"block": nn.ModuleDict({"mlp": layer(num_experts=8), "norm": nn.LayerNorm(WIDTH)})})
    with pytest.raises(RuntimeError, match="16 only in the model"):
        load_global_state_dict(eight, state)
    with pytest.raises(RuntimeError, match="16 are only in the file"):
        load_global_state_dict(other, global_state_dict(eight))


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_that_are_not_spread_are_ordinary_parameters(kind: str) -> None:
    moe = layer(residual=kind)
    assert not isinstance(moe, MoE)
    assert not any(is_moe_param(parameter) for parameter in moe.parameters())


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_residuals_that_are_spread_have_deepspeeds_marks(first_of_two: None) -> None:
    """Copies of them too, and those that have left the meta device."""
    made = layer(ep_size=2)
    with torch.device("meta"):
        empty, assigned = layer(ep_size=2), layer(ep_size=2)
    assigned.load_state_dict(made.state_dict(), assign=True)
    for moe in (made, copy.deepcopy(made), empty.to_empty(device="cpu"), assigned):
        assert isinstance(moe, MoE)
        marked = [name for name, parameter in moe.named_parameters() if is_moe_param(parameter)]
        assert marked == [f"deepspeed_moe.experts.{name}" for name in moe.residuals()._fields]
        assert {p.group_name for p in moe.deepspeed_moe.parameters()} == {"ep_size_2"}


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a layer believe that it is in the first of two processes, which it may not speak to."""
    monkeypatch.setattr("rmoe.moe.layer._check_processes", lambda ep_size: None)
    monkeypatch.setattr("rmoe.moe.layer.make_expert_groups", lambda ep_size: None)
    monkeypatch.setattr(ResidualMoE, "expert_rank", lambda self: 0)


def test_roles() -> None:
    model = nn.Sequential(nn.Linear(2, 2), layer())
    found = roles(model)
    assert found["0.weight"] == "other"
    assert found["1.core.fc1.weight"] == "core"
    assert found["1.gate.weight"] == "gate"
    assert found["1.deepspeed_moe.experts.a1_ERC"] == "residual"
    assert set(found) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("top_k", [1, "all"])
def test_experts_that_share_an_a(experts: int, top_k: int | str) -> None:
    config = {"num_experts": experts, "top_k": top_k, "shared_a": True}
    x = tokens()
    assert torch.equal(layer(**config).eval()(x), layer().core(x))
    moe = layer(spread=0.5, **config).eval()
    each = layer(**(config | {"shared_a": False})).eval()
    state = moe.state_dict()
    assert state["deepspeed_moe.experts.a1_ERC"].shape == (1, 2, WIDTH)
    assert len([key for key in state if "deepspeed_experts" in key]) == 2 * experts
    for e in range(experts):  # each with a copy of what is shared
        prefix = f"deepspeed_moe.experts.deepspeed_experts.{e}."
        state |= {prefix + name: state[f"deepspeed_moe.experts.{name}"][0] for name in ("a1_ERC", "a2_ERH")}
    each.load_state_dict({key: x for key, x in state.items() if key in each.state_dict()})
    torch.testing.assert_close(moe(x), each(x))
    for one, other in zip(moe.residuals().delta(experts - 1), each.residuals().delta(experts - 1), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_shared_a_is_saved_once_and_loaded() -> None:
    model = nn.ModuleDict({"mlp": layer(spread=0.5, shared_a=True)})
    state = global_state_dict(model)
    assert set(state) == set(model.state_dict())
    other = nn.ModuleDict({"mlp": layer(seed=9, shared_a=True)})
    load_global_state_dict(other, state)
    assert torch.equal(other["mlp"].eval()(tokens()), model["mlp"].eval()(tokens()))
    with pytest.raises(RuntimeError, match="only in the model"):
        load_global_state_dict(nn.ModuleDict({"mlp": layer()}), state)
    with torch.device("meta"):
        empty = layer(shared_a=True)
    empty.load_state_dict(model["mlp"].state_dict(), assign=True)
    assert torch.equal(empty.eval()(tokens()), model["mlp"].eval()(tokens()))


@pytest.mark.parametrize("combine", PRESERVING)
def test_alpha_scales_the_residuals_and_is_not_saved(combine: str) -> None:
    strong, plain = (layer(spread=0.5, rank=4, combine=combine, alpha=alpha).eval() for alpha in (3.0, None))
    for name, x in strong.state_dict().items():
        assert torch.equal(x, plain.state_dict()[name])
    assert torch.equal(layer(alpha=3.0).eval()(tokens()), layer().core(tokens()))
    torch.testing.assert_close(strong.residuals().delta(2).w1_HC, 1.5 * plain.residuals().delta(2).w1_HC)  # 3 / √4
    with torch.no_grad():
        for name in ("b1_ERH", "b2_ERC"):
            plain.deepspeed_moe.experts.get_parameter(name).mul_(1.5)
    torch.testing.assert_close(strong(tokens()), plain(tokens()))
    strong(tokens()).sum().backward()
    plain(tokens()).sum().backward()
    gradients = [moe.deepspeed_moe.experts.b1_ERH.grad for moe in (strong, plain)]
    torch.testing.assert_close(gradients[0], 1.5 * gradients[1])


def test_local_experts_changes_nothing_in_one_process() -> None:
    moe = layer(spread=0.5).eval()
    with local_experts(moe):
        inside = moe(tokens())
    assert torch.equal(inside, moe(tokens()))


def test_ep_size_without_processes_is_refused() -> None:
    with pytest.raises(UserError, match="needs torch.distributed"):
        layer(ep_size=2)


@pytest.mark.parametrize("asks", ["balance", "loads", "average"])
def test_who_asks_first_does_not_take_the_gradient_of_the_losses(asks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmoe.moe.records.SumOverProcesses", SumOfOne)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    moe = layer(losses=GateLosses(importance=1.0))
    with collect() as records:
        moe(tokens())
    with torch.no_grad():
        getattr(records, asks)(*([torch.zeros(2)] if asks == "average" else []))
    records.loss().backward()
    assert moe.gate.weight.grad.abs().sum() > 0


class SumOfOne(torch.autograd.Function):
    """The sum over two processes of which the other one has nothing."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class QuickGELU(nn.GELU):
    """An activation that is not its parent's."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("top_k", [1, "all"])
def test_a_subclass_of_gelu_has_its_own_gradient(top_k: int | str) -> None:
    core = mlp(QuickGELU).double()
    x = tokens().double().requires_grad_()
    (expected,) = torch.autograd.grad(core(x).sum(), x)
    moe = ResidualMoE(core, ResidualMoEConfig(num_experts=4, top_k=top_k, noise=0.0))  # type: ignore[arg-type]
    torch.testing.assert_close(torch.autograd.grad(moe(x).sum(), x)[0], expected)


@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_float64_stays_float64_under_autocast(kind: str) -> None:
    moe, x = layer(residual=kind, spread=0.1).double(), tokens().double()
    expected = moe.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe(x), expected)


@pytest.mark.parametrize("config", [{}, {"top_k": "all"}, {"residual": "full"}], ids=str)
def test_second_derivatives_are_refused(config: dict[str, object]) -> None:
    x = tokens().requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        torch.autograd.grad(layer(spread=0.1, **config)(x).square().sum(), x, create_graph=True)
