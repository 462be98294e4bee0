"""Prints lines that hold names of files and classes, which may be anybody's and tell a terminal to do anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmoe.errors import printable

if TYPE_CHECKING:
    from rich.console import Console


def tell(text: str, console: Console | None = None) -> None:
    """Prints one line, whatever is in it; on a console beside a progress bar, say, or on standard output."""
    if console is None:
        print(printable(text), flush=True)
    else:
        from rich.text import Text

        console.print(Text(printable(text)), soft_wrap=True)
