"""Reads class lists, all by one function."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rmoe.data.arguments import require_count
from rmoe.data.files import reason
from rmoe.errors import UserError

_FORMS = "give JSON or text, one name a line"


class ClassList(NamedTuple):
    """Holds the names of classes in the order of their indices, and their colours if the list has any."""

    names: tuple[str, ...]
    palette: list[list[int]] | None

    @property
    def metainfo(self) -> dict[str, Any]:
        """Returns the list as mmseg's and mmdet's data sets take it."""
        return {"classes": self.names} | ({"palette": self.palette} if self.palette else {})


def class_list(classes: Any, num_classes: Any = None) -> ClassList:
    """Checks and returns a class list.

    Args:
        classes: the names, or the path of a file with them. A .json file holds a list, an object with `classes` and, if
            there are colours, `palette`, or COCO annotations, whose categories are taken in the order of their ids. Any
            other file is ADE20K's objectInfo150.txt, or text with one name on each line.
        num_classes: how many names there must be, if that is known.

    Raises:
        UserError: the file cannot be read or has none of these forms; a name is empty, stands twice or is no text; the
            colours do not fit the names; there is another number of names.
    """
    if isinstance(classes, (str, Path)):
        what = f"the class list {classes}"
        names, palette = _read(classes, what)
    else:
        what, names, palette = "the class list", classes, None
    _check_names(names, what)
    _check_palette(palette, len(names), what)
    if num_classes is not None and len(names) != require_count("num_classes", num_classes):
        found = f"{what} has {len(names)} names, num_classes is {num_classes}"
        raise UserError(f"{found}; make them equal (void is not a class)")
    return ClassList(tuple(names), palette)


def _read(path: str | Path, what: str) -> tuple[Any, Any]:
    """Returns the names and the colours that a file holds, whose types are not checked yet."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix != ".json":
            return _lines(text), None
        content = json.loads(text)
        if isinstance(content, Mapping) and "categories" in content:
            return [one["name"] for one in sorted(content["categories"], key=lambda one: one["id"])], None
        return (content["classes"], content.get("palette")) if isinstance(content, Mapping) else (content, None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{what} cannot be read ({reason(error)}); {_FORMS}") from None


def _lines(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].split("\t")[0].strip() == "Idx":
        return [line.split("\t")[-1].strip() for line in lines[1:]]
    return [line.strip() for line in lines]


def _check_names(names: Any, what: str) -> None:
    if not isinstance(names, Sequence) or isinstance(names, (str, bytes)) or not names:
        raise UserError(f"{what} holds no list of names; {_FORMS}")
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise UserError(f"{what} has the name {name!r:.80}; a name is text that can be printed; {_FORMS}")
    if len(set(names)) < len(names):
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise UserError(f"{what} has the name '{twice}' twice; every class has a name of its own")


def _check_palette(palette: Any, names: int, what: str) -> None:
    if palette is None:
        return
    colours = palette if isinstance(palette, list) else []
    sound = [one for one in colours if isinstance(one, list) and len(one) == 3 and all(map(_is_shade, one))]
    if len(sound) != names or len(colours) != names:
        raise UserError(
            f"{what} has {len(sound)} colours for {names} names; palette holds [red, green, blue] for each name"
        )


def _is_shade(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
