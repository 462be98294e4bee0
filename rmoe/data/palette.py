"""Chooses colours that tell classes apart."""

from __future__ import annotations

from functools import cache

import numpy as np

_STEP = 15  # of the grid of candidates, in 0 … 255
_DARK, _LIGHT = 0.42, 0.92  # lightness of the darkest and the lightest colour, which is seen over any picture
_TAKEN = ((0, 0, 0), (255, 255, 255), (128, 128, 128))  # void and the grey of pictures; no class looks like them


@cache
def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Returns `count` colours as (red, green, blue) in 0 … 255, each as far as can be from those before it.

    Distances are Euclidean in OKLab (https://bottosson.github.io/posts/oklab), where they follow the eye. The first
    colours of a longer palette are those of a shorter one.
    """
    shades = np.arange(0, 256, _STEP)
    candidates: np.ndarray = np.stack(np.meshgrid(shades, shades, shades, indexing="ij"), -1).reshape(-1, 3)
    places = _oklab(candidates)
    seen = (places[:, 0] > _DARK) & (places[:, 0] < _LIGHT)
    candidates, places = candidates[seen], places[seen]
    far = np.min([np.linalg.norm(places - one, axis=1) for one in _oklab(np.array(_TAKEN))], axis=0)
    chosen = []
    for _ in range(count):
        best = int(far.argmax())
        chosen.append(best)
        far = np.minimum(far, np.linalg.norm(places - places[best], axis=1))
    return tuple((int(r), int(g), int(b)) for r, g, b in candidates[chosen])


def _oklab(rgb_N3: np.ndarray) -> np.ndarray:
    """Returns (lightness, green-red, blue-yellow) of colours in sRGB, float64 [N, 3]."""
    srgb = rgb_N3 / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ _TO_CONES.T
    return np.cbrt(cones) @ _TO_LAB.T


_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
