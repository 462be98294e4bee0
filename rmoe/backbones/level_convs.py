"""Brings the maps of a pyramid to one width, each for itself, as ViTDet does between its pyramid and a detector."""

from __future__ import annotations

from collections.abc import Sequence

import timm.layers
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.errors import UserError
from rmoe.registry import MODELS


@MODELS.register_module()
class LevelConvs(nn.Module):
    """Gives each map a 1×1 and a 3×3 convolution, both without a bias and with a LayerNorm over the channels, and adds
    smaller maps (ViTDet, arXiv 2203.16527, section 3). Maps do not see one another, as they do in a feature pyramid
    network.

    Args:
        in_channels: of each map.
        out_channels: of all maps that are returned.
        num_outs: how many are returned; each one that is added is every other row and column of the one before.

    Raises:
        UserError: an argument is no positive number, or there are fewer outputs than maps.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_outs: int) -> None:
        super().__init__()
        numbers = [*in_channels, out_channels, num_outs] if isinstance(in_channels, Sequence) else []
        if not all(type(x) is int and x > 0 for x in numbers) or not 0 < len(numbers) - 2 <= num_outs:
            raise UserError(
                f"LevelConvs has in_channels={in_channels!r}, out_channels={out_channels!r}, num_outs={num_outs!r}; "
                "give the channels of each map, those to bring them to, and at least as many outputs as maps"
            )
        self.num_outs = num_outs
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False),
                timm.layers.LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                timm.layers.LayerNorm2d(out_channels),
            )
            for channels in in_channels
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Takes maps [B, in_channels, H, W]; returns maps [B, out_channels, H, W], the added ones [B, out_channels,
        ⌈H/2⌉, ⌈W/2⌉] of the one before.
        """
        found = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        for _ in range(self.num_outs - len(found)):
            found.append(F.max_pool2d(found[-1], 1, stride=2))
        return tuple(found)
