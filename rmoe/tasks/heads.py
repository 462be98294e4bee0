"""Adds to mmseg the heads by which plain backbones, such as DINO's, are judged and used.

Import this module, by `custom_imports` in a config, to use `rmoe.LinearHead` and `rmoe.DPTHead`. It imports all of
mmseg's models, which data sets do not need, and so stands apart from `rmoe.tasks.segmentation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads import DPTHead as MMSegDPTHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor

from rmoe.errors import UserError
from rmoe.registry import MODELS

_LEVELS = 4  # of DPT


@MODELS.register_module()
class LinearHead(BaseDecodeHead):
    """Classifies each cell by a batch norm and a linear layer, as DINOv2's linear evaluation does (arXiv 2304.07193).

    Several maps are resized to the size of the first and concatenated.

    Args:
        in_channels: of each map that is read.
        in_index: their numbers among the backbone's maps; the first ones by default.
        norm_cfg: the norm.
        dropout_ratio: of whole channels, before the linear layer.
        **mmseg: further arguments of mmseg's `BaseDecodeHead`, such as num_classes and loss_decode.

    Raises:
        UserError: in_channels or in_index is no list of numbers.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_index: Sequence[int] | None = None,
        *,
        norm_cfg: Mapping[str, Any],
        dropout_ratio: float = 0.0,
        **mmseg: Any,
    ) -> None:
        channels, index = _checked("rmoe.LinearHead", in_channels, in_index)
        super().__init__(
            in_channels=channels,
            channels=sum(channels),
            in_index=index,
            input_transform="resize_concat",
            norm_cfg=dict(norm_cfg),
            dropout_ratio=dropout_ratio,
            **mmseg,
        )
        self.norm = build_norm_layer(self.norm_cfg, self.channels)[1]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Takes the maps of the backbone, each [B, C, H, W]; returns logits [B, num_classes, H, W]."""
        return self.cls_seg(self.norm(self._transform_inputs(maps)))


@MODELS.register_module()
class DPTHead(MMSegDPTHead):
    """Is mmseg's head of DPT (arXiv 2103.13413) for maps without a class token, as `rmoe.TimmPyramid` gives them.

    It brings four maps of one stride, that of the patches, to a pyramid of its own: so the backbone has to leave them
    as they are, by `strides=(16, 16, 16, 16)`.

    Args:
        in_channels: of each of the four maps that are read, all the same.
        in_index: their numbers among the backbone's maps; the first four by default.
        **mmseg: further arguments of mmseg's `DPTHead`, such as channels and post_process_channels; embed_dims and
            readout_type follow from the maps.

    Raises:
        UserError: in_channels or in_index is no list of four numbers, or channels differ.
    """

    def __init__(self, in_channels: Sequence[int], in_index: Sequence[int] | None = None, **mmseg: Any) -> None:
        channels, index = _checked("rmoe.DPTHead", in_channels, in_index)
        if len(channels) != _LEVELS or len({*channels}) != 1:
            raise UserError(
                f"in_channels of rmoe.DPTHead are {channels}; it reads four maps of as many channels each: name four "
                "blocks of a backbone without stages in out_indices"
            )
        super().__init__(
            embed_dims=channels[0],
            in_channels=channels,
            in_index=index,
            input_transform="multiple_select",
            readout_type="ignore",
            **mmseg,
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Takes the maps of the backbone, each [B, C, H, W]; returns logits [B, num_classes, 16⌈H/2⌉, 16⌈W/2⌉]."""
        return super().forward([maps[number] for number in self.in_index])

    def _transform_inputs(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, None]]:
        """Returns pairs of a map and the class token that there is not, which mmseg's head expects."""
        return [(level, None) for level in maps]


def _checked(head: str, in_channels: Any, in_index: Any) -> tuple[list[int], list[int]]:
    """Returns the two lists, which are as long as one another."""
    if in_index is None and isinstance(in_channels, Sequence):
        in_index = range(len(in_channels))
    lists = all(
        isinstance(values, Sequence) and values and all(type(x) is int for x in values)
        for values in (in_channels, in_index)
    )
    if not lists or len(in_channels) != len(in_index):
        raise UserError(
            f"{head} has in_channels={in_channels!r} and in_index={in_index!r}; they are lists of as many numbers: the "
            "channels of each map that it reads, and which map that is, the first one being 0"
        )
    return [*in_channels], [*in_index]
