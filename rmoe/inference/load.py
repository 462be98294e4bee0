"""Loads a finished run for use, from its `model.safetensors`, which says what it is: nothing else of the run is read.

Neither DeepSpeed nor the training data, the core's file or a process group is needed; mmseg and mmdet only where the
model is theirs. A file may come from anybody: it can name only what our and OpenMMLab's registries hold.
"""

from __future__ import annotations

import difflib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

import rmoe
from rmoe.backbones.hub import CONFIG, INDEX, weights_in
from rmoe.backbones.load_core import checked_path
from rmoe.data.palette import palette
from rmoe.engine import safe_config
from rmoe.engine.building import user_errors
from rmoe.engine.checkpoint.export import ADAPTER, MODEL, read_metadata
from rmoe.engine.checkpoint.files import is_checkpoint
from rmoe.engine.checkpoint.weights import fill, read_weights
from rmoe.engine.model_config import fill_in_saved_moe, for_one_process
from rmoe.engine.task_config import checked_task, model_of, model_tasks, read_alone, state_of
from rmoe.engine.terminal import without_noise
from rmoe.errors import UserError
from rmoe.inference.inputs import Inputs
from rmoe.inference.precision import check_precision, lowered, tell_if_slow
from rmoe.inference.predictor import Predictor
from rmoe.tasks.classification import TimmClassifier

_BEST = "best_*.pth"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST = 64 * 2**20  # bytes of a config.json
_GIVE = "give the work dir of a finished run, or a file of it"


def load(
    path: str | Path,
    *,
    task: str | None = None,
    device: str | torch.device | None = None,
    dtype: Any = None,
    precision: Any = None,
) -> Predictor:
    """Loads a finished run.

    Args:
        path: its work dir, whose best weights are taken where it kept some, else its last ones (`model.safetensors`);
            or a file or training checkpoint in it, for just those weights. Where a run averaged its weights, they are
            the average. A folder with `model.safetensors` alone, or that file, will do; and so will a folder in
            Hugging Face's layout.
        task: which one, of a run of several (`rmoe.MultiTask`); the model is then an ordinary one of that task.
        device: such as "cpu" or "cuda:1"; a GPU if there is one.
        dtype: what is computed in, "bfloat16" or "float16" by autocast; float32 by default. Weights stay as they are.
        precision: what weights become, "bfloat16" or, on a CPU, "int8"; see `rmoe.inference.precision.lowered`.

    Returns:
        The model in evaluation mode, with what belongs to it; see `Predictor`.

    Raises:
        UserError: no such run, an unfinished one, one of a newer rmoe, weights of another model, a model that names
            what neither we nor OpenMMLab register, or a device, dtype or precision that is not there.
    """
    device, dtype = checked_device(device), _dtype(dtype)
    precision = check_precision(precision, device, dtype)  # before weights are read
    where, metadata, state = read_run(path, task)
    return predictor(metadata, state, where, device, dtype, precision)


def read_run(path: str | Path, task: str | None = None) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Returns what `find_run` does, and the weights; of a run of several tasks, as if it were one of `task` alone.

    Raises:
        UserError: see `load`.
    """
    where, metadata = find_run(path)
    model = metadata["model"]
    with user_errors(f"{where}: the model that it describes"):
        task = checked_task(model_tasks(model), task, where)
    state = read_weights(where)
    if task is None:
        return where, metadata, state
    with user_errors(f"{where}: the model that it describes"):
        about = {**metadata, **((metadata.get("tasks") or {}).get(task) or {}), "model": model_of(model, task)}
        about = {key: value for key, value in about.items() if key != "tasks"} | {"of_task": task}
        found = state_of(model, state, task)
        last, of_all = (max(one["backbone"].get("out_indices", (0,))) for one in (about["model"], model))
        if last < of_all:  # the backbone ends with the task's last map
            found = read_alone(found, build_model(about, where))
    return where, about, found


def find_run(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Returns the file, checkpoint or folder whose weights `load` takes, and the description of their model."""
    where = _found(checked_path(path, "the run"))
    described_by = where if where.suffix == ".safetensors" or (where / CONFIG).is_file() else where.parent / MODEL
    metadata = read_description(described_by)
    if "adapter" in metadata:
        raise UserError(
            f"{where} is an adapter, which lacks its core's weights; give both to rmoe attach, or to rmoe.Core"
        )
    return where, metadata


def predictor(
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: Path,
    device: str | torch.device | None = None,
    dtype: Any = None,
    precision: Any = None,
) -> Predictor:
    """Builds the model that metadata describe, with the weights of a state dict; see `load`.

    Raises:
        UserError: the model cannot be built, or the weights are another's; `where` is what they are called.
    """
    device, dtype = checked_device(device), _dtype(dtype)
    precision = check_precision(precision, device, dtype)
    dtype = torch.bfloat16 if precision == "bfloat16" else dtype
    tell_if_slow(device, dtype)
    inputs = metadata.get("inputs")
    with user_errors(f"{where}: the model that it describes"):
        model = build_model(metadata, where)
        fill(model, state, where)
        if precision is not None:
            model = lowered(model, precision)
        known = tuple(metadata.get("classes") or ())
        classes = (*known, *(f"class {label}" for label in range(len(known), _class_count(model))))
        colours = metadata.get("palette") or ()
        if not all(isinstance(name, str) for name in known) or not all(0 <= x <= 255 for one in colours for x in one):
            raise UserError(
                f"{where} is damaged: its classes are texts, and its palette has a red, green and blue of 0 to 255 for "
                "each of them; copy it again"
            )
        colours = colours if len(colours) == len(classes) else palette(len(classes))
        return Predictor(
            model=model.eval().to(device),
            inputs=Inputs(inputs) if inputs else None,
            classes=classes,
            palette=tuple((int(r), int(g), int(b)) for r, g, b in colours),
            source=where,
            metadata=metadata,
            dtype=dtype,
            precision=precision,
        )


def _class_count(model: nn.Module) -> int:
    """Returns how many classes a model tells apart, as its heads say; 0 where none does."""
    if isinstance(model, TimmClassifier):
        net: Any = model.model
        return int(net.num_classes)
    heads = (module for name, child in model.named_children() if name != "backbone" for module in child.modules())
    counts = [getattr(module, "num_classes", 0) for module in heads]
    return max((count for count in counts if isinstance(count, int)), default=0)


def read_description(path: Path) -> dict[str, Any]:
    """Returns the metadata of a run's `model.safetensors`, see `rmoe.engine.checkpoint.export.write_model`; or what
    the config.json says of a folder in Hugging Face's layout, which is the same.

    Raises:
        UserError: it has none, or is of a newer rmoe.
    """
    metadata = read_config_json(path / CONFIG) if path.is_dir() else read_metadata(path)
    if "model" not in metadata:
        raise UserError(f"{path} does not say what model it holds: no training of rmoe has written it; {_GIVE}")
    if "initial" in metadata:
        raise UserError(f"{path} holds the backbone alone, for timm; give {path.with_name(MODEL)}")
    if not isinstance(metadata["model"], dict) or not isinstance(metadata.get("inputs") or {}, dict):
        raise UserError(f"{path} describes its model by {str(metadata['model'])[:80]!r}, which is no config; {_GIVE}")
    own, its = (_version(text) for text in (rmoe.__version__, metadata["rmoe"]))
    if its is None or (own or ()) < its:
        raise UserError(
            f"{path} was written by rmoe {metadata['rmoe'][:40]}, this is {rmoe.__version__}; install that version "
            "or a later one"
        )
    fill_in_saved_moe(metadata["model"])
    return metadata


def read_config_json(path: Path) -> dict[str, Any]:
    """Returns the content of a config.json.

    Raises:
        UserError: it is damaged, or another program's.
    """
    try:
        content = json.loads(path.read_text()) if path.stat().st_size <= _LARGEST else None
        if not isinstance(content, dict):
            raise ValueError
    except Exception as error:  # damaged in any way
        raise UserError(f"{path} is no JSON object; copy it again, or save the run anew by rmoe export") from error
    if "architecture" in content:
        raise UserError(
            f"{path} is timm's: load the model by timm.create_model('local-dir:{path.parent}', pretrained=True), or "
            "give the folder as a config's core"
        )
    if not isinstance(content.get("rmoe"), str):
        raise UserError(f"{path} was not written by rmoe; {_GIVE}")
    return content


def build_model(metadata: Mapping[str, Any], where: Path) -> nn.Module:
    """Returns the model that metadata describe, with random weights, all experts in this process, on the CPU.

    Args:
        metadata: of `read_description`.
        where: what messages call their origin.

    Raises:
        UserError: they name what neither we nor OpenMMLab register, or cannot be built.
    """
    inputs = metadata.get("inputs") or {}
    scope, model = inputs.get("scope", "mmengine"), safe_config.with_pairs(metadata["model"])
    modules = [name for name in inputs.get("imports", ()) if name not in sys.modules]
    packages = [scope] if scope in ("mmseg", "mmdet") else []
    with quiet():
        safe_config.check([model, inputs], str(where), _importable(modules, where), packages)
        with DefaultScope.overwrite_default_scope(scope), torch.random.fork_rng([]):
            return revert_sync_batchnorm(MODELS.build(for_one_process(Config({"model": model}).model)))


def _importable(modules: list[Any], where: Path) -> list[str]:
    for name in modules:
        if not safe_config.is_ours(name):
            raise UserError(
                f"{where} needs code of its own, the module {name!r}: if you trust it, import it first (rmoe predict "
                f"and rmoe test do with --import {name})"
            )
    return modules


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves out what packages say while something is built or evaluated: the run's own log has it."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        with without_noise(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="(mmengine|mmcv|mmseg|mmdet)\\.")
            yield
    finally:
        logger.setLevel(level)


def _found(path: Path) -> Path:
    """Returns the file or checkpoint whose weights are meant."""
    if not path.exists():
        raise UserError(f"there is no {path}{_hint(path)}; {_GIVE}")
    if path.is_file() or is_checkpoint(path):
        return path
    if (path / CONFIG).is_file():
        if not weights_in(path).is_file():
            raise UserError(f"{path} has a {CONFIG} but neither {MODEL} nor {INDEX}; copy its weights there, too")
        return path
    if not (path / MODEL).is_file():
        if (path / ADAPTER).is_file():
            return path / ADAPTER  # which is refused by what it is
        if any(path.glob("*/vis_data")) or any(map(is_checkpoint, path.iterdir())):
            raise UserError(f"{path} has no {MODEL}: the run is not finished; let it go on by --resume")
        inside = sorted(one.parent for one in path.glob(f"*/{MODEL}"))
        raise UserError(f"{path} is no run{_hint(path, inside)}: it has no {MODEL}; {_GIVE}")
    best = sorted(path.glob(_BEST))
    if len(best) > 1:
        names = ", ".join(one.name for one in best)
        raise UserError(
            f"{path} has the best weights by several metrics: {names}; give the path of one, or of {MODEL} for the last"
        )
    return best[0] if best else path / MODEL


def _hint(path: Path, runs: list[Path] | None = None) -> str:
    if runs is None:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        close = difflib.get_close_matches(path.name, [one.name for one in beside], n=1)
        runs = [path.with_name(close[0])] if close else []
    return f", did you mean {runs[0]}?" if runs else ""


def _version(text: str) -> tuple[int, int] | None:
    """Returns the first two numbers of a version; those after them change no format."""
    first = text.split(".")[:2]
    return (int(first[0]), int(first[1])) if len(first) == 2 and all(map(str.isdecimal, first)) else None


def checked_device(device: str | torch.device | None) -> torch.device:
    """Returns a device that can be used; by default a GPU if there is one.

    Raises:
        UserError: it is none, or is not there.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        found = torch.empty(0, device=chosen).device
        if found.type == "meta":
            raise ValueError("it holds no numbers")
        return found
    except Exception as error:  # torch raises errors of many types for what is no device and for one that is not there
        text = str(error).splitlines()[0]
        raise UserError(f"the device {chosen!r:.80} cannot be used: {text}; give cpu, cuda or cuda:N") from error


def _dtype(dtype: Any) -> torch.dtype:
    found = _DTYPES.get(str(dtype or "float32").removeprefix("torch."))
    if found is None:
        raise UserError(f"dtype is {dtype!r:.80}; it is one of {', '.join(_DTYPES)}")
    return found
