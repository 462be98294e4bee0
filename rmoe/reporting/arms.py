"""Says which runs are of one arm: those that were treated alike, whatever their seeds and wherever they are.

What a run starts from, a core or `load_from`, counts by what it is: where it was made by a run that is still there, by
that run's config, as an arm of its own; else by its path, in which the run's own seed is forgiven, and by the hash of
its file where one path had several files, or one file several paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rmoe.engine.checkpoint.export import MODEL
from rmoe.errors import UserError
from rmoe.inference.runs import Run, literal_config

# What may differ between runs of one arm: where they are, and how they were carried out.
_BESIDE = ("work_dir", "resume", "launcher", "env_cfg", "strategy", "card", "log_level", "visualizer")
# What of DeepSpeed's JSON changes the training.
_TREATED = (
    *("train_batch_size", "gradient_clipping", "fp16.enabled", "bf16.enabled"),
    *("torch_autocast.enabled", "torch_autocast.dtype"),
)
_OFF = ("None", "False", "0", "0.0")
_PER_PROCESS = "train_dataloader.batch_size"
_STRATEGY, _LOAD = "strategy.config.", "load_from"
_DEEPEST = 8  # runs that start from one another


def settings(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Returns what of each run's config belongs to its arm, by dotted key, as text; see above."""
    return _settings([run.config.to_dict() for run in runs], [run.core_sha256 for run in runs])


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, value as text) of a config; a list of plain values is one value."""
    plain = not isinstance(node, Mapping) and not any(isinstance(one, Mapping) for one in _items(node).values())
    if plain or not node:
        yield path, str(node)
        return
    for key, inner in _items(node).items():
        yield from leaves(inner, f"{path}.{key}".lstrip("."))


def _items(node: Any) -> dict[Any, Any]:
    return dict(node) if isinstance(node, Mapping) else dict(enumerate(node)) if isinstance(node, list | tuple) else {}


def _settings(
    configs: Sequence[Mapping[str, Any]], hashes: Sequence[str | None], depth: int = 0
) -> list[dict[str, str]]:
    whole = [dict(leaves(config)) for config in configs]
    found = [_own(one) for one in whole]
    seeds = [str((config.get("randomness") or {}).get("seed") or 0) for config in configs]
    _fill_in_resumed(found, [config.get("resume") for config in configs])
    for key in dict.fromkeys(key for one in found for key in one if key == _LOAD or key.endswith(".core")):
        mine = [i for i, one in enumerate(found) if one.get(key, "None") != "None"]
        digests = [hashes[i] if key != _LOAD else None for i in mine]
        origins = _origins(key, [found[i][key] for i in mine], [seeds[i] for i in mine], digests, depth)
        for i, origin in zip(mine, origins, strict=True):
            del found[i][key]
            found[i] |= origin
    return found


def _own(config: Mapping[str, str]) -> dict[str, str]:
    """Returns what a run's config says of its treatment."""
    treated = {key: value for key in _TREATED if (value := config.get(_STRATEGY + key, "None")) not in _OFF}
    beside = {*_BESIDE, "seed"}
    kept = {k: x for k, x in config.items() if not {k.partition(".")[0], k.rpartition(".")[2]} & beside}
    if "train_batch_size" in treated:
        kept.pop(_PER_PROCESS, None)
    return kept | treated


def _fill_in_resumed(found: Sequence[dict[str, str]], resumed: Sequence[Any]) -> None:
    """Gives resumed runs, whose configs no longer say what they were loaded from, what runs that are else alike say."""
    for one, again in zip(found, resumed, strict=True):
        alike = [
            other for other, its in zip(found, resumed, strict=True) if not its and _without(other) == _without(one)
        ]
        if again and len(known := {other.get(_LOAD, "None") for other in alike}) == 1:
            one[_LOAD] = known.pop()


def _without(config: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in config.items() if key != _LOAD and not key.endswith(".core")}


def _origins(
    key: str, paths: Sequence[str], seeds: Sequence[str], hashes: Sequence[str | None], depth: int
) -> list[dict[str, str]]:
    """Returns what each run starts from, by dotted key at or below `key`."""
    makers = {path: config for path in paths if depth < _DEEPEST and (config := _maker(path)) is not None}
    made = dict(zip(makers, _settings([*makers.values()], [None] * len(makers), depth + 1), strict=True))
    names = _names(paths, seeds, hashes)
    return [
        {f"{key}.{inner}": value for inner, value in (made[path] | _file(path)).items()}
        if path in made
        else {key: name}
        for path, name in zip(paths, names, strict=True)
    ]


def _maker(path: str) -> dict[str, Any] | None:
    """Returns the config of the run that has made a folder or file, where it is there."""
    with suppress(UserError):
        config = literal_config(Path(path) if os.path.isdir(path) else Path(path).parent).to_dict()
        return config if os.path.exists(path) and "model" in config else None
    return None


def _file(path: str) -> dict[str, str]:
    """Returns which file of a run is meant, if it is not the whole model that the run ends with; steps do not count."""
    name = re.sub(r"\d+", "", os.path.basename(path))
    return {} if os.path.isdir(path) or name == MODEL else {"file": name}


def _names(paths: Sequence[str], seeds: Sequence[str], hashes: Sequence[str | None]) -> list[str]:
    """Returns what to call the file or folder that each run starts from: equal where it is the same to an arm."""
    users: dict[str, set[str]] = {}
    known: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for path, seed, digest in zip(paths, seeds, hashes, strict=True):
        users.setdefault(path, set()).add(seed)
        if digest is not None:
            known.setdefault(path, set()).add(digest)
            first.setdefault(digest, path)
    names = []
    for path, seed, digest in zip(paths, seeds, hashes, strict=True):
        name = path
        if len(users[path]) == 1:  # else it is one for several seeds, whatever number it has
            name = re.sub(rf"(?<=\D)0*{seed}(?=/|$|\.\D\w*$)", "", path)
        if name == path and len(of_path := known.get(path, set())) <= 1:
            name = first[min(of_path)] if of_path else path
        if name in known and len(known[name]) > 1:
            name = f"{name} (SHA-256 {(digest or 'unknown')[:8]})"
        names.append(name)
    return names
