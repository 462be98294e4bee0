"""Which expert each token went to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rmoe.analysis import routing_maps
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.config import UserError
from rmoe.layers.moe import moe_layers

SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4}
VIT = {"embed_dim": 12, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "kwargs", "out", "grids"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, (0, 1, 2, 3), [(4, 5), (2, 3)]),
        ("vit_tiny_patch16_224", VIT, (0, 1), [(4, 5)]),  # the class token is no part of the map
    ],
)
def test_maps_are_on_the_grids_of_their_layers(model, kwargs, out, grids):
    pyramid = TimmPyramid(model, kwargs, out, moe={"num_experts": 3}).eval()
    maps = routing_maps(pyramid, lambda: pyramid(torch.randn(1, 3, 64, 80)), (64, 80))
    assert [expert_hw.shape for expert_hw in maps.values()] == grids
    assert list(maps) == list(moe_layers(pyramid))
    assert all(expert_hw.min() >= 0 and expert_hw.max() < 3 for expert_hw in maps.values())


def test_a_token_is_where_it_was_in_the_image():
    """Two halves of an image that look different go to two experts, if the gate is made to tell them apart."""
    torch.manual_seed(0)
    pyramid = TimmPyramid("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}, (0, 1), moe={})
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
    (expert_hw,) = routing_maps(pyramid, lambda: pyramid(image), (64, 96)).values()
    assert np.unique(expert_hw[:, :4]).tolist() == [3]
    assert np.unique(expert_hw[:, 4:]).tolist() == [5]


def test_a_dense_model_has_none():
    dense = TimmPyramid("vit_tiny_patch16_224", VIT, (0, 1))
    with pytest.raises(UserError, match="the model is dense"):
        routing_maps(dense, lambda: None, (16, 16))
