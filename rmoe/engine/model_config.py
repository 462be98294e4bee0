"""What stands in a model's config, wherever in it, and the same model without checkpoints and other processes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from rmoe.backbones.hub import SCHEME
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError

_BACKBONES = ("TimmPyramid", "TimmClassifier")


def mappings(node: Any) -> Iterator[Any]:
    """Yields every mapping in a config, the config included."""
    if isinstance(node, Mapping):
        yield node
    if isinstance(node, (Mapping, list, tuple)):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from mappings(value)


def moe_dicts(config: Any) -> Iterator[Any]:
    """Yields every dict named `moe` in a model's config; an empty one is a mixture with the defaults."""
    for node in mappings(config):
        if isinstance(node.get("moe"), Mapping):
            yield node["moe"]


def complete_moe(values: Any) -> ResidualMoEConfig:
    """Returns the mixture that a dict of a config describes, and writes what it leaves open into it, in place: what is
    saved says all that a mixture is made of, whatever the defaults of later versions are.
    """
    config = ResidualMoEConfig.from_dict(values).resolved()
    for key, value in dataclasses.asdict(config).items():
        if values.get(key, "auto") == "auto" or isinstance(value, dict):
            values[key] = value
    return config


def fill_in_saved_moe(config: Any) -> None:
    """Writes into a model's saved config, in place, what its mixtures leave open, by the defaults of the time when a
    run's config could leave something open: one expert for each token, and a frozen core.
    """
    for moe in moe_dicts(config):
        for key, value in {"top_k": 1, "train_core": False}.items():
            moe.setdefault(key, value)


def without_paths(node: Any, key: Any = None) -> Any:
    """Returns a copy of a description in which paths of this machine, and what a core is called, are cut to names."""
    if isinstance(node, Mapping):
        return {name: without_paths(value, name) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(without_paths(value, key) for value in node)
    if not isinstance(node, str) or "://" in node or node.startswith(SCHEME):
        return node
    local = key == "core" or PurePosixPath(node).is_absolute() or PureWindowsPath(node).is_absolute()
    return (PureWindowsPath(node).name or node) if local else node


def allow_random_cores(config: Any) -> None:
    """Sets `allow_random_core` for every backbone without a core in a model's config, in place: weights come later."""
    for node in mappings(config):
        kind = node.get("type")
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        if name.rpartition(".")[2] in _BACKBONES and node.get("core") is None:
            node["allow_random_core"] = True


def for_one_process(config: Any) -> Any:
    """Returns a model's config that reads no checkpoint and keeps all experts in this process: for models whose weights
    come later, or do not matter.
    """
    changed = copy.deepcopy(config)
    for node in mappings(changed):
        if "core" in node:
            node["core"] = None
        if node.get("pretrained"):
            node["pretrained"] = False if node["pretrained"] is True else None
        if node.get("checkpoint_path"):
            node["checkpoint_path"] = ""
    for moe in moe_dicts(changed):
        moe["ep_size"] = 1
    allow_random_cores(changed)
    return changed


def check_maps(config: Any, model: Any) -> None:
    """Checks that what reads a backbone's maps, a neck or else the heads, says of them what they are.

    Args:
        config: of a segmentor or detector; a reader without in_channels is let pass.
        model: what was built of it; another backbone than `rmoe.TimmPyramid` is let pass.

    Raises:
        UserError: a reader names a map that there is not, or another number of channels.
    """
    channels = getattr(getattr(model, "backbone", None), "channels", None)
    if not isinstance(channels, list) or not isinstance(config, Mapping):
        return
    for name, reader in _readers(config):
        if "in_channels" not in reader:
            continue
        wanted: Any = reader["in_channels"]
        index: Any = reader.get("in_index")
        several = isinstance(wanted, list | tuple)
        if index is None:
            index = range(len(channels)) if several else -1
        numbers, widths = ([*index], [*wanted]) if several and not isinstance(index, int) else ([index], [wanted])
        if all(type(x) is int and -len(channels) <= x < len(channels) for x in numbers):
            found = [channels[number] for number in numbers]
            if found == widths:
                continue
            read, there = f"{name}.in_channels is {wanted}", f"maps of {_listed(found)} channels"
        else:
            read, there = f"{name}.in_index is {index}", f"{len(channels)} maps, of {_listed(channels)} channels"
        raise UserError(f"{read}, but the backbone gives it {there}; change it, or out_indices of the backbone")


def _readers(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the name and the config of all that reads the backbone's maps."""
    neck = config.get("neck")
    if neck:
        yield ("neck", neck) if isinstance(neck, Mapping) else ("neck[0]", neck[0])
        return
    for name in ("decode_head", "auxiliary_head", "panoptic_head"):
        node = config.get(name)
        if isinstance(node, Mapping):
            yield name, node
        for number, one in enumerate(node if isinstance(node, list | tuple) else ()):
            yield f"{name}[{number}]", one


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
