"""Makes a timm backbone a feature pyramid for the heads of mmseg and mmdet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.models import model_entrypoint
from torch import Tensor, nn

from rmoe.backbones.build import add_weights, brings_weights, checked_kwargs, timm_model
from rmoe.backbones.windows import pad_before_shift
from rmoe.errors import UserError
from rmoe.registry import MODELS

# Arguments that let a model take images of any size, by the name of timm's module that it is in. A model of another
# module takes one size alone if timm marks it with a fixed input size.
_SWIN = {"strict_img_size": False, "always_partition": True}
_VIT = {"dynamic_img_size": True}
_ANY_SIZE: dict[str, dict[str, Any]] = {
    "swin_transformer": _SWIN,
    "swin_transformer_v2": _SWIN,
    "swin_transformer_v2_cr": _SWIN,
    "vision_transformer": _VIT,
    "vision_transformer_hybrid": _VIT,
    "deit": _VIT,
    "eva": _VIT,
    "vision_transformer_sam": {},
    "xcit": {},
    "twins": {},
}
_POWERS = (2, 4, 8, 16, 32, 64)  # what a map of a plain backbone may be brought to
# Models of these modules round up when they halve an odd map; for others images are padded to the last map's cells.
_ROUNDS_UP = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "cvt")


@MODELS.register_module()
class TimmPyramid(nn.Module):
    """Computes the feature maps of a timm backbone for images of any size, and gives each map a LayerNorm.

    A Swin's maps have the strides 4, 8, 16, 32 and equal those of the published Swin for dense tasks. A CvT's three
    maps have the strides 4, 8, 16, without the class token. The maps of a plain ViT all have one stride, that of its
    patches, and are brought to those of `strides` by deconvolutions or max pooling; maps of stride 14 are first
    interpolated to stride 16, unless 14 is asked for. Some other models take images of one size only, and an error says
    so.

    One block and several strides make the simple feature pyramid of ViTDet (arXiv 2203.16527, section 3): each map is
    made of that block's map alone, and each deconvolution halves its channels, as in the code published with it.
    `rmoe.LevelConvs` is what follows there.

    It is no mmengine `BaseModule`, because mmengine's weight initialisation would overwrite the loaded core.

    Args:
        model: a timm model with `forward_intermediates`, such as "swin_tiny_patch4_window7_224".
        kwargs: further arguments of `timm.create_model`: drop_path_rate, embed_dim, depths, pretrained, …
        out_indices: stages (Swin, CvT) or blocks (ViT) whose maps are returned.
        core: checkpoint of the dense core, or of a mixture that `moe` describes; see `rmoe.backbones.build`.
        moe: keys of `rmoe.config.ResidualMoEConfig`; None leaves the backbone dense. Blocks are chosen from the whole
            backbone, before `out_indices` cut it, so that upstream and downstream models have the same experts.
        with_cp: recompute activations in the backward pass, to save memory.
        allow_random_core: accept residuals around random weights: in trials, where weights are loaded later, and to
            train from scratch.
        strides: those of the maps of a backbone without stages, one for each of `out_indices`, or several for a single
            one; 4, 8, 16, … by default. Each is the stride of the patches, which leaves a map as it is, or a power of
            two.

    Attributes:
        channels: of each map.
        strides: of each map, in pixels.
        spread: whether these follow from how many maps there are.

    Raises:
        UserError: the model or an argument is unknown, or the model has no such index or stride; also what `load_core`
            and `upcycle` raise. The forward pass raises it for images of a size that the model does not take.
    """

    def __init__(
        self,
        model: str,
        kwargs: Mapping[str, Any] | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        core: str | None = None,
        moe: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        allow_random_core: bool = False,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        kwargs, family = checked_kwargs(kwargs), _family(model)
        net: Any = timm_model(model, {**_ANY_SIZE.get(family, {}), **kwargs, "num_classes": 0})
        levels = _levels(model, net, out_indices)
        reductions = [info["reduction"] for info in net.feature_info]
        plain = len({*reductions}) == 1  # a backbone without stages
        self.strides = _strides(model, [stride for _, stride in levels], strides, plain)
        self.spread = plain and strides is None
        simple = len(levels) < len(self.strides)
        levels = levels * len(self.strides) if simple else levels
        self.given = [stride for _, stride in levels]
        self.regular = [
            _power_of_two(given) if plain and given != wanted else given
            for given, wanted in zip(self.given, self.strides, strict=True)
        ]
        made = [
            _rescale(channels, stride, wanted, halve=simple)
            for (channels, _), stride, wanted in zip(levels, self.regular, self.strides, strict=True)
        ]
        self.channels = [channels for _, channels in made]
        norms = [timm.layers.LayerNorm2d(channels, eps=1e-5) for channels in self.channels]
        allow_random_core = allow_random_core or brings_weights(kwargs)
        weights = {} if simple else dict(zip(out_indices, norms, strict=True))
        add_weights(net, core, moe, weights, allow_random_core=allow_random_core)
        self.name, self.size = model, _only_size(family, net, kwargs)
        self.patch = 1 if self.size else reductions[0] if family in _ROUNDS_UP else max(reductions)
        self.out_indices = net.prune_intermediate_layers(list(out_indices), prune_norm=True)
        pad_before_shift(net)
        if with_cp:
            timm.layers.set_reentrant_ckpt(False)  # the reentrant kind loses the gate's losses
            try:
                net.set_grad_checkpointing(True)
            except AssertionError as error:  # so timm refuses it
                raise UserError(
                    f"with_cp is True, but timm's {model} cannot recompute activations; leave it out"
                ) from error
        self.model, self.with_cp = net, with_cp
        self.rescale = nn.ModuleList(module for module, _ in made)
        self.norms = nn.ModuleList(norms)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Takes images [B, 3, H, W]; returns for each level of stride s a map [B, C, ⌈H/s⌉, ⌈W/s⌉]."""
        height, width = images.shape[-2:]
        if self.size is not None and (height, width) != self.size:
            raise UserError(
                f"{self.name} got images of {height} x {width} pixels but takes only {self.size[0]} x {self.size[1]}; "
                "resize or crop them, build it for their size where timm can, by kwargs=dict(img_size=…), or use a "
                "Swin, a CvT or a ViT"
            )
        images = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        maps = self.model.forward_intermediates(images, indices=self.out_indices, intermediates_only=True)
        maps = maps * len(self.strides) if len(maps) < len(self.strides) else maps
        levels = zip(maps, self.given, self.regular, self.rescale, self.norms, self.strides, strict=True)
        # mmcv's RoIAlign ignores strides: its input must be contiguous.
        return tuple(
            norm(rescale(self._brought(level, given, regular, images, height, width)))[
                ..., : math.ceil(height / stride), : math.ceil(width / stride)
            ].contiguous()
            for level, given, regular, rescale, norm, stride in levels
        )

    def _brought(self, level: Tensor, given: int, stride: int, images: Tensor, height: int, width: int) -> Tensor:
        """Returns a map of the images, not padded, with `stride`, from a map of the padded images with `given`."""
        cells = tuple(math.ceil(side / given) for side in images.shape[-2:])
        if level.shape[-2:] != cells:
            raise UserError(
                f"{self.name} gives a map of {level.shape[-2]} x {level.shape[-1]} cells for a padded image of "
                f"{images.shape[-2]} x {images.shape[-1]} pixels, where stride {given} makes {cells[0]} x {cells[1]}; "
                "leave this level out of out_indices, or use a Swin, a CvT or a ViT"
            )
        if stride == given:
            return level
        rows, columns = (
            _interpolation(math.ceil(side / stride), stride / given, cell, level)
            for side, cell in zip((height, width), cells, strict=True)
        )
        return rows @ level @ columns.T


def _family(name: Any) -> str:
    """Returns the name of the module of timm that defines a model, or "" for an unknown model."""
    known = isinstance(name, str) and timm.is_model(name)
    return model_entrypoint(name).__module__.rpartition(".")[2] if known else ""


def _only_size(family: str, net: Any, kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the one size (rows, columns) of images that a model takes, or None if it takes any."""
    strict = any(kwargs.get(key, value) != value for key, value in _ANY_SIZE.get(family, {}).items())
    marks = getattr(net, "pretrained_cfg", None) or {}
    if not strict and (family in _ANY_SIZE or not marks.get("fixed_input_size")):
        return None
    return timm.layers.to_2tuple(kwargs.get("img_size") or marks["input_size"][1:])


def _levels(name: str, net: Any, out_indices: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (channels, stride) of each map in `out_indices`."""
    if not hasattr(net, "forward_intermediates"):
        raise UserError(f"timm's {name} has no forward_intermediates; use a Swin, a CvT or a ViT")
    known = net.feature_info
    numbers = isinstance(out_indices, Sequence) and all(type(index) is int for index in out_indices)
    if not numbers or not out_indices or sorted({*out_indices}) != [*out_indices]:
        raise UserError(f"out_indices are {out_indices!r}; they are whole numbers, each larger than the one before")
    if not all(0 <= index < len(known) for index in out_indices):
        raise UserError(f"out_indices are {tuple(out_indices)}; {name} has the levels 0 to {len(known) - 1}")
    return [(known[index]["num_chs"], known[index]["reduction"]) for index in out_indices]


def _strides(name: str, given: list[int], strides: Any, plain: bool) -> list[int]:
    """Returns the stride of each map, `given` being those of the backbone's own."""
    if strides is None:
        return [4 * 2**level for level in range(len(given))] if plain else given
    if not plain:
        raise UserError(f"strides are {strides!r}, but {name} has stages, whose strides are theirs: leave strides out")
    allowed = {given[0], *_POWERS}
    if not isinstance(strides, Sequence) or not strides or not all(type(x) is int and x in allowed for x in strides):
        raise UserError(
            f"strides are {strides!r}; they are a list of numbers, each {given[0]}, the side of the patches of {name}, "
            f"or a power of two from {_POWERS[0]} to {_POWERS[-1]}"
        )
    if len(given) not in (1, len(strides)):
        raise UserError(
            f"there are {len(strides)} strides and {len(given)} out_indices; give one stride for each, or one index, "
            "of whose map all are made"
        )
    return [*strides]


def _power_of_two(stride: int) -> int:
    """Returns the power of two nearest to `stride`."""
    return 2 ** round(math.log2(stride))


def _interpolation(cells: int, ratio: float, given: int, like: Tensor) -> Tensor:
    """Returns the weights [cells, given] of linear interpolation to cells that are `ratio` times as long."""
    centre = (torch.arange(cells, device=like.device) + 0.5) * ratio - 0.5
    distance = centre.clamp(0, given - 1)[:, None] - torch.arange(given, device=like.device)
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)


def _rescale(channels: int, given: int, wanted: int, *, halve: bool = False) -> tuple[nn.Module, int]:
    """Returns the module that turns a map of stride `given` into one of stride `wanted`, and that map's channels.

    Args:
        channels: of the map that is given.
        given: its stride.
        wanted: the stride to bring it to.
        halve: each deconvolution halves the channels.

    Raises:
        UserError: the channels cannot be halved as often.
    """
    if given <= wanted:
        pool = nn.MaxPool2d(wanted // given, ceil_mode=True) if given < wanted else nn.Identity()
        return pool, channels
    doublings = int(math.log2(given // wanted))
    if halve and channels % 2**doublings:
        raise UserError(f"the {channels} channels of the map cannot be halved {doublings} times for stride {wanted}")
    steps: list[nn.Module] = []
    for _ in range(doublings):
        steps += [timm.layers.LayerNorm2d(channels), nn.GELU()] if steps else []
        width = channels // 2 if halve else channels
        steps.append(nn.ConvTranspose2d(channels, width, 2, stride=2))
        channels = width
    return nn.Sequential(*steps), channels
