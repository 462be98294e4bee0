"""Finds weights in Hugging Face's layout, in a folder or on the hub: model.safetensors, or shards with an index."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rmoe.errors import UserError

SCHEME = "hf-hub:"  # as in timm's names of models
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_PICKLED = "pytorch_model.bin"
_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_LARGEST = 64 * 2**20  # bytes of an index


def located(path: Path) -> Path:
    """Returns where a checkpoint lies on this machine. What is called hf-hub:ORG/NAME, or hf-hub:ORG/NAME@REVISION, is
    fetched from the hub first, unless it lies in its cache.

    Raises:
        UserError: it cannot be had.
    """
    return fetch(str(path).removeprefix(SCHEME)) if str(path).startswith(SCHEME) else path


def is_repo(name: str) -> bool:
    """Returns whether `name` can be that of a repository of the hub, such as "org/name" or "org/name@revision"."""
    return bool(_REPO.fullmatch(name))


def fetch(name: str, *, config: bool = False) -> Path:
    """Fetches the weights of a repository of the hub, through huggingface_hub's cache.

    Args:
        name: ORG/NAME, with @REVISION where it is not the newest.
        config: fetch its config.json as well, and its weights as safetensors alone.

    Returns:
        The folder that they are in; of a repository without safetensors the pickled file, read as weights only.

    Raises:
        UserError: there is no such repository, it has no weights, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if not is_repo(name):
        raise UserError(f"{SCHEME}{name} names no repository of the Hugging Face hub; write {SCHEME}ORG/NAME")
    repo, _, revision = name.partition("@")

    def get(file: str) -> Path:
        return Path(hf_hub_download(repo, file, revision=revision or None))

    try:
        if config:
            get(CONFIG)
        for file in (WEIGHTS, INDEX) if config else (WEIGHTS, INDEX, _PICKLED):
            try:
                found = get(file)
            except EntryNotFoundError as error:
                absent = error
                continue
            for shard in _shards(found).values() if file == INDEX else ():
                get(shard)
            return found if file == _PICKLED else found.parent
        raise absent
    except UserError:
        raise
    except Exception as error:  # huggingface_hub and what it stands on raise errors of many types
        reason = next(iter(str(error).split("\n\n")[0].splitlines()), type(error).__name__)
        raise UserError(
            f"{name} cannot be had from the Hugging Face hub ({type(error).__name__}: {reason}); check its name, your "
            "login (hf auth login) and the network, or give a folder"
        ) from error


def weights_in(folder: Path) -> Path:
    """Returns the file that a folder's weights begin at: model.safetensors, or the index of its shards."""
    return folder / INDEX if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def read_shards(index: Path) -> dict[str, Tensor]:
    """Returns the tensors of all shards that an index names.

    Raises:
        UserError: the index is damaged, or a shard is missing, damaged or holds other tensors than the index says.
    """
    place = _shards(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(place.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise UserError(f"{index.parent} lacks {name}, which its {INDEX} names; copy it there, or save all again")
        try:
            found = load_file(shard)
        except Exception as error:  # safetensors raises errors of many types at damaged bytes
            raise UserError(
                f"{shard} cannot be read ({error}); it was cut short or is no checkpoint: copy or save it again"
            ) from error
        wanted = {key for key, its in place.items() if its == name}
        if wrong := sorted(wanted.symmetric_difference(found)):
            raise UserError(
                f"{shard} and {INDEX} differ in {len(wrong)} weights, such as {wrong[0]}; take all files of one save"
            )
        state |= found
    return state


def _shards(index: Path) -> dict[str, str]:
    """Returns the file of each tensor, all of them plain names beside the index."""
    try:
        place = json.loads(index.read_text())["weight_map"] if index.stat().st_size <= _LARGEST else {}
        if not place or not all(isinstance(file, str) and _SHARD.fullmatch(file) for file in place.values()):
            raise ValueError
    except Exception as error:  # damaged in any way
        raise UserError(
            f"{index} is damaged: it has no weight_map from weights to .safetensors files beside it; copy it again"
        ) from error
    return dict(place)
