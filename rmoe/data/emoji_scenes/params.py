"""Defines the parameters of the embedded data set; it imports fast, for the command line."""

from __future__ import annotations

import dataclasses

from rmoe.data.emoji_scenes.glyphs import THINGS, UPSTREAM
from rmoe.errors import UserError, nearest

STYLES = ("plain", "tinted", "night", "outline")
_MOST = 99_999  # images of one kind


@dataclasses.dataclass(frozen=True)
class SceneParams:
    """Says what the embedded data set looks like and how large it is; equal parameters give equal bytes.

    Attributes:
        seed: seed of all random choices.
        upstream_size, scene_size: height and width of the square images in pixels.
        upstream_classes: number of upstream classes, the first of `rmoe.data.emoji_scenes.glyphs.UPSTREAM`.
        upstream_train, upstream_val: images of each upstream class.
        scenes_train, scenes_val: numbers of scenes.
        categories: number of kinds of things in the scenes, the first of `rmoe.data.emoji_scenes.glyphs.THINGS`.
        styles: the styles of drawing; each image has one of them by chance. `plain` changes nothing, `tinted` has a
            strong colour cast, `night` is dark, bluish and grainy, `outline` is grey with objects as strokes on white.
        long_tail: an exponent a ≥ 0. The r-th category of the scenes is drawn in proportion to r^-a, and the r-th
            upstream class has r^-a times as many training images (at least 1). Upstream validation stays balanced.
    """

    seed: int = 0
    upstream_size: int = 64
    scene_size: int = 128
    upstream_classes: int = len(UPSTREAM)
    upstream_train: int = 60
    upstream_val: int = 10
    scenes_train: int = 1200
    scenes_val: int = 200
    categories: int = 24
    styles: tuple[str, ...] = ("plain",)
    long_tail: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "seed": (0, 2**32 - 1),
            "upstream_size": (16, 1024),
            "scene_size": (32, 1024),
            "upstream_classes": (2, len(UPSTREAM)),
            "upstream_train": (1, 10_000),
            "upstream_val": (1, 10_000),
            "scenes_train": (1, _MOST),
            "scenes_val": (1, _MOST),
            "categories": (2, len(THINGS)),
            "long_tail": (0, 4),
        }
        for name, (low, high) in limits.items():
            value, real = getattr(self, name), name == "long_tail"
            if type(value) not in ((int, float) if real else (int,)) or not low <= value <= high:
                kind = "a number" if real else "a whole number"
                raise UserError(f"{name} is {value!r:.80}; it is {kind} from {low} to {high}")
        if not isinstance(self.styles, (tuple, list)):
            raise UserError(f"styles are {self.styles!r:.80}; name one or more of {', '.join(STYLES)}, in a tuple")
        for style in self.styles:
            if not isinstance(style, str):
                raise UserError(f"style {style!r:.80} is no text; known: {', '.join(STYLES)}")
            if style not in STYLES:
                raise UserError(f"style '{style}' is unknown{nearest(style, STYLES)}")
        if not self.styles or len(set(self.styles)) < len(self.styles):
            raise UserError(f"styles are {list(self.styles)}; name one or more of {', '.join(STYLES)}, each once")

    def upstream_count(self, split: str, rank: int) -> int:
        """Returns the number of images of the upstream class of `rank` (from 0) in `split`."""
        if split == "val":
            return self.upstream_val
        return max(1, self.upstream_train * tail(rank, self.long_tail) + 2**15 >> 16)


def tail(rank: int, exponent: float) -> int:
    """Returns (rank + 1) to the power of -exponent, in units of 2^-16."""
    return max(1, round(65536 * (rank + 1) ** -exponent))
