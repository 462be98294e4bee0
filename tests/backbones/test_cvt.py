"""Tests CvT: it equals Hugging Face's on the same weights, as a timm model, as a pyramid and with experts."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from random_weights import images, randomised
from timm.layers import QuickGELU
from torch import Tensor, nn

from rmoe.backbones.cvt import Block, ConvAttention
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.backbones.upcycle import upcycle
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.records import collect
from rmoe.moe.state import moe_layers

SMALL = {"embed_dims": (8, 16, 24), "depths": (1, 2, 3), "num_heads": (1, 2, 3)}
PYRAMID = {"model": "cvt_13", "kwargs": SMALL, "out_indices": (0, 1, 2)}


def cvt(name: str = "cvt_13", **changed: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **{**SMALL, "num_classes": 5, **changed})).eval()


@pytest.fixture(scope="module")
def hf() -> SimpleNamespace:
    """Returns the foreign implementation, whose import takes seconds."""
    from transformers import CvtConfig, CvtForImageClassification

    return SimpleNamespace(CvtConfig=CvtConfig, CvtForImageClassification=CvtForImageClassification)


def hf_twin(hf: SimpleNamespace, ours: nn.Module, depths: tuple[int, ...], **config: Any) -> nn.Module:
    twin = hf.CvtForImageClassification(hf.CvtConfig(depth=depths, num_labels=ours.num_classes, **config))
    twin.load_state_dict({hf_key(key): x for key, x in ours.state_dict().items()})
    return twin.eval()


def hf_key(key: str) -> str:
    words = {"q": "query", "k": "key", "v": "value", "conv": "convolution", "bn": "normalization"}
    if key.startswith("norm."):
        return f"layer{key}"
    if key.startswith("head."):
        return key.replace("head", "classifier")
    key = f"cvt.encoder.{key}".replace(".blocks.", ".layers.")
    key = key.replace("patch_embed.proj", "embedding.convolution_embeddings.projection")
    key = key.replace("patch_embed.norm", "embedding.convolution_embeddings.normalization")
    key = key.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
    key = key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
    key = key.replace("attn.proj.", "attention.output.dense.")
    key = re.sub(r"attn\.proj_(.)", lambda m: f"attention.attention.projection_{words[m[1]]}", key)
    return re.sub(
        r"attn\.conv_proj_(.)\.(conv|bn)",
        lambda m: f"attention.attention.convolution_projection_{words[m[1]]}.convolution_projection.{words[m[2]]}",
        key,
    )


def test_attention_to_a_single_token_is_a_chain_of_linear_maps():
    attention = randomised(ConvAttention(4, 2)).eval()
    x = torch.randn(1, 1, 4)
    conv, bn = attention.conv_proj_v
    value = x * conv.weight[:, 0, 1, 1]  # the middle of the kernel, the rest sees padding
    value = (value - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
    torch.testing.assert_close(attention(x, (1, 1)), attention.proj(attention.proj_v(value)))


@pytest.mark.parametrize(("name", "millions"), [("cvt_13", 20.0), ("cvt_21", 31.6), ("cvt_w24", 277.2)])
def test_as_many_parameters_as_published(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("size", [(64, 64), (50, 75)])
def test_small_logits_and_maps_equal_hugging_faces(hf, size):
    ours = cvt()
    theirs = hf_twin(hf, ours, SMALL["depths"], embed_dim=SMALL["embed_dims"], num_heads=SMALL["num_heads"])
    with torch.no_grad():
        answer = theirs(images(*size), output_hidden_states=True)
        maps = ours.forward_intermediates(images(*size), intermediates_only=True)
        close(ours(images(*size)), answer.logits)
        for one, other in zip(maps, answer.hidden_states, strict=True):
            close(one, other)


def test_logits_at_full_size_equal_hugging_faces(hf):
    ours = randomised(timm.create_model("cvt_13", num_classes=5)).eval()
    theirs = hf_twin(hf, ours, (1, 2, 10))
    with torch.no_grad():
        close(ours(images(96, 64)), theirs(images(96, 64)).logits)


def test_with_the_published_activation_too(hf):
    ours = cvt(act_layer="quick_gelu")
    theirs = hf_twin(hf, ours, SMALL["depths"], embed_dim=SMALL["embed_dims"], num_heads=SMALL["num_heads"])
    for stage in theirs.cvt.encoder.stages:
        for layer in stage.layers:
            layer.intermediate.activation = QuickGELU()
    with torch.no_grad():
        close(ours(images(64, 64)), theirs(images(64, 64)).logits)
        assert not torch.allclose(ours(images(64, 64)), cvt()(images(64, 64)))


def close(ours: Tensor, theirs: Tensor) -> None:
    print(f"largest difference {(ours - theirs).abs().max().item():.1e}")  # shown by pytest -rP
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cvt_21", "cvt_w24"])
def test_the_other_sizes_run(name):
    assert cvt(name, depths=(1, 1, 1))(images(32, 32)).shape == (2, 5)


def test_the_classifier_can_be_changed_or_left_out():
    model = cvt()
    assert model.get_classifier().out_features == 5
    model.reset_classifier(7)
    assert model(images(32, 32)).shape == (2, 7)
    model.reset_classifier(0)
    token = model(images(32, 32))
    assert token.shape == (2, model.num_features)
    torch.testing.assert_close(token, cvt().forward_head(cvt().forward_features(images(32, 32)), pre_logits=True))
    assert cvt(num_classes=0)(images(32, 32)).shape == (2, 24)


def test_intermediates_come_with_the_last_features_if_wanted():
    model = cvt()
    features, maps = model.forward_intermediates(images(64, 32), indices=[0, 2], norm=True)
    torch.testing.assert_close(features, model.forward_features(images(64, 32)))
    assert [level.shape for level in maps] == [(2, 8, 16, 8), (2, 24, 4, 2)]
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), features[:, 1:])


def test_timms_feature_extractor_takes_it():
    timms = timm.create_model("cvt_13", features_only=True, **SMALL).eval()
    assert timms.feature_info.channels() == [8, 16, 24]
    assert timms.feature_info.reduction() == [4, 8, 16]
    assert [level.shape for level in timms(images(64, 32))] == [(2, 8, 16, 8), (2, 16, 8, 4), (2, 24, 4, 2)]


@pytest.mark.parametrize("size", [(32, 32), (37, 101)])
def test_the_pyramids_maps_have_the_strides_4_8_16(size):
    pyramid = TimmPyramid(**PYRAMID).eval()
    assert pyramid.strides == [4, 8, 16]
    for stride, channels, level in zip((4, 8, 16), (8, 16, 24), pyramid(images(*size)), strict=True):
        assert level.shape == (2, channels, *(-(-side // stride) for side in size))


def test_the_pyramids_maps_are_the_models_without_class_token():
    pyramid = TimmPyramid(**PYRAMID)
    model = cvt()
    model.reset_classifier(0)
    model.norm = nn.Identity()
    pyramid.model.load_state_dict(model.state_dict())
    pyramid.eval()
    pyramid.norms = nn.ModuleList(nn.Identity() for _ in pyramid.norms)
    maps = model.forward_intermediates(images(64, 64), intermediates_only=True)
    torch.testing.assert_close(list(pyramid(images(64, 64))), maps)


def test_levels_that_are_not_asked_for_are_gone():
    pyramid = TimmPyramid(**{**PYRAMID, "out_indices": (0, 1)})
    assert [level.shape[1] for level in pyramid(images(32, 32))] == [8, 16]
    assert not any("stages.2" in name or "head" in name for name, _ in pyramid.named_parameters())
    with pytest.raises(UserError, match="has the levels 0 to 2"):
        TimmPyramid(**{**PYRAMID, "out_indices": (0, 1, 2, 3)})


def test_every_parameter_gets_a_gradient():
    pyramid = TimmPyramid(**PYRAMID, moe={"num_experts": 2, "train_core": True}, allow_random_core=True)
    with collect() as records:
        total = sum((level * level.detach().cos()).sum() for level in pyramid.train()(images(64, 64)))
    (total + records.loss()).backward()
    assert [name for name, p in pyramid.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("residual", ["low_rank", "full"])
def test_experts_leave_the_function_as_it_was(residual):
    dense = cvt()
    config = ResidualMoEConfig(num_experts=4, residual=residual)
    mixture, report = upcycle(dense, config, copy=True)
    assert report.blocks == ("stages.1.blocks.1.mlp", "stages.2.blocks.1.mlp")
    assert len(report.blocks) + len(report.dense) == 6
    assert list(moe_layers(mixture)) == list(report.blocks)
    torch.testing.assert_close(mixture(images(50, 75)), dense(images(50, 75)))


@pytest.mark.parametrize("moe", [None, {"num_experts": 2, "noise": 0.0}])
def test_checkpointed_activations_change_nothing(moe):
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        pyramid = TimmPyramid(**PYRAMID, moe=moe, with_cp=with_cp, allow_random_core=True)
        with collect() as records:
            total = sum(level.square().cos().sum() for level in pyramid(images(64, 64)))
        if (gate_loss := records.loss()) is not None:
            total = total + gate_loss
        total.backward()
        gradients = {name: p.grad for name, p in pyramid.named_parameters() if p.requires_grad}
        statistics = {name: x for name, x in pyramid.named_buffers() if "running" in name or "batches" in name}
        results.append((total, gradients, statistics))
    torch.testing.assert_close(*results)
    statistics = results[1][2]
    assert statistics["model.stages.2.blocks.0.attn.conv_proj_q.bn.num_batches_tracked"] == 1


def test_activations_are_recomputed():
    model = cvt().train()
    calls = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    model(images(32, 32)).sum().backward()
    assert len(calls) == 12
    model.set_grad_checkpointing(False)
    model(images(32, 32)).sum().backward()
    assert len(calls) == 18


def test_branches_are_dropped_in_the_last_stage_alone():
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in cvt(drop_path_rate=0.2).modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0, 0, 0, 0, 0.1, 0.2])


def test_the_class_token_is_no_weight():
    assert cvt().no_weight_decay() == {"stages.2.cls_token"}


def test_an_unknown_argument_is_a_users_error():
    with pytest.raises(UserError, match="timm cannot build cvt_13"):
        TimmPyramid(**{**PYRAMID, "kwargs": {"window_size": 7}})
