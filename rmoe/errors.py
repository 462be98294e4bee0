"""The error that a user can cause and mend, and the words that such errors share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Tells a user of a mistake that he can mend: the value that was found, what is allowed and what to do next.

    The command line prints it as one line and leaves with exit code 2.
    """


def nearest(key: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about the unknown name `key`: the closest known name, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{hint} known: {', '.join(names)}"
