"""A timm backbone as a feature pyramid: the maps are right, for any size, dense or with experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import Tensor, nn

from rmoe.backbones.pyramid import TimmPyramid
from rmoe.errors import UserError
from rmoe.layers.moe import ResidualMoE, collect, moe_layers

SWIN = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4, "drop_path_rate": 0.0}
VIT = "vit_tiny_patch16_224"
SMALL_VIT = {"embed_dim": 12, "depth": 4, "num_heads": 2}
CHANNELS = [8, 16, 32, 64]


def swin(**changed: Any) -> TimmPyramid:
    torch.manual_seed(0)
    return TimmPyramid(**{"model": SWIN, "kwargs": SMALL, "allow_random_core": True, **changed}).eval()


def without_norms(pyramid: TimmPyramid) -> TimmPyramid:
    pyramid.norms = nn.ModuleList(nn.Identity() for _ in pyramid.norms)
    return pyramid


def image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def test_on_whole_windows_the_maps_are_those_of_timm():
    pyramid = without_norms(swin())
    timms = timm.create_model(SWIN, features_only=True, strict_img_size=False, always_partition=True, **SMALL).eval()
    timms.load_state_dict({key.replace("layers.", "layers_", 1): x for key, x in pyramid.model.state_dict().items()})
    images = image(128, 256)
    for ours, theirs in zip(pyramid(images), timms(images), strict=True):
        torch.testing.assert_close(ours, theirs.permute(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(64, 64), (50, 75), (33, 129)])
def test_at_any_size_the_maps_are_those_of_the_published_swin(size):
    """mmseg's SwinTransformer is the published one for dense tasks."""
    from mmseg.models.backbones import SwinTransformer

    ours = swin()
    theirs = SwinTransformer(
        embed_dims=8, depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.0
    )
    theirs.eval()  # returns None
    theirs.load_state_dict(mmseg_keys(ours), strict=False)
    for one, other in zip(ours(image(*size)), theirs(image(*size)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def mmseg_keys(pyramid: TimmPyramid) -> dict[str, Tensor]:
    """timm downsamples at the start of a stage, mmseg at the end, with the four neighbours in another order."""
    renamed = {}
    for key, x in pyramid.model.state_dict().items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}", f"layers.{stage - 1}")
            neighbours = x.reshape(*x.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
            x = neighbours.transpose(-1, -2).reshape(x.shape)
        for timms, mmsegs in {
            "layers": "stages",
            "attn.": "attn.w_msa.",
            "mlp.fc1.": "ffn.layers.0.0.",
            "mlp.fc2.": "ffn.layers.1.",
            "patch_embed.proj.": "patch_embed.projection.",
        }.items():
            key = key.replace(timms, mmsegs)
        renamed[key] = x
    norms = {
        f"norm{level}.{key}": x for level, norm in enumerate(pyramid.norms) for key, x in norm.state_dict().items()
    }
    return renamed | norms


@pytest.mark.parametrize("size", [(32, 32), (37, 101)])
def test_maps_have_the_strides_4_8_16_32(size):
    for stride, channels, level in zip((4, 8, 16, 32), CHANNELS, swin()(image(*size)), strict=True):
        assert level.shape == (2, channels, *(-(-side // stride) for side in size))


def test_a_plain_vit_is_spread_over_the_strides():
    pyramid = TimmPyramid(VIT, SMALL_VIT).eval()
    for size in ((32, 32), (37, 101)):
        for stride, level in zip((4, 8, 16, 32), pyramid(image(*size)), strict=True):
            assert level.shape == (2, 12, *(-(-side // stride) for side in size))


def test_a_vits_middle_map_is_timms():
    pyramid = without_norms(TimmPyramid(VIT, SMALL_VIT, out_indices=(0, 1, 2, 3)).eval())
    images = image(64, 32)
    timms = pyramid.model.forward_intermediates(images, indices=[2], intermediates_only=True)
    torch.testing.assert_close(pyramid(images)[2], timms[0])


def test_each_level_is_normalised():
    for level in swin()(image(64, 64)):
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(level.var(1, unbiased=False), torch.ones_like(level[:, 0]), atol=1e-2, rtol=0)


def test_chosen_levels_keep_their_strides_and_unused_stages_are_gone():
    last_three = swin(out_indices=(1, 2, 3))
    assert last_three.strides == [8, 16, 32]
    first_two = swin(out_indices=(0, 1))
    assert [level.shape[1] for level in first_two(image(32, 32))] == [8, 16]
    assert len(first_two.model.layers) == 2


def test_every_parameter_gets_a_gradient():
    for pyramid in (swin(moe={"num_experts": 2, "train_core": True}), TimmPyramid(VIT, SMALL_VIT)):
        with collect() as records:
            total = sum((level * level.detach().cos()).sum() for level in pyramid.train()(image(64, 64)))
        if (gate_loss := records.loss()) is not None:
            total = total + gate_loss
        total.backward()
        assert [name for name, p in pyramid.named_parameters() if p.grad is None] == []


def test_experts_leave_the_function_as_it_was():
    dense, mixture = swin(), swin(moe={"num_experts": 4})
    mixture.load_state_dict(
        {
            key.replace(".mlp.fc", ".mlp.core.fc") if is_moe(mixture, key) else key: x
            for key, x in dense.state_dict().items()
        },
        strict=False,
    )
    assert len(moe_layers(mixture)) == 2
    for before, after in zip(dense(image(50, 75)), mixture(image(50, 75)), strict=True):
        torch.testing.assert_close(after, before)


def is_moe(model: nn.Module, key: str) -> bool:
    return any(key.startswith(f"{name}.") for name in moe_layers(model))


@pytest.mark.parametrize(("model", "kwargs"), [(SWIN, SMALL), (VIT, SMALL_VIT)])
def test_checkpointed_activations_change_nothing(model, kwargs):
    moe = {"num_experts": 2, "noise": 0.0}
    torch.manual_seed(0)
    plain = TimmPyramid(model, kwargs, moe=moe, allow_random_core=True)
    torch.manual_seed(0)
    saving = TimmPyramid(model, kwargs, moe=moe, with_cp=True, allow_random_core=True)
    results = []
    for pyramid in (plain, saving):
        with collect() as records:
            total = sum(level.square().cos().sum() for level in pyramid(image(64, 64)))
        (total + records.loss()).backward()
        results.append([total, records.loss(), *(p.grad for p in pyramid.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results)


def test_a_copy_is_independent():
    """The padding of windows must belong to the copy's blocks, not to the original's."""
    pyramid = swin()
    twin = copy.deepcopy(pyramid)
    nn.init.zeros_(pyramid.model.layers[0].blocks[1].attn.proj.weight)
    assert not torch.equal(pyramid(image(32, 32))[0], twin(image(32, 32))[0])
    torch.testing.assert_close(swin()(image(33, 32))[0], twin(image(33, 32))[0])


UPERNET = {
    "type": "EncoderDecoder",
    "data_preprocessor": {"type": "SegDataPreProcessor", "size": (64, 64)},
    "test_cfg": {"mode": "whole"},
    "backbone": {
        "type": "rmoe.TimmPyramid",
        "model": SWIN,
        "kwargs": SMALL,
        "moe": {"num_experts": 2},
        "allow_random_core": True,
    },
    "decode_head": {
        "type": "UPerHead",
        "in_channels": CHANNELS,
        "in_index": [0, 1, 2, 3],
        "channels": 8,
        "num_classes": 3,
        "norm_cfg": {"type": "GN", "num_groups": 2},
        "align_corners": False,
    },
}


def test_in_an_unmodified_upernet():
    from mmseg.structures import SegDataSample

    init_default_scope("mmseg")
    model = MODELS.build(Config({"model": UPERNET}).model).train()
    before = {key: x.clone() for key, x in model.backbone.state_dict().items()}
    model.init_weights()  # mmengine's runner calls it; the core must survive
    torch.testing.assert_close(dict(model.backbone.state_dict()), before)
    truth = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(3, (1, 64, 64))))
    with collect() as records:
        losses = model.loss(torch.randn(2, 3, 64, 64), [truth, truth])
    assert set(losses) == {"decode.loss_ce", "decode.acc_seg"}
    assert all(isinstance(layer, ResidualMoE) for layer in records.routing)
    assert records.loss().requires_grad
    answer = model.eval().predict(torch.randn(1, 3, 50, 40))[0]
    assert answer.pred_sem_seg.data.shape == (1, 50, 40)


def test_in_an_unmodified_fpn_of_mmdet():
    init_default_scope("mmdet")
    pyramid = MODELS.build(UPERNET["backbone"])
    neck = MODELS.build({"type": "FPN", "in_channels": CHANNELS, "out_channels": 4, "num_outs": 5})
    assert [level.shape[-2:] for level in neck(pyramid(image(50, 75)))] == [(13, 19), (7, 10), (4, 5), (2, 3), (1, 2)]
    init_default_scope("mmengine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model": "swin_tiny_patch4_window7_244"},
            "no model 'swin_tiny_patch4_window7_244'; did you mean swin_tiny_patch4_window7_224",
        ),
        ({"model": "qqqqqqqqqqqqqqq"}, "timm.list_models"),
        ({"kwargs": {"embed_dims": 8}}, "unexpected keyword argument 'embed_dims'"),
        ({"out_indices": (0, 4)}, "has the levels 0 to 3"),
        ({"model": "resnet18", "kwargs": {}, "moe": {}}, "no feed-forward network"),
        ({"moe": {"num_expert": 8}}, "did you mean 'num_experts'"),
        ({"core": "nowhere.pth"}, "there is no checkpoint nowhere.pth"),
    ],
)
def test_what_a_user_can_get_wrong(arguments, message):
    with pytest.raises(UserError, match=message):
        swin(**arguments)
