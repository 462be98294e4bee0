"""Lists the shipped configs in a table, from their keys: `card` says what the others do not.

This module is apart from the reports, as it needs neither torch nor what a report imports: the table is there at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmoe.errors import UserError, printable

FOLDER = Path(__file__).parents[1] / "configs"
_TASKS = {"mmengine": "classification", "mmseg": "segmentation", "mmdet": "detection"}  # by the key default_scope
_WIDTH = 230  # columns of the table where the output is a file: paths are not cut


@dataclass(frozen=True)
class Entry:
    """Describes one config.

    Attributes:
        config: its path as one types it: from the working directory, if it lies in there.
        task: classification, segmentation or detection, or several of them.
        backbone: its name in timm.
        pipeline: Lower bound, RMoE-D, …
        published: the figure to compare a run with, and where it was published.
        hardware: the machines that the config is meant for.
        full_scale: whether anybody has run it at full scale.
        batch: images of a step, over all GPUs; None where a config does not say it.
    """

    config: str
    task: str
    backbone: str
    pipeline: str
    published: str
    hardware: str
    full_scale: str
    batch: int | None = None


def entries(words: Sequence[str] = ()) -> list[Entry]:
    """Returns the shipped configs whose entries hold all of `words`, in the order of their paths.

    Raises:
        UserError: no config has all of them.
    """
    paths = sorted(path for path in FOLDER.glob("*/*.py") if path.parent.name != "_base_")
    known = [_entry(path) for path in paths]
    found = [one for one in known if all(word.lower() in str(asdict(one)).lower() for word in words)]
    if not found:
        raise UserError(
            f"none of the {len(known)} configs has all of {', '.join(words)}; use fewer words, or words such as "
            f"{', '.join(sorted({one.pipeline for one in known}))}"
        )
    return found


def show(found: Sequence[Entry]) -> None:
    """Prints the table, without what stands in brackets."""
    table, screen = Table(), sys.stdout.isatty()
    for field in fields(Entry):
        whole = field.name == "config" and not screen
        table.add_column(field.name.replace("full_scale", "run at full scale"), overflow="fold", no_wrap=whole)
    for one in found:
        cells = (re.sub(r"\s\([^()]*\)", "", str(value or "")) for value in asdict(one).values())
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console(width=None if screen else _WIDTH).print(table)


@cache
def _read(path: Path) -> Config:
    return Config.fromfile(path, import_custom_modules=False)


def _entry(path: Path) -> Entry:
    config, here = _read(path), Path.cwd()
    each = [_read(path.parent / one.config) for one in (config.get("tasks") or {}).values()] or [config]
    return Entry(
        config=str(path.relative_to(here) if path.is_relative_to(here) else path),
        task=", ".join(_TASKS[one.default_scope] for one in each),
        backbone=each[0].model.get("backbone", each[0].model).model,
        **config.card,
    )
