"""What the terminal gets to see while a run starts: a line for each thing that takes time, and no more."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from logging.handlers import MemoryHandler
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

# What other packages say in every run, and a user can do nothing about. The log file has it.
_NOISE = (
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    "Failed to search registry",
    "The prefix is not set in metric class",
)
# By mmseg and mmdet, when they are imported, and by pycocotools.
_PRINTED = ("Could not import OneDL", "creating index", "index created")
_KEPT = 1000  # warnings before there is a log file


def say(text: str) -> None:
    """Prints a line that says what is being done, on the first process alone."""
    if speaks():
        print(f"rmoe: {text}", flush=True)


def speaks() -> bool:
    """Returns whether this process is the first of its group."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def keep_warnings() -> None:
    """Keeps Python's warnings, which are other packages', for the log file, see `keep_short`."""
    logging.captureWarnings(True)
    warnings = logging.getLogger("py.warnings")
    warnings.propagate = False
    warnings.addHandler(MemoryHandler(_KEPT, flushLevel=logging.CRITICAL))


@contextmanager
def without_noise() -> Iterator[None]:
    """Leaves out what packages print when they are imported, or read annotations."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            if not line.startswith(_PRINTED):
                print(line, flush=True)


class StartFilter(logging.Filter):
    """Lets through single lines that are no `_NOISE`: environment, config and hooks are many, and in the log file."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        text = record.getMessage()
        return record.levelno >= logging.ERROR or not ("\n" in text.strip() or text.startswith(_NOISE))


_FILTER = StartFilter()


def keep_short(logger: logging.Logger) -> None:
    """Lets the terminal have short lines only, until `show_all`; warnings of other packages go to the log file."""
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            warnings = logging.getLogger("py.warnings")
            for kept in [one for one in warnings.handlers if isinstance(one, MemoryHandler)]:
                kept.setTarget(handler)
                kept.close()
                warnings.removeHandler(kept)
                warnings.addHandler(handler)
        else:
            handler.addFilter(_FILTER)


def show_all(logger: logging.Logger) -> None:
    """Ends what `keep_short` began."""
    for handler in logger.handlers:
        handler.removeFilter(_FILTER)


def progress_bar() -> Progress:
    """Returns a bar with steps, time, time left and a `note` of each task; invisible where stderr is no terminal."""
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("eta"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=Console(file=sys.stderr),
        auto_refresh=False,  # no thread: workers of a loader are forked
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not sys.stderr.isatty(),
    )
