"""Defines what a COCO annotation file may hold: the type of each field that is read, polygons and run lengths too."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import AfterValidator, Field, StrictBool, TypeAdapter, ValidationError
from typing_extensions import TypedDict

_MOST = 2**63
_LONGEST_NAME = 255  # bytes that file systems allow
_LONGEST_RUN = 7  # characters of a compressed run, which are 35 bits


def _in_pairs(numbers: list[float]) -> list[float]:
    if len(numbers) % 2:
        raise ValueError("an odd number of coordinates")
    return numbers


def _below(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError("not a path below the images' folder")
    if max(len(part.encode()) for part in parts) > _LONGEST_NAME:
        raise ValueError("too long")
    return name


_Whole = Annotated[int, Field(strict=True, ge=-_MOST, lt=_MOST)]
_Positive = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
_Run = Annotated[int, Field(strict=True, ge=0, lt=_MOST)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Size = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
_Text = Annotated[str, Field(strict=True)]
_Polygon = Annotated[list[_Number], Field(min_length=6), AfterValidator(_in_pairs)]


class _RunLengths(TypedDict):
    size: Annotated[list[_Whole], Field(min_length=2, max_length=2)]
    counts: list[_Run] | _Text


class _Image(TypedDict):
    id: _Whole | _Text
    file_name: Annotated[_Text, AfterValidator(_below)]
    height: _Positive
    width: _Positive


class _Annotation(TypedDict):
    id: _Whole | _Text
    image_id: _Whole | _Text
    category_id: _Whole
    bbox: tuple[_Number, _Number, _Size, _Size]
    area: _Number
    iscrowd: NotRequired[StrictBool | Annotated[int, Field(strict=True, ge=0, le=1)]]
    segmentation: NotRequired[list[_Polygon] | _RunLengths | None]


class _Category(TypedDict):
    id: _Whole
    name: Annotated[_Text, Field(pattern=r"\S")]


_SCHEMA: dict[str, TypeAdapter[Any]] = {
    "images": TypeAdapter(_Image),
    "annotations": TypeAdapter(_Annotation),
    "categories": TypeAdapter(_Category),
}


def wrong_fields(kind: str, item: Any) -> list[str]:
    """Returns the names of an item's fields that are missing or have the wrong type, "" if it is no object at all.

    Args:
        kind: the list that the item stands in: "images", "annotations" or "categories".
    """
    try:
        _SCHEMA[kind].validator.validate_python(item)
    except ValidationError as error:
        places = [one["loc"] for one in error.errors(include_url=False, include_context=False, include_input=False)]
        return list(dict.fromkeys(str(place[0]) if place else "" for place in places))
    return []


def covers(mask: Mapping[str, Any], size: list[int]) -> bool:
    """Returns whether run lengths that follow the schema cover an image of `size` [height, width] exactly."""
    counts = mask["counts"]
    runs = _decompress(counts) if isinstance(counts, str) else counts
    return mask["size"] == size and runs is not None and sum(runs) == size[0] * size[1]


def _decompress(text: str) -> list[int] | None:
    """Returns the run lengths in pycocotools' compressed text, or None if it is damaged, which pycocotools ignores.

    Each number is written in pieces of 5 bits, the lowest first; a sixth bit says that another piece follows. From the
    fourth on, a number is the difference to the number two places before it.
    """
    codes = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    pieces = ends - starts + 1
    if pieces.max() > _LONGEST_RUN:
        return None
    place = np.arange(codes.size) - np.repeat(starts, pieces)
    numbers = np.add.reduceat((codes & 31) << 5 * place, starts)
    numbers -= np.where(codes[ends] & 16, 1 << 5 * pieces, 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers.tolist() if numbers.min() >= 0 else None


def shown(value: Any) -> str:
    """Returns a value as text for a message, cut where it is long or nested deeply."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # the number has more digits than Python prints
        return f"a huge {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
