"""Draws predictions over their images, with a legend, in the images' aspect ratio."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rmoe.inference.predictor import Classification, Detection, Prediction, Segmentation

Colours = Sequence[Sequence[int]]
_SMALLEST, _LARGEST = 512, 2048  # pixels of a picture's longer side
_TEXT = 15  # pixels
_MARGIN, _SWATCH, _LINE = 10, 14, 22  # pixels of the legend
_LISTED = 40  # lines of a legend


def draw(
    image: Image.Image,
    prediction: Prediction,
    classes: Sequence[str],
    palette: Colours,
    *,
    opacity: float = 0.55,
    threshold: float = 0.0,
) -> Image.Image:
    """Returns the image with what was predicted over it, and a legend on its right.

    Args:
        image: of any mode; one whose longer side is below 512 or above 2048 pixels is scaled for the picture.
        prediction: of this image.
        classes: names by index.
        palette: a colour of each class in 0 … 255.
        opacity: of the classes' colours over the image, in 0 … 1.
        threshold: the score from which on objects are in `prediction`, for the legend.
    """
    longest = max(image.size)
    scale = min(max(longest, _SMALLEST), _LARGEST) / longest
    view = image.convert("RGB").resize(tuple(max(1, round(side * scale)) for side in image.size))  # type: ignore[arg-type]
    lines: list[tuple[str, Any]]
    if isinstance(prediction, Segmentation):
        view = _over(view, colour_map(prediction, palette), opacity)
        shares = class_shares(prediction)
        lines = [(f"{classes[label]} {share:.1%}", palette[label]) for label, share in shares]
    elif isinstance(prediction, Detection):
        view = _objects(view, prediction, classes, palette, scale, opacity)
        found, counts = np.unique(prediction.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        lines = [(f"{classes[int(found[i])]}: {counts[i]}", palette[int(found[i])]) for i in order]
        lines.append((f"score from {threshold:g}" if lines else f"nothing of score {threshold:g}", None))
    else:
        assert isinstance(prediction, Classification)
        lines = [(f"{classes[label]} {share:.1%}", palette[label]) for label, share in prediction.top()]
    return _with_legend(view, lines)


def colour_map(prediction: Segmentation, palette: Colours) -> Image.Image:
    """Returns the classes' colours, a pixel for each of the image's."""
    return Image.fromarray(np.array(palette, dtype=np.uint8)[prediction.labels])


def class_shares(prediction: Segmentation) -> list[tuple[int, float]]:
    """Returns the classes of a label map with their shares of its pixels, the commonest first."""
    counts = np.bincount(prediction.labels.ravel())
    order = np.argsort(-counts, kind="stable")
    return [(int(label), float(counts[label] / prediction.labels.size)) for label in order if counts[label]]


def _over(view: Image.Image, colours: Image.Image, opacity: float) -> Image.Image:
    return Image.blend(view, colours.resize(view.size, Image.Resampling.NEAREST), opacity)


def _objects(
    view: Image.Image, found: Detection, classes: Sequence[str], palette: Colours, scale: float, opacity: float
) -> Image.Image:
    """Draws masks, boxes, and names with scores; the surest objects last, over the others."""
    order = list(range(len(found.scores)))[::-1]
    if found.masks is not None:
        for number in order:
            mask = Image.fromarray(found.masks[number]).convert("L").resize(view.size, Image.Resampling.BILINEAR)
            weight = mask.point(lambda value: round(value * opacity))
            view.paste(Image.new("RGB", view.size, tuple(palette[found.labels[number]])), mask=weight)
    drawn, font = ImageDraw.Draw(view), _font()
    for number in order:
        colour = tuple(palette[found.labels[number]])
        left, top, right, bottom = (float(side) * scale for side in found.boxes[number])
        drawn.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        text = f"{classes[int(found.labels[number])]} {found.scores[number]:.2f}"
        width = font.getlength(text) + 4
        x = max(0.0, min(left, view.width - width))
        y = top - _TEXT - 3 if top >= _TEXT + 3 else top
        drawn.rectangle((x, y, x + width, y + _TEXT + 3), fill=colour)
        drawn.text((x + 2, y), text, fill=_ink(colour), font=font)
    return view


def _with_legend(view: Image.Image, lines: Sequence[tuple[str, Any]]) -> Image.Image:
    font, shown = _font(), [*lines[:_LISTED]]
    if len(lines) > _LISTED:
        shown.append((f"and {len(lines) - _LISTED} more", None))
    width = max((int(font.getlength(text)) for text, _ in shown), default=0) + _SWATCH + 3 * _MARGIN
    height = max(view.height, 2 * _MARGIN + _LINE * len(shown))
    picture = Image.new("RGB", (view.width + width, height), "white")
    picture.paste(view)
    drawn = ImageDraw.Draw(picture)
    for row, (text, colour) in enumerate(shown):
        x, y = view.width + _MARGIN, _MARGIN + row * _LINE
        if colour is not None:
            drawn.rectangle((x, y, x + _SWATCH, y + _SWATCH), fill=tuple(colour), outline="black")
        drawn.text((x + _SWATCH + _MARGIN, y - 2), text, fill="black", font=font)
    return picture


def _ink(colour: Sequence[int]) -> str:
    red, green, blue = colour[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


@cache
def _font() -> Any:
    return ImageFont.load_default(size=_TEXT)
