"""Tests the way from a checkpoint to a backbone: a dense core gets experts, a mixture brings its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.logging import MMLogger
from safetensors.torch import save_file
from torch import nn

import rmoe
from rmoe.backbones.build import add_weights
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.errors import UserError
from rmoe.moe.state import global_state_dict, moe_layers
from rmoe.tasks.classification import TimmClassifier

NAME = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4}
KINDS: dict[str, dict[str, Any]] = {
    "low_rank": {"num_experts": 3, "rank": 2},
    "full": {"num_experts": 3, "residual": "full"},
    "experts": {"num_experts": 3, "residual": "experts", "expert_init": "random"},
    "fixed": {"num_experts": 3, "residual": "full", "train_residual": False},
}


def trained(folder: Path, moe: dict[str, Any]) -> nn.Module:
    """Makes an upstream mixture whose residuals are no longer zero, and its work dir."""
    torch.manual_seed(0)
    classifier = TimmClassifier(
        NAME, num_classes=5, kwargs=SMALL | {"img_size": 256}, moe=moe, allow_random_core=True
    ).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    folder.mkdir(exist_ok=True)
    save_file({key: x.contiguous() for key, x in global_state_dict(classifier).items()}, folder / "model.safetensors")
    return classifier


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_and_gates_are_carried_over(kind, tmp_path):
    upstream, images = trained(tmp_path, KINDS[kind]), torch.randn(2, 3, 256, 256)
    pyramid = TimmPyramid(NAME, SMALL, core=str(tmp_path), moe=KINDS[kind]).eval()
    expected = upstream.model.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True)
    for got, one in zip(pyramid.model.forward_intermediates(images, intermediates_only=True), expected, strict=True):
        assert torch.equal(got, one)
    for ours, theirs in zip(moe_layers(pyramid.model).values(), moe_layers(upstream.model).values(), strict=True):
        assert torch.equal(ours.gate.weight, theirs.gate.weight)
        assert all(map(torch.equal, ours.residuals(), theirs.residuals()))
        assert all(p.requires_grad == (kind != "fixed") for p in ours.deepspeed_moe.parameters())


def test_the_run_s_log_says_what_became_of_every_key(tmp_path):
    trained(tmp_path, KINDS["low_rank"])
    MMLogger.get_instance("test_build", log_file=str(tmp_path / "run.log"))
    TimmPyramid(NAME, SMALL, core=str(tmp_path), moe=KINDS["low_rank"])
    log = (tmp_path / "run.log").read_text()
    assert re.search(rf"core {tmp_path} \(timm\): \d+ weights loaded", log)
    assert "feed-forward networks became MoE" in log


def test_a_classifier_goes_on_with_its_own_head(tmp_path):
    upstream, images = trained(tmp_path, KINDS["low_rank"]), torch.randn(2, 3, 256, 256)
    again = TimmClassifier(NAME, 5, SMALL | {"img_size": 256}, core=str(tmp_path), moe=KINDS["low_rank"]).eval()
    assert torch.equal(again(images), upstream(images))


def test_a_dense_core_becomes_the_core_of_new_experts(tmp_path):
    dense = timm.create_model(NAME, **SMALL, img_size=256, num_classes=0).eval()
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    net = timm.create_model(NAME, **SMALL, img_size=256, num_classes=0).eval()
    add_weights(net, str(tmp_path), KINDS["low_rank"])
    images = torch.randn(1, 3, 256, 256)
    assert moe_layers(net)
    assert torch.equal(net(images), dense(images))


@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        (None, "is the checkpoint of a mixture of experts, and moe is None; give the moe"),
        ({"num_experts": 4, "rank": 2}, r"holds 3 experts in a layer, .* num_experts=4; .* architecture and this moe"),
        ({"num_experts": 2, "rank": 2}, r"holds 3 experts in a layer, .* num_experts=2"),
        ({"num_experts": 3, "rank": 4}, r"has the shape .* this moe \(its model.json"),
        ({"num_experts": 3, "residual": "full"}, r"holds 24 weights .*a1_ERC"),
        ({"num_experts": 3, "rank": 2, "blocks": "last_two"}, r"weights \(.*layers.2.blocks.1.mlp"),
    ],
)
def test_another_mixture_is_refused(moe, reason, tmp_path):
    trained(tmp_path, KINDS["low_rank"])
    with pytest.raises(UserError, match=reason):
        TimmPyramid(NAME, SMALL, core=str(tmp_path), moe=moe)


def test_upstream_and_downstream_have_experts_in_the_same_blocks():
    whole, part = (
        TimmPyramid(NAME, SMALL, indices, moe=KINDS["low_rank"], allow_random_core=True)
        for indices in ((0, 1, 2, 3), (1, 2))
    )
    assert [*moe_layers(part)] == [
        name for name in moe_layers(whole) if "layers_3" not in name and "layers.3" not in name
    ]


@pytest.mark.parametrize("load_from", [None, "weights.pth"])
def test_a_run_that_loads_weights_needs_no_core(load_from, tmp_path):
    from rmoe.engine import launch

    path = Path(rmoe.__file__).parent / "configs/demo/residual.py"
    cfg = launch.read_config(
        path, {"model.backbone.core": None, "model.backbone.moe.ep_size": 1, "load_from": load_from}
    )
    launch.prepare(cfg, {"train_micro_batch_size_per_gpu": "auto"}, 1, tmp_path, False)
    assert cfg.model.backbone.get("allow_random_core", False) == (load_from is not None)
