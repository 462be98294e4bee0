"""Feed-forward networks of every form: a mixture begins as the network, and computes what its definition says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from timm.layers import (
    ConvMlp,
    GlobalResponseNormMlp,
    GluMlp,
    LayerNorm2d,
    Mlp,
    RmsNorm,
    SwiGLU,
    SwiGLUPacked,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.experts import BIASES, reference
from rmoe.moe.forms import form_of
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.merged import exact_network
from rmoe.moe.records import collect

WIDTH, HIDDEN = 4, 6
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (lambda: Mlp(WIDTH, HIDDEN), "fc2(act(fc1(x)))"),
    "activation with weights": (lambda: Mlp(WIDTH, HIDDEN, act_layer=nn.PReLU), "fc2(act(fc1(x)))"),
    "norm behind": (lambda: Mlp(WIDTH, HIDDEN, norm_layer=nn.LayerNorm), "fc2(norm(act(fc1(x))))"),
    "GRN": (lambda: GlobalResponseNormMlp(WIDTH, HIDDEN), "fc2(grn(act(fc1(x))))"),
    "gate first": (lambda: SwiGLUPacked(WIDTH, HIDDEN), "fc2(act(fc1(x)) * fc1(x))"),
    "gate last": (lambda: GluMlp(WIDTH, HIDDEN), "fc2(act(fc1(x)) * fc1(x))"),
    "gate and norm": (lambda: GluMlp(WIDTH, HIDDEN, norm_layer=RmsNorm), "fc2(norm(act(fc1(x)) * fc1(x)))"),
    "two layers": (lambda: SwiGLU(WIDTH, HIDDEN), "fc2(act(fc1_g(x)) * fc1_x(x))"),
    "two and a norm": (
        lambda: SwiGLU(WIDTH, HIDDEN, norm_layer=nn.LayerNorm, bias=False),
        "fc2(norm(act(fc1_g(x)) * fc1_x(x)))",
    ),
    "convolutions": (lambda: Mlp(WIDTH, HIDDEN, use_conv=True), "fc2(act(fc1(x)))"),
    "norm before": (lambda: ConvMlp(WIDTH, HIDDEN, norm_layer=LayerNorm2d), "fc2(act(norm(fc1(x))))"),
    "gated convolutions": (lambda: GluMlp(WIDTH, HIDDEN, use_conv=True), "fc2(act(fc1(x)) * fc1(x))"),
    "GRN of convolutions": (lambda: GlobalResponseNormMlp(WIDTH, HIDDEN, use_conv=True), "fc2(grn(act(fc1(x))))"),
}
CONVOLUTIONS = ("convolutions", "norm before", "gated convolutions", "GRN of convolutions")
OTHERS = [name for name in NETWORKS if name != "plain"]
every_form = pytest.mark.parametrize("name", NETWORKS)
every_other_form = pytest.mark.parametrize("name", OTHERS)


def network(name: str) -> nn.Module:
    """A dense network whose parts all have random weights; those that start at zero would hide what they do."""
    torch.manual_seed(0)
    made = NETWORKS[name][0]()
    for x in made.parameters():
        x.data.normal_()
    return made


def layer(name: str, spread: float = 0.0, **config: Any) -> ResidualMoE:
    """A layer of three experts; `spread` moves its residuals away from zero."""
    moe = ResidualMoE(
        network(name),
        ResidualMoEConfig(**{"num_experts": 3, "top_k": 1, "rank": 2, "gate_std": 3.0, "train_core": False, **config}),
    )
    with torch.no_grad():
        for parameter in moe.deepspeed_moe.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return moe


def images(name: str) -> Tensor:
    x = torch.randn(2, 3, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.movedim(-1, 1).contiguous() if name in CONVOLUTIONS else x


@every_form
def test_a_form_is_what_the_network_computes(name: str) -> None:
    dense, x = network(name), images(name)
    form = form_of(dense)
    assert str(form) == NETWORKS[name][1]
    assert form.plain == (name == "plain")
    assert torch.equal(form.dense(dense, x), dense(x))


@every_form
@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_it_begins_as_the_network(name: str, kind: str) -> None:
    x = images(name)
    for combine, k, training in product(("residual", "straight_through"), (1, 2, "all"), (True, False)):
        moe = layer(name, residual=kind, combine=combine, top_k=k).train(training)
        torch.testing.assert_close(moe(x), moe.core(x), rtol=1e-5, atol=1e-5)
        if combine == "residual" and kind == "low_rank" and name != "plain":  # test_layer.py has that
            assert torch.equal(moe(x), moe.core(x))


@every_form
def test_copied_experts_begin_as_the_network(name: str) -> None:
    moe, x = layer(name, residual="experts", top_k=2).eval(), images(name)
    torch.testing.assert_close(moe(x), network(name)(x), rtol=1e-5, atol=1e-5)
    drawn = layer(name, residual="experts", expert_init="random", top_k=2).eval()
    assert not torch.allclose(drawn(x), moe(x))
    between = [p for key, p in moe.core.named_parameters()]
    assert all(p.requires_grad for p in between)
    fixed = layer(name, residual="experts", train_residual=False)
    assert not any(p.requires_grad for p in (*fixed.core.parameters(), *fixed.deepspeed_moe.parameters()))


def definition(moe: ResidualMoE, x: Tensor, routing: Any) -> Tensor:
    """What the layer means, token by token."""
    form, grid = moe.form, moe.form.tokens(x).shape[:-1]

    def act(h_TF: Tensor) -> Tensor:
        h = h_TF.unflatten(0, grid)
        inside = form.inside(moe.core, h if form.channels == -1 else h.movedim(-1, 1))
        return form.tokens(inside).flatten(0, -2)

    x_TC = form.tokens(x).flatten(0, -2)
    decided = (routing.expert_TK, routing.gate_TK.to(x.dtype))
    y_TC = reference(x_TC, *decided, moe.theta(), moe.residuals(), act, moe.config.mixes_weights)
    y = y_TC.unflatten(0, grid)
    return y if form.channels == -1 else y.movedim(-1, 1)


@every_other_form
@pytest.mark.parametrize(
    ("kind", "combine", "k"),
    [
        ("low_rank", "residual", 1),
        ("low_rank", "residual", "all"),
        ("low_rank", "straight_through", 2),
        ("full", "residual", 2),
        ("full", "straight_through", 1),
        ("experts", "softmax", 2),
    ],
)
def test_it_equals_its_definition_and_so_do_its_gradients(name: str, kind: str, combine: str, k: Any) -> None:
    moe = layer(name, 0.5, residual=kind, combine=combine, top_k=k, train_core=kind != "experts", noise=0.0).double()
    moe.eval()
    x = images(name).double().requires_grad_()
    with collect() as records:
        y = moe(x)
    expected = definition(moe, x, records.routing[moe])
    torch.testing.assert_close(y, expected)
    inputs = [x, *moe.parameters()]
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad((one * weights).sum(), inputs, retain_graph=True) for one in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@every_other_form
def test_gradients_are_those_of_differences(name: str) -> None:
    moe, x = layer(name, 0.5, top_k="all").double().eval(), images(name)[:1, :, :1].double()
    names = [key for key, _ in moe.deepspeed_moe.named_parameters()]
    values = [moe.deepspeed_moe.get_parameter(key).detach().clone().requires_grad_() for key in names]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        state = {f"deepspeed_moe.{key}": value for key, value in zip(names, values, strict=True)}
        return torch.func.functional_call(moe, state, (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values), fast_mode=True)


@every_form
def test_weights_stand_under_the_names_of_timm(name: str) -> None:
    dense = network(name)
    form = form_of(dense)
    state = form.state(form.network(dense))
    linear = {key: x for key, x in dense.state_dict().items() if key.startswith("fc")}
    assert state.keys() == linear.keys()
    assert all(torch.equal(state[key], x) for key, x in linear.items())
    moe = layer(name, 0.5, residual="full").eval()
    for key, x in moe.state_dict().items():
        if key.startswith("core."):
            assert torch.equal(x, dense.state_dict()[key.removeprefix("core.")])
    again = layer(name, residual="full").eval()
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again(images(name)), moe(images(name)))


@every_form
def test_an_expert_is_a_network_of_timm(name: str) -> None:
    """With all weight on one expert of full residuals, the layer is the network that holds core + Δ."""
    moe, x = layer(name, 0.5, residual="full", combine="straight_through").eval(), images(name)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
        core, delta = moe.theta(), moe.residuals().delta(1)
        whole = type(core)(*(d if c is None else c + d for c, d in zip(core, delta, strict=True)))
        dense = network(name)
        for part in ("fc1", "fc1_g", "fc1_x", "fc2"):
            if (linear := getattr(dense, part, None)) is not None and linear.bias is None:
                linear.bias = nn.Parameter(torch.zeros(linear.weight.shape[0]))
        missing = dense.load_state_dict(moe.form.state(whole), strict=False)
        assert not missing.unexpected_keys
        torch.testing.assert_close(moe(x), dense(x), rtol=1e-5, atol=1e-5)


@every_other_form
@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_a_dropped_token_gets_the_core_alone(name: str, kind: str) -> None:
    moe, x = layer(name, 0.5, residual=kind, capacity_factor=0.5).train(), images(name)
    with collect() as records:
        y = moe(x)
    routing = records.routing[moe]
    assert (routing.expert_TK == 3).any()
    torch.testing.assert_close(y, definition(moe, x, routing))


@every_other_form
def test_in_evaluation_an_image_does_not_depend_on_its_batchmates(name: str) -> None:
    moe, x = layer(name, 0.5).eval(), images(name)
    torch.testing.assert_close(moe(x)[:1], moe(x[:1]))


@every_other_form
def test_recomputing_gives_the_same(name: str) -> None:
    found = []
    for recompute in (False, True):
        moe, x = layer(name, 0.5, recompute=recompute).eval(), images(name).requires_grad_()
        moe(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in moe.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@every_other_form
def test_autocast_computes_in_half_precision(name: str) -> None:
    moe, x = layer(name, 0.2).eval(), images(name)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), moe(x), rtol=0.1, atol=0.3)


@every_other_form
def test_low_rank_costs_the_network_and_two_products_of_the_rank(name: str) -> None:
    moe, x = layer(name, 0.5).eval(), images(name)
    with torch.no_grad(), FlopCounterMode(display=False) as dense:
        moe.core(x)
    with torch.no_grad(), FlopCounterMode(display=False) as mixture:
        moe(x)
    (first, width), hidden = moe.theta().w1_HC.shape, moe.theta().w2_CH.shape[1]
    tokens, rows = moe.form.tokens(x).numel() // WIDTH, 3 * 2
    expected = 2 * tokens * (rows * (width + first + hidden + width) + 3 * WIDTH)  # and the gate
    assert mixture.get_total_flops() - dense.get_total_flops() == expected


@pytest.mark.parametrize("name", ["norm behind", "GRN", "two layers", "norm before"])
@pytest.mark.parametrize("config", [{}, {"residual": "full"}, {"residual": "full", "top_k": 2}], ids=str)
def test_an_exporter_follows(name: str, config: dict[str, Any]) -> None:
    moe, x = layer(name, 0.5, **config).eval(), images(name)
    exported = torch.export.export(moe, (x,), strict=False).module()
    for one in (x, x.flip(0)):
        torch.testing.assert_close(exported(one), moe(one))


@pytest.mark.parametrize(
    "dense",
    [
        lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
        lambda: Mlp(4, 8, out_features=3),
        lambda: SwiGLU(4, 8, out_features=3),
        lambda: nn.ModuleDict({"fc1": nn.Conv2d(4, 8, 3, padding=1), "act": nn.GELU(), "fc2": nn.Conv2d(8, 4, 1)}),
        lambda: nn.ModuleDict({"fc1": nn.Conv2d(4, 8, 1), "act": nn.GELU(), "fc2": nn.Linear(8, 4)}),
    ],
)
def test_what_has_no_form(dense: Callable[[], nn.Module]) -> None:
    assert form_of(dense()) is None


def test_tokens_do_not_travel_to_networks_that_see_others() -> None:
    with pytest.raises(UserError, match="a GlobalResponseNormMlp computes more .* use exchange='weights'"):
        ResidualMoE(network("GRN"), ResidualMoEConfig(num_experts=2, residual="full", ep_size=2))


@every_form
@pytest.mark.parametrize("residual", ["low_rank", "full", "experts"])
def test_one_expert_is_merged_into_a_network_of_its_form(name: str, residual: str) -> None:
    moe, dense = layer(name, spread=0.5, residual=residual, num_experts=1).eval(), network(name)
    with torch.no_grad():
        for key, x in moe.deepspeed_moe.named_parameters():
            x.mul_(key.rpartition(".")[2] not in BIASES)  # which some of the networks do not have
    dense.load_state_dict(moe.form.state(exact_network(moe)), strict=False)
    torch.testing.assert_close(dense(images(name)), moe(images(name)))
