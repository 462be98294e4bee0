"""Reads images and label maps, in the same way for the checks and for every loader.

They are taken as they are stored. An EXIF orientation is not followed, because label maps, boxes and masks refer to the
stored pixels.
"""

from __future__ import annotations

import io
import os
import stat

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rmoe.data.files import reason
from rmoe.errors import UserError

IGNORED = 255  # the label value of void
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26  # a larger image may be a decompression bomb, says Pillow
_DEEP = ("I", "F")  # the names of modes with 16 and 32 bits begin with these letters
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED_BACK = {  # what undoes each orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class UnreadableImage(UserError):
    """Says that a file is no image, or not a whole one."""


class OtherMode(UserError):
    """Says that an image has a mode whose pixels would be changed silently."""


def read_image(path: str, content: bytes | None = None) -> Image.Image:
    """Decodes an image of at most 8 bits a channel.

    Args:
        path: the file; if `content` is given, only the name that messages use.
        content: the bytes of the file, if it is no file of this machine.

    Raises:
        UnreadableImage: the file is missing, is no image, is damaged, was cut short, or has too many pixels.
        OtherMode: the image has 16 or 32 bits a channel, or floats.
    """
    return of_8_bits(_decode(path, content, "image")[0], path)


def of_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Returns the image if it has at most 8 bits a channel; `name` is what messages call it.

    Raises:
        OtherMode: it has more.
    """
    if image.mode.startswith(_DEEP):
        raise OtherMode(
            f"image {name} has mode {image.mode}, of more than 8 bits a channel, which would be cut off; save it "
            "with 8 bits a channel, scaled to 0 … 255"
        )
    return image


def read_label_map(path: str, content: bytes | None = None) -> np.ndarray:
    """Returns the class indices of a label map, uint8 [H, W], as they are stored; a palette is not applied.

    Raises:
        UnreadableImage: see `read_image`.
        OtherMode: the label map has colours, floats, or more or fewer than 8 bits.
    """
    image, packing = _decode(path, content, "label map")
    if image.mode != "P" and packing != "L":  # Pillow would scale grey values of 1, 2 or 4 bits up to 255
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
    except Exception:  # EXIF data that is damaged gives no orientation
        return False


def upright(image: Image.Image) -> Image.Image:
    """Returns an image turned as its EXIF orientation says, for pictures that no label map refers to."""
    return ImageOps.exif_transpose(image) if is_turned(image) else image


def _decode(path: str, content: bytes | None, kind: str) -> tuple[Image.Image, str]:
    """Returns an image and how its pixels are packed in the file: "L", "L;4" and so on."""
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or a device may never end
            raise OSError("it is a folder or no ordinary file")
        # Of a path, Pillow would map the bytes of some TIFFs with height and width of the turned image.
        with open(path, "rb") if content is None else io.BytesIO(content) as file, Image.open(file) as image:
            if image.width * image.height > MOST_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS}: cut it into tiles")
            packing = _packing(image)
            turned = image.getexif().get(_ORIENTATION, 1) if image.format == "TIFF" else 1
            image.load()
        return _as_stored(image, turned), packing
    except UnidentifiedImageError:
        why = "it is empty or no image of a known format"
    except Exception as error:  # decoders raise errors of any type at damaged bytes
        why = reason(error)
    raise UnreadableImage(f"{path} is no readable {kind} ({why}); restore or remove the file")


def _as_stored(image: Image.Image, turned: int) -> Image.Image:
    """Returns an image that Pillow has turned by its EXIF orientation, as it does TIFFs alone, as it was before; the
    orientation stays with it.
    """
    if turned not in _TURNED_BACK:
        return image
    stored = image.transpose(_TURNED_BACK[turned])
    stored.getexif()[_ORIENTATION] = turned
    return stored


def _packing(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None)
    words = tiles[0][3] if tiles else image.mode
    first = words[0] if isinstance(words, tuple) and words else words
    return first if isinstance(first, str) else image.mode
