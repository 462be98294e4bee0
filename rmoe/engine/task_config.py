"""Configs of several tasks: made of the configs of each, checked, and taken apart again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import Tensor, nn

from rmoe.engine.check_values import short_name
from rmoe.engine.shipped import find_config
from rmoe.errors import UserError, nearest
from rmoe.moe.stacked import EXPERT_KEY
from rmoe.moe.state import global_state_dict
from rmoe.tasks.multi_task import checked_weights, task_names

_SECTIONS = ("model", "train_dataloader", "val_dataloader", "val_evaluator")
_KEYS = ("config", "weight", *_SECTIONS)
_LOADER = ("num_workers", "persistent_workers", "prefetch_factor", "pin_memory", "timeout")  # of the one loader for all
_SHARED = ("default_scope", "custom_imports", *_SECTIONS)  # of a config, what follows from its tasks' configs
_TYPE = "rmoe.MultiTask"


def join_tasks(cfg: Config) -> None:
    """Turns a config's `tasks`, if it has the section, into model, data and metrics of the run, in place.

    Each task has a `config`, a file or the name of a shipped one, and beside it what differs from that: `model`,
    `train_dataloader`, `val_dataloader`, `val_evaluator`; and the `weight` of its losses. The config's own
    `model.backbone` is set in the backbones of all tasks, and its loaders' workers in the loaders.

    Raises:
        UserError: no such config, one that lacks what a task needs, or backbones that are not one.
    """
    if cfg.get("tasks") is None:
        return
    names = task_names(cfg.tasks)
    changed = cfg.get("model") or {}
    if unknown := sorted(set(changed) - {"backbone", "type"}):
        raise UserError(
            f"model has {unknown[0]} beside tasks; it has a backbone, and the rest stands in tasks.NAME.model"
        )
    own = {name: _read(cfg, name, changed.get("backbone") or {}) for name in names}
    backbones = {name: one.model.backbone.to_dict() for name, one in own.items()}
    maps = {name: [*one.pop("out_indices", (0, 1, 2, 3))] for name, one in backbones.items()}
    first = backbones[names[0]]
    for name in names[1:]:
        _check_equal(first, backbones[name], names[0], name)
    models = {}
    for name, one in own.items():
        model = one.model.to_dict() | {"backbone": {"out_indices": maps[name]}}
        models[name] = {"_scope_": one.get("default_scope") or "mmengine", **model}
    cfg.default_scope = "mmengine"
    cfg.custom_imports = {"imports": _imports([cfg, *own.values()]), "allow_failed_imports": False}
    cfg.model = {
        "type": _TYPE,
        "backbone": {**first, "out_indices": sorted({index for some in maps.values() for index in some})},
        "tasks": models,
        "weights": {name: cfg.tasks[name].get("weight", 1.0) for name in names},
    }
    evaluated = [name for name, one in own.items() if one.get("val_dataloader") and one.get("val_evaluator")]
    if evaluated and (silent := [name for name in names if name not in evaluated]):
        raise UserError(
            f"the task {silent[0]} has no val_dataloader and val_evaluator, and {evaluated[0]} has; give them in its "
            "config, or None in all"
        )
    for kind in ("train", "val") if evaluated else ("train",):
        loaders = {name: one[f"{kind}_dataloader"].to_dict() for name, one in own.items()}
        cfg[f"{kind}_dataloader"] = _loader(cfg, kind, loaders, {name: models[name]["_scope_"] for name in names})
    if evaluated:
        metrics = {name: _scoped(one.val_evaluator, models[name]["_scope_"]) for name, one in own.items()}
        cfg.val_evaluator = {"type": "rmoe.TaskEvaluator", "metrics": metrics}
        cfg.val_cfg = cfg.get("val_cfg") or {"type": "ValLoop"}
    cfg._cfg_dict.pop("tasks")


def _read(cfg: Config, name: str, backbone: Mapping[str, Any]) -> Config:
    """Returns the config of one task, with what is changed in it, and in the backbone of all."""
    from rmoe.engine.read_config import read_config  # which reads those of several tasks by this module

    entry, where = cfg.tasks[name], f"tasks.{name}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("config"), str):
        raise UserError(f"{where} is {str(entry)[:100]}; it has a config, such as dict(config='demo/residual.py')")
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise UserError(f"{where} has no key '{unknown[0]}'{nearest(unknown[0], _KEYS)}")
    checked_weights({name: entry.get("weight", 1.0)}, [name])
    beside = Path(cfg.filename or ".").parent / entry["config"]
    path = beside if beside.is_file() else find_config(Path(entry["config"]))
    own = read_config(path, {})
    own.merge_from_dict({key: entry[key] for key in _SECTIONS if key in entry})
    if model_tasks(own.get("model")):
        raise UserError(f"{where}.config {path} has several tasks itself; name the configs of each")
    for key in ("model", "train_dataloader"):
        if not own.get(key):
            raise UserError(f"{where}: {path} has no {key}, which a task needs; give it in {where}.{key}")
    if not own.model.get("backbone"):
        raise UserError(f"{where}: the model of {path} has no backbone to share, as segmentors and detectors have")
    own.merge_from_dict({"model": {"backbone": copy.deepcopy(backbone)}})  # of which a merge takes _delete_
    return own


def _check_equal(one: Mapping[str, Any], other: Mapping[str, Any], name: str, other_name: str) -> None:
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            said = [
                f"{str(x.get(key, 'not set'))[:120]} of the task {of}" for x, of in ((one, name), (other, other_name))
            ]
            raise UserError(
                f"the tasks have other backbones: {key} is {said[0]} and {said[1]}; one core has one: set "
                f"model.backbone.{key} beside tasks"
            )


def _imports(configs: Sequence[Config]) -> list[str]:
    found: dict[str, None] = {}
    for one in configs:
        given = one.get("custom_imports") or {}
        imports = given.get("imports", ()) if isinstance(given, Mapping) else given
        found |= dict.fromkeys([imports] if isinstance(imports, str) else imports)
    return [*found]


def _scoped(node: Any, scope: str) -> Any:
    """Returns the config of a thing, or those of several, as plain data that says whose registries have it."""
    if isinstance(node, Mapping):
        return {"_scope_": scope, **(node.to_dict() if hasattr(node, "to_dict") else node)}
    return [_scoped(one, scope) for one in node]


def _loader(cfg: Config, kind: str, loaders: Mapping[str, dict[str, Any]], scopes: Mapping[str, str]) -> dict[str, Any]:
    """Returns the loader of all tasks."""
    own = cfg.get(f"{kind}_dataloader") or {}
    if unknown := sorted(set(own) - set(_LOADER)):
        raise UserError(
            f"{kind}_dataloader has {unknown[0]} beside tasks; it takes {', '.join(_LOADER)}, the rest stands in "
            f"tasks.NAME.{kind}_dataloader"
        )
    for name, loader in loaders.items():
        if not loader.get("dataset"):
            raise UserError(f"tasks.{name}.{kind}_dataloader has no dataset; give one, or leave the task out")
    sizes = {name: loader.get("batch_size", 1) for name, loader in loaders.items()}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"tasks.{name}.{kind}_dataloader.batch_size is {size!r}; it is a whole number from 1")
    workers = max(loader.get("num_workers", 0) for loader in loaders.values())
    joined = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "dataset": {
            "type": "rmoe.TaskDatasets",
            "datasets": {name: _scoped(one["dataset"], scopes[name]) for name, one in loaders.items()},
        },
        "collate_fn": {"type": "rmoe.collate_tasks"},
        "batch_size": sum(sizes.values()),
        "sampler": {"type": "rmoe.TaskSampler", "shuffle": True, "batch_sizes": sizes},
    }
    if kind == "val":
        joined |= {"batch_size": max(sizes.values()), "sampler": {"type": "DefaultSampler", "shuffle": False}}
        joined["batch_sampler"] = {"type": "rmoe.TaskBatches", "batch_sizes": sizes}
    return joined | dict(own)


def model_tasks(model: Any) -> list[str]:
    """Returns the names of the tasks of a model, by its config; none of a model of one task."""
    kind = (model or {}).get("type") if isinstance(model, Mapping) else None
    several = isinstance(kind, str | type) and short_name(kind) == "MultiTask"
    return task_names(model.get("tasks")) if several else []


def check_tasks(cfg: Config) -> None:
    """Checks that model, data and metrics of a config have the same tasks, and that the best checkpoint is of one.

    Raises:
        UserError: they have not, or the run is counted in epochs.
    """
    names = model_tasks(cfg.model)
    if not names:
        return
    places: dict[str, Any] = {"model.weights": cfg.model.get("weights"), "val_evaluator.metrics": None}
    for kind, sampler in (("train", "sampler"), ("val", "batch_sampler")):
        if loader := cfg.get(f"{kind}_dataloader"):
            dataset = loader.dataset.get("dataset", loader.dataset)  # as a run has dumped it, with its seed
            places[f"{kind}_dataloader.dataset.datasets"] = dataset.get("datasets") or {}
            places[f"{kind}_dataloader.{sampler}.batch_sizes"] = (loader.get(sampler) or {}).get("batch_sizes") or {}
    if cfg.get("val_evaluator"):
        places["val_evaluator.metrics"] = cfg.val_evaluator.get("metrics") or {}
    for where, found in places.items():
        if found is None:
            continue
        if unknown := sorted(set(found) - set(names)):
            raise UserError(f"{where} has the task '{unknown[0]}'{nearest(unknown[0], names)}")
        if where != "model.weights" and (lacking := [name for name in names if name not in found]):
            raise UserError(f"{where} lacks the task {lacking[0]}, which the model has; give all of {', '.join(names)}")
    if "max_iters" not in cfg.train_cfg:
        raise UserError("several tasks train by steps: give train_cfg=dict(type='IterBasedTrainLoop', max_iters=…)")
    _check_best((cfg.get("default_hooks") or {}).get("checkpoint") or {}, names)


def _check_best(saver: Mapping[str, Any], names: Sequence[str]) -> None:
    best = saver.get("save_best") or []
    for key in [best] if isinstance(best, str) else best:
        name, slash, metric = key.partition("/")
        if not slash or name not in names:
            raise UserError(
                f"default_hooks.checkpoint.save_best is '{key}', of no task{nearest(name, names)}; write TASK/METRIC, "
                f"such as {names[0]}/{metric or 'mIoU'}"
            )


def check_json(cfg: Config, size: int, stage: int) -> None:
    """Checks that several tasks can train as DeepSpeed's JSON says.

    Args:
        cfg: of the run.
        size: images of each step of a process.
        stage: of ZeRO.

    Raises:
        UserError: a step has another number of images than its tasks, or the stage is 3: it takes a mixture's
            gradients as done after the first of its backward passes.
    """
    if not model_tasks(cfg.model):
        return
    if stage == 3:
        raise UserError(
            "zero_optimization.stage is 3, for which a network runs once in a step, and the backbone of several tasks "
            "runs once for each; use stage 2 (ds_configs/zero2.json)"
        )
    if size != (own := sum(cfg.train_dataloader.sampler.batch_sizes.values())):
        raise UserError(
            f"the DeepSpeed JSON gives {size} images to each step of a process, and the tasks' batch sizes add up to "
            f"{own}: write 'auto' for train_batch_size and train_micro_batch_size_per_gpu"
        )


# --- one task of several ----------------------------------------------------------------------------------------------


def checked_task(names: Sequence[str], task: str | None, where: object) -> str | None:
    """Returns the task that is meant of those that a run has, of which there are none if it has one alone.

    Raises:
        UserError: none is named of several, or one that the run has not.
    """
    if not names and task is not None:
        raise UserError(f"{where} is a run of one task, and the task '{task}' is asked for; leave it out")
    if names and task is None:
        raise UserError(f"{where} is a run of the tasks {', '.join(names)}; say which: --task NAME, in Python task=…")
    if task is not None and task not in names:
        raise UserError(f"{where} has no task '{task}'{nearest(task, names)}")
    return task


def model_of(model: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Returns the config of the ordinary model that computes what a model of several tasks does for one."""
    own = {key: value for key, value in model["tasks"][task].items() if key != "_scope_"}
    backbone = dict(model["backbone"])
    if (own.get("backbone") or {}).get("out_indices") is not None:
        backbone["out_indices"] = own["backbone"]["out_indices"]
    if backbone.get("moe") is not None:
        moe = {key: value for key, value in backbone["moe"].items() if key != "tasks"}
        losses = dict(moe.get("losses") or {})
        losses.pop("task_information", None)
        if "losses" in moe:
            moe["losses"] = losses
        if moe.get("router") == "task":
            moe |= {"router": "linear", "num_experts": 1, "ep_size": 1}
        backbone["moe"] = moe
    return {**own, "backbone": backbone}


def state_of(model: Mapping[str, Any], state: Mapping[str, Tensor], task: str) -> dict[str, Tensor]:
    """Returns the weights of `model_of` from those of the model of several tasks, experts under global ids.

    The gates' bias for the task is added to that for all; of gates that give each task an expert, it becomes the only
    one. What the task does not read of the backbone stays in.
    """
    number = task_names(model["tasks"]).index(task)
    every = [*model["backbone"].get("out_indices", (0, 1, 2, 3))]
    wanted = (model["tasks"][task].get("backbone") or {}).get("out_indices") or every
    levels = {every.index(index): level for level, index in enumerate(wanted)}
    lone = (model["backbone"].get("moe") or {}).get("router") == "task"
    found = {}
    for key, x in state.items():
        first, _, rest = key.partition(".")
        part, _, inner = rest.partition(".")
        if first == "tasks":
            if part == task:
                found[inner] = x
        elif part in ("norms", "rescale"):
            level, _, leaf = inner.partition(".")
            if int(level) in levels:
                found[f"backbone.{part}.{levels[int(level)]}.{leaf}"] = x
        elif EXPERT_KEY in key and lone:
            before, _, after = key.partition(EXPERT_KEY)
            expert, _, leaf = after.partition(".")
            if int(expert) == number:
                found[f"{before}{EXPERT_KEY}0.{leaf}"] = x
        elif key.endswith(".gate.task_bias"):
            continue
        elif lone and key.endswith((".gate.weight", ".gate.bias")):
            found[key] = x[:1]
        elif (bias := state.get(f"{key.removesuffix('bias')}task_bias")) is not None and key.endswith(".gate.bias"):
            found[key] = x + bias[number]
        else:
            found[key] = x
    return found


def read_alone(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Returns weights that `state_of` gave without those of a backbone's parts behind the task's last map, which
    `network`, the task's model, does not have.
    """
    known = global_state_dict(network)
    return {key: x for key, x in state.items() if key in known or not key.startswith("backbone.model.")}


def task_config(cfg: Config, task: str | None, where: object) -> Config:
    """Returns the config of a run, or of the one task that is meant of several; see `checked_task`."""
    task = checked_task(model_tasks(cfg.get("model")), task, where)
    return cfg if task is None else config_of(cfg, task)


def config_of(cfg: Config, task: str) -> Config:
    """Returns the config of a run of one task, from that of a run of several: model, data and metrics of the task."""
    plain = cfg.to_dict()
    scope = plain["model"]["tasks"][task].get("_scope_", "mmengine")
    found = {**plain, "default_scope": scope, "model": model_of(plain["model"], task)}
    for kind, sampler in (("train", "sampler"), ("val", "batch_sampler")):
        if loader := plain.get(f"{kind}_dataloader"):
            dataset = loader["dataset"].get("dataset", loader["dataset"])
            kept = {key: value for key, value in loader.items() if key in _LOADER}
            found[f"{kind}_dataloader"] = {
                **kept,
                "batch_size": loader[sampler]["batch_sizes"][task],
                "sampler": {"type": "DefaultSampler", "shuffle": kind == "train"},
                "dataset": _plain(dataset["datasets"][task]),
            }
    if plain.get("val_evaluator"):
        found["val_evaluator"] = _plain(plain["val_evaluator"]["metrics"][task])
    return Config(found, filename=cfg.filename)


def _plain(node: Any) -> Any:
    """Returns what `_scoped` was given."""
    if isinstance(node, Mapping):
        return {key: value for key, value in node.items() if key != "_scope_"}
    return [_plain(one) for one in node]
