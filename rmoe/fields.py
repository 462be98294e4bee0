"""Frozen dataclasses built from plain data, and their fields checked against their types."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rmoe.errors import UserError, nearest

_Config = TypeVar("_Config")


def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
    """Builds the frozen dataclass `cls` from plain data, nested dataclasses included.

    Raises:
        UserError: `values` is no mapping, has a key that `cls` does not have (the nearest known key is named), or a
            value that the class refuses at construction.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{cls.__name__} is {values!r}; it takes a mapping of its keys, such as dict(num_experts=8)")
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(f"{cls.__name__} has no key '{key}'{nearest(str(key), known)}")
    return cls(**values)


def check_fields(config: Any) -> None:
    """Checks every field of a frozen dataclass against its type, at construction: the one check of both ways to build.

    A list becomes the tuple, and a mapping the nested dataclass, that the field's type asks for.

    Raises:
        UserError: a value of another type, a name that is none of the choices, or a number that is not finite.
    """
    for name, hint in _hints(type(config)).items():  # type: ignore[arg-type]
        where, value = f"{type(config).__name__}.{name}", getattr(config, name)
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            value = from_dict(hint, value)  # type: ignore[arg-type]
        value = tuple(value) if isinstance(value, list) else value
        if not _accepts(hint, value):
            choices = [one for part in (hint, *get_args(hint)) if get_origin(part) is Literal for one in get_args(part)]
            if choices and isinstance(value, str):
                raise UserError(f"{where} is '{value}'{nearest(value, choices)}")
            raise UserError(f"{where} is {value!r}; it takes {_described(hint)}")
        object.__setattr__(config, name, value)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _accepts(hint: Any, value: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_accepts(get_args(hint)[0], item) for item in value)
    if get_origin(hint) in (Union, UnionType):
        return any(_accepts(part, value) for part in get_args(hint))
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # no NaN, no number of 400 digits
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    """Says in words what `_accepts` takes."""
    if get_origin(hint) is Literal:
        return f"{'one of ' if len(get_args(hint)) > 1 else ''}{', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return f"a tuple, each item being {_described(get_args(hint)[0])}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_described(part) for part in get_args(hint))
    words = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}
    return words.get(hint, "None" if hint is type(None) else f"a {getattr(hint, '__name__', hint)}")
