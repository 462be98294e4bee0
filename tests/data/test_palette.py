"""Colours tell classes apart."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import pdist

from rmoe.data.palette import _oklab, palette


def test_oklab_is_as_published() -> None:
    """White, and red, green and blue of sRGB: https://bottosson.github.io/posts/oklab."""
    found = _oklab(np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]))
    expected = [[1, 0, 0], [0.62796, 0.22486, 0.12585], [0.86644, -0.23389, 0.17950], [0.45201, -0.03246, -0.31153]]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_no_two_colours_look_alike() -> None:
    """The least distance that is told apart is 0.02 (https://www.w3.org/TR/css-color-4, 13.2.1)."""
    for count, least in {2: 0.35, 11: 0.2, 32: 0.12, 80: 0.08, 255: 0.045}.items():
        places = _oklab(np.array([(0, 0, 0), *palette(count)]))
        assert pdist(places).min() > least, count


def test_more_classes_leave_the_first_ones_their_colours() -> None:
    assert palette(40)[:11] == palette(11)
    assert palette(0) == ()
