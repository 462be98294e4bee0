"""The runs of a study that goes on over several sittings: one file, written anew after each run.

A sitting may end at any moment and on a machine whose work dirs are not there the next time. So what a run came to is
kept here, and a run that stands here is not done again. What says that it is the same run is a `Cell`, and the
fingerprint of all that the study says of it: its mixture, options, stages, data, model, batch, steps and `VERSIONS`.
Code, defaults, log intervals and paths are no part of it: a change elsewhere must not cost hours of training that
stand. A change of the recipe that matters (a demo config's schedule or augmentation, the arithmetic of a mixture) is
told by raising one of `VERSIONS` by hand; a test holds the recipe's sections to their hashes, so that none goes unseen.

Two runs are a pair if they are of one seed, one kind of machine and one core, bit for bit (`Context`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from safetensors.torch import load_file

from benchmarks.claims.arms import Arm, Size, Upstream
from benchmarks.claims.runs import upstream_steps
from benchmarks.common import Row
from rmoe.errors import UserError

# Raised by hand where a change of code makes other runs of what has the key: "all", "gate", and what is named so in a
# mixture or its options.
VERSIONS = {"all": 1, "gate": 1, "low_rank": 1, "segments": 1, "sparse": 1, "full": 1, "experts": 1, "calibrate": 1}
UPSTREAM = "upstream"  # where stages of upstream training are run; others are at a task
# Of a config: what decides a result. The rest is logs, hooks and paths.
RECIPE = ("model", "train_dataloader", "val_dataloader", "val_evaluator", "optim_wrapper", "param_scheduler")


class Cell(NamedTuple):
    """Names one run of the study: an arm or an upstream stage, at a task or upstream, and under which conditions.

    Attributes:
        name: of the arm, or of the stage.
        where: the task, or `UPSTREAM`.
        seed: of weights and data order.
        steps: of an arm that has no more than the others; of a stage, its own.
        styles: of the scenes' drawing, with commas; none for a stage.
        width: of the backbone, as a multiple of the miniature's.
    """

    name: str
    where: str
    seed: int
    steps: int
    styles: str
    width: float


class Context(NamedTuple):
    """Is what two runs share that may be compared.

    Attributes:
        device: kind of processor.
        core: hash of the seed's dense core, `weights_hash`.
    """

    device: str
    core: str


class Ledger:
    """Holds the runs that were done, in memory as in the file; damaged, it is refused.

    Args:
        path: of the file; it need not be there.

    Raises:
        UserError: the file is none of a study's runs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = self._read()

    def find(self, cell: Cell, fingerprint: str, context: Context | None = None) -> list[Row]:
        """Returns the runs of a cell, of one context or of all."""
        return [
            row
            for row in self.rows
            if cell_of(row) == cell
            and row["fingerprint"] == fingerprint
            and (context is None or context_of(row) == context)
        ]

    def add(self, row: Row) -> None:
        """Adds a run, in place of an older one of the same cell and context, and writes the file.

        Another process that writes to it meanwhile loses nothing: the file is read again first. A process that is
        killed leaves the file as it was, or as it is to be.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._path.parent):
            kept = [one for one in self._read() if _identity(one) != _identity(row)]
            self.rows = sorted([*kept, row], key=_identity)
            content = {"benchmark": "claims", "rows": self.rows}
            written = self._path.with_name(f"{self._path.name}.tmp")
            with written.open("w") as file:
                json.dump(content, file, indent=1, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            written.replace(self._path)

    def _read(self) -> list[Row]:
        if not self._path.exists():
            return []
        try:
            rows: list[Row] = json.loads(self._path.read_text())["rows"]
            for row in rows:
                _identity(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged ({type(error).__name__}: {error}); take it from the last commit, or move it "
                "away to run everything again"
            ) from error
        return rows


def cell_of(row: Row) -> Cell:
    """Returns the cell of a run."""
    return Cell(row["arm"], row["where"], row["seed"], row["planned_steps"], row["styles"], row["width"])


def context_of(row: Row) -> Context:
    """Returns the context of a run."""
    return Context(row["device"], row["core"])


def _identity(row: Row) -> tuple[Any, ...]:
    cell = cell_of(row)
    return (cell.where, cell.styles, cell.width, cell.steps, cell.name, cell.seed, *context_of(row))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def fingerprint(size: Size, stages: Mapping[str, Upstream], where: str, one: Arm | Upstream) -> str:
    """Returns a hash of what the study says of a run: 12 hexadecimal digits.

    Args:
        size: steps, batch, data and model.
        stages: all stages of upstream training; those that the run starts from count.
        where: the task, or `UPSTREAM`.
        one: the arm or stage.
    """
    said: dict[str, Any] = {"versions": _versions(one), "model": size.model(None if where == UPSTREAM else where)}
    said |= {"what": _differing(one), "batch": size.batch[where], "pictures": size.pictures}
    if isinstance(one, Arm):
        said |= {"steps": round(one.longer * size.steps[where]), "scenes": size.scenes}
        before: str | None = one.upstream
    else:
        said |= {"steps": upstream_steps(one, size)}
        before = one.after
    said["before"] = before and fingerprint(size, stages, UPSTREAM, stages[before])
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def _versions(one: Arm | Upstream) -> dict[str, int]:
    kinds = {"all"} | ({"gate", one.moe["residual"]} if one.moe else set())
    return {name: number for name, number in VERSIONS.items() if name in kinds | one.options.keys()}


def _differing(one: Arm | Upstream) -> dict[str, Any]:
    """Returns the fields that are not at their defaults: one that is added later changes no fingerprint."""
    return {
        field.name: value
        for field in fields(one)
        if (value := getattr(one, field.name))
        != (field.default_factory() if callable(field.default_factory) else field.default)
    }


def weights_hash(folder: Path) -> str:
    """Returns a hash of a finished run's weights, whatever else its file says of them: 12 hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]


def recipe(config: Path, folder: Path) -> dict[str, str]:
    """Returns a hash of each section of a config that decides a result, wherever its `folder` lies: 12 hex digits."""
    sections = Config.fromfile(config, import_custom_modules=False).to_dict()
    text = {name: json.dumps(sections[name], sort_keys=True).replace(str(folder), "FOLDER") for name in RECIPE}
    return {name: hashlib.sha256(text[name].encode()).hexdigest()[:12] for name in RECIPE}
