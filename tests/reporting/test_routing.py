"""Which expert each token went to, and where in the image it was."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from one_mixture import Net
from small_runs import segmentor

import rmoe
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.errors import UserError
from rmoe.moe.state import moe_layers
from rmoe.reporting.routing import routing_maps

SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4}
CVT = {"embed_dims": (8, 8, 12), "depths": (1, 2, 2), "num_heads": (1, 1, 2)}
VIT = {"embed_dim": 12, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "kwargs", "out", "grids"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, (0, 1, 2, 3), [(4, 5), (2, 3)]),
        ("vit_tiny_patch16_224", VIT, (0, 1), [(4, 5)]),  # the class token is no part of the map
        ("cvt_13", CVT, (0, 1, 2), [(8, 10), (4, 5)]),  # here the last stage alone has one
    ],
)
def test_maps_are_on_the_grids_of_their_layers(model, kwargs, out, grids):
    pyramid = TimmPyramid(model, kwargs, out, moe={"num_experts": 3}, allow_random_core=True).eval()
    maps = routing_maps(pyramid, lambda: pyramid(torch.randn(1, 3, 64, 80)))
    assert [one.expert_hw.shape for one in maps.values()] == grids
    assert [f"model.{name}" for name in maps] == list(moe_layers(pyramid))
    assert all(one.expert_hw.min() >= 0 and one.expert_hw.max() < 3 for one in maps.values())


@pytest.mark.parametrize(
    ("model", "kwargs", "size", "grids"),
    [
        ("vit_small_patch14_dinov2", {**VIT, "img_size": 28}, (70, 112), {(5, 8)}),
        ("vit_small_patch14_dinov2", {**VIT, "img_size": 28}, (64, 100), {(5, 8)}),  # padded to the patches
        (
            "swin_tiny_patch4_window7_224",
            {**SWIN, "depths": (1, 1, 1, 1)},
            (65, 79),
            {(17, 20), (9, 10), (5, 5), (3, 3)},
        ),
    ],
)
def test_maps_know_their_grids_at_any_stride_and_size(model, kwargs, size, grids):
    out = (0, 1) if "vit" in model else (0, 1, 2, 3)
    pyramid = TimmPyramid(model, kwargs, out, moe={"blocks": "all"}, allow_random_core=True).eval()
    maps = routing_maps(pyramid, lambda: pyramid(torch.randn(1, 3, *size)), size)
    assert {one.expert_hw.shape for one in maps.values()} == grids


def test_what_a_batch_pads_an_image_by_is_no_part_of_its_map():
    pyramid = TimmPyramid("vit_tiny_patch16_224", VIT, (0, 1), moe={"blocks": "all"}, allow_random_core=True).eval()
    found = next(iter(routing_maps(pyramid, lambda: pyramid(torch.randn(1, 3, 128, 128)), (100, 50)).values()))
    assert (found.expert_hw.shape, found.cell) == ((7, 4), (0.16, 0.32))
    assert found.probability_hwE.shape == (7, 4, 8)


def test_a_sliding_window_is_left_out_for_maps(tmp_path):
    window = {"mode": "slide", "crop_size": (32, 32), "stride": (16, 16)}
    run = rmoe.load(segmentor(tmp_path / "run", "swin", test_cfg=window), device="cpu")
    batch = run.inputs.collate([run.item(np.zeros((64, 96, 3), np.uint8))])
    maps = routing_maps(run.model, lambda: run.run(batch), (64, 96))
    assert {one.expert_hw.shape for one in maps.values()} == {(16, 24), (8, 12)}
    assert run.model.test_cfg.mode == "slide"


def test_tokens_on_an_unknown_grid_are_refused():
    net = Net()
    with pytest.raises(UserError, match="mlp has 8 tokens, and neither"):
        routing_maps(net, lambda: net(torch.zeros(8, 6)))


def test_a_token_is_where_it_was_in_the_image():
    """Two halves of an image that look different go to two experts, if the gate is made to tell them apart."""
    torch.manual_seed(0)
    pyramid = TimmPyramid(
        "vit_tiny_patch16_224",
        {**VIT, "class_token": False, "global_pool": "avg"},
        (0, 1),
        moe={},
        allow_random_core=True,
    )
    (layer,) = moe_layers(pyramid.eval()).values()
    image = torch.zeros(1, 3, 64, 96)
    image[..., 64:] = 5  # the right third: two columns of six
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    pyramid(image)
    hook.remove()
    left, right = seen[0].reshape(4, 6, -1)[2, 1], seen[0].reshape(4, 6, -1)[2, 5]
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[3], layer.gate.weight[5] = left - right, right - left
    expert_hw = next(iter(routing_maps(pyramid, lambda: pyramid(image)).values())).expert_hw
    assert np.unique(expert_hw[:, :4]).tolist() == [3]
    assert np.unique(expert_hw[:, 4:]).tolist() == [5]


@pytest.mark.parametrize(
    ("model", "kwargs", "kind"),
    [
        ("hiera_tiny_224", {"img_size": 64, "embed_dim": 8, "stages": (1, 1, 1, 1), "num_heads": 1}, "Hiera"),
        ("nest_tiny", {}, "NestLevel"),
        ("mobilevit_xxs", {}, "MobileVitBlock"),
        ("mobilevitv2_050", {}, "MobileVitV2Block"),
    ],
)
def test_tokens_in_another_order_than_the_images_are_refused(model, kwargs, kind):
    with torch.device("meta"):
        net = timm.create_model(model, **kwargs)
        rmoe.upcycle(net, rmoe.ResidualMoEConfig(num_experts=2, blocks="last_two"))
    with pytest.raises(UserError, match=rf"\.mlp is inside of timm's {kind}, which gives it the tokens"):
        routing_maps(net, lambda: pytest.fail("it ran"))


def test_a_dense_model_has_none():
    dense = TimmPyramid("vit_tiny_patch16_224", VIT, (0, 1))
    with pytest.raises(UserError, match="the model is dense"):
        routing_maps(dense, lambda: None)
