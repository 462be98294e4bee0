"""Checkpoints on disk: complete or invisible, verified before they are used, read at any layout.

A training checkpoint is a folder: `part_*.safetensors`, the tensors of resharding.py, written by as many processes as
hold different ones; `run.json` and `history.safetensors`, how far the run is and what it has logged; and
`complete.json`, written last of all, with the size and the SHA-256 of every other file. It is written aside, under
another name, and renamed when all of it is on the disk. Nothing in it is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from mmengine.dist import all_gather_object, get_dist_info, is_main_process
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rmoe.errors import UserError
from rmoe.moe.state import save_tensors

MARKER, RUN, HISTORY = "complete.json", "run.json", "history.safetensors"
PARTIAL, REPLACED = ".partial", ".replaced"
WEIGHT, AVERAGE = "weight/", "average/"  # what the names of a checkpoint's weights, and of their average, begin with
_MOST_JSON = 2**26  # bytes of a JSON file; what is larger was not written here
_FILES = rf"^(part_\d{{5}}\.safetensors|{re.escape(HISTORY)}|{re.escape(RUN)})$"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is spread, and what must be the same for another to go on where it stopped (`check_layout`).

    Attributes:
        processes: number of processes.
        ep_size: processes over which the experts of a layer are spread; 1 in a dense model.
        num_experts: experts of a layer; 0 in a dense model.
        micro_batch: samples of one process in one iteration.
        accumulation: iterations for one step of the optimizer.
        seed: of the order of samples, of augmentation and of noise.
    """

    processes: int
    ep_size: int
    num_experts: int
    micro_batch: int
    accumulation: int
    seed: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())

    @property
    def iteration_batch(self) -> int:
        """Returns how many samples all processes together draw in one iteration."""
        return self.processes * self.micro_batch


class _Sealed(BaseModel):
    """What the marker says of a file."""

    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: NonNegativeInt
    sha256: str


class _Marker(BaseModel):
    """The content of `complete.json`: plain names of files, and numbers where numbers belong."""

    model_config = ConfigDict(strict=True, extra="forbid")
    iteration: Annotated[int, Field(ge=0, lt=2**63)]
    layout: Layout
    files: dict[Annotated[str, Field(pattern=_FILES)], _Sealed]
    sha256: str


def complete_checkpoints(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Returns the checkpoints of `folder` with all their files in full length, those of most iterations first, and what
    is wrong with each of the others. Contents are not read, see `newest_intact`.
    """
    found, wrong = {}, {}
    for path in sorted(path for path in folder.glob("*/") if is_checkpoint(path)):
        if harm := _missing(path):
            wrong[path] = harm
        else:
            found[path] = _marker(path).iteration
    return sorted(found, key=found.__getitem__, reverse=True), wrong


def newest_intact(folder: Path, warn: Callable[[str], object]) -> Path:
    """Returns the newest checkpoint of `folder` whose files are what was written; collective, the reading is shared.

    Args:
        folder: a work dir.
        warn: told of every newer one that is damaged.

    Raises:
        UserError: there is none.
    """
    for path in complete_checkpoints(folder)[0]:
        if not (harm := damage(path)):
            return path
        warn(f"{path} is {harm}; it is ignored")
    raise UserError(f"every checkpoint in {folder} is damaged; move them away to start anew")


def check_layout(path: Path, layout: Layout) -> None:
    """Refuses to resume where the run would not go on as it had: other numbers of processes, ep_size and ZeRO stage
    are fine, other batches of one step or seeds are not.

    Raises:
        UserError: naming both layouts and the way out.
    """
    made_by = _checked_marker(path).layout
    same = [(one.num_experts, one.iteration_batch, one.accumulation, one.seed) for one in (made_by, layout)]
    if same[0] == same[1]:
        return
    way_out = "Resume with the former"
    if made_by.iteration_batch != layout.iteration_batch and made_by.iteration_batch % layout.processes == 0:
        batch = made_by.iteration_batch // layout.processes
        way_out = f"Resume with train_dataloader.batch_size {batch}, for {made_by.iteration_batch} samples as before"
    raise UserError(
        f"{path} was made with {made_by}; this run has {layout}. {way_out}, or start a new run from its weights alone: "
        f"another --work-dir and --cfg-options load_from={path}"
    )


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    history: Mapping[str, Tensor],
    iteration: int,
    layout: Layout,
) -> None:
    """Writes a training checkpoint; it bears the name `path` when it is complete. All processes call it.

    Args:
        path: its name.
        tensors: this process's share, see `rmoe.engine.checkpoint.resharding.gather_tensors`.
        about: what JSON can hold; the first process's is written, as is its `history`.
        history: what has been logged.
        iteration: how many the run has done.
        layout: of the run.

    Raises:
        UserError: a file cannot be written. What there was is as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    written: dict[str, dict[str, Any]] = {}
    with all_or_none(partial):
        if is_main_process():
            _remove(partial)
            partial.mkdir(parents=True)
    with all_or_none(partial):
        if tensors:
            name = f"part_{get_dist_info()[0]:05d}.safetensors"
            save_tensors(partial / name, tensors)
            written[name] = _seal(partial / name)
        if is_main_process():
            save_tensors(partial / HISTORY, history)
            (partial / RUN).write_text(json.dumps(about, indent=1) + "\n")
            written |= {name: _seal(partial / name) for name in (HISTORY, RUN)}
    files = {name: about for each in all_gather_object(written) for name, about in each.items()}
    with all_or_none(partial):
        if is_main_process():
            write_marker(partial, iteration, layout, files)
            put_in_place(partial, path)


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes a file of a whole model's weights, such as the best one's. All processes call it; the first one writes.

    Raises:
        UserError: see `write_checkpoint`.
    """
    partial = path.with_name(path.name + PARTIAL)
    with all_or_none(partial):
        if is_main_process():
            _remove(partial)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state_dict": dict(state)}, partial)
            put_in_place(partial, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file aside, brings it to the disk, then renames it."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(content, indent=1) + "\n")
    put_in_place(partial, path)


def write_marker(path: Path, iteration: int, layout: Layout, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Declares the checkpoint folder `path` complete."""
    content = {"iteration": iteration, "layout": dataclasses.asdict(layout), "files": dict(sorted(files.items()))}
    (path / MARKER).write_text(json.dumps({**content, "sha256": _digest_of(content)}, indent=1) + "\n")
    _sync(path / MARKER)


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a complete file or folder its name. Where there is one of that name already, it lives on until then.

    A file is brought to the disk before; of a folder, its files have been.
    """
    _sync(partial)
    replaced = path.with_name(path.name + REPLACED)
    if path.exists() and path.is_dir() != partial.is_dir():
        raise FileExistsError(f"{path} is a {'folder' if path.is_dir() else 'file'} of somebody else's; move it away")
    if path.is_dir():
        _remove(replaced)
        path.rename(replaced)
    partial.rename(path)
    _sync(path.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def all_or_none(partial: Path) -> Iterator[None]:
    """Ends all processes with the same error where one of them cannot write. They wait for each other."""
    error = ""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as failure:  # the last is torch.save's
        error = f"{failure} (process {get_dist_info()[0]})"
    if errors := [one for one in all_gather_object(error) if one]:
        if is_main_process():
            with suppress(OSError):  # the reason is told
                _remove(partial)
        raise UserError(
            f"{partial.with_name(partial.name.removesuffix(PARTIAL))} cannot be written: {errors[0]}; earlier "
            "checkpoints are as they were: mend that, then go on with --resume"
        )


def _seal(path: Path) -> dict[str, Any]:
    """Brings a file to the disk, and returns what the marker says of it."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Says whether a folder is a training checkpoint, sound, damaged or half written."""
    if any(os.path.lexists(path / name) for name in (MARKER, RUN)):
        return True
    if not path.name.endswith(PARTIAL) or not path.is_dir():
        return False
    names = [one.name for one in path.iterdir()]  # other folders are filled aside, too
    return not names or any(name == HISTORY or name.startswith("part_") for name in names)


def _marker(path: Path) -> _Marker:
    """Reads the marker of a checkpoint.

    Raises:
        ValueError: it is not what `write_marker` writes.
        OSError: it cannot be read.
    """
    marker = _Marker.model_validate_json(_read(path / MARKER))
    if marker.sha256 != _digest_of(marker.model_dump(exclude={"sha256"})):
        raise ValueError
    return marker


def _checked_marker(path: Path) -> _Marker:
    if harm := _missing(path):
        raise UserError(f"{path} is {harm}; give an earlier checkpoint")
    return _marker(path)


def _read(path: Path) -> bytes:
    if path.stat().st_size > _MOST_JSON:
        raise ValueError(f"it has more than {_MOST_JSON} bytes")
    return path.read_bytes()


def _missing(path: Path) -> str:
    """Returns what the names and lengths of its files tell against a checkpoint; nothing where it is complete."""
    try:
        if not (path / MARKER).is_file():
            return f"half written (it has no {MARKER})"
        for name, sealed in _marker(path).files.items():
            if not (path / name).is_file():
                return f"damaged ({name} is missing)"
            if (length := (path / name).stat().st_size) != sealed.bytes:
                return f"damaged ({name} has {length} bytes, not {sealed.bytes})"
    except ValueError:
        return f"damaged ({MARKER} is not what was written)"
    except OSError as error:
        return f"damaged ({error})"
    return ""


def damage(path: Path) -> str:
    """Returns what the contents of its files tell against a checkpoint. The processes share the reading and agree."""
    rank, processes = get_dist_info()
    bad = _missing(path)
    try:
        for name, sealed in [] if bad else list(_marker(path).files.items())[rank::processes]:
            if _digest(path / name) != sealed.sha256:
                bad = f"damaged ({name} is not what was written: its SHA-256 differs)"
        if not bad:
            read_run(path)
            Tensors(path)
    except (OSError, ValueError) as error:  # the latter of JSON and of tensors that were never sound
        bad = f"damaged ({str(error).removeprefix(f'{path}/')})"
    return next(filter(None, all_gather_object(bad)), "")


class Tensors(Mapping[str, Tensor]):
    """The tensors of a training checkpoint by name; each is read when it is asked for.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        parts = [path / name for name in _checked_marker(path).files if name.startswith("part_")]
        self._files: dict[str, Any] = {}
        for part in parts:
            try:
                file = safe_open(part, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{part} cannot be read ({_line(error)}); give an earlier checkpoint") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, key: str) -> Tensor:
        return self._files[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what `write_checkpoint` was given as `about` and `history`.

    Raises:
        UserError: a file cannot be read, or holds something else.
    """
    try:
        about, history = json.loads(_read(path / RUN).decode()), load_file(path / HISTORY)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{path}/{RUN} or {HISTORY} cannot be read ({_line(error)}); give an earlier checkpoint"
        ) from error
    if not isinstance(about, dict):
        raise UserError(f"{path}/{RUN} holds a {type(about).__name__}, not an object; give an earlier checkpoint")
    if odd := [key for key, x in history.items() if x.ndim != 2 or len(x) != 2 or not x.is_floating_point()]:
        raise UserError(f"{path}/{HISTORY} has {odd[0]} of another shape than [2, n]; give an earlier checkpoint")
    return about, history


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
