"""A timm backbone as a feature pyramid for the heads of mmseg and mmdet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import timm.layers
import torch.nn.functional as F
from timm.models import model_entrypoint
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from rmoe.backbones.build import add_weights, timm_model
from rmoe.errors import UserError
from rmoe.registry import MODELS

# What a family needs to take images of any size, by the name of timm's module.
_ANY_SIZE: dict[str, dict[str, Any]] = {
    "swin_transformer": {"strict_img_size": False, "always_partition": True},
    "vision_transformer": {"dynamic_img_size": True},
}


@MODELS.register_module()
class TimmPyramid(nn.Module):
    """Feature maps of a timm backbone, one LayerNorm for each, for images of any size.

    A Swin's maps have the strides 4, 8, 16, 32, and are those of the published Swin for dense tasks. A CvT's three have
    the strides 4, 8, 16; its class token is split off. A plain ViT's, all of stride 16, are brought to the strides
    4, 8, 16, 32 as in ViTDet (arXiv 2203.16527, section 3).

    Not an mmengine `BaseModule`, on purpose: mmengine's weight initialisation would run timm's over the loaded core.

    Args:
        model: a timm model with `forward_intermediates`, such as "swin_tiny_patch4_window7_224".
        kwargs: further arguments of `timm.create_model`: drop_path_rate, embed_dim, depths, pretrained, …
        out_indices: stages (Swin, CvT) or blocks (ViT) whose maps are returned.
        core: checkpoint of the dense core, or of a mixture that `moe` describes: see `rmoe.backbones.build`.
        moe: keys of `rmoe.config.ResidualMoEConfig`; None leaves the backbone dense. Blocks are chosen of the whole
            backbone, whatever `out_indices` leave of it, so that upstream and downstream models have the same.
        with_cp: recompute activations in the backward pass, to save memory.

    Raises:
        UserError: an unknown model or argument, an index that the model does not have, and what `load_core` and
            `upcycle` raise.
    """

    def __init__(
        self,
        model: str,
        kwargs: Mapping[str, Any] | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        core: str | None = None,
        moe: Mapping[str, Any] | None = None,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        net: Any = timm_model(model, {**_any_size(model), **(kwargs or {}), "num_classes": 0})
        levels = _levels(model, net, out_indices)
        norms = [timm.layers.LayerNorm2d(channels, eps=1e-5) for channels, _ in levels]
        add_weights(net, core, moe, dict(zip(out_indices, norms, strict=True)))
        self.patch = net.feature_info[0]["reduction"]
        self.out_indices = net.prune_intermediate_layers(list(out_indices), prune_norm=True)
        _pad_before_shift(net)
        if with_cp:
            timm.layers.set_reentrant_ckpt(False)  # the reentrant kind loses the gate's losses
            net.set_grad_checkpointing(True)
        self.model = net
        self.strides = _strides([stride for _, stride in levels])
        self.rescale = nn.ModuleList(
            _rescale(channels, given, wanted) for (channels, given), wanted in zip(levels, self.strides, strict=True)
        )
        self.norms = nn.ModuleList(norms)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B, 3, H, W] → for each level of stride s a map [B, C, ⌈H/s⌉, ⌈W/s⌉]."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        maps = self.model.forward_intermediates(images, indices=self.out_indices, intermediates_only=True)
        levels = zip(maps, self.rescale, self.norms, self.strides, strict=True)
        # Contiguous: mmcv's RoIAlign, for one, takes memory to be in this order, whatever the strides say.
        return tuple(
            norm(rescale(level))[..., : math.ceil(height / stride), : math.ceil(width / stride)].contiguous()
            for level, rescale, norm, stride in levels
        )


def _any_size(name: str) -> dict[str, Any]:
    family = model_entrypoint(name).__module__.rpartition(".")[2] if timm.is_model(name) else ""
    return _ANY_SIZE.get(family, {})


def _levels(name: str, net: Any, out_indices: Sequence[int]) -> list[tuple[int, int]]:
    """(channels, stride) of the maps asked for."""
    if not hasattr(net, "forward_intermediates"):
        raise UserError(f"timm's {name} has no forward_intermediates; use a Swin, a CvT or a ViT")
    known = net.feature_info
    if not all(0 <= index < len(known) for index in out_indices):
        raise UserError(f"out_indices are {tuple(out_indices)}; {name} has the levels 0 to {len(known) - 1}")
    return [(known[index]["num_chs"], known[index]["reduction"]) for index in out_indices]


def _strides(given: list[int]) -> list[int]:
    """A backbone without stages gives maps of one stride, which are spread; others keep theirs."""
    return [4 * 2**level for level in range(len(given))] if len(set(given)) == 1 else given


def _rescale(channels: int, given: int, wanted: int) -> nn.Module:
    """From a map of stride `given` to one of stride `wanted`."""
    if given <= wanted:
        return nn.MaxPool2d(wanted // given, ceil_mode=True) if given < wanted else nn.Identity()
    steps: list[nn.Module] = []
    for _ in range(int(math.log2(given // wanted))):
        steps += [timm.layers.LayerNorm2d(channels), nn.GELU()] if steps else []
        steps.append(nn.ConvTranspose2d(channels, channels, 2, stride=2))
    return nn.Sequential(*steps)


class _PaddedWindows(SwinTransformerBlock):
    """A Swin block that pads the map to whole windows before it shifts it, as the published Swin does.

    timm shifts first: then tokens from opposite edges of the image share a window and attend to one another wherever
    the map is not a multiple of the window.
    """

    def _attn(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] → [B, H, W, C]."""
        height, width = x.shape[1:3]
        rows, columns = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        return super()._attn(padded)[:, :height, :width]


def _pad_before_shift(net: nn.Module) -> None:
    for module in net.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = _PaddedWindows  # not a wrapper: names of modules and weights stay timm's
