"""Optimizer groups: each parameter once, at the learning rate and decay that the rules give it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.optim import param_groups_layer_decay
from torch import nn
from toy import ToyModel

from rmoe.backbones.pyramid import TimmPyramid
from rmoe.config import ResidualMoEConfig
from rmoe.engine import optim
from rmoe.engine.optim import ParamGroups, param_groups
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE

Rates = dict[str, tuple[float, float]]


def rates(model: nn.Module, groups: list[dict[str, Any]]) -> Rates:
    """(learning rate, weight decay) by name; fails where a parameter is in two groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: Rates = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (round(group["lr"], 9), round(group["weight_decay"], 9))
    return found


class Small(nn.Module):
    """A backbone with a norm, a table and an MoE layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"norm": nn.LayerNorm(4), "mlp": ResidualMoE(Mlp(4, 8), ResidualMoEConfig(num_experts=2, residual="full"))}
        )
        self.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))
        self.head = nn.Linear(4, 2)


def test_roles_have_their_own_rates() -> None:
    model = Small()
    groups = param_groups(
        model, 1.0, 0.5, residual_lr_mult=2.0, residual_decay_mult=3.0, gate_lr_mult=4.0, head_lr_mult=5.0
    )
    experts = "backbone.mlp.deepspeed_moe.experts"
    assert rates(model, groups) == {
        "backbone.norm.weight": (1.0, 0.0),
        "backbone.norm.bias": (1.0, 0.0),
        "backbone.relative_position_bias_table": (1.0, 0.0),
        "backbone.mlp.gate.weight": (4.0, 0.5),
        "backbone.mlp.gate.bias": (4.0, 0.0),
        f"{experts}.w1_EHC": (2.0, 1.5),
        f"{experts}.b1_EH": (2.0, 0.0),
        f"{experts}.w2_ECH": (2.0, 1.5),
        f"{experts}.b2_EC": (2.0, 0.0),
        "head.weight": (5.0, 0.5),
        "head.bias": (5.0, 0.0),
    }


def test_kinds_of_residuals_have_their_own_rates() -> None:
    model = nn.ModuleDict({"full": ResidualMoE(Mlp(4, 8), ResidualMoEConfig(num_experts=2, residual="full"))})
    model["low_rank"] = ResidualMoE(Mlp(4, 8), ResidualMoEConfig(num_experts=2))
    found = rates(model, param_groups(model, 1.0, gate_lr_mult=3.0))
    assert {name: rate for name, (rate, _) in found.items() if "experts" in name} == {
        **{f"full.deepspeed_moe.experts.{name}": 1.0 for name in ("w1_EHC", "b1_EH", "w2_ECH", "b2_EC")},
        **{f"low_rank.deepspeed_moe.experts.{name}": 4.0 for name in ("a1_ERC", "b1_ERH", "a2_ERH", "b2_ERC")},
    }
    assert found["low_rank.gate.weight"] == (3.0, 0.0)
    found = rates(model, param_groups(model, 1.0, residual_lr_mult=0.5))
    assert {rate for name, (rate, _) in found.items() if "experts" in name} == {0.5}


def test_experts_that_are_spread_have_groups_of_their_own() -> None:
    model = Small()
    experts = [*model.backbone["mlp"].deepspeed_moe.parameters()]
    for parameter in experts:
        parameter.allreduce, parameter.group_name = False, "ep_size_2"
    groups = param_groups(model, 1.0, 0.1, head_lr_mult=5.0)
    marked = [group for group in groups if group.get("moe")]
    others = [group["name"] for group in groups if not group.get("moe")]
    assert all(group["name"] == "ep_size_2" for group in marked)
    assert {parameter for group in marked for parameter in group["params"]} == set(experts)
    assert len(set(others)) == len(others)
    assert all(group["params"] for group in groups)


def test_experts_that_are_not_spread_share_groups_with_others() -> None:
    model = Small()
    groups = param_groups(model, 1.0, 0.1)
    assert len(groups) == 2
    assert not any(group.get("moe") for group in groups)
    assert {parameter for group in groups for parameter in group["params"]} == {
        p for p in model.parameters() if p.requires_grad
    }


def test_a_shared_parameter_is_in_one_group_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(optim, "print_log", lambda text, logger: said.append(text))
    model = nn.ModuleDict({"embed": nn.Linear(3, 3), "head": nn.Linear(3, 3), "frozen": nn.Linear(3, 3)})
    model["head"].weight = model["embed"].weight
    model["frozen"].requires_grad_(False)
    model["twin"] = model["frozen"]
    found = rates(model, param_groups(model, 1.0, 0.1, head_lr_mult=5.0))
    assert found.keys() == {"embed.weight", "embed.bias", "head.bias"}
    assert said == ["head.weight is the same parameter as embed.weight: it trains once, at the rates of embed.weight"]


def test_equal_rates_are_one_group() -> None:
    assert len(param_groups(timm.create_model("test_vit"), 1.0, 0.1)) == 2


def test_frozen_parameters_are_left_out() -> None:
    model = Small()
    model.head.requires_grad_(False)
    assert not any(name.startswith(("head", "backbone.mlp.core")) for name in rates(model, param_groups(model, 1.0)))
    with pytest.raises(UserError, match="nothing|no parameter to train"):
        param_groups(model.requires_grad_(False), 1.0)


@pytest.mark.parametrize("options", [{}, {"exempt": False}, {"bias_decay_mult": 2.0}])
def test_a_gate_whose_rate_is_0_is_fixed(options: dict[str, Any]) -> None:
    """Whatever decay and schedule say: a schedule may end above 0."""
    model = Small()
    before = {name: x.clone() for name, x in model.backbone.mlp.gate.state_dict().items()}
    groups = param_groups(model, 1.0, 0.5, gate_lr_mult=0.0, **options)
    assert not any("gate" in name for name in rates(model, groups))
    optimizer = torch.optim.AdamW(groups)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(2):
        model.backbone.mlp(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in model.backbone.mlp.gate.state_dict().items())
    assert any("deepspeed_moe" in name for name in rates(model, param_groups(model, 1.0, residual_lr_mult=0.0)))


def test_timms_own_exceptions() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 1, 1, 1))
    listed = model.no_weight_decay()
    found = rates(model, param_groups(model, 1.0, 0.1))
    assert listed
    assert all(found[name][1] == 0 for name in listed)
    vit = timm.create_model("test_vit")
    assert rates(vit, param_groups(vit, 1.0, 0.1))["pos_embed"][1] == 0


def test_the_classifier_of_a_model_without_backbone() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    found = rates(model, param_groups(model, 1.0, 0.1, head_lr_mult=7.0))
    assert {name for name, (lr, _) in found.items() if lr == 7.0} == {"head.weight", "head.bias"}


def test_a_stock_config_gives_what_mmengine_gives() -> None:
    """The published Swin's paramwise_cfg, without our exceptions, against mmengine's own constructor."""
    from mmengine.optim import DefaultOptimWrapperConstructor

    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 1, 1, 1))
    optimizer = {"type": "AdamW", "lr": 6e-5, "weight_decay": 0.01}
    custom = {"relative_position_bias_table": {"decay_mult": 0.0}, "norm": {"decay_mult": 0.0}, "head": {"lr_mult": 10}}
    paramwise = {"custom_keys": custom, "bias_decay_mult": 0.5, "norm_decay_mult": 0.25}
    theirs = DefaultOptimWrapperConstructor({"type": "OptimWrapper", "optimizer": optimizer}, paramwise)(model)
    wrapper = {"type": "DeepSpeedOptimWrapper", "optimizer": optimizer}
    ours = ParamGroups(wrapper, paramwise | {"exempt": False})(model)
    assert rates(model, ours.optimizer.param_groups) == rates(model, theirs.optimizer.param_groups)
    assert len(ours.optimizer.param_groups) < 6


@pytest.mark.parametrize(
    ("wrapper", "paramwise", "message"),
    [
        ({"lr": 1.0}, {"residual_lr_mul": 2}, "no key 'residual_lr_mul'; did you mean 'residual_lr_mult'"),
        ({"lr": 1.0}, {"custom_keys": {"norm": {"decay_mul": 0}}}, "no key 'decay_mul'; did you mean 'decay_mult'"),
        ({}, {}, "no lr"),
    ],
)
def test_mistakes(wrapper: dict[str, Any], paramwise: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParamGroups({"optimizer": {"type": "AdamW", **wrapper}}, paramwise)(Small())


ADAMW = {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05}


@pytest.mark.parametrize(
    ("optimizer", "fused"),
    [
        (ADAMW, True),
        (ADAMW | {"type": torch.optim.Adam}, True),
        (ADAMW | {"fused": False}, False),
        (ADAMW | {"foreach": True}, None),
        ({"type": "SGD", "lr": 0.1}, None),
    ],
)
def test_adam_is_fused_unless_the_config_says_how(optimizer: dict[str, Any], fused: bool | None) -> None:
    made = ParamGroups({"optimizer": optimizer})(Small()).optimizer
    assert {group["fused"] for group in made.param_groups} == {fused}


def test_fused_steps_are_adamws() -> None:
    """Also of a parameter without dimensions, as ATSS's scales are."""
    made, models = {}, {}
    for fused in (True, False):
        torch.manual_seed(0)
        models[fused] = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
        models[fused].scale = nn.Parameter(torch.tensor(2.0))
        made[fused] = ParamGroups({"optimizer": ADAMW | {"fused": fused}})(models[fused]).optimizer
    for _ in range(5):
        for fused, model in models.items():
            made[fused].zero_grad()
            (model(torch.linspace(-1, 1, 10).view(2, 5)).square().sum() * model.scale).backward()
            made[fused].step()
    torch.testing.assert_close(models[True].state_dict(), models[False].state_dict())


def test_a_checkpoint_of_an_unfused_optimizer_goes_on_fused() -> None:
    group = ParamGroups({"optimizer": ADAMW})(Small()).optimizer.param_groups[0]
    saved = optim.settings(group) | {"fused": None, "lr": 0.01}
    optim.change_settings(group, optim.checked_settings(group, saved))
    assert (group["fused"], group["lr"]) == (True, 0.01)


def scales(model: nn.Module, decay: float = 0.5, **options: Any) -> dict[str, float]:
    """Learning rates by name where that of the head is 1."""
    return {
        name: rate for name, (rate, _) in rates(model, param_groups(model, 1.0, layer_decay=decay, **options)).items()
    }


def test_the_rate_falls_from_layer_to_layer_as_in_timm() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=2)
    found = scales(model)
    names = ("head.weight", "norm.weight", "blocks.2.mlp.fc1.weight", "blocks.0.attn.qkv.weight", "pos_embed")
    assert [found[name] for name in names] == [1.0, 0.5, 0.5, 0.125, 0.0625]
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    names_of = {parameter: name for name, parameter in model.named_parameters()}
    assert found == {names_of[x]: group["lr_scale"] for group in groups for x in group["params"]}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "cvt_13"])
def test_layers_of_a_pyramid(name: str) -> None:
    """Mixtures have the rate of their block, times their own; what the pyramid adds has the head's."""
    kwargs = {"depths": (1, 1, 2)} if name == "cvt_13" else {"depths": (1, 1, 2, 1)}
    model = nn.Module()
    model.backbone = TimmPyramid(
        name, kwargs, out_indices=(1, 2), moe={"num_experts": 2, "blocks": "all"}, allow_random_core=True
    )
    model.head = nn.Linear(2, 2)
    found = scales(model, residual_lr_mult=3.0)
    block = "layers" if "swin" in name else "stages"
    for key, rate in found.items():
        if key.startswith(("head.", "backbone.norms.")):
            assert rate == 1.0, key
    mixtures = [(key, rate) for key, rate in found.items() if ".deepspeed_moe." in key and f".{block}.2." in key]
    gates = {rate for key, rate in found.items() if ".gate." in key and f".{block}.2." in key}
    assert {rate for _, rate in mixtures} == {3.0 * rate for rate in gates}
    assert len(gates) == 2  # of two blocks
    assert next(rate for key, rate in found.items() if key.startswith("backbone.model.")) < min(gates)
    assert found == scales(model, residual_lr_mult=3.0)  # and in the same order


def test_custom_keys_win_over_layers() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=2)
    found = scales(model, custom_keys={"pos_embed": {"lr_mult": 0.7}})
    assert (found["pos_embed"], found["cls_token"]) == (0.7, 0.125)
    assert scales(model, decay=1.0) == dict.fromkeys(found, 1.0)


@pytest.mark.parametrize("decay", [1.5, -0.5, float("nan"), "0.9", True, None])
def test_layer_decay_is_a_share(decay: Any) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    with pytest.raises(UserError, match="layer_decay is "):
        param_groups(model, 1.0, layer_decay=decay)


def test_a_model_without_layers_has_no_layer_decay() -> None:
    with pytest.raises(UserError, match=r"layer_decay is 0\.9, and the model has no backbone of timm"):
        param_groups(Small(), 1.0, layer_decay=0.9)


def test_groups_whose_numbers_print_alike_have_names_of_their_own() -> None:
    """DeepSpeed tells groups with experts apart by name."""
    keys = {"head.weight": {"lr_mult": 1.0000001}, "head.bias": {"lr_mult": 1.0000002, "decay_mult": 0.0}}
    groups = param_groups(ToyModel(), 1e-3, custom_keys=keys)
    names = [group["name"] for group in groups]
    assert names == ["lr_0.001_decay_0", "lr_0.001_decay_0_2", "lr_0.001_decay_0_3"]
