"""Models of transformers, whose feed-forward networks have names of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rmoe
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.records import collect
from rmoe.moe.state import moe_layers

transformers = pytest.importorskip("transformers", reason="transformers belongs to the development's requirements")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ViT": ("ViT", {"intermediate_size": 32}, "fc2(activation_fn(fc1(x)))"),
    "DINOv2": ("Dinov2", {"mlp_ratio": 2}, "fc2(activation_fn(fc1(x)))"),
    "DINOv2 giant's": (
        "Dinov2",
        {"mlp_ratio": 2, "use_swiglu_ffn": True},
        "down_proj(act_fn(gate_proj(x)) * up_proj(x))",
    ),
    "DINOv3": ("DINOv3ViT", {"intermediate_size": 32}, "down_proj(act_fn(up_proj(x)))"),
    "DINOv3 plus": (
        "DINOv3ViT",
        {"intermediate_size": 32, "use_gated_mlp": True, "hidden_act": "silu"},
        "down_proj(act_fn(gate_proj(x)) * up_proj(x))",
    ),
    "SigLIP": ("SiglipVision", {"intermediate_size": 32}, "fc2(activation_fn(fc1(x)))"),
}


def model(name: str) -> nn.Module:
    kind, more, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    return getattr(transformers, f"{kind}Model")(config)


def output(net: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    return net(torch.randn(2, 3, 32, 32)).last_hidden_state


@pytest.mark.parametrize("residual", ["low_rank", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_they_become_mixtures_that_learn(name: str, residual: str) -> None:
    dense = model(name).eval()
    config = ResidualMoEConfig(num_experts=3, rank=2, residual=residual, blocks="all", gate_std=1.0)  # type: ignore[arg-type]
    moe = rmoe.upcycle(dense, config, copy=True).model
    layers = moe_layers(moe)
    assert [str(layer.form) for layer in layers.values()] == [MODELS[name][2]] * 2
    torch.testing.assert_close(output(moe.eval()), output(dense), rtol=1e-4, atol=1e-5)
    with collect() as records:
        loss = output(moe.train()).square().mean()
    (loss + records.loss()).backward()
    for layer in layers.values():
        moved = [x.grad for x in layer.residuals() if x.requires_grad and x.grad is not None]
        assert moved
        assert any(x.abs().sum() > 0 for x in moved)


def test_two_activations_are_no_network() -> None:
    core = nn.ModuleDict({"fc1": nn.Linear(4, 8), "act": nn.GELU(), "act_fn": nn.GELU(), "fc2": nn.Linear(8, 4)})
    with pytest.raises(UserError, match="there must be one activation"):
        rmoe.ResidualMoE(core, ResidualMoEConfig())
