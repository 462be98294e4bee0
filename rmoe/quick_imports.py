"""Spares a start the import of what nobody asked for, and a line that says nothing.

Where transformers is installed, mmengine imports it to register one optimizer, and mmdet for its text encoders; with
peft beside it this took longer than all else that a run imports: 9.5 of 16.2 s on one core, 6.6 more for detection.
Neither of them needs it: both go on where it is missing. So to these two it is missing once `rmoe.engine` or
`rmoe.inference` is imported, unless the program has imported it itself. The optimizer is there under its full name,
`type="transformers.Adafactor"`. On a machine without a GPU every import of DeepSpeed prints that it has found none.
"""

from __future__ import annotations

import logging
import sys
from importlib.abc import MetaPathFinder

_UNASKED, _ASKING = "transformers", ("mmengine.", "mmdet.")
_NO_GPU = "Setting accelerator to CPU"  # DeepSpeed's line begins so


class _NotForThem(MetaPathFinder):
    """Finds nothing; raises ModuleNotFoundError where one of `_ASKING` imports what it can do without."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == _UNASKED and _importer().startswith(_ASKING):
            raise ModuleNotFoundError(f"{name} is not imported at the start; see {__name__}", name=name)


def _importer() -> str:
    """Returns the name of the module whose import statement is being carried out."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


def install() -> None:
    """Puts this before the other finders, and before what DeepSpeed logs, once."""
    if not any(isinstance(finder, _NotForThem) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NotForThem())
        logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(_NO_GPU))
