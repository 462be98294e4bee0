"""The shipped configs in a table, as each tells of itself: in its keys, and in its docstring, which begins with the
pipeline and a colon and has a paragraph of the fields Hardware, Published and Run at full scale.

A module of its own, as the table needs neither torch nor what a report of runs imports: it is there at once.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from rmoe.errors import UserError

FOLDER = Path(__file__).parents[1] / "configs"
_TASKS = {"mmengine": "classification", "mmseg": "segmentation", "mmdet": "detection"}  # by the config's default_scope
_FIELDS = re.compile(r"\n\nHardware: (.+?)\.\s+Published: (.+?)\.\s+Run at full scale: (.+?)\.(?:\n\n|\n?$)", re.DOTALL)
_WIDTH = 230  # columns of the table where the output is a file: paths are not cut


@dataclass(frozen=True)
class Entry:
    """One config.

    Attributes:
        config: its path as one types it: from the working directory, if it is in there.
        task: classification, segmentation or detection.
        backbone: timm's name.
        pipeline: Lower bound, RMoE-D, …
        published: the figure to compare with and its source.
        hardware: what the config is meant for.
        full_scale: whether anybody has run it at full scale.
    """

    config: str
    task: str
    backbone: str
    pipeline: str
    published: str
    hardware: str
    full_scale: str


def entries(words: Sequence[str] = ()) -> list[Entry]:
    """The shipped configs, in the order of their paths, that have all of `words` in what is told of them.

    Raises:
        UserError: there is none.
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
    """Prints the table; what stands in brackets is left out."""
    table, screen = Table(), sys.stdout.isatty()
    for field in fields(Entry):
        whole = field.name == "config" and not screen
        table.add_column(field.name.replace("full_scale", "run at full scale"), overflow="fold", no_wrap=whole)
    for one in found:
        table.add_row(*(re.sub(r"\s\([^()]*\)", "", value) for value in asdict(one).values()))
    Console(width=None if screen else _WIDTH).print(table)


def _entry(path: Path) -> Entry:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    told = _FIELDS.search(text)
    assert told, f"{path} lacks the fields Hardware, Published and Run at full scale in its docstring"
    published, hardware, full_scale = (" ".join(told[number].split()) for number in (2, 1, 3))
    config = Config.fromfile(path, import_custom_modules=False)
    here = Path.cwd()
    return Entry(
        config=str(path.relative_to(here) if path.is_relative_to(here) else path),
        task=_TASKS[config.default_scope],
        backbone=config.model.get("backbone", config.model).model,
        pipeline=text.partition(":")[0],
        published=published,
        hardware=hardware,
        full_scale=full_scale,
    )
