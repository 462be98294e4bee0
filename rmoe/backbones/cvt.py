"""Registers CvT, the convolutional vision transformer (arXiv 2103.15808), with timm: `timm.create_model("cvt_13")`.

It has three stages at the strides 4, 8, 16. Each stage embeds the map before it by a convolution and then runs blocks
whose queries, keys and values pass through depthwise convolutions first. So it needs no position table and takes images
of any size. Only the last stage has a class token. Weights have the published names, with `stages.0` for `stage0`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, get_act_layer, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["CvT"]  # register_model appends the names below

_STRIDES = (4, 2, 2)  # of the stages' embeddings


class CvT(nn.Module):
    """Is a CvT with the interface of timm's models.

    Args:
        in_chans: channels of the images.
        num_classes: 0 for no classifier.
        embed_dims: width of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; each divides the stage's width.
        mlp_ratio: hidden width of the feed-forward networks as a multiple of the stage's.
        drop_path_rate: share of dropped residual branches in the last block; it grows linearly from 0 over the last
            stage's blocks, as in the published configurations.
        act_layer: timm's name of the activation; the published weights were trained with "quick_gelu".
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 192, 384),
        depths: Sequence[int] = (1, 2, 10),
        num_heads: Sequence[int] = (1, 3, 6),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        act_layer: str = "gelu",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dims[-1]
        last, stages, stride = len(_STRIDES) - 1, [], 1
        self.feature_info = []
        for i, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            stages.append(
                Stage(
                    in_chans=embed_dims[i - 1] if i else in_chans,
                    dim=dim,
                    stride=_STRIDES[i],
                    num_heads=heads,
                    mlp_ratio=mlp_ratio,
                    drop_paths=torch.linspace(0, drop_path_rate if i == last else 0, depth, device="cpu").tolist(),
                    class_token=i == last,
                    act_layer=act_layer,
                )
            )
            stride *= _STRIDES[i]
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"stages.{i}"})
        self.stages = nn.ModuleList(stages)
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = _classifier(self.num_features, num_classes)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that get no weight decay; optimisers exempt norms and biases themselves."""
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns timm's patterns of the layers: a layer is a block, the first of a stage with the stage's embedding.

        With `coarse` it is a stage.
        """
        if coarse:
            return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)"}
        entry, block = r"^stages\.(\d+)\.(?:patch_embed|cls_token)", r"^stages\.(\d+)\.blocks\.(\d+)"
        blocks = [(entry, (0,)), (block, None), (r"^norm", (99999,))]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks' activations in the backward pass, to save memory, if `enable` is true."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """Returns the classifier, an identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Makes a new classifier, which reads the class token; `global_pool` offers no choice here and is ignored."""
        self.num_classes = num_classes
        self.head = _classifier(self.num_features, num_classes)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the maps of stages, without the class token.

        Args:
            x: images [B, in_chans, H, W].
            indices: the stages whose maps are returned: a list of them, a number of last ones, or None for all.
            norm: apply the final norm to the last stage's map.
            output_fmt: "NCHW", the only format.
            intermediates_only: return the maps alone, and do not run what they do not need.

        Returns:
            Maps [B, C, ⌈H/s⌉, ⌈W/s⌉], s = 4, 8, 16, for sides that are multiples of 4. Without `intermediates_only` a
            tuple of what `forward_features` returns and the maps.
        """
        assert output_fmt == "NCHW", output_fmt
        taken, last = feature_take_indices(len(self.stages), indices)
        token, maps = x[:, :0], []
        for i, stage in enumerate(self.stages[: last + 1] if intermediates_only else self.stages):
            token, x = stage(x)
            if i in taken:
                normed = norm and i == len(self.stages) - 1
                maps.append(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if normed else x)
        return maps if intermediates_only else (self._normed(token, x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the maps of the stages `indices` do not need; returns the stages' indices from the front."""
        taken, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:
            self.norm = nn.Identity()  # it has the last stage's width
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Takes images [B, in_chans, H, W]; returns the last tokens, normed [B, 1 + H·W/256, C], class token first."""
        token = x[:, :0]
        for stage in self.stages:
            token, x = stage(x)
        return self._normed(token, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Turns what `forward_features` returns into logits [B, classes], or class tokens [B, C] if `pre_logits`."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Turns images [B, in_chans, H, W] into logits [B, classes], or class tokens [B, C] without a classifier."""
        return self.forward_head(self.forward_features(x))

    def _normed(self, token: Tensor, x: Tensor) -> Tensor:
        return self.norm(torch.cat([token, _tokens(x)], dim=1))


class Stage(nn.Module):
    """Embeds the map before it and runs the blocks of one stage.

    Args:
        in_chans: channels of the map before.
        dim: width of this stage.
        stride: stride of the embedding.
        num_heads: attention heads of each block.
        mlp_ratio: hidden width of the feed-forward networks as a multiple of `dim`.
        drop_paths: for each block the share of dropped residual branches.
        class_token: whether the stage has a class token.
        act_layer: timm's name of the activation.
    """

    def __init__(
        self,
        *,
        in_chans: int,
        dim: int,
        stride: int,
        num_heads: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        class_token: bool,
        act_layer: str,
    ) -> None:
        super().__init__()
        self.patch_embed = ConvEmbed(in_chans, dim, stride)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02)) if class_token else None
        self.num_prefix_tokens = int(class_token)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, rate, act_layer) for rate in drop_paths)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a map [B, in_chans, H, W]; returns class token [B, 1 or 0, C] and map [B, C, H', W']."""
        x = self.patch_embed(x)
        size = x.shape[2:]
        tokens = _tokens(x)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], dim=1)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = _recomputed(block, tokens, size)
            else:
                tokens = block(tokens, size)
        return _split(tokens, size)


class ConvEmbed(nn.Module):
    """Embeds overlapping patches by a strided convolution and norms the channels."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        super().__init__()
        # Neighbouring patches overlap by stride - 1 pixels, and a side of n·stride pixels gives n patches.
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=2 * stride - 1, stride=stride, padding=stride // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Turns a map [B, in_chans, H, W] into [B, C, H/stride, W/stride]; with stride 2, odd sides are rounded up."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Adds attention and then a feed-forward network to the tokens, each applied to normed tokens."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, act_layer: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ConvAttention(dim, num_heads)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=get_act_layer(act_layer))

    def forward(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """Maps tokens [B, (1 +) H·W, C] of a map of `size` (H, W), class token first if any, to the same shape."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class ConvAttention(nn.Module):
    """Computes self-attention whose queries, keys and values are convolved before their linear maps.

    Keys and values stand on every second row and column only. The class token takes part but is not convolved.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = dim**-0.5  # by the whole width and not by a head's, as published
        self.conv_proj_q, self.conv_proj_k, self.conv_proj_v = (_depthwise(dim, stride) for stride in (1, 2, 2))
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """Maps tokens [B, (1 +) H·W, C] of a map of `size` (H, W) to the same shape."""
        token, x = _split(tokens, size)
        query, key, value = (
            linear(torch.cat([token, _tokens(convolve(x))], dim=1)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for convolve, linear in (
                (self.conv_proj_q, self.proj_q),
                (self.conv_proj_k, self.proj_k),
                (self.conv_proj_v, self.proj_v),
            )
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def _depthwise(dim: int, stride: int) -> nn.Sequential:
    projection = nn.Sequential()
    projection.add_module("conv", nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False))
    projection.add_module("bn", nn.BatchNorm2d(dim))
    return projection


def _classifier(width: int, num_classes: int) -> nn.Module:
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _split(tokens: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Splits tokens [B, (1 +) H·W, C] into class token [B, 1 or 0, C] and map [B, C, H, W]."""
    area = size[0] * size[1]
    token, x = tokens.split([tokens.shape[1] - area, area], dim=1)
    return token, x.transpose(1, 2).unflatten(2, (size[0], size[1]))


def _recomputed(block: nn.Module, tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Returns `block(tokens, size)`; only the inputs are kept, and the backward pass runs the block again."""

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _statistics_untouched(block)

    return checkpoint(block, tokens, size, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_untouched(block: nn.Module) -> Iterator[None]:
    """Lets batch norms update copies of their running statistics, so that a recomputed batch does not count twice."""
    kept: list[tuple[nn.Module, dict[str, Any]]] = [
        (module, dict(module.named_buffers(recurse=False)))
        for module in block.modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                setattr(module, name, buffer.clone())
        yield
    finally:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


def _cfg(size: int = 224) -> dict[str, Any]:
    return {
        "url": "",  # load the published weights from a file, as a core
        "num_classes": 1000,
        "input_size": (3, size, size),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({"cvt_13": _cfg(), "cvt_21": _cfg(), "cvt_w24": _cfg(384)})


def _build(variant: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    features = {"out_indices": (0, 1, 2), "feature_cls": "getter"}
    return build_model_with_cfg(CvT, variant, pretrained, feature_cfg=features, **arguments)


@register_model
def cvt_13(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Returns CvT-13, 20 million parameters; `kwargs` are arguments of `CvT`."""
    return _build("cvt_13", pretrained, kwargs)


@register_model
def cvt_21(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Returns CvT-21, 32 million parameters; `kwargs` are arguments of `CvT`."""
    return _build("cvt_21", pretrained, {"depths": (1, 4, 16), **kwargs})


@register_model
def cvt_w24(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Returns CvT-W24, 277 million parameters; `kwargs` are arguments of `CvT`."""
    size = {"embed_dims": (192, 768, 1024), "depths": (2, 2, 20), "num_heads": (3, 12, 16)}
    return _build("cvt_w24", pretrained, {**size, **kwargs})
