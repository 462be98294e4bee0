"""Checks the types of a data set's arguments, before anything is looked for or built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmoe.errors import UserError

_PATH, _TEXT, _MAP, _COUNT = "a path", "text", "a dict of paths", "a whole number"
_NAMES = "a list of names or the path of one"
_ARGUMENTS = {
    **dict.fromkeys(("root", "data_root", "ann_file"), _PATH),
    **dict.fromkeys(("split", "img_suffix", "seg_map_suffix"), _TEXT),
    **{"data_prefix": _MAP, "num_classes": _COUNT, "classes": _NAMES},
}
_NEEDED = {"root", "split", "num_classes", "classes"}  # may not be None


def check_arguments(given: Mapping[str, Any]) -> None:
    """Checks the arguments of a data set that name files and classes; None is accepted if an argument may be left out.

    Raises:
        UserError: an argument has the wrong type.
    """
    for name, what in _ARGUMENTS.items():
        if name not in given or (given[name] is None and name not in _NEEDED):
            continue
        value = given[name]
        if what == _COUNT:
            require_count(name, value)
        elif not _is_of(value, what):
            raise UserError(f"a data set's {name} is {value!r:.80}; it is {what}")


def require_count(name: str, value: Any, most: int | None = None) -> int:
    """Returns `value` if it is a whole number from 1 to `most`.

    Raises:
        UserError: `value` is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most and value > most):
        raise UserError(f"{name} is {value!r:.80}; it is a whole number from 1{f' to {most}' if most else ' on'}")
    return value


def _is_of(value: Any, what: str) -> bool:
    if what == _MAP:
        return isinstance(value, Mapping) and all(_is_of(one, _PATH) for one in value.values() if one is not None)
    if what == _TEXT:
        return isinstance(value, str) and bool(value) and "\0" not in value
    if what == _NAMES and isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return True
    return isinstance(value, (str, Path)) and "\0" not in str(value)
