"""The one way in which images and label maps are read: by the check, and by every loader.

All of them are taken as they are stored. An EXIF orientation is not followed: label maps, boxes and masks refer to the
stored pixels, and have no orientation of their own.
"""

from __future__ import annotations

import io
import os
import stat

import numpy as np
from PIL import Image, UnidentifiedImageError

from rmoe.errors import UserError

IGNORED = 255  # the label of void
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26  # Pillow's limit of what may be a decompression bomb
_DEEP = ("I", "F")  # modes of 16 and 32 bits begin so
_ORIENTATION = 0x0112


class UnreadableImage(UserError):
    """A file is no image, or not a whole one."""


class OtherMode(UserError):
    """An image has pixels of a kind that would be changed silently."""


def read_image(path: str, content: bytes | None = None) -> Image.Image:
    """Returns the decoded image of a file, of 8 bits a channel at most.

    Args:
        path: the file; where `content` is given, only what to call it.
        content: of the file, if it is not on a disk of its own.

    Raises:
        UnreadableImage: there is no such file, it is no image, is damaged or was cut short, or has too many pixels.
        OtherMode: it has 16 bits a channel, 32, or floats.
    """
    image = _decode(path, content, "image")[0]
    if image.mode.startswith(_DEEP):
        raise OtherMode(
            f"image {path} has mode {image.mode}, of more than 8 bits a channel, which would be cut off; save it with "
            "8 bits, scaled as it should be seen"
        )
    return image


def read_label_map(path: str, content: bytes | None = None) -> np.ndarray:
    """Returns the class indices of a label map, uint8 [H, W], as they are stored; a palette is not applied.

    Raises:
        UnreadableImage: as `read_image`.
        OtherMode: it has colours, another number of bits than 8, or floats.
    """
    image, packing = _decode(path, content, "label map")
    if image.mode != "P" and packing != "L":  # grey values of 1, 2 or 4 bits would be scaled up to 255
        mode = packing if image.mode == "L" else image.mode
        raise OtherMode(
            f"label map {path} has mode {mode}; it must be 8-bit with one channel (L or P), one class index per pixel: "
            "save the class indices, not colours"
        )
    return np.array(image)


def is_turned(image: Image.Image) -> bool:
    """Returns whether an image has an EXIF orientation that viewers follow."""
    try:
        return image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF data is no orientation, and nobody else reads it
        return False


def _decode(path: str, content: bytes | None, kind: str) -> tuple[Image.Image, str]:
    """Returns an image, and how its pixels are packed in the file: "L", "L;4", …"""
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device may never end
            raise OSError("it is a folder or no ordinary file")
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS}: cut it into tiles")
            packing = _packing(image)
            image.load()
        return image, packing
    except UnidentifiedImageError:
        why = "it is empty or no image of a known format"
    except Exception as error:  # decoders raise whatever damaged bytes make of their arithmetic
        why = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    raise UnreadableImage(f"{path} is no readable {kind} ({why}); restore or remove the file")


def _packing(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None)
    words = tiles[0][3] if tiles else image.mode
    first = words[0] if isinstance(words, tuple) and words else words
    return first if isinstance(first, str) else image.mode
