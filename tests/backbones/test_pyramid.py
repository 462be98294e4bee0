"""Tests the feature pyramid: its maps are right for images of any size, dense or with experts."""

from __future__ import annotations

import copy
import pickle
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
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect
from rmoe.moe.state import moe_layers

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
    """Compares with mmseg's SwinTransformer, which is the published one for dense tasks."""
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
    """Translates downsampling, which mmseg does at the end of a stage and with neighbours in another order."""
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


DINO = "vit_small_patch14_reg4_dinov2"
SWIN_V2 = {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4}
CONVNEXT = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
HIERA = {"embed_dim": 8, "stages": (1, 1, 1, 1), "num_heads": 1}
BRIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "Swin": (SWIN, SMALL),
    "SwinV2": ("swinv2_tiny_window8_256", SWIN_V2),
    "SwinV2-CR": ("swinv2_cr_tiny_224", {key: x for key, x in SWIN_V2.items() if key != "window_size"}),
    "ViT, patch 16": (VIT, SMALL_VIT),
    "ViT, patch 8": ("vit_small_patch8_224", SMALL_VIT),
    "ViT, patch 32": ("vit_small_patch32_224", SMALL_VIT),
    "DINOv2, patch 14": ("vit_small_patch14_dinov2", SMALL_VIT | {"img_size": 56}),
    "DINOv2, registers": (DINO, SMALL_VIT | {"img_size": 56}),
    "DINOv3": ("vit_small_patch16_dinov3", {"embed_dim": 16, "depth": 4, "num_heads": 2}),
    "EVA-02, patch 14": ("eva02_tiny_patch14_224", {"embed_dim": 16, "depth": 4, "num_heads": 2}),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", SMALL_VIT),
    "SAM": ("samvit_base_patch16", SMALL_VIT | {"img_size": 64}),
    "ConvNeXt": ("convnext_tiny", CONVNEXT),
    "XCiT": ("xcit_nano_12_p16_224", {"depth": 4}),
    "Hiera": ("hiera_tiny_224", HIERA | {"img_size": (96, 160)}),
    "BEiT": ("beit_base_patch16_224", SMALL_VIT | {"img_size": (96, 160)}),
}


@pytest.mark.parametrize("name", BRIGHT)
def test_each_map_answers_where_the_image_changed(name):
    """Moves a bright patch through the image; a map changes most at the patch's place, edges included."""
    torch.manual_seed(0)
    pyramid = TimmPyramid(*BRIGHT[name]).eval()
    height, width = pyramid.size or (101, 150)
    images = image(height, width)[:1]
    places = [(y, x) for y in (8, height // 2, height - 8) for x in (8, width // 2, width - 8)]
    with torch.no_grad():
        before = pyramid(images)
        for y, x in places:
            bright = images.clone()
            bright[..., y - 8 : y + 8, x - 8 : x + 8] += 9
            for stride, given, old, new in zip((4, 8, 16, 32), pyramid.given, before, pyramid(bright), strict=True):
                assert new.shape[-2:] == (-(-height // stride), -(-width // stride))
                found = centre((new - old).square().sum(1)[0], stride)
                assert max(abs(found[0] - y), abs(found[1] - x)) < 6 + max(stride, given) / 2, (stride, y, x)


def centre(response: Tensor, stride: int) -> tuple[float, float]:
    """Returns (row, column) of the strongest part of a map in pixels."""
    response = response * (response > response.max() / 2)
    rows, columns = ((torch.arange(side) + 0.5) @ response.sum(1 - axis) for axis, side in enumerate(response.shape))
    return (stride * rows / response.sum()).item(), (stride * columns / response.sum()).item()


def test_maps_of_patch_14_are_interpolated_in_place():
    """Checks that a map which holds each cell's own place in pixels still does so on the grid of stride 16."""
    pyramid = without_norms(TimmPyramid(DINO, SMALL_VIT | {"img_size": 56}, out_indices=(0, 1, 2)).eval())
    level = torch.stack(torch.meshgrid(14 * (torch.arange(8) + 0.5), 14 * (torch.arange(11) + 0.5), indexing="ij"))
    padded = torch.zeros(1, 3, 112, 154)
    moved = pyramid._brought(level[None], 14, 16, padded, 101, 150)[0]
    expected = torch.stack(torch.meshgrid(16 * (torch.arange(7) + 0.5), 16 * (torch.arange(10) + 0.5), indexing="ij"))
    inside = (slice(None), slice(0, 6), slice(0, 9))  # beyond the last centre, its value is repeated
    torch.testing.assert_close(moved[inside], expected[inside])
    assert (moved - expected).abs().max() <= 14


@pytest.mark.parametrize(
    ("model", "kwargs", "own"),
    [
        ("hiera_tiny_224", HIERA, (224, 224)),
        ("hiera_tiny_224", HIERA | {"img_size": 64}, (64, 64)),
        ("beit_base_patch16_224", SMALL_VIT | {"img_size": (32, 64)}, (32, 64)),
        ("mvitv2_tiny", {}, (224, 224)),
        ("maxvit_rmlp_pico_rw_256", {"embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1)}, (256, 256)),
        ("vit_tiny_patch16_224", SMALL_VIT | {"img_size": 32, "dynamic_img_size": False}, (32, 32)),
        (SWIN, SMALL | {"strict_img_size": True}, (224, 224)),
    ],
)
def test_a_model_of_one_image_size_says_so(model, kwargs, own):
    pyramid = TimmPyramid(model, kwargs).eval()
    for size in ((48, 48), (own[0] - 4, own[1]), (256, 288)):
        message = f"{model} got images of {size[0]} x {size[1]} pixels but takes only {own[0]} x {own[1]};"
        with pytest.raises(UserError, match=message):
            pyramid(image(*size))
    with torch.no_grad():
        maps = pyramid(image(*own)[:1])
    assert [level.shape[-2:] for level in maps] == [
        (-(-own[0] // stride), -(-own[1] // stride)) for stride in pyramid.strides
    ]


def test_a_model_of_one_size_gets_its_images_unpadded():
    with torch.no_grad():
        maps = TimmPyramid("levit_128s", out_indices=(0, 1, 2)).eval()(image(224, 224)[:1])
    assert [level.shape[-1] for level in maps] == [14, 7, 4]


@pytest.mark.parametrize("name", ["SwinV2", "DINOv2, registers"])
def test_dtypes_copies_and_pickles(name):
    pyramid = TimmPyramid(*BRIGHT[name], moe={"num_experts": 2}, allow_random_core=True).eval()
    images = image(50, 75)
    for twin in (copy.deepcopy(pyramid), pickle.loads(pickle.dumps(pyramid))):
        assert all(map(torch.equal, twin(images), pyramid(images)))
    for dtype in (torch.bfloat16, torch.float64):
        assert all(x.dtype == dtype and x.isfinite().all() for x in pyramid.to(dtype)(images.to(dtype)))


def test_a_map_of_another_size_than_its_stride_says_is_refused():
    pyramid = swin()
    pyramid.given = [8, *pyramid.given[1:]]
    with pytest.raises(UserError, match=rf"{SWIN} gives a map of 16 x 16 cells .* where stride 8 makes 8 x 8"):
        pyramid(image(64, 64))


def test_one_level_of_a_backbone_with_stages_keeps_its_stride():
    (level,) = swin(out_indices=(1,))(image(64, 64))
    assert level.shape == (2, 16, 8, 8)


@pytest.mark.parametrize(("model", "kwargs"), [("swinv2_tiny_window8_256", SWIN_V2), (SWIN, SMALL)])
def test_opposite_edges_do_not_see_one_another(model, kwargs):
    """Checks that shifted windows do not join the edges of a map that is no multiple of the window."""
    torch.manual_seed(0)
    pyramid = TimmPyramid(model, kwargs | {"depths": (2, 1, 1, 1)}, out_indices=(0,)).eval()
    images = image(72, 72)
    changed = images.clone()
    changed[..., :4] += 1
    (before,), (after,) = pyramid(images), pyramid(changed)
    assert not torch.equal(before[..., :2], after[..., :2])
    assert torch.equal(before[..., -4:], after[..., -4:])


def test_a_vits_middle_map_is_timms():
    pyramid = without_norms(TimmPyramid(VIT, SMALL_VIT, out_indices=(0, 1, 2, 3)).eval())
    images = image(64, 32)
    timms = pyramid.model.forward_intermediates(images, indices=[2], intermediates_only=True)
    torch.testing.assert_close(pyramid(images)[2], timms[0])


def deconvolved(level: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    """Writes each cell of a map [B, C, H, W] into its own 2 x 2 cells, [B, O, 2H, 2W], one corner at a time."""
    batch, _, height, width = level.shape
    result = torch.zeros(batch, layer.weight.shape[1], 2 * height, 2 * width)
    for row in (0, 1):
        for column in (0, 1):
            corner = torch.einsum("bchw,co->bohw", level, layer.weight[:, :, row, column])
            result[..., row::2, column::2] = corner + layer.bias[:, None, None]
    return result


def normed(level: Tensor, norm: nn.Module) -> Tensor:
    """Norms every cell of a map over its channels, as LayerNorm is defined."""
    centred = level - level.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("name", ["ViT, patch 16", "DINOv3"])
def test_the_simple_feature_pyramid_is_made_of_the_last_map_alone(name):
    """Compares with section 3 of arXiv 2203.16527, computed cell by cell, from the map that timm gives."""
    torch.manual_seed(0)
    model, kwargs = BRIGHT[name]
    pyramid = TimmPyramid(model, kwargs, (3,), strides=(4, 8, 16, 32)).eval()
    with torch.no_grad():
        for parameter in [*pyramid.rescale.parameters(), *pyramid.norms.parameters()]:
            parameter.normal_()  # so that no norm is the identity and no bias is 0
        images = image(64, 96)
        (last,) = pyramid.model.forward_intermediates(images, indices=[3], intermediates_only=True)
        (two, norm, act, four), (eight,) = pyramid.rescale[0], pyramid.rescale[1]
        batch, channels, height, width = last.shape
        expected = [
            deconvolved(act(normed(deconvolved(last, two), norm)), four),
            deconvolved(last, eight),
            last,
            last.reshape(batch, channels, height // 2, 2, width // 2, 2).amax((3, 5)),
        ]
        assert isinstance(act, nn.GELU)
        assert pyramid.channels == [channels // 4, channels // 2, channels, channels]
        for ours, level, norm in zip(pyramid(images), expected, pyramid.norms, strict=True):
            torch.testing.assert_close(ours, normed(level, norm), rtol=1e-4, atol=1e-4)


SIMPLE = ["ViT, patch 16", "ViT, patch 8", "DINOv2, patch 14", "DINOv2, registers", "DINOv3", "EVA-02, patch 14"]


@pytest.mark.parametrize("name", SIMPLE)
def test_the_simple_feature_pyramid_takes_images_of_any_size(name):
    pyramid = TimmPyramid(*BRIGHT[name], (3,), strides=(4, 8, 16, 32)).eval()
    for size in ((50, 75), (5, 3)):  # the second is smaller than a patch
        for channels, stride, level in zip(pyramid.channels, (4, 8, 16, 32), pyramid(image(*size)), strict=True):
            assert level.shape == (2, channels, *(-(-side // stride) for side in size))


def test_maps_keep_the_stride_of_the_patches_where_that_is_asked_for():
    pyramid = without_norms(TimmPyramid(DINO, SMALL_VIT | {"img_size": 56}, (1, 3), strides=(14, 14)).eval())
    images = image(56, 84)
    timms = pyramid.model.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    for ours, theirs in zip(pyramid(images), timms, strict=True):
        assert torch.equal(ours, theirs)
    assert [level.shape[-2:] for level in pyramid(image(57, 85))] == [(5, 7), (5, 7)]


def test_one_map_of_one_stride_is_no_simple_pyramid():
    pyramid = TimmPyramid(VIT, SMALL_VIT, (3,), strides=(8,))
    assert pyramid.channels == [12]


def test_a_simple_pyramid_with_experts_trains_all_of_its_parameters():
    moe = {"num_experts": 2, "train_core": True, "noise": 0.0}
    pyramid = TimmPyramid(VIT, SMALL_VIT, (3,), strides=(4, 8, 16, 32), moe=moe, allow_random_core=True)
    with collect() as records:
        total = sum((level * level.detach().cos()).sum() for level in pyramid(image(64, 64)))
    (total + records.loss()).backward()
    assert [name for name, p in pyramid.named_parameters() if p.grad is None] == []


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
        (total + records.loss()).backward()
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
    """Checks that the padding of windows belongs to the copy's blocks, not to the original's."""
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
        (
            {"moe": {}, "allow_random_core": False},
            "residuals go around a core and there is none",
        ),
        ({"model": "resnet18", "kwargs": {}, "moe": {}}, "no feed-forward network"),
        ({"moe": {"num_expert": 8}}, "did you mean 'num_experts'"),
        ({"model": "twins_svt_small", "kwargs": {}, "with_cp": True}, "twins_svt_small cannot recompute activations"),
        ({"core": "nowhere.pth"}, "there is no checkpoint nowhere.pth"),
    ],
)
def test_what_a_user_can_get_wrong(arguments, message):
    with pytest.raises(UserError, match=message):
        swin(**arguments)
