"""Optimizer groups: which parameters train, at which learning rate and weight decay. The one place for all of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from mmengine import registry
from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import OPTIMIZERS, Registry
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rmoe.errors import UserError, nearest
from rmoe.moe.experts import BIASES
from rmoe.moe.state import roles

OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor", parent=registry.OPTIM_WRAPPER_CONSTRUCTORS, scope="rmoe"
)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_TABLES = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed", "cls_token", "dist_token", "reg_token")
_HEADS = {"head", "head_dist", "fc", "classifier"}


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    residual_lr_mult: float = 1.0,
    residual_decay_mult: float = 1.0,
    gate_lr_mult: float = 1.0,
    head_lr_mult: float = 1.0,
    exempt: bool = True,
    norm_decay_mult: float | None = None,
    bias_decay_mult: float | None = None,
    bias_lr_mult: float = 1.0,
    custom_keys: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """The groups to build an optimizer from, as few as can be: DeepSpeed's steps get slower with every group.

    Frozen parameters are in none. Experts are in groups of their own, marked for DeepSpeed.

    Args:
        model: dense or with `ResidualMoE` layers.
        lr: learning rate that the multipliers apply to.
        weight_decay: weight decay that the multipliers apply to.
        residual_lr_mult, residual_decay_mult: for residuals; their decay pulls the experts towards the core.
        gate_lr_mult: for routers.
        head_lr_mult: for all that is outside `model.backbone`, or for the classifier of a model without one.
        exempt: no decay for norms, biases, position tables, tokens, and what timm's `no_weight_decay()` names.
        norm_decay_mult, bias_decay_mult: decay of norms and biases, where it is given; wins over `exempt`.
        bias_lr_mult: for the biases of all modules but norms.
        custom_keys: by part of a parameter's name, its `lr_mult` and `decay_mult`; the longest match wins, and wins
            over everything above, as in mmengine.

    Returns:
        Dicts with `params`, `lr`, `weight_decay` and a unique `name`; `moe=True` and DeepSpeed's group name where the
        parameters are experts.

    Raises:
        UserError: nothing to train, or a custom key that matches no parameter or sets something else.
    """
    custom = _checked_custom_keys(model, custom_keys or {})
    role, undecayed = roles(model), _undecayed(model)
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module, name, parameter in _trainable(model):
        lr_mult = {"residual": residual_lr_mult, "gate": gate_lr_mult}.get(role[name], 1.0)
        decay_mult = residual_decay_mult if role[name] == "residual" else 1.0
        is_norm, is_bias = isinstance(module, _NORMS), _is_bias(name)
        if _is_head(model, name):
            lr_mult *= head_lr_mult
        if is_bias and not is_norm:
            lr_mult *= bias_lr_mult
        if exempt and (parameter.ndim <= 1 or is_bias or name in undecayed):
            decay_mult = 0.0
        given = norm_decay_mult if is_norm else bias_decay_mult if is_bias else None
        decay_mult = decay_mult if given is None else given
        for key in custom:
            if key in name:
                lr_mult, decay_mult = custom[key].get("lr_mult", 1.0), custom[key].get("decay_mult", 1.0)
                break
        merged.setdefault((lr * lr_mult, weight_decay * decay_mult), []).append(parameter)
    if not merged:
        raise UserError(
            "the model has no parameter to train: all are frozen; unfreeze some, such as moe.train_core=True"
        )
    groups = [
        {"params": parameters, "lr": rate, "weight_decay": decay, "name": f"lr_{rate:g}_decay_{decay:g}"}
        for (rate, decay), parameters in merged.items()
    ]
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in split if group["params"]]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ParamGroups:
    """mmengine's way to `param_groups`: `optim_wrapper = dict(constructor='rmoe.ParamGroups', paramwise_cfg=dict(…))`.

    The wrapper is always DeepSpeed's: precision, accumulation and clipping are the engine's business.

    Args:
        optim_wrapper_cfg: the config's `optim_wrapper`; its `optimizer` has an `lr`.
        paramwise_cfg: keyword arguments of `param_groups`.

    Raises:
        UserError: an optimizer without learning rate, or a key that `param_groups` does not have.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        self._optimizer = dict(optim_wrapper_cfg["optimizer"])
        self._options = dict(paramwise_cfg or {})
        known = [p.name for p in inspect.signature(param_groups).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for key in self._options:
            if key not in known:
                raise UserError(f"optim_wrapper.paramwise_cfg has no key '{key}'{nearest(key, known)}")
        if "lr" not in self._optimizer:
            raise UserError("optim_wrapper.optimizer has no lr; give one, such as lr=1e-4")

    def __call__(self, model: nn.Module) -> BaseOptimWrapper:
        """The wrapper around an optimizer of `model`."""
        decay = self._optimizer.get("weight_decay", 0.0)
        groups = param_groups(model, self._optimizer["lr"], decay, **self._options)
        optimizer = OPTIMIZERS.build(dict(self._optimizer, params=groups))
        return DeepSpeedOptimWrapper(optimizer)


def _trainable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, full name, parameter), each parameter once."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module, f"{prefix}.{name}" if prefix else name, parameter


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] in ("bias", *BIASES)


def _is_head(model: nn.Module, name: str) -> bool:
    if hasattr(model, "backbone"):
        return not name.startswith("backbone.")
    return not _HEADS.isdisjoint(name.split("."))


def _undecayed(model: nn.Module) -> set[str]:
    """Names of position tables and tokens, and what any submodule's `no_weight_decay()` lists."""
    named = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in _TABLES}
    for prefix, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            named |= {f"{prefix}.{name}" if prefix else name for name in module.no_weight_decay()}
    return named


def _checked_custom_keys(
    model: nn.Module, custom_keys: Mapping[str, Mapping[str, float]]
) -> dict[str, Mapping[str, float]]:
    """The custom keys, longest first.

    A key that matches nothing is let pass: stock configs list what only some backbones have.
    """
    for key, options in custom_keys.items():
        for option in options:
            if option not in ("lr_mult", "decay_mult"):
                hint = nearest(option, ("lr_mult", "decay_mult"))
                raise UserError(f"optim_wrapper.paramwise_cfg.custom_keys['{key}'] has no key '{option}'{hint}")
    return {key: custom_keys[key] for key in sorted(sorted(custom_keys), key=len, reverse=True)}
