"""A Swin's windows: maps of any size as the published Swin takes them, masks that are kept, attention in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor, nn

_KEPT = 8  # masks: those of all stages, for images of two sizes


def fuse_attention(net: nn.Module) -> None:
    """Lets the attention of a Swin's windows run in one kernel on a GPU, without the probabilities in memory.

    timm calls it experimental and leaves it off. On a CPU torch has no such kernel for a bias that is trained. timm's
    environment variable TIMM_FUSED_ATTN=0 leaves it off on a GPU too.
    """
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.fused_attn = torch.cuda.is_available() and use_fused_attn()  # type: ignore[misc]


def pad_before_shift(net: nn.Module) -> None:
    """Lets the blocks of a Swin pad their map to whole windows before they shift it, as the published Swin does."""
    for module in net.modules():
        for padded in (_PaddedSwin, _PaddedSwinV2, _PaddedSwinV2Cr):
            if type(module) is padded.__mro__[2]:
                module.__class__ = padded  # a wrapper would change the names of modules and weights


def _on_whole_windows(attend: Callable[[Tensor], Tensor], x: Tensor, window: tuple[int, int]) -> Tensor:
    """Pads the map x [B, H, W, C] to whole windows before `attend` shifts it, as the published Swin does.

    timm shifts first: where the map is not a multiple of the window, tokens from opposite edges of the image then share
    a window and attend to one another.
    """
    height, width = x.shape[1:3]
    rows, columns = window
    return attend(F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows)))[:, :height, :width]


class _KeepsMasks:
    """Has the masks of shifted windows made once for all blocks and passes, not by each block in each pass."""

    def get_attn_mask(self: Any, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
        if x is not None and any(self.shift_size) and torch.compiler.is_exporting():
            return _mask_in_a_graph(x, self.window_size, self.shift_size)
        if type(x) is not Tensor or not any(self.shift_size):  # a tensor without values keeps nothing
            return super().get_attn_mask(x, *args, **kwargs)  # type: ignore[misc]
        block = type(self).__mro__[2]
        return _mask(block, tuple(x.shape[1:3]), tuple(self.window_size), tuple(self.shift_size), x.dtype, x.device)


def _mask_in_a_graph(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Returns timm's mask for the map x [B, H, W, C] by a few operations without branches."""

    def region_of(side: int, axis: int) -> Tensor:
        place = torch.arange(side, device=x.device)
        return (place >= side - window[axis]).int() + (place >= side - shift[axis]).int()

    of_rows, of_columns = region_of(x.shape[1], 0), region_of(x.shape[2], 1)
    region = (3 * of_rows[:, None] + of_columns).unflatten(0, (-1, window[0])).unflatten(2, (-1, window[1]))
    region = region.transpose(1, 2).reshape(-1, prod(window))
    return (region[:, None] != region[:, :, None]).to(x.dtype) * -100.0


@lru_cache(_KEPT)
def _mask(
    block: Any,
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Returns timm's mask for a map of that size [windows, tokens of one, tokens of one]: 0, or -100 across an edge."""
    asked = SimpleNamespace(window_size=window, shift_size=shift, window_area=prod(window))
    with torch.inference_mode(False):
        return block.get_attn_mask(asked, torch.empty(1, *size, 1, dtype=dtype, device=device))


class _PaddedSwin(_KeepsMasks, SwinTransformerBlock):
    def _attn(self, x: Tensor) -> Tensor:
        return _on_whole_windows(super()._attn, x, self.window_size)


class _PaddedSwinV2(_KeepsMasks, SwinTransformerV2Block):
    def _attn(self, x: Tensor) -> Tensor:
        return _on_whole_windows(super()._attn, x, self.window_size)


class _PaddedSwinV2Cr(_KeepsMasks, SwinTransformerV2CrBlock):
    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return _on_whole_windows(super()._shifted_window_attn, x, self.window_size)
