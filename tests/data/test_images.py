"""Images are taken as they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe.data.images import is_turned, read_image, read_label_map, upright

ORIENTATION = 0x0112


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_an_orientation_turns_no_pixels(tmp_path: Path, suffix: str, turned: int) -> None:
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    path = str(tmp_path / f"x.{suffix}")
    Image.fromarray(stored).save(path, exif=exif)
    found = read_image(path)
    assert (np.asarray(found) == stored).all()
    assert (read_label_map(path) == stored).all()
    assert is_turned(found) == (turned != 1)
    assert upright(found).size == ((3, 2) if turned < 5 else (2, 3))
