"""Types and ranges of a config's values: one table, looked up before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.registry import OPTIMIZERS

from rmoe.engine.trained import check_train_only
from rmoe.errors import UserError, nearest


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    words: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.words} or {other.words}", lambda value: self.accepts(value) or other.accepts(value))


def is_number(value: Any) -> bool:
    """Returns whether `value` is a finite number, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def whole(least: int, most: int = 2**31 - 1) -> Rule:
    """Returns the rule of a whole number from `least` to `most`."""

    def accepts(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Rule(f"a whole number from {least} to {most}", accepts)


def _number(least: float, below: float = math.inf) -> Rule:
    words = f"a number of at least {least:g}" + ("" if below == math.inf else f" and below {below:g}")
    return Rule(words, lambda value: is_number(value) and least <= value < below)


def between(least: float, most: float = math.inf) -> Rule:
    """Returns the rule of a number above `least` and, unless it is infinite, at most `most`."""
    words = f"a number above {least:g}" + ("" if most == math.inf else f" and at most {most:g}")
    return Rule(words, lambda value: is_number(value) and least < value <= most)


def check_arguments(what: str, **checked: tuple[Any, Rule]) -> None:
    """Checks what `what`, such as a hook, is made with.

    Args:
        what: its name.
        **checked: by name of an argument its value and what it must be.

    Raises:
        UserError: naming the first that is something else.
    """
    for name, (value, rule) in checked.items():
        if not rule.accepts(value):
            raise UserError(f"{what}: {name} is {_shown(value)}; it takes {rule.words}")


def _list_of(rule: Rule, length: int | None = None) -> Rule:
    many = f"a list of {length or 'items'}, each being {rule.words}"
    return Rule(many, lambda x: _is_list(x) and len(x) in (length or len(x),) and all(map(rule.accepts, x)))


_NOTHING = Rule("None", lambda value: value is None)
_FLAG = Rule("True or False", lambda value: isinstance(value, bool))
_TEXT = Rule("a string that is not empty", lambda value: isinstance(value, str) and bool(value))
_SECTION = Rule("a dict", lambda value: isinstance(value, Mapping))
_MADE = Rule("a dict with a type", lambda value: isinstance(value, Mapping) and bool(value.get("type")))
_FINITE = Rule("a finite number", is_number)
_RATE, _SHARE, _INTERVAL = _number(0), _number(0, 1), whole(1)
_NEVER = Rule("-1", lambda value: value == -1 and not isinstance(value, bool))

_LOADER = {
    "": _SECTION,
    "dataset": _MADE,
    "batch_size": _INTERVAL,
    "num_workers": whole(0, 4096),
    "persistent_workers": _FLAG,
    "prefetch_factor": _INTERVAL | _NOTHING,
    "pin_memory": _FLAG,
    "drop_last": _FLAG,
    "timeout": _RATE,
    "sampler": _MADE | _NOTHING,
    "batch_sampler": _SECTION | _NOTHING,
    "collate_fn": _SECTION,
}
_OPTIMIZER = {
    "lr": _RATE,
    "weight_decay": _RATE,
    "betas": _list_of(_SHARE, 2),
    "eps": _RATE,
    "momentum": _RATE,
    "dampening": _RATE,
    "alpha": _RATE,
    "nesterov": _FLAG,
    "amsgrad": _FLAG,
}
_PARAMWISE = {
    **dict.fromkeys(("residual_decay_mult", "gate_lr_mult", "head_lr_mult", "bias_lr_mult", "layer_decay"), _RATE),
    **dict.fromkeys(("residual_lr_mult", "norm_decay_mult", "bias_decay_mult"), _RATE | _NOTHING),
    "exempt": _FLAG,
    "custom_keys": _SECTION | _NOTHING,
    "custom_keys.*": _SECTION,
    "custom_keys.*.*": _RATE,
}
_SCHEDULER = {
    "begin": whole(0),
    "end": _INTERVAL,
    "by_epoch": _FLAG,
    "convert_to_iter_based": _FLAG,
    "T_max": _INTERVAL | _NOTHING,
    "step_size": _INTERVAL,
    "milestones": _list_of(whole(0)),
    "verbose": _FLAG,
    **dict.fromkeys(("eta_min", "power", "gamma", "factor", "start_factor", "end_factor"), _FINITE),
    **dict.fromkeys(("eta_min_ratio",), _FINITE | _NOTHING),
}
_TABLES = {
    "": {
        "model": _MADE,
        "train_dataloader": _SECTION,
        "train_cfg": _SECTION,
        "optim_wrapper": _SECTION,
        "val_cfg": _SECTION | _NOTHING,
        "test_cfg": _SECTION | _NOTHING,
        "val_evaluator": _MADE | _list_of(_MADE) | _NOTHING,
        "test_evaluator": _MADE | _list_of(_MADE) | _NOTHING,
        "param_scheduler": _MADE | _list_of(_MADE) | _NOTHING,
        "default_hooks": _SECTION | _NOTHING,
        "default_hooks.*": _MADE | _NOTHING,
        "custom_hooks": _list_of(_MADE) | _NOTHING,
        "randomness": _SECTION | _NOTHING,
        "randomness.seed": whole(0, 2**32 - 1) | _NOTHING,
        "randomness.deterministic": _FLAG,
        "randomness.diff_rank_seed": _FLAG,
        "env_cfg": _SECTION | _NOTHING,
        "visualizer": _MADE | _NOTHING,
        "visualizer.vis_backends": _list_of(_MADE) | _NOTHING,
        "log_processor": _SECTION | _NOTHING,
        "custom_imports": _SECTION | _NOTHING,
        "load_from": _TEXT | _NOTHING,
        "work_dir": _TEXT | _NOTHING,
        "default_scope": _TEXT | _NOTHING,
        "stage": _TEXT | _NOTHING,
        "card": _SECTION | _NOTHING,
        "calibrate": _SECTION | _NOTHING,
        "resume": _FLAG | _TEXT,
    },
    "train_dataloader": _LOADER,
    "val_dataloader": _LOADER | {"": _SECTION | _NOTHING},
    "test_dataloader": _LOADER | {"": _SECTION | _NOTHING},
    "train_cfg": {
        "max_iters": _INTERVAL,
        "max_epochs": _INTERVAL,
        "val_interval": _INTERVAL,
        "val_begin": whole(0),
        "by_epoch": _FLAG,
        "dynamic_intervals": _list_of(_list_of(_INTERVAL, 2)) | _NOTHING,
    },
    "optim_wrapper": {
        "optimizer": _MADE,
        "accumulative_counts": _INTERVAL,
        "clip_grad": _SECTION | _NOTHING,
        "clip_grad.max_norm": _RATE,
        "paramwise_cfg": _SECTION | _NOTHING,
    },
    "optim_wrapper.optimizer": _OPTIMIZER,
    "optim_wrapper.paramwise_cfg": _PARAMWISE,
    "param_scheduler": _SCHEDULER,
    "param_scheduler.*": _SCHEDULER,
    "default_hooks.checkpoint": {
        "interval": _INTERVAL | _NEVER,
        "max_keep_ckpts": _INTERVAL | _NEVER,
        "by_epoch": _FLAG,
        "save_last": _FLAG,
        "save_best": _TEXT | _list_of(_TEXT) | _NOTHING,
    },
    "default_hooks.logger": {"interval": _INTERVAL, "log_metric_by_epoch": _FLAG, "ignore_last": _FLAG},
}
SECTIONS = {"tasks"} | {path.partition(".")[0] for path in (*_TABLES[""], *_TABLES) if path}  # at the top of a config
_SHOWN = 100  # characters of a value in a message
_LOOPS = {"IterBasedTrainLoop": "max_iters", "EpochBasedTrainLoop": "max_epochs"}


def check_values(cfg: Mapping[str, Any]) -> None:
    """Checks the values of a config that training reads.

    Raises:
        UserError: naming the first key whose value is of another type or out of range, and what it takes.
    """
    cfg = dict(cfg.items())  # of a Config, which is no Mapping
    for key in ("model", "train_dataloader", "train_cfg", "optim_wrapper"):
        if cfg.get(key) is None:
            raise UserError(f"the config has no {key}; training needs one")
    for section, rules in _TABLES.items():
        for path, rule in rules.items():
            for where, value in _found(cfg, ".".join(filter(None, (section, path)))):
                if not rule.accepts(value):
                    raise UserError(f"{where} is {_shown(value)}; it takes {rule.words}")
    for where, value in everywhere(cfg):
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{where} is {value}, which is not a number; give one")
        if (
            where.rpartition(".")[2] == "moe"
            and where.startswith("model.")
            and not (_SECTION | _NOTHING).accepts(value)
        ):
            raise UserError(f"{where} is {_shown(value)}; it takes a dict ({{}}: a mixture with the defaults) or None")
    if "dataset" not in cfg["train_dataloader"]:
        raise UserError("train_dataloader has no dataset; give one, such as dict(type='rmoe.ImageFolder', …)")
    _check_loop(cfg["train_cfg"])
    _check_optimizer(cfg["optim_wrapper"])
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        _check_workers(name, cfg.get(name) or {})


def _check_loop(loop: Mapping[str, Any]) -> None:
    lengths = [key for key in ("max_iters", "max_epochs") if loop.get(key) is not None]
    if len(lengths) != 1:
        said = " and ".join(lengths) or "neither max_iters nor max_epochs"
        raise UserError(f"train_cfg has {said}; it takes one of max_iters and max_epochs")
    kind, by_epoch = loop.get("type"), loop.get("by_epoch")
    if kind is None and by_epoch is None:
        raise UserError("train_cfg has neither type nor by_epoch; give type='IterBasedTrainLoop' and max_iters")
    wanted = ("max_epochs" if by_epoch else "max_iters") if kind is None else _LOOPS.get(short_name(kind))
    if wanted not in (None, *lengths):
        how = f"type={kind!r}" if kind else f"by_epoch={by_epoch}"
        raise UserError(f"train_cfg has {lengths[0]}, but {how} takes {wanted}; change either")


def _check_optimizer(wrapper: Mapping[str, Any]) -> None:
    check_train_only((wrapper.get("paramwise_cfg") or {}).get("train_only"))
    if (optimizer := wrapper.get("optimizer")) is None:
        raise UserError("optim_wrapper has no optimizer; give one, such as dict(type='AdamW', lr=1e-4)")
    kind = optimizer["type"]
    if isinstance(kind, str) and "." not in kind and OPTIMIZERS.get(kind) is None:
        raise UserError(f"optim_wrapper.optimizer.type is '{kind}'{nearest(kind, OPTIMIZERS.module_dict)}")


def _check_workers(name: str, loader: Mapping[str, Any]) -> None:
    if not loader.get("num_workers"):
        for key in ("persistent_workers", "prefetch_factor"):
            if loader.get(key):
                raise UserError(f"{name}.{key} is {loader[key]} without workers; set {name}.num_workers, or drop it")


def _found(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of what stands at a dotted path, whose `*` is every key of a dict or item of a list."""
    first, _, rest = path.partition(".")
    if first == "*":
        keys: Sequence[Any] = list(node) if isinstance(node, Mapping) else range(len(node)) if _is_list(node) else ()
    else:
        keys = [first] if isinstance(node, Mapping) and first in node else ()
    for key in keys:
        for where, value in _found(node[key], rest) if rest else [("", node[key])]:
            yield f"{key}.{where}".rstrip("."), value


def everywhere(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of all that stands in a config, sections before what they hold."""
    keys: Any = node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, list | tuple) else ()
    for key in keys:
        where = f"{path}.{key}".lstrip(".")
        yield where, node[key]
        yield from everywhere(node[key], where)


def short_name(kind: Any) -> str:
    """Returns the name of a registered class, without its package."""
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
