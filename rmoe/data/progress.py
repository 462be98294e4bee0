"""A progress bar for what takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")


def tracked(items: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
    """Yields the items, with a bar on standard error where that is a terminal.

    Args:
        items: what to go through.
        description: what stands before the bar.
        total: how many there are, if they cannot say.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description, total, console=Console(file=sys.stderr))
