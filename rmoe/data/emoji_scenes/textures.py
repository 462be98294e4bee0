"""Draws procedural "stuff" (sky, grass, water …) and changes colours, in integer arithmetic.

Every kind comes in several colours, and the colours of kinds overlap (grey sky, road and brick; dry grass and sand), so
that only texture tells them apart. Letters in array names: H height, W width in pixels; 3 is red, green, blue.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from rmoe.data.emoji_scenes.dice import Dice

Colour = tuple[int, int, int]


def texture(kind: str, dice: Dice, size: int) -> np.ndarray:
    """Returns a picture filled with one kind of `STUFF`, uint8 [size, size, 3]."""
    draw, ramps = STUFF[kind]
    dark, light = dice.pick(ramps)
    colours = (np.array(colour, dtype=np.int32) for colour in (dark, light))
    return draw(dice, size, *colours).clip(0, 255).astype(np.uint8)


def noise(dice: Dice, size: int, across: int, down: int, octaves: int = 1) -> np.ndarray:
    """Returns smooth random values of about 0 … 255, int32 [size, size]; each octave halves their grain and weight.

    Args:
        across, down: width and height of the largest grains, in pixels of a picture of 128 pixels.
    """
    total, weights = np.zeros((size, size), dtype=np.int32), 0
    for octave in range(octaves):
        columns, rows = (-(-size * 128 // max(128, size * grain)) + 1 for grain in (across >> octave, down >> octave))
        grid = Image.fromarray(dice.bytes(min(rows, size), min(columns, size)))
        weight = 1 << (octaves - 1 - octave)
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) * np.int32(weight)
        weights += weight
    return total // weights


def recolour(rgb: np.ndarray, matrix: np.ndarray, offset: int | np.ndarray = 0) -> np.ndarray:
    """Returns every colour times `matrix` / 256 (int32 [3, 3]) plus `offset`, clipped, uint8 [..., 3]."""
    channels = [rgb[..., channel].astype(np.int32) for channel in range(3)]
    mixed = [sum(int(row[i]) * channels[i] for i in range(3)) + 128 >> 8 for row in matrix]
    return (np.stack(mixed, axis=-1) + offset).clip(0, 255).astype(np.uint8)


def colour_matrix(hue: int = 0, saturation: int = 256, contrast: int = 256) -> np.ndarray:
    """Returns a matrix that turns the hue by degrees and scales saturation and contrast, int32 [3, 3] in 1/256."""
    cos, sin = math.cos(math.radians(hue)) * saturation, math.sin(math.radians(hue)) * saturation / math.sqrt(3)
    grey = (256 - cos) / 3
    first = (grey + cos, grey - sin, grey + sin)
    return np.array([[round(first[(i - j) % 3] * contrast / 256) for i in range(3)] for j in range(3)], dtype=np.int32)


def _ramp(value: np.ndarray, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Returns colours from `dark` at 0 to `light` at 255, int32 [H, W, 3]."""
    return dark + ((light - dark) * value[..., None] >> 8)


def _sky(dice: Dice, size: int, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    height = np.broadcast_to(np.arange(size, dtype=np.int32)[:, None] * 255 // size, (size, size))
    clouds = ((noise(dice, size, 56, 24, 4) - dice.between(110, 170)) * 4).clip(0, 220)[..., None]
    sky = _ramp(height, dark, light)
    return sky + ((np.array([245, 245, 248]) - sky) * clouds >> 8)


def _grass(dice: Dice, size: int, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    blades = noise(dice, size, 2, 9) + noise(dice, size, 3, 14)
    return _ramp((blades + noise(dice, size, 40, 24, 2)) // 3 * 2 - 128 + 64, dark, light)


def _water(dice: Dice, size: int, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    ripples = (noise(dice, size, 26, 4, 2) * 3 + noise(dice, size, 60, 12)) // 4
    return _ramp(ripples, dark, light) + (ripples > 172)[..., None] * 38


def _sand(dice: Dice, size: int, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    period = dice.between(10, 18)
    phase = (
        np.arange(size)[:, None] * 128 // size * 8 + np.arange(size) * dice.between(-3, 3) + noise(dice, size, 36, 36)
    )
    dunes = abs(phase * 32 // period % 512 - 256)
    return _ramp((dunes + noise(dice, size, 1, 1) * 2 + noise(dice, size, 48, 48)) // 4, dark, light)


def _snow(dice: Dice, size: int, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    drifts = noise(dice, size, 50, 22, 2)
    return _ramp(drifts, dark, light) + (dice.bytes(size, size) > 250)[..., None] * 30


def _road(dice: Dice, size: int, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    asphalt = _ramp((noise(dice, size, 1, 1) + noise(dice, size, 30, 30, 3)) // 2, dark, light)
    line, width, period = dice.between(0, size), max(2, size // 40), max(8, size // dice.between(3, 6))
    rows, columns = np.arange(size)[:, None], np.arange(size)
    lean = dice.between(-60, 60)
    marked = (abs(columns - line + (rows - size // 2) * lean // 64) < width) & (rows % period * 5 < period * 3)
    return np.where(marked[..., None], np.array(dice.pick(((225, 225, 220), (225, 190, 70)))), asphalt)


def _brick(dice: Dice, size: int, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    rise = max(4, size * dice.between(7, 12) // 128)
    length = rise * dice.between(2, 3)
    rows = np.arange(size)[:, None] + dice.between(0, rise)
    course = rows // rise
    columns = np.arange(size) + course * (length // 2) + dice.between(0, length)
    shade = dice.bytes(size, 2 * size).astype(np.int32)[course, columns // length]
    bricks = _ramp((shade * 2 + noise(dice, size, 2, 2)) // 3, dark, light)
    joint = (rows % rise == 0) | (columns % length == 0)
    return np.where(joint[..., None], (dark + light) // 4 + 96, bricks)


def _wood(dice: Dice, size: int, dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    board = max(6, size * dice.between(14, 24) // 128)
    columns = np.arange(size) + dice.between(0, board)
    shade = np.broadcast_to(dice.bytes(size).astype(np.int32)[columns // board], (size, size))
    grain = noise(dice, size, 2, 40) + noise(dice, size, 4, 90)
    seam = np.broadcast_to(columns % board == 0, (size, size))
    return np.where(seam[..., None], dark // 2, _ramp((grain + shade) // 3, dark, light))


_Draw = Callable[[Dice, int, np.ndarray, np.ndarray], np.ndarray]

# kind → (how it is drawn, its (dark, light) colours); the order is the order of the label values, from 1.
STUFF: dict[str, tuple[_Draw, tuple[tuple[Colour, Colour], ...]]] = {
    "sky": (
        _sky,
        (((70, 130, 205), (185, 215, 240)), ((120, 125, 135), (190, 192, 196)), ((90, 80, 130), (245, 170, 110))),
    ),
    "grass": (_grass, (((20, 70, 20), (130, 190, 70)), ((60, 80, 20), (190, 180, 90)), ((15, 60, 45), (90, 160, 110)))),
    "water": (
        _water,
        (((15, 60, 120), (90, 160, 210)), ((20, 80, 80), (110, 180, 160)), ((50, 65, 75), (140, 155, 165))),
    ),
    "sand": (
        _sand,
        (((175, 140, 85), (240, 215, 160)), ((150, 90, 60), (220, 150, 105)), ((150, 145, 130), (215, 210, 195))),
    ),
    "snow": (
        _snow,
        (((185, 200, 225), (250, 252, 255)), ((205, 205, 210), (252, 250, 245)), ((165, 175, 205), (225, 232, 250))),
    ),
    "road": (
        _road,
        (((50, 50, 54), (115, 115, 120)), ((85, 85, 82), (165, 162, 155)), ((70, 58, 52), (140, 122, 110))),
    ),
    "brick": (
        _brick,
        (((110, 45, 35), (190, 95, 70)), ((85, 85, 88), (165, 163, 160)), ((150, 115, 65), (225, 190, 125))),
    ),
    "wood": (
        _wood,
        (((70, 42, 22), (165, 110, 65)), ((90, 86, 80), (165, 160, 150)), ((140, 100, 55), (225, 185, 125))),
    ),
}
