"""Translates the checkpoints of other code bases to timm's names and layouts.

The rules are data, one `Format` for each code base. A file is recognised by its keys. A key that no rule covers is
passed on as it is, and `rmoe.backbones.load_core` then refuses it by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rmoe.backbones import swin_moe
from rmoe.errors import UserError

Names = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

NOT_BACKBONE = "not part of the backbone"
SWIN_MOE = "Microsoft Swin-MoE"


@dataclass(frozen=True)
class Format:
    """Tells how a code base names and stores the weights of a backbone.

    Attributes:
        source: name of the code base.
        sign: pattern of a key that every such file has, and no file of a format further down the list. What stands
            before the match is the name of the backbone within a larger model.
        names: pairs (pattern, replacement), applied in turn to a key without the backbone's own name. Parts of one
            weight get numbers at the end, as in "attn.qkv.weight.0", and are then joined.
        left_out: pairs (pattern, reason) for keys that timm's model does not have.
        reordered: triples (pattern of timm's key, what is done, function of the value).
        whole: what is done last, with all values under timm's names; returns them, and the keys of those that it made,
            by what was done.
        note: what a user must know besides.
    """

    source: str
    sign: str
    names: Names
    left_out: tuple[tuple[str, str], ...] = ()
    reordered: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = ()
    whole: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], dict[str, list[str]]]] | None = None
    note: str = ""


@dataclass
class Translation:
    """Holds a checkpoint under timm's names.

    Attributes:
        state: the values by timm's key; norms of output levels are called "norm0.weight" etc.
        source: the format that was recognised, or "timm" if there was none.
        converted: keys whose values changed, by what was done.
        left_out: keys of the file that are not in `state`, by reason.
        note: what a user must know besides.
    """

    state: dict[str, Tensor]
    source: str = "timm"
    converted: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""


def translate(state: Mapping[str, Tensor]) -> Translation:
    """Recognises the format of a checkpoint and translates the keys and values of its backbone to timm's.

    A checkpoint with timm's own names, or with names of no known format, is returned as it is.

    Raises:
        UserError: two keys become the same, or the backbone is there twice, as a student and a teacher are.
    """
    for form in FORMATS:
        signs = (re.match(rf"(|.*?\.){form.sign}", key) for key in state)
        if prefixes := list(dict.fromkeys(sign[1] for sign in signs if sign)):
            check_one(prefixes)
            return _translated(form, prefixes[0], state)
    return Translation(dict(state))


def check_one(prefixes: Sequence[str]) -> None:
    """Refuses a checkpoint that holds the backbone under several prefixes, which nobody can choose between."""
    if len(prefixes) > 1:
        raise UserError(
            f"the checkpoint holds the backbone {len(prefixes)} times, under {' and '.join(map(repr, prefixes))}; save "
            "the weights of the one that you mean alone"
        )


def _translated(form: Format, prefix: str, state: Mapping[str, Tensor]) -> Translation:
    left_out: dict[str, list[str]] = defaultdict(list)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        bare = key.removeprefix(prefix)
        name = _renamed(form.names, bare)
        if reason := next((reason for pattern, reason in form.left_out if re.search(pattern, bare)), None):
            left_out[reason].append(key)
        elif name == key and prefix:  # no rule knows it: it belongs to a head
            left_out[NOT_BACKBONE].append(key)
        elif name in renamed:
            raise UserError(
                f"two keys of the checkpoint, '{key}' and another one, become timm's '{name}'; remove either"
            )
        else:
            renamed[name] = value
    joined, converted = _joined(renamed)
    for pattern, done, function in form.reordered:
        for name in (name for name in joined if re.search(pattern, name)):
            joined[name] = function(joined[name])
            converted[done].append(name)
    if form.whole:
        joined, done_besides = form.whole(joined)
        converted |= done_besides
    return Translation(joined, form.source, dict(converted), dict(left_out), form.note)


def _renamed(names: Names, key: str) -> str:
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def _joined(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Joins query, key and value, the parts 0, 1, 2 of one weight. Parts that do not fit keep their names, and the
    model will refuse them.
    """
    joined = dict(state)
    converted: dict[str, list[str]] = defaultdict(list)
    for first in (name for name in state if name.endswith(".0")):
        whole = first.removesuffix(".0")
        parts = [f"{whole}.{number}" for number in range(3)]
        shapes = {joined[part].shape if part in joined else None for part in parts}
        if len(shapes) == 1 and not shapes & {None, torch.Size()}:
            joined[whole] = torch.cat([joined.pop(part) for part in parts])
            converted["query, key and value joined"].append(whole)
    return joined, converted


def _numbered(before: str, shift: int, after: str = "") -> Callable[[re.Match[str]], str]:
    """Returns a replacement that adds `shift` to the number in the first group and sets it between two texts."""
    return lambda match: f"{before}{int(match[1]) + shift}{after}"


def _neighbours_outside(x: Tensor) -> Tensor:
    """Turns [..., C·4], four neighbours innermost and row by row, into [..., 4·C], outermost and column by column.

    A value of another shape is returned as it is, and is refused later for its shape.
    """
    if not x.ndim or not x.numel() or x.shape[-1] % 4:
        return x
    return x.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


# timm merges patches at the start of a stage, all others merge them at the end of the stage before.
_MERGING = (r"^layers\.(\d+)\.downsample\.", _numbered("layers.", 1, ".downsample."))

_HF_BLOCK: Names = (
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    # First the names in files, then the names that transformers 5 has in memory.
    (r"\.attention\.(?:self|attention)\.query\.(\w+)$", r".attn.qkv.\1.0"),
    (r"\.attention\.(?:self|attention)\.key\.(\w+)$", r".attn.qkv.\1.1"),
    (r"\.attention\.(?:self|attention)\.value\.(\w+)$", r".attn.qkv.\1.2"),
    (r"\.attention\.q_proj\.(\w+)$", r".attn.qkv.\1.0"),
    (r"\.attention\.k_proj\.(\w+)$", r".attn.qkv.\1.1"),
    (r"\.attention\.v_proj\.(\w+)$", r".attn.qkv.\1.2"),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self|relative_position_bias)\.(relative_position_\w+)$", r".attn.\1"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)

FORMATS = (
    Format(
        source="Hugging Face Swin",
        sign=r"encoder\.layers\.0\.blocks\.0\.layernorm_before\.",
        names=(
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^embeddings\.norm\.", "patch_embed.norm."),
            (r"^encoder\.layers\.", "layers."),
            _MERGING,
            *_HF_BLOCK,
            (r"^hidden_states_norms\.stage(\d+)\.", _numbered("norm", -1, ".")),
            (r"^classifier\.", "head.fc."),
        ),
        left_out=((r"^embeddings\.mask_token$", "for masked pretraining only"),),
    ),
    Format(
        source="Hugging Face CvT",
        sign=r"encoder\.stages\.0\.embedding\.convolution_embeddings\.",
        names=(
            (r"^encoder\.stages\.", "stages."),
            (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
            (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
            (r"\.layers\.", ".blocks."),
            (r"\.convolution_projection_([qkv])\w+\.convolution_projection\.", r".conv_proj_\1."),
            (r"\.attention\.attention\.(conv_proj_[qkv])\.convolution\.", r".attn.\1.conv."),
            (r"\.attention\.attention\.(conv_proj_[qkv])\.normalization\.", r".attn.\1.bn."),
            (r"\.attention\.attention\.projection_([qkv])\w+\.", r".attn.proj_\1."),
            *_HF_BLOCK,
            (r"^classifier\.", "head."),
        ),
    ),
    Format(
        source="Hugging Face ViT",
        sign=r"(?:encoder\.layer|layers)\.0\.layernorm_before\.",
        names=(
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^embeddings\.cls_token$", "cls_token"),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^(?:encoder\.layer|layers)\.", "blocks."),
            *_HF_BLOCK,
            (r"^classifier\.", "head."),
        ),
        left_out=(
            (r"^embeddings\.mask_token$", "for masked pretraining only"),
            (r"^pooler\.", "pooler of the last layer"),
        ),
    ),
    Format(
        source="mmseg or mmdet Swin",
        sign=r"stages\.0\.blocks\.0\.attn\.w_msa\.",
        names=(
            (r"^stages\.", "layers."),
            _MERGING,
            (r"^patch_embed\.projection\.", "patch_embed.proj."),
            (r"\.attn\.w_msa\.", ".attn."),
            (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
            (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        ),
        reordered=((r"\.downsample\.(?:norm|reduction)\.", "patch merging reordered", _neighbours_outside),),
    ),
    Format(
        source="Microsoft CvT",
        sign=r"stage0\.patch_embed\.proj\.",
        names=((r"^stage(\d)\.", r"stages.\1."),),
        note="trained with another activation: build the model with act_layer='quick_gelu'",
    ),
    Format(
        source=SWIN_MOE,
        sign=r"layers\.\d+\.blocks\.\d+\.mlp\._moe_layer\.",
        names=(_MERGING, (r"^head\.", "head.fc.")),
        whole=swin_moe.to_ours,
        note="its gates weigh experts by their probability: use residual='experts', combine='softmax', top_k=1",
    ),
    Format(
        source="Microsoft Swin",
        sign=r"layers\.0\.downsample\.",
        names=(_MERGING, (r"^head\.", "head.fc.")),
        left_out=((r"^mask_token$", "for masked pretraining only"),),
    ),
)
