"""What may change between a checkpoint and the run that goes on from it, and what may not.

A checkpoint says which config it was made with, as text. It is read as data: nothing in it is run.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmoe.config import ResidualMoEConfig
from rmoe.engine.checkpoint.files import RUN
from rmoe.engine.model_config import fill_in_saved_moe, moe_dicts
from rmoe.engine.optim import complete_paramwise
from rmoe.errors import UserError

_REFUSED = {
    "model": "another model",
    "optim_wrapper.optimizer": "other settings of the optimizer",
    "optim_wrapper.paramwise_cfg": "other groups of parameters",
    "param_scheduler": "another schedule",
}
_TOLD = ("train_cfg", "optim_wrapper.clip_grad", "train_dataloader", "custom_hooks", "val_evaluator")
# Of a model: where weights come from, how experts are spread and what is kept for backward. None changes the function.
_FREE = {
    *("core", "allow_random_core", "init_cfg", "pretrained", "checkpoint"),
    *("ep_size", "exchange", "recompute", "with_cp"),
}
# Keys of a mixture that a run has always written out since residuals of low rank have a rate of their own by default.
_WRITTEN_OUT = {"top_k", "alpha", "shared_a", "tasks", "expert_drop"}


def compare(path: Path, cfg: Any) -> list[str]:
    """Compares a config with that of the checkpoint `path`.

    Returns:
        One line for every section that differs and may.

    Raises:
        UserError: the model's function, its losses or the meaning of the optimizer would be others than the
            checkpoint's, whose state would go on as if nothing had changed.
    """
    if not (before := parsed(_text(path))):
        return []
    _fill_in_saved(before)
    now = parsed(cfg.pretty_text)
    for section, what in _REFUSED.items():
        old, new = (dict(_flat(_section(one, section), section)) for one in (before, now))
        if section == "optim_wrapper.optimizer" and old.get(f"{section}.type") != new.get(f"{section}.type"):
            continue  # another kind is refused where its states would be restored
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and _FREE.isdisjoint(key.split(".")):
                raise UserError(
                    f"{path} is of {what}: {key} was {_said(old, key)}; this run has {_said(new, key)}. Resume "
                    "with the former, or start a new run from its weights alone: another --work-dir and --cfg-options "
                    f"load_from={path}"
                )
    notes = []
    for section in _TOLD:
        old, new = (dict(_flat(_section(one, section), section)) for one in (before, now))
        if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
            which = "; ".join(f"{key} was {_said(old, key)}, is {_said(new, key)}" for key in changed[:3])
            notes.append(f"resuming with another {section}: {which}; the run goes on with the new one")
    return notes


def _fill_in_saved(config: Any) -> None:
    """Writes into a run's saved config, in place, what it leaves open of its mixtures and of the optimizer's groups, by
    the defaults of the version that saved it.
    """
    model, wrapper = config.get("model"), config.get("optim_wrapper")
    if isinstance(wrapper, dict):
        mixtures, given = [*moe_dicts(model)], wrapper.get("paramwise_cfg")
        if not all(one.keys() >= _WRITTEN_OUT for one in mixtures):
            wrapper["paramwise_cfg"] = {"residual_lr_mult": 1.0, **(given or {})}
        fill_in_saved_moe(model)
        complete_paramwise(wrapper, [ResidualMoEConfig.from_dict(one) for one in mixtures])


def _text(path: Path) -> str:
    """Returns the config in a checkpoint; nothing, where there is none, as in one that is damaged."""
    try:
        return str(json.loads((path / RUN).read_text())["meta"]["cfg"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def parsed(text: str) -> dict[str, Any]:
    """Returns the text of a dumped config as data, of which nothing is run; what is no literal stays text."""
    try:
        lines = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return {}
    return {
        line.targets[0].id: _value(line.value)
        for line in lines
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
    }


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        values = {word.arg: _value(word.value) for word in node.keywords if word.arg}
        for one in node.keywords:
            if one.arg is None:  # dict(**{...}), for keys that are no names
                values |= _value(one.value)
        return values
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _section(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _flat(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value); every `moe` with all that it leaves open, so that it does not matter what is said."""
    if path.endswith(".moe") and isinstance(node, Mapping):
        node = dataclasses.asdict(ResidualMoEConfig.from_dict(node).resolved())
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}")
    elif isinstance(node, list | tuple) and any(isinstance(item, Mapping) for item in node):
        for index, value in enumerate(node):
            yield from _flat(value, f"{path}.{index}")
    elif node is not None:
        yield path, list(node) if isinstance(node, tuple) else node


def _said(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"
