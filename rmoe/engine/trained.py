"""Which parameters train, by the part that each plays in the model: `train_only` keeps the named parts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rmoe.errors import UserError, nearest
from rmoe.moe.state import moe_layers, roles

PARTS = {
    "core": "the feed-forward networks that mixtures are made around",
    "residual": "the experts' residuals, or experts of their own",
    "gate": "routers",
    "head": "all that is outside the backbone, or the classifier of a model without one",
    "norm": "norms of the backbone",
    "attention": "attention of the backbone, with its position tables",
    "mlp": "feed-forward networks that have stayed dense",
    "embedding": "patch embeddings, position tables and tokens",
    "other": "the rest of the backbone, such as patch merging",
}
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
TABLES = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed", "cls_token", "dist_token", "reg_token")
_HEADS = {"head", "head_dist", "fc", "classifier"}
_WORDS = {  # part → words, of which one is in the name of a module
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "ffn", "feed_forward"),
    "embedding": ("embed",),
}


class Count(NamedTuple):
    """Numbers of parameters over all processes, each expert counted once."""

    trained: int
    frozen: int


def check_train_only(value: Any) -> None:
    """Checks what a config has under `train_only`.

    Raises:
        UserError: it is no list of names, is empty, or has a name that is no part.
    """
    if value is None:
        return
    where = "optim_wrapper.paramwise_cfg.train_only"
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where} is {value!r:.100}; it takes a list of parts, such as ['residual', 'gate', 'head']")
    if not value:
        raise UserError(f"{where} is empty, so that nothing would train; name one or more of {', '.join(PARTS)}")
    for name in value:
        if name not in PARTS:
            raise UserError(f"{where} has {name!r:.100}{nearest(name, PARTS)}")


def parts(model: nn.Module) -> dict[str, str]:
    """Returns the part that each parameter plays, one of `PARTS`, by the parameter's name."""
    modules, role = dict(model.named_modules()), roles(model)
    return {
        name: role[name] if role[name] != "other" else _part(model, modules[name.rpartition(".")[0]], name)
        for name, _ in model.named_parameters()
    }


def freeze_others(model: nn.Module, train_only: Any) -> None:
    """Freezes every parameter whose part is not named. What is frozen already stays so.

    Args:
        model: to be trained.
        train_only: names of parts; None leaves the model as it is.

    Raises:
        UserError: see `check_train_only`; or a named part is frozen by the config already, or nothing is left to train.
    """
    check_train_only(train_only)
    if train_only is None:
        return
    part, parameters = parts(model), dict(model.named_parameters())
    for name in train_only:
        own = [parameters[key] for key, its in part.items() if its == name]
        if own and not any(x.requires_grad for x in own):
            raise UserError(
                f"train_only names {name}, which the config freezes (moe.train_core, moe.train_residual and gates' or "
                "layers' own keys do); let it train there, or leave it out of train_only"
            )
    for key, its in part.items():
        if its not in train_only:
            parameters[key].requires_grad_(False)
    if not any(x.requires_grad for x in parameters.values()):
        there = ", ".join(name for name in PARTS if name in part.values())
        raise UserError(
            f"train_only is {', '.join(train_only)}, of which the model has nothing to train; its parts are {there}"
        )


def count_parts(model: nn.Module) -> dict[str, Count]:
    """Returns how many parameters of each part are trained and how many are frozen, of the parts that there are.

    Over all processes, without asking them: every process holds as many experts.
    """
    spread = {x: layer.ep_size for layer in moe_layers(model).values() for x in own_experts(layer)}
    trained: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    part = parts(model)
    for name, parameter in model.named_parameters():
        size = parameter.numel() * spread.get(parameter, 1)
        (trained if parameter.requires_grad else frozen)[part[name]] += size
    return {name: Count(trained[name], frozen[name]) for name in PARTS if name in trained or name in frozen}


def own_experts(layer: Any) -> Iterator[nn.Parameter]:
    """Yields the parameters of a `ResidualMoE` of which each expert has its own; what experts share is none of them."""
    yield from layer.deepspeed_moe.experts.own().values()


def table(counts: dict[str, Count]) -> str:
    """Returns a table of what trains, a line for each part and one for all."""
    rows: list[tuple[str, ...]] = [("part", "trained", "frozen")]
    rows += [(name, f"{one.trained:,}", f"{one.frozen:,}") for name, one in counts.items()]
    rows.append(("all", *(f"{sum(column):,}" for column in zip(*counts.values(), strict=True))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (f"  {name:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}" for name, a, b in rows)
    return "parameters by part:\n" + "\n".join(lines)


def is_head(model: nn.Module, name: str) -> bool:
    """Returns whether a parameter is outside `model.backbone`, or the classifier's of a model without one."""
    if hasattr(model, "backbone"):
        return not name.startswith("backbone.")
    return not _HEADS.isdisjoint(name.split("."))


def _part(model: nn.Module, owner: nn.Module, name: str) -> str:
    """Returns the part of a parameter that no mixture holds; the innermost module whose name says one decides."""
    if is_head(model, name):
        return "head"
    if isinstance(owner, NORMS) or "norm" in type(owner).__name__.lower():
        return "norm"
    *path, leaf = name.split(".")
    for module in reversed(path):
        for part, words in _WORDS.items():
            if any(word in module for word in words):
                return part
    return "embedding" if leaf in TABLES else "other"
