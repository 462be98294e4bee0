"""A finished run in Hugging Face's layout: written with a model card, pushed to the hub, loaded from either.

The folder has config.json, which describes the model as a run's own file does, model.safetensors or shards of it with
an index, preprocessor_config.json for other programs, and README.md. A dense backbone can be written as timm reads it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm.models
import torch

import rmoe
from rmoe.backbones.hub import CONFIG, INDEX, SCHEME, WEIGHTS, fetch, is_repo
from rmoe.engine.building import described
from rmoe.engine.checkpoint.export import timm_nodes, timm_state, untrained
from rmoe.engine.checkpoint.files import write_json
from rmoe.engine.model_config import without_paths
from rmoe.errors import UserError
from rmoe.inference.card import card
from rmoe.inference.folders import new_folder
from rmoe.inference.load import load
from rmoe.inference.predictor import Predictor
from rmoe.inference.preprocessing import image_processor, preprocessing
from rmoe.moe.state import global_state_dict, save_tensors

SHARD_SIZE = "5GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_LAST_NORM = re.compile(r"(fc_)?norm\.")  # the one part of timm's models that dense tasks have no use for
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(KB|MB|GB|TB)")


def from_pretrained(
    name: str | Path, *, revision: str | None = None, device: str | torch.device | None = None, dtype: Any = None
) -> Predictor:
    """Loads what `save_pretrained` has written: as `rmoe.load`, from a folder or from the Hugging Face hub.

    Args:
        name: a folder; or ORG/NAME of a repository of the hub, where there is no such folder.
        revision: branch, tag or commit of the repository.
        device, dtype: see `rmoe.load`.

    Raises:
        UserError: there is no such folder or repository, or it is no model of ours; also what `rmoe.load` raises.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise UserError(f"from_pretrained got {name!r:.100}; give a folder, or ORG/NAME of a repository of the hub")
    if not isinstance(revision, str | None):
        raise UserError(f"revision is {revision!r:.100}; it is the name of a branch, tag or commit")
    repo = str(name).removeprefix(SCHEME)
    if Path(name).is_dir():
        return load(name, device=device, dtype=dtype)
    if not is_repo(repo):
        raise UserError(f"there is no folder {name}, and it is no name of a repository; give a folder, or ORG/NAME")
    return load(fetch(f"{repo}@{revision}" if revision else repo, config=True), device=device, dtype=dtype)


def save_pretrained(
    run: Predictor, out: str | Path, *, shard_size: int | str = SHARD_SIZE, license: str | None = None
) -> None:
    """Writes a loaded run into a new folder, in Hugging Face's layout; see `Predictor.save_pretrained`."""
    _check_whole(run)
    state, limit = global_state_dict(run.model), _shard_size(shard_size)
    with new_folder(out) as folder:
        write_json(folder / CONFIG, _config(run))
        _write_weights(folder, state, limit)
        if processor := image_processor(run.metadata):
            write_json(folder / "preprocessor_config.json", processor)
        (folder / "README.md").write_text(card(run, Path(out).name, license))


def push_to_hub(
    run: Predictor,
    repo: str,
    *,
    private: bool = True,
    message: str | None = None,
    shard_size: int | str = SHARD_SIZE,
    license: str | None = None,
) -> str:
    """Writes a loaded run into a repository of the Hugging Face hub; see `Predictor.push_to_hub`."""
    from huggingface_hub import HfApi

    if not isinstance(repo, str) or not is_repo(repo) or "@" in repo:
        raise UserError(f"the repository is {repo!r:.100}; it is ORG/NAME")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / repo.partition("/")[2]
        save_pretrained(run, out, shard_size=shard_size, license=license)
        api = HfApi(library_name="rmoe", library_version=rmoe.__version__)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=out, commit_message=message or f"Model of rmoe {rmoe.__version__}"
            )
        except Exception as error:  # huggingface_hub and what it stands on raise errors of many types
            raise UserError(
                f"{repo} cannot be written ({described(error)}); log in by hf auth login with a token that may write"
            ) from error
    return str(done.commit_url)


def save_timm(run: Predictor, out: str | Path) -> None:
    """Writes the dense timm model of a run into a new folder, under timm's own names and with timm's config.json:
    `timm.create_model("local-dir:OUT", pretrained=True)` loads it, as does "hf-hub:ORG/NAME" once it is pushed, and
    `core=` of a config.

    A last norm, which the backbone of a segmentor or detector does not have, is timm's initial one.

    Raises:
        UserError: the run is no timm model or a mixture of experts, lacks other weights of timm's model, or was loaded
            in fewer bits; or the folder cannot be written.
    """
    _check_whole(run)
    config = run.metadata["model"]
    found = timm_state(config, global_state_dict(run.model))
    if found is None:
        raise UserError(
            f"{run.source} is no dense timm model, so that timm cannot build it; export it without --timm, or the "
            "dense run that it was made from"
        )
    node = next(node for _, node in timm_nodes(config))
    if lacking := [name for name in found[1] if not _LAST_NORM.match(name)]:
        raise UserError(
            f"{run.source} lacks {len(lacking)} weights of timm's {node['model']}, such as {lacking[0]}: its backbone "
            "ends before timm's; export it without --timm"
        )
    net = untrained(node)
    net.load_state_dict(found[0])
    names = list(run.classes) if run.task == "classification" else []
    with new_folder(out) as folder:
        timm.models.save_for_hf(
            net,
            str(folder),
            model_config={"label_names": names} if names else {},
            safe_serialization=True,
            data_config=preprocessing(run.metadata),
        )
        save_tensors(folder / WEIGHTS, net.state_dict(), {"format": "pt"})  # readable by others, see there
        (folder / "README.md").write_text(card(run, Path(out).name, None, timm=node["model"]))


def _check_whole(run: Predictor) -> None:
    """Refuses a run whose weights are no longer those that its description is of."""
    if run.precision is not None:
        raise UserError(
            f"{run.source} was loaded with precision {run.precision!r}, in which weights are not saved; load it without"
        )


def _config(run: Predictor) -> dict[str, Any]:
    """Returns config.json's content: the description of the model, without paths of the machine that trained it."""
    about = without_paths({key: value for key, value in run.metadata.items() if key != "format"})
    return {"library_name": "rmoe", "task": run.task, **about}


def _write_weights(folder: Path, state: Mapping[str, torch.Tensor], limit: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(dict(state), max_shard_size=limit)
    for name, keys in split.filename_to_tensors.items():
        save_tensors(folder / name, {key: state[key] for key in keys}, {"format": "pt"})
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _shard_size(value: Any) -> int:
    """Returns a size in bytes."""
    size = value
    if isinstance(value, str) and (found := _SIZE.fullmatch(value)):
        size = round(float(found[1]) * _UNITS[found[2]])
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(
            f"the shard size is {value!r:.100}; it is a text with a unit, such as '500MB', or in Python bytes"
        )
    return size
