"""Every parameter plays one part, `train_only` keeps the named parts, and what trains is told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp, RmsNorm
from torch import nn

from rmoe.config import ResidualMoEConfig
from rmoe.engine.optim import param_groups
from rmoe.engine.trained import PARTS, Count, check_train_only, count_parts, freeze_others, parts, table
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE


class Small(nn.Module):
    """A model of one parameter or two of each part."""

    def __init__(self, **moe: Any) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "patch_embed": nn.Linear(3, 4),
                "attn": nn.Linear(4, 4),
                "rms": RmsNorm(4),
                "moe": ResidualMoE(Mlp(4, 8), ResidualMoEConfig(num_experts=2, residual="full", **moe)),
                "mlp": Mlp(4, 8),
                "downsample": nn.Linear(4, 4),
            }
        )
        self.backbone.pos_embed = nn.Parameter(torch.zeros(5, 4))
        self.neck = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def trained(model: nn.Module) -> set[str]:
    return {name for name, x in model.named_parameters() if x.requires_grad}


def test_each_parameter_has_one_part() -> None:
    found = parts(Small())
    assert {name: part for name, part in found.items() if ".moe." not in name} == {
        "backbone.pos_embed": "embedding",
        **dict.fromkeys(("backbone.patch_embed.weight", "backbone.patch_embed.bias"), "embedding"),
        **dict.fromkeys(("backbone.attn.weight", "backbone.attn.bias"), "attention"),
        "backbone.rms.weight": "norm",
        **{f"backbone.mlp.{fc}.{x}": "mlp" for fc in ("fc1", "fc2") for x in ("weight", "bias")},
        **dict.fromkeys(("backbone.downsample.weight", "backbone.downsample.bias"), "other"),
        **{f"{owner}.{x}": "head" for owner in ("neck", "head") for x in ("weight", "bias")},
    }
    assert {part for name, part in found.items() if ".moe." in name} == {"core", "residual", "gate"}
    assert set(found.values()) == set(PARTS)


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "cvt_13"])
def test_little_of_a_transformer_is_something_else(name: str) -> None:
    """Of a Swin patch merging is; position tables in attention are attention's."""
    import rmoe.backbones.cvt  # noqa: F401

    with torch.device("meta"):
        model = timm.create_model(name)
    found = parts(model)
    rest = {key for key, part in found.items() if part == "other"}
    assert all("downsample.reduction" in key for key in rest), rest
    assert {"head", "norm", "attention", "mlp", "embedding"} <= set(found.values())
    assert all(found[key] == "attention" for key in found if "relative_position_bias_table" in key)
    assert all(found[key] == "norm" for key in found if ".norm" in key)


@pytest.mark.parametrize("names", [("residual", "gate"), ["head"], ("norm", "head", "attention", "embedding")])
def test_only_the_named_parts_train(names: Any) -> None:
    model = Small()
    before = trained(model)
    groups = param_groups(model, 1.0, 0.1, train_only=names)
    named = {name for name, part in parts(model).items() if part in names}
    assert trained(model) == named < before
    assert sum(len(group["params"]) for group in groups) == len(named)


def test_nothing_else_moves() -> None:
    model = Small()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    groups = param_groups(model, 0.1, 0.1, train_only=("residual", "gate"))
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        x = model.backbone["attn"](model.backbone["patch_embed"](torch.randn(16, 3)))
        model.head(model.neck(model.backbone["moe"](x))).square().sum().backward()
        optimizer.step()
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved
    assert all("gate" in name or "deepspeed_moe" in name for name in moved)


def test_what_is_frozen_already_stays_frozen() -> None:
    model = Small()
    model.head.bias.requires_grad_(False)
    freeze_others(model, ["head"])
    assert trained(model) == {"head.weight", "neck.weight", "neck.bias"}
    with pytest.raises(UserError, match=r"train_only names core, which the config freezes \(moe.train_core.*or leave"):
        freeze_others(Small(), ["core", "head"])
    freeze_others(model := Small(train_core=True), ["core"])
    assert {parts(model)[name] for name in trained(model)} == {"core"}


def test_without_it_everything_trains_that_did() -> None:
    model = Small()
    before = trained(model)
    freeze_others(model, None)
    assert trained(model) == before


def test_a_part_that_a_model_has_not_is_no_mistake_beside_others() -> None:
    """A dense run may have its mixture's config."""
    dense = nn.ModuleDict({"backbone": Mlp(4, 8), "head": nn.Linear(4, 2)})
    freeze_others(dense, ["residual", "gate", "head"])
    assert trained(dense) == {"head.weight", "head.bias"}
    with pytest.raises(UserError, match="residual, gate, of which the model has nothing to train; .* are head, other"):
        freeze_others(dense, ["residual", "gate"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["residuals"], "has 'residuals'; did you mean 'residual'. known: attention, core, embedding, gate, head"),
        (["backbone"], "has 'backbone'; known: attention"),
        ([], "is empty, so that nothing would train; name one or more of core, residual"),
        ("residual", r"is 'residual'; it takes a list of parts, such as \['residual'"),
        (["gate", 3], "takes a list of parts"),
        ({"gate": True}, "takes a list of parts"),
        (True, "takes a list of parts"),
    ],
)
def test_mistakes(value: Any, message: str) -> None:
    for refuse in (check_train_only, lambda names: param_groups(Small(), 1.0, train_only=names)):
        with pytest.raises(UserError, match=message):
            refuse(value)


def test_parameters_are_counted_by_part() -> None:
    model = Small()
    freeze_others(model, ["gate", "head"])
    found = count_parts(model)
    assert [*found] == [name for name in PARTS if name in found]
    assert found["gate"] == Count(4 * 2 + 2, 0)
    assert found["core"] == Count(0, 4 * 8 * 2 + 8 + 4)
    assert found["head"] == Count(4 + 4 + 8 + 2, 0)
    assert found["residual"] == Count(0, 2 * found["core"].frozen)
    model.backbone["moe"].deepspeed_moe.ep_size = model.backbone["moe"].ep_size = 2
    assert sum(sum(one) for one in count_parts(model).values()) == sum(
        x.numel() * (2 if "deepspeed_moe" in name else 1) for name, x in model.named_parameters()
    )


def test_the_table_adds_up() -> None:
    lines = table({"core": Count(0, 1200), "head": Count(30, 4)}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["part", "trained", "frozen"],
        ["core", "0", "1,200"],
        ["head", "30", "4"],
        ["all", "30", "1,204"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1
    assert Counter(map(len, lines[1:]))
