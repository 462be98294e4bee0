from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Mlp, SwiGLU
from torch import nn

import rmoe
from rmoe.backbones.upcycle import find_networks
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.state import moe_layers

CONFIG = ResidualMoEConfig(num_experts=4, rank=2)


def swin(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"embed_dim": 12, "depths": (2, 2, 3, 2), "window_size": 2, "img_size": 64, "num_classes": 5, **kwargs}
    return timm.create_model("swin_tiny_patch4_window7_224", **arguments).eval()


def vit(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"embed_dim": 12, "depth": 4, "num_heads": 2, "img_size": 32, "num_classes": 5, **kwargs}
    return timm.create_model("vit_tiny_patch16_224", **arguments).eval()


@pytest.mark.parametrize("build", [swin, vit])
@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_a_whole_model_computes_what_it_computed(build, kind) -> None:
    model = build()
    x = torch.randn(2, 3, *((64, 64) if build is swin else (32, 32)))
    upcycled, _ = rmoe.upcycle(model, ResidualMoEConfig(num_experts=4, residual=kind), copy=True)
    torch.testing.assert_close(upcycled(x), model(x), rtol=0, atol=1e-6)


def test_every_second_block_of_the_last_two_stages() -> None:
    model, report = rmoe.upcycle(swin(), CONFIG)
    assert report.blocks == ("layers.2.blocks.1.mlp", "layers.3.blocks.1.mlp")
    assert list(moe_layers(model)) == list(report.blocks)
    assert len(report.dense) == 7
    assert "2 of 9" in str(report)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("alternate_last_two_stages", ["blocks.1.mlp", "blocks.3.mlp"]),
        ("alternate", ["blocks.1.mlp", "blocks.3.mlp"]),
        ("last_two", ["blocks.2.mlp", "blocks.3.mlp"]),
        ("all", [f"blocks.{i}.mlp" for i in range(4)]),
        (("blocks.2.mlp",), ["blocks.2.mlp"]),
    ],
)
def test_which_blocks(blocks, expected) -> None:
    report = rmoe.upcycle(vit(), ResidualMoEConfig(num_experts=4, blocks=blocks)).report
    assert list(report.blocks) == expected


def test_stages_inside_a_feature_pyramid() -> None:
    model = swin(features_only=True)
    report = rmoe.upcycle(model, CONFIG).report
    assert [name.replace("layers_", "layers.") for name in report.blocks] == [
        "layers.2.blocks.1.mlp",
        "layers.3.blocks.1.mlp",
    ]


def test_in_place_or_copied() -> None:
    model = swin()
    copied = rmoe.upcycle(model, CONFIG, copy=True).model
    assert copied is not model
    assert not any(isinstance(module, ResidualMoE) for module in model.modules())
    assert rmoe.upcycle(model, CONFIG).model is model


def test_report_counts_and_freezing() -> None:
    model, report = rmoe.upcycle(swin(), CONFIG)
    assert sum(report.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert sum(report.trainable.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable == report.parameters
    frozen = rmoe.upcycle(swin(), ResidualMoEConfig(num_experts=4, train_core=False)).report
    assert frozen.trainable["core"] == 0
    assert frozen.trainable["residual"] == frozen.parameters["residual"] > 0


def test_what_was_frozen_before_trains_only_where_it_is_asked_to() -> None:
    for train_core, trained in (("auto", False), (True, True)):
        model = swin().requires_grad_(False)
        report = rmoe.upcycle(model, ResidualMoEConfig(num_experts=4, train_core=train_core)).report
        assert (report.trainable["core"] > 0) == trained
        assert report.trainable["residual"] == report.parameters["residual"] > 0
        assert report.trainable["other"] == 0


def test_the_core_is_the_blocks_own_network() -> None:
    model = swin()
    before = model.layers[3].blocks[1].mlp
    moe = rmoe.upcycle(model, CONFIG).model.layers[3].blocks[1].mlp
    assert moe.core is before


def test_a_model_without_networks_is_refused() -> None:
    with pytest.raises(UserError, match=r"no feed-forward network found in Sequential: looked for .*'fc1'"):
        rmoe.upcycle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4)), CONFIG)


def test_a_mixture_is_refused() -> None:
    model = rmoe.upcycle(swin(), CONFIG).model
    with pytest.raises(UserError, match="already"):
        rmoe.upcycle(model, CONFIG)


def test_unknown_block_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'blocks\.2\.mlp'"):
        rmoe.upcycle(vit(), ResidualMoEConfig(blocks=("blocks.2.mpl",)))


def test_a_rule_that_selects_nothing() -> None:
    with pytest.raises(UserError, match="selects none of the 1"):
        rmoe.upcycle(vit(depth=1), ResidualMoEConfig())


def test_dropout_inside_a_network_is_refused_before_anything_changes() -> None:
    model = vit(proj_drop_rate=0.1)
    with pytest.raises(UserError, match="proj_drop=0"):
        rmoe.upcycle(model, CONFIG)
    assert not any(isinstance(module, ResidualMoE) for module in model.modules())


def test_networks_of_several_forms_become_mixtures_together() -> None:
    model = nn.Sequential(Mlp(4, 8), SwiGLU(4, 8), Mlp(4, 8, norm_layer=nn.LayerNorm)).eval()
    x = torch.randn(2, 3, 4)
    before = model(x)
    assert list(find_networks(model)) == ["0", "1", "2"]
    mixture = rmoe.upcycle(model, ResidualMoEConfig(num_experts=3, blocks="all")).model
    torch.testing.assert_close(mixture(x), before)
    assert all(isinstance(layer, ResidualMoE) for layer in mixture)


def test_what_is_drawn_afterwards_is_what_the_dense_model_would_have_drawn() -> None:
    swin()
    head = nn.Linear(3, 3)
    rmoe.upcycle(swin(), CONFIG)
    assert torch.equal(nn.Linear(3, 3).weight, head.weight)


def test_a_model_that_cannot_be_upcycled_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise UserError("no")

    monkeypatch.setattr("rmoe.backbones.upcycle._compare", refuse)
    model = nn.Sequential(Mlp(4, 8, act_layer=lambda: nn.SiLU(inplace=True)))
    with pytest.raises(UserError, match="no"):
        rmoe.upcycle(model, ResidualMoEConfig(num_experts=4, blocks="all"))
    assert model[0].act.inplace
    assert all(x.requires_grad for x in model.parameters())
