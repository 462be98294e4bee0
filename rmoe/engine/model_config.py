"""What stands in a model's config, wherever in it, and the same model without checkpoints and other processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

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
