"""A Swin's windows: kept masks and fused attention compute what timm computes without them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from rmoe.backbones import windows
from rmoe.backbones.build import timm_model

SMALL = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "drop_path_rate": 0.0}
ANY_SIZE = {"strict_img_size": False, "always_partition": True}
NAMES = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")


def swin(name: str = NAMES[0]) -> Any:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, **SMALL, **ANY_SIZE).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)  # a bias of position that is not zero
    return net


def image(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(net: Any, images: Tensor) -> list[Tensor]:
    net.zero_grad()
    y = net(images)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def test_fused_attention_is_attention() -> None:
    """With and without shift, where windows see an edge: values and all gradients, the bias's included."""
    net = swin()
    unfused = gradients(net, image(64))
    layers = [module for module in net.modules() if isinstance(module, WindowAttention)]
    assert not any(layer.fused_attn for layer in layers)
    for layer in layers:
        layer.fused_attn = True
    torch.testing.assert_close(gradients(net, image(64)), unfused)


@pytest.mark.parametrize(("gpu", "asked", "fused"), [(True, True, True), (True, False, False), (False, True, False)])
def test_it_is_fused_on_a_gpu_unless_timm_is_told_not_to(
    gpu: bool, asked: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(windows, "use_fused_attn", lambda: asked)
    net = timm_model(NAMES[0], {**SMALL, **ANY_SIZE})
    assert {layer.fused_attn for layer in net.modules() if isinstance(layer, WindowAttention)} == {fused}


@pytest.mark.parametrize("name", NAMES)
def test_kept_masks_are_timms(name: str) -> None:
    """Of maps of whole windows, where padding does nothing, of two sizes in turn."""
    net, kept = swin(name), swin(name)
    windows.pad_before_shift(kept)
    windows._mask.cache_clear()
    for side in (64, 32, 64):
        for ours, theirs in zip(gradients(kept, image(side)), gradients(net, image(side)), strict=True):
            assert torch.equal(ours, theirs)
    info = windows._mask.cache_info()
    assert (info.misses, info.hits) == (3, 3)  # maps of 16, 8 and 4 rows; the second stage of one is the first's size


def test_a_mask_without_values_is_not_kept() -> None:
    net = swin()
    windows.pad_before_shift(net)
    windows._mask.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        net(torch.empty(1, 3, 64, 64, dtype=torch.float64))
    assert windows._mask.cache_info().currsize == 0
    assert type(gradients(net, image(64))[0]) is Tensor


def test_a_mask_made_in_inference_serves_training() -> None:
    net = swin()
    windows.pad_before_shift(net)
    windows._mask.cache_clear()
    with torch.inference_mode():
        before = net(image(64))
    torch.testing.assert_close(gradients(net, image(64))[0], before)


def test_blocks_are_found_by_their_class() -> None:
    net = swin()
    windows.pad_before_shift(net)
    windows.pad_before_shift(net)
    blocks = [module for module in net.modules() if isinstance(module, SwinTransformerBlock)]
    assert {type(block) for block in blocks} == {windows._PaddedSwin}


@pytest.mark.parametrize("shift", [(2, 2), (0, 2), (3, 1)])
@pytest.mark.parametrize("size", [(8, 12), (4, 4)])
def test_the_mask_of_a_graph_is_timms(size: tuple[int, int], shift: tuple[int, int]) -> None:
    block = SimpleNamespace(window_size=(4, 4), shift_size=shift, window_area=16)
    x = torch.zeros(1, *size, 2)
    found = windows._mask_in_a_graph(x, block.window_size, block.shift_size)
    assert torch.equal(found, SwinTransformerBlock.get_attn_mask(block, x))
