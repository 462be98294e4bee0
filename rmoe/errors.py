"""The error that a user can cause and mend, the words that such errors share, and its one way to an exit code."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn


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


def printable(text: str) -> str:
    """Returns a text that stays one line of a terminal: a question mark stands for what could steer it or cannot be
    encoded, which names of files and classes may have.
    """
    return "".join(character if character.isprintable() else "?" for character in text)


def run_guarded(run: Callable[[], int | None], program: str = "rmoe") -> NoReturn:
    """Runs `run` and ends the process with its exit code (None is 0).

    A UserError becomes one line on stderr, without a traceback, and exit code 2.
    """
    sys.exit(exit_code(run, program))


def exit_code(run: Callable[[], int | None], program: str, debug: bool = False) -> int:
    """Runs `run` and returns its exit code: 0 for None, 2 after a user's error, of which one line is said.

    Args:
        run: what to run.
        program: the name that the line begins with.
        debug: also show where in the program the error comes from.
    """
    try:
        return run() or 0
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"{program}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
