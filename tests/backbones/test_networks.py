"""Tests what a mixture can replace: networks that compute more than fc2(act(fc1(x))) are refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, GatedMlp, GluMlp, Mlp, SqueezeExcite
from timm.models.mlp_mixer import SpatialGatingUnit
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import rmoe
from rmoe.backbones.networks import check_networks, find_networks
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.state import moe_layers

CONFIG = ResidualMoEConfig(num_experts=3, rank=2, blocks="all")


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def model(*networks: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(network) for network in networks))


class Own(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Scaled(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class ScaledGlu(GluMlp):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Dropped(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Rolled(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, -2))


class Sized(Mlp):
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return super().forward(x)


class Called(Mlp):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


class Paired(Own):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubling(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Overwriting(nn.Module):
    """Is a ReLU in place that does not say so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


class Softmax(nn.Softmax):
    def __init__(self) -> None:
        super().__init__(dim=-1)


def changed(change: Callable[[Any], object], network: nn.Module | None = None) -> nn.Module:
    network = network or Mlp(4, 8)
    change(network)
    return network


def scale_gamma(network: Any) -> None:
    network.gamma = nn.Parameter(torch.ones(4))


def own_linear(network: Any) -> None:
    network.fc1 = OwnLinear(4, 8)


def zero(network: nn.Module) -> nn.Module:
    for x in network.parameters():
        nn.init.zeros_(x)
    return network


def replaced_forward(network: Any) -> None:
    network.forward = lambda x: x


def depthwise(network: Any) -> None:
    network.dwconv = nn.Conv2d(8, 8, 3, groups=8)


def buffered(network: Any) -> None:
    network.register_buffer("mask", torch.ones(4))


def typed(part: str, dtype: torch.dtype) -> Callable[[Any], None]:
    def change(network: Any) -> None:
        linear = getattr(network, part)
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)

    return change


def sparse(network: Any) -> None:
    network.fc1.weight = nn.Parameter(network.fc1.weight.detach().to_sparse())


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "batch norm": (changed(lambda m: setattr(m, "norm", nn.BatchNorm1d(8))), r"'0.mlp.norm' \(BatchNorm1d\) counts"),
    "gMLP": (
        GatedMlp(4, 8, gate_layer=partial(SpatialGatingUnit, seq_len=3)),
        r"'0.mlp' .*'gate' \(SpatialGatingUnit\)",
    ),
    "subclass of a gated one": (ScaledGlu(4, 8), r"'0.mlp' \(ScaledGlu\) computes more than fc2\(act\(fc1\(x\)\) \*"),
    "depthwise convolution": (changed(depthwise), r"'0.mlp' .*'dwconv' \(Conv2d\)"),
    "an identity that is none": (changed(lambda m: setattr(m, "norm", Doubling())), r"'0.mlp' .*'norm' \(Doubling\)"),
    "parameter of its own": (changed(scale_gamma), "'0.mlp' .*'gamma'"),
    "buffer of its own": (changed(buffered), "'0.mlp' .*'mask'"),
    "linear of its own": (changed(own_linear), "'0.mlp.fc1' is a OwnLinear"),
    "dropout": (Mlp(4, 8, drop=0.1), "'0.mlp' has dropout"),
    "stochastic depth": (changed(lambda m: m.add_module("drop", DropPath(0.1))), "'0.mlp' has dropout"),
    "forward hook": (changed(lambda m: m.register_forward_hook(lambda *_: None)), "'0.mlp' has a hook"),
    "pre-hook of fc1": (changed(lambda m: m.fc1.register_forward_pre_hook(lambda *_: None)), "'0.mlp.fc1' has a hook"),
    "hook of act": (changed(lambda m: m.act.register_forward_hook(lambda *_: None)), "'0.mlp.act' has a hook"),
    "backward hook": (changed(lambda m: m.register_full_backward_hook(lambda *_: None)), "'0.mlp' has a hook"),
    "weight_norm": (changed(lambda m: parametrizations.weight_norm(m.fc2)), "'0.mlp.fc2' has a parametrization"),
    "spectral_norm": (changed(lambda m: parametrizations.spectral_norm(m.fc1)), "'0.mlp.fc1' has a parametrization"),
    "parametrization": (
        changed(lambda m: parametrize.register_parametrization(m.fc1, "weight", nn.Tanh())),
        "'0.mlp.fc1' has a parametrization",
    ),
    "old spectral_norm": (changed(lambda m: spectral_norm(m.fc1)), "'0.mlp.fc1' has a hook"),
    "pruning": (changed(lambda m: prune.random_unstructured(m.fc1, "weight", 0.5)), "'0.mlp.fc1' has a hook"),
    "forward of the object": (changed(replaced_forward), "'0.mlp' has another forward"),
    "subclass that scales": (Scaled(4, 8), r"'0.mlp' \(Scaled\) computes more"),
    "the same, zero weights": (zero(Scaled(4, 8)), r"'0.mlp' \(Scaled\) computes more"),
    "dropout as a function": (Dropped(4, 8), r"'0.mlp' \(Dropped\) computes more"),
    "tokens mixed": (Rolled(4, 8), r"'0.mlp' \(Rolled\) computes more"),
    "call of its own": (Called(4, 8), r"'0.mlp' \(Called\) computes more"),
    "two results": (Paired(4, 8), r"'0.mlp' \(Paired\) computes more"),
    "more arguments": (Sized(4, 8), r"'0.mlp' \(Sized\) cannot be run on tokens alone \(TypeError"),
    "softmax": (Mlp(4, 8, act_layer=Softmax), r"'0.mlp.act' \(Softmax\) is not elementwise"),
    "random act": (Mlp(4, 8, act_layer=nn.RReLU), r"'0.mlp.act' \(RReLU\) is not elementwise"),
    "act that overwrites": (changed(lambda m: setattr(m, "act", Overwriting())), "'0.mlp.act' .* overwrites"),
    "bool weights": (changed(typed("fc1", torch.bool)), "'0.mlp.fc1.weight' is bool"),
    "int8 weights": (changed(typed("fc2", torch.int8)), "'0.mlp.fc2.weight' is int8"),
    "complex weights": (changed(typed("fc1", torch.complex64)), "'0.mlp.fc1.weight' is complex64"),
    "float8 weights": (changed(typed("fc1", torch.float8_e4m3fn)), "'0.mlp.fc1.weight' is float8_e4m3fn"),
    "sparse weights": (changed(sparse), "'0.mlp.fc1.weight' is float32, sparse_coo"),
    "two dtypes": (changed(typed("fc1", torch.float16)), "'0.mlp' has weights of float16 on cpu and .*float32 on cpu"),
    "two devices": (changed(lambda m: m.fc2.to("meta")), "'0.mlp' has weights of .*float32 on cpu and .* on meta"),
}


def test_an_activation_in_place_is_computed() -> None:
    model = nn.Sequential(nn.ModuleDict({"mlp": Mlp(4, 8, act_layer=lambda: nn.SiLU(inplace=True))}))
    x = torch.randn(5, 4)
    expected = model[0]["mlp"](x.clone())
    rmoe.upcycle(model, ResidualMoEConfig(num_experts=2, blocks="all"))
    torch.testing.assert_close(model[0]["mlp"](x), expected)


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_dropped_is_refused(case: str) -> None:
    network, message = REFUSED[case]
    network = model(network, Mlp(4, 8))
    trained = [p.requires_grad for p in network.parameters()]
    with pytest.raises(UserError, match=message) as caught:
        rmoe.upcycle(network, CONFIG)
    assert "\n" not in str(caught.value)
    assert not moe_layers(network)
    assert [p.requires_grad for p in network.parameters()] == trained


def test_old_weight_norm_is_refused() -> None:
    with pytest.warns(FutureWarning):
        network = changed(lambda m: weight_norm(m.fc1))
    with pytest.raises(UserError, match=r"'0.mlp.fc1' has a hook"):
        rmoe.upcycle(model(network), CONFIG)


def test_squeeze_and_excitation_is_no_network() -> None:
    network = nn.Sequential(nn.ModuleDict({"se": SqueezeExcite(8), "mlp": Mlp(8, 16, use_conv=True)}))
    assert [*find_networks(network)] == ["0.mlp"]


def test_a_model_of_timm_with_more_inside() -> None:
    with pytest.raises(UserError, match="'dwconv'"):
        rmoe.upcycle(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), CONFIG)


def test_a_forward_of_its_own_that_computes_the_same_is_taken() -> None:
    network, x = model(Own(4, 8)).eval(), torch.randn(2, 3, 4)
    before = network(x)
    torch.testing.assert_close(rmoe.upcycle(network, CONFIG).model(x), before)


def test_what_is_left_dense_may_compute_anything() -> None:
    network = model(Scaled(4, 8), Mlp(4, 8))
    report = rmoe.upcycle(network, ResidualMoEConfig(num_experts=3, blocks=("1.mlp",))).report
    assert report.blocks == ("1.mlp",)


def test_one_module_in_two_places_is_refused() -> None:
    shared = Mlp(4, 8)
    with pytest.raises(UserError, match=r"'0\.mlp' and '1\.mlp' are one module"):
        rmoe.upcycle(model(shared, shared), CONFIG)
    block = Block(Mlp(4, 8))
    with pytest.raises(UserError, match=r"'0\.mlp' and '2\.mlp' are one module"):
        rmoe.upcycle(nn.Sequential(block, Block(Mlp(4, 8)), block), CONFIG)


@pytest.mark.parametrize("same_object", [True, False])
def test_one_weight_in_two_places_is_refused(same_object: bool) -> None:
    network: Any = model(Mlp(4, 8), Mlp(4, 8))
    weight = network[0].mlp.fc1.weight
    network[1].mlp.fc1.weight = weight if same_object else nn.Parameter(weight.detach())
    with pytest.raises(UserError, match=r"'0\.mlp\.fc1\.weight' and '1\.mlp\.fc1\.weight' are one weight"):
        rmoe.upcycle(network, ResidualMoEConfig(num_experts=3, blocks=("1.mlp",)))
    head: Any = model(Mlp(4, 4), Mlp(4, 8), nn.Linear(4, 4))
    head[2].mlp.weight = head[0].mlp.fc2.weight
    with pytest.raises(UserError, match=r"'0\.mlp\.fc2\.weight' and '2\.mlp\.weight' are one weight"):
        rmoe.upcycle(head, CONFIG)
    assert rmoe.upcycle(head, ResidualMoEConfig(num_experts=3, blocks=("1.mlp",))).report.blocks == ("1.mlp",)


def xcit() -> nn.Module:
    return timm.create_model("xcit_nano_12_p16_224", depth=2)


def cait() -> nn.Module:
    return timm.create_model("cait_xxs24_224", depth=2, embed_dim=24, num_heads=2)


def volo() -> nn.Module:
    widths = {"embed_dims": (12, 24, 24, 24), "num_heads": (1, 2, 2, 2), "mlp_ratio": 2}
    return VOLO((1, 1, 1, 1), post_layers=("ca", "ca"), **widths)


def siglip() -> nn.Module:
    return timm.create_model("vit_base_patch16_siglip_224", embed_dim=24, depth=2, num_heads=2)


@pytest.mark.parametrize(
    ("build", "found", "left"),
    [
        (xcit, "blocks.1.mlp", "cls_attn_blocks.0.mlp"),
        (cait, "blocks.1.mlp", "blocks_token_only.0.mlp"),
        (volo, "network.4.0.mlp", "post_network.0.mlp"),
        (siglip, "blocks.1.mlp", "attn_pool.mlp"),
    ],
)
def test_networks_of_a_single_token_are_left_out(build: Callable[[], nn.Module], found: str, left: str) -> None:
    network = build()
    assert left in dict(network.named_modules())
    networks = find_networks(network)
    assert found in networks
    assert left not in networks
    rmoe.upcycle(network, ResidualMoEConfig(num_experts=8, blocks="last_two")).model.train()(
        torch.randn(1, 3, 224, 224)
    )
    with pytest.raises(UserError, match=f"'{left}', which is no feed-forward network"):
        rmoe.upcycle(build(), ResidualMoEConfig(blocks=(left,)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["low_rank", "full", "experts"])
def test_every_floating_dtype(dtype: torch.dtype, kind: Any) -> None:
    dense, x = model(Mlp(8, 16), Own(8, 16)).to(dtype).eval(), torch.randn(2, 3, 8, dtype=dtype)
    mixture = rmoe.upcycle(dense, ResidualMoEConfig(num_experts=3, residual=kind, blocks="all"), copy=True).model
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(mixture(x), dense(x), **tolerance)


def test_modes_gradients_and_random_generators_stay() -> None:
    network = model(Own(4, 8), Mlp(4, 8)).train()
    network[1].eval()
    for x in network.parameters():
        x.requires_grad_(False)
    state, before = torch.get_rng_state(), copy.deepcopy(network.state_dict())
    mixture = rmoe.upcycle(network, CONFIG).model
    assert torch.equal(torch.get_rng_state(), state)
    assert mixture[0].mlp.core.training
    assert not mixture[1].mlp.core.training
    assert all(x.grad is None for x in mixture.parameters())
    for key, x in before.items():
        assert torch.equal(mixture.state_dict()[key.replace("mlp.", "mlp.core.")], x)


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = model(Mlp(4, 8), Own(4, 8))
        mixture = rmoe.upcycle(network, CONFIG).model
        assert all(x.is_meta for x in mixture.parameters())
        with pytest.raises(UserError, match="'0.mlp' .Scaled. computes more"):
            rmoe.upcycle(model(Scaled(4, 8)), CONFIG)


def test_blocks_on_several_devices_and_of_several_dtypes() -> None:
    network = model(Mlp(4, 8), Mlp(4, 8).to("meta"), Mlp(4, 8).double())
    layers = moe_layers(rmoe.upcycle(network, CONFIG).model).values()
    assert [(x.core.fc1.weight.device.type, x.core.fc1.weight.dtype) for x in layers] == [
        ("cpu", torch.float32),
        ("meta", torch.float32),
        ("cpu", torch.float64),
    ]


def test_copies_pickles_and_state_dicts() -> None:
    mixture, x = rmoe.upcycle(model(Own(4, 8), Mlp(4, 8)), CONFIG).model.eval(), torch.randn(2, 3, 4)
    for twin in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        assert torch.equal(twin(x), mixture(x))
    other = rmoe.upcycle(model(Own(4, 8), Mlp(4, 8)), CONFIG).model.eval()
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(other(x), mixture(x))


def test_a_mixture_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ResidualMoE.forward
    monkeypatch.setattr(ResidualMoE, "forward", lambda self, x: 1.01 * forward(self, x))
    network = model(Mlp(4, 8))
    with pytest.raises(UserError, match=r"the mixture made of '0.mlp' \(Mlp\) does not compute what the network does"):
        rmoe.upcycle(network, CONFIG)
    assert not moe_layers(network)
    assert all(p.requires_grad for p in network.parameters())
    assert rmoe.upcycle(network, ResidualMoEConfig(num_experts=3, blocks="all", combine="softmax")).report.blocks


def test_a_norm_before_the_first_layer_is_named() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(self.norm(x))))

    model = nn.ModuleDict({"mlp": Normed()})
    with pytest.raises(UserError, match=r"'mlp' has 'norm' \(LayerNorm\) inside"):
        check_networks(model, find_networks(model))
