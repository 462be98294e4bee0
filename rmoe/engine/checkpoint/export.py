"""What a finished run leaves: its whole model in `model.safetensors`, which says what it is, and a dense backbone as
timm reads it in `backbone.safetensors`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import rmoe
from rmoe.backbones.build import timm_model
from rmoe.backbones.hub import located
from rmoe.engine.checkpoint.files import PARTIAL, put_in_place
from rmoe.engine.model_config import complete_moe, mappings, moe_dicts
from rmoe.errors import UserError
from rmoe.moe.state import save_tensors

MODEL, BACKBONE, ADAPTER = "model.safetensors", "backbone.safetensors", "adapter.safetensors"
_JSON = (
    "model",
    "classes",
    "palette",
    "inputs",
    "tasks",
    "initial",
    "adapter",
)  # the keys of the metadata whose strings are JSON


def write_model(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    stage: str | None = None,
    classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    inputs: Mapping[str, Any] | None = None,
    tasks: Mapping[str, Any] | None = None,
    core_sha256: str | None = None,
) -> None:
    """Writes `model.safetensors` and, for a dense timm model, `backbone.safetensors` into `folder`.

    The metadata of both, which `read_metadata` reads, are `format` ("pt"), `rmoe` (the version that wrote it), `stage`,
    `model` (the model's config), `classes`, `palette`, `inputs`, `tasks` and `core_sha256`, without those that are not
    known.
    The backbone's says with `initial` which of its weights the model does not have, see `timm_state`.

    Args:
        folder: a work dir.
        state: what `rmoe.moe.state.global_state_dict` returned.
        config: of the model, as plain data; what it leaves open of its mixtures is written out.
        stage: of the pipeline, as the config says.
        classes: their names, in the order of their indices.
        palette: their colours, each [red, green, blue] in 0 … 255.
        inputs: how images become the model's inputs, see `inputs_of`.
        tasks: of a model of several, by name, their own classes, palette and inputs.
        core_sha256: see `core_sha256`.
    """
    known: dict[str, Any] = {"stage": stage, "core_sha256": core_sha256}
    known |= {"classes": classes, "palette": palette, "inputs": inputs, "tasks": tasks}
    config = copy.deepcopy(dict(config))
    for moe in moe_dicts(config):
        complete_moe(moe)
    metadata: dict[str, Any] = {"format": "pt", "rmoe": rmoe.__version__, "model": config}
    metadata |= {key: value for key, value in known.items() if value is not None}
    write_tensors(folder / MODEL, state, metadata)
    if found := timm_state(config, state):
        write_tensors(folder / BACKBONE, found[0], {**metadata, "initial": found[1]})
    else:
        (folder / BACKBONE).unlink(missing_ok=True)  # of an earlier run


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads what `write_model` says of the weights in a file, or in the `model.safetensors` of a work dir.

    Returns:
        The metadata by name, as Python values; empty for files of other origin and of earlier versions.

    Raises:
        UserError: there is no such file, it cannot be read, or its metadata are damaged.
    """
    path = path / MODEL if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        if "rmoe" not in metadata:
            return {}
        return {key: json.loads(text) if key in _JSON else text for key, text in metadata.items()}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give the work dir of a finished run, or a file of it"
        ) from error


def inputs_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns how a run's validation images become its model's inputs, from the run's config; None where it has none.

    Returns:
        `scope`, whose registries hold the names below; `imports`, the modules that register what is not OpenMMLab's;
        and `pipeline`, mmseg's or mmdet's transforms, or `transform`, arguments of `timm.data.create_transform`.
    """
    loader = config.get("val_dataloader") or config.get("test_dataloader") or {}
    dataset = loader.get("dataset") or {}
    while "dataset" in dataset or "datasets" in dataset:  # a wrapper, such as mmengine's RepeatDataset
        dataset = dataset.get("dataset") or dataset["datasets"][0]
    found = {key: dataset[key] for key in ("pipeline", "transform") if dataset.get(key)}
    if len(found) != 1:
        return None
    given = config.get("custom_imports") or {}
    imports = given.get("imports", ()) if isinstance(given, Mapping) else given
    named = [imports] if isinstance(imports, str) else [*imports]
    return {"scope": config.get("default_scope") or "mmengine", "imports": named, **found}


def core_of(config: Any) -> str | None:
    """Returns the core that a model's config names, if it names one."""
    return next((node["core"] for node in mappings(config) if node.get("core")), None)


def core_sha256(config: Any) -> str | None:
    """Returns the SHA-256 of the file of the core that a model's config names, as `sha256sum` prints it; None where
    there is none. Of a finished run's folder that is its `model.safetensors`.
    """
    core = core_of(config)
    if core is None:
        return None
    path = located(Path(core))
    path = path / MODEL if path.is_dir() else path
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def timm_state(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    """Returns the weights of the dense timm model in a model, under timm's own names.

    `timm.create_model(NAME, **kwargs, checkpoint_path=FILE)` takes them, with `num_classes=0` for the backbone of a
    segmentor or detector. That has no use for some weights, such as a last norm; timm wants them all.

    Args:
        config: of the model.
        state: of the model.

    Returns:
        All weights, and the names of those that the model does not have and that are timm's initial ones; None where
        the model is no timm model, or a mixture of experts.
    """
    found = [(prefix, node) for prefix, node in timm_nodes(config) if node.get("moe") is None]
    if len(found) != 1:
        return None
    prefix, node = found[0]
    own = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    whole = untrained(node).state_dict()
    return {**whole, **own}, sorted(whole.keys() - own.keys())


def untrained(node: Mapping[str, Any]) -> nn.Module:
    """Returns the timm model that a part of a model's config names, with timm's initial weights; random states stay."""
    kwargs = {k: x for k, x in (node.get("kwargs") or {}).items() if k not in ("pretrained", "checkpoint_path")}
    with torch.random.fork_rng([]):
        return timm_model(node["model"], {**kwargs, "num_classes": node.get("num_classes", 0)})


def timm_nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the prefix of the weights and the config of every timm model in a model's config."""
    if isinstance(config, Mapping):
        if str(config.get("type")).rpartition(".")[2] in ("TimmPyramid", "TimmClassifier"):
            yield f"{prefix}model.", config
        for key, value in config.items():
            yield from timm_nodes(value, f"{prefix}{key}.")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a safetensors file aside, brings it to the disk, then renames it; of the metadata, what is no string
    becomes JSON.
    """
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    partial = path.with_name(path.name + PARTIAL)
    save_tensors(partial, tensors, metadata)
    put_in_place(partial, path)
