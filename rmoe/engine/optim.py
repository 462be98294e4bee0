"""Optimizer groups: which parameters train, at which learning rate and weight decay. The one place for all of it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from mmengine import registry
from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper
from mmengine.logging import print_log
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import OPTIMIZERS, Registry
from timm.models import group_parameters
from torch import Tensor, nn

from rmoe.config import ResidualMoEConfig
from rmoe.engine.check_values import is_number
from rmoe.engine.trained import NORMS, TABLES, freeze_others, is_head
from rmoe.errors import UserError, nearest
from rmoe.moe.experts import BIASES
from rmoe.moe.state import mixed_parameters, roles

OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor", parent=registry.OPTIM_WRAPPER_CONSTRUCTORS, scope="rmoe"
)
_LAYOUT_KEYS = {"params", "name", "moe"}  # of a group: what depends on the layout
_MEANS = frozenset(("fused", "foreach", "capturable", "differentiable"))  # of a group: how the same is computed


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    residual_lr_mult: float | None = None,
    residual_decay_mult: float = 1.0,
    gate_lr_mult: float = 1.0,
    head_lr_mult: float = 1.0,
    layer_decay: float = 1.0,
    exempt: bool = True,
    norm_decay_mult: float | None = None,
    bias_decay_mult: float | None = None,
    bias_lr_mult: float = 1.0,
    custom_keys: Mapping[str, Mapping[str, float]] | None = None,
    train_only: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Returns the groups to build an optimizer from, as few as can be: each makes DeepSpeed's steps slower.

    Frozen parameters are in none, and a rate multiplier of 0 freezes, residuals aside: no decay, and no schedule that
    ends above 0, moves such a parameter. Experts that are spread over processes are in groups of their own, marked for
    DeepSpeed.

    Args:
        model: dense or with `ResidualMoE` layers.
        lr: learning rate that the multipliers apply to.
        weight_decay: weight decay that the multipliers apply to.
        residual_lr_mult: for residuals; None: 4 for those of low rank, 1 for others (`rmoe.config.Kind.lr_mult`).
        residual_decay_mult: for residuals; their decay pulls the experts towards the core.
        gate_lr_mult: for routers, weight and bias; 0 keeps gates as they are.
        head_lr_mult: for all that is outside `model.backbone`, or for the classifier of a model without one.
        layer_decay: for each layer of a timm backbone, multiplied once for every layer between it and the head, which
            it leaves as it is: the last block has it once, the patch embedding the most often (BEiT, arXiv
            2106.08254). timm says what a layer is; what else `model.backbone` holds, as a pyramid's norms, counts as
            the head's.
        exempt: no decay for norms, biases, position tables, tokens, and what timm's `no_weight_decay()` names.
        norm_decay_mult, bias_decay_mult: decay of norms and biases, where it is given; wins over `exempt`.
        bias_lr_mult: for the biases of all modules but norms.
        custom_keys: by part of a parameter's name, its `lr_mult` and `decay_mult`; the longest match wins, and wins
            over everything above, as in mmengine.
        train_only: the parts of the model that train, see `rmoe.engine.trained.PARTS`; all others are frozen.

    Returns:
        Dicts with `params`, `lr`, `weight_decay` and a unique `name`; `moe=True` and DeepSpeed's group name where the
        parameters are experts that are spread.

    Raises:
        UserError: nothing to train, a rate, decay or multiplier that is not a finite number of 0 or more, or a custom
            key that sets something else; a `layer_decay` above 1, or one of a model that has no layers by timm; or what
            `freeze_others` raises.
    """
    rates = {"lr": lr, "weight_decay": weight_decay, "gate_lr_mult": gate_lr_mult}
    rates |= {"residual_decay_mult": residual_decay_mult, "head_lr_mult": head_lr_mult, "bias_lr_mult": bias_lr_mult}
    rates |= {"layer_decay": layer_decay}
    given = {
        "norm_decay_mult": norm_decay_mult,
        "bias_decay_mult": bias_decay_mult,
        "residual_lr_mult": residual_lr_mult,
    }
    for name, value in {**rates, **{name: value for name, value in given.items() if value is not None}}.items():
        _check_number(name, value)
    if not isinstance(exempt, bool):
        raise UserError(f"exempt is {exempt!r}; it is True or False")
    custom = _checked_custom_keys({} if custom_keys is None else custom_keys)
    freeze_others(model, train_only)
    _report_shared(model)
    role, undecayed, layers = roles(model), _undecayed(model), _layer_scales(model, layer_decay)
    residuals = _residual_rates(model, residual_lr_mult)
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module, name, parameter in _trainable(model):
        lr_mult = gate_lr_mult if role[name] == "gate" else residuals.get(name, 1.0)
        lr_mult *= layers.get(name, 1.0)
        decay_mult = residual_decay_mult if role[name] == "residual" else 1.0
        is_norm, is_bias = isinstance(module, NORMS), _is_bias(name)
        if is_head(model, name):
            lr_mult *= head_lr_mult
        if is_bias and not is_norm:
            lr_mult *= bias_lr_mult
        if exempt and (parameter.ndim <= 1 or is_bias or name in undecayed):
            decay_mult = 0.0
        fixed = norm_decay_mult if is_norm else bias_decay_mult if is_bias else None
        decay_mult = decay_mult if fixed is None else fixed
        for key in custom:
            if key in name:
                lr_mult, decay_mult = custom[key].get("lr_mult", 1.0), custom[key].get("decay_mult", 1.0)
                break
        if lr_mult == 0 and role[name] != "residual":
            parameter.requires_grad_(False)
            continue
        merged.setdefault((lr * lr_mult, weight_decay * decay_mult), []).append(parameter)
    if not merged:
        raise UserError(
            "the model has no parameter to train: all are frozen; unfreeze some, such as moe.train_core=True"
        )
    names = Counter[str]()
    groups: list[dict[str, Any]] = []
    for (rate, decay), parameters in merged.items():
        name = f"lr_{rate:g}_decay_{decay:g}"
        names[name] += 1  # numbers may differ beyond what is printed of them
        unique = name if names[name] == 1 else f"{name}_{names[name]}"
        groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": unique})
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in split if group["params"]]


def complete_paramwise(wrapper: Any, mixtures: Sequence[ResidualMoEConfig]) -> None:
    """Writes what a config's `optim_wrapper` leaves open of `paramwise_cfg` into it, in place: what is saved says which
    groups there are, whatever the defaults of later versions are.

    Args:
        wrapper: the section.
        mixtures: those of the model, whose kind says which rate residuals have. Where they say several, it stays open.
    """
    defaults = {name: parameter.default for name, parameter in _options().items()}
    rates = {one.kind.lr_mult for one in mixtures} or {1.0}
    if len(rates) == 1:
        defaults["residual_lr_mult"] = rates.pop()
    given = wrapper.get("paramwise_cfg") or {}
    wrapper["paramwise_cfg"] = {**defaults, **{key: value for key, value in given.items() if value is not None}}


def _options() -> dict[str, inspect.Parameter]:
    """Returns the options of `param_groups` by name."""
    parameters = inspect.signature(param_groups).parameters
    return {name: one for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ParamGroups:
    """mmengine's way to `param_groups`: `optim_wrapper = dict(constructor='rmoe.ParamGroups', paramwise_cfg=dict(…))`.

    The wrapper is always DeepSpeed's: precision, accumulation and clipping are the engine's business.

    Args:
        optim_wrapper_cfg: the config's `optim_wrapper`; its `optimizer` has an `lr`.
        paramwise_cfg: keyword arguments of `param_groups`.

    Raises:
        UserError: an optimizer without learning rate, or with other values than it takes; or a key that `param_groups`
            does not have.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        for name, value in (("optimizer", optim_wrapper_cfg.get("optimizer")), ("paramwise_cfg", paramwise_cfg or {})):
            if not isinstance(value, Mapping):
                raise UserError(f"optim_wrapper.{name} is {value!r}; it takes a dict, see the configs in rmoe/configs")
        self._optimizer, self._options = dict(optim_wrapper_cfg["optimizer"]), dict(paramwise_cfg or {})
        known = _options()
        for key in self._options:
            if key not in known:
                raise UserError(f"optim_wrapper.paramwise_cfg has no key '{key}'{nearest(str(key), known)}")
        if "lr" not in self._optimizer:
            raise UserError("optim_wrapper.optimizer has no lr; give one, such as lr=1e-4")

    def __call__(self, model: nn.Module) -> BaseOptimWrapper:
        """Returns the wrapper around an optimizer of `model`."""
        decay = self._optimizer.get("weight_decay", 0.0)
        groups = param_groups(model, self._optimizer["lr"], decay, **self._options)
        self._check_values()
        try:
            optimizer = OPTIMIZERS.build(self._in_one_kernel() | {"params": groups})
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"optim_wrapper.optimizer {self._optimizer} cannot be built: {error}") from error
        return DeepSpeedOptimWrapper(optimizer)

    def _in_one_kernel(self) -> dict[str, Any]:
        """Returns the optimizer's config, in which torch's Adam and AdamW are fused unless it says how they compute."""
        fused = self._maker() in (torch.optim.Adam, torch.optim.AdamW) and _MEANS.isdisjoint(self._optimizer)
        return {**self._optimizer, "fused": True} if fused else self._optimizer

    def _maker(self) -> Any:
        kind = self._optimizer.get("type")
        return OPTIMIZERS.get(kind) if isinstance(kind, str) else kind

    def _check_values(self) -> None:
        """Checks that numbers are given where the optimizer's defaults are numbers: torch looks at few of them."""
        maker = self._maker()
        defaults = {} if maker is None else {x.name: x.default for x in inspect.signature(maker).parameters.values()}
        for key, value in self._optimizer.items():
            several = isinstance(defaults.get(key), (tuple, list)) and isinstance(value, (tuple, list))
            for one, default in zip(value, defaults[key], strict=False) if several else [(value, defaults.get(key))]:
                if isinstance(default, (int, float)) and not isinstance(default, bool):
                    _check_number(f"optim_wrapper.optimizer.{key}", one)


def _trainable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yields (owner, full name, parameter), each parameter once."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module, f"{prefix}.{name}" if prefix else name, parameter


def _residual_rates(model: nn.Module, rate: float | None) -> dict[str, float]:
    """Returns what `residual_lr_mult` says of each parameter that is a residual's."""
    return {
        name: layer.config.kind.lr_mult if rate is None else rate
        for name, layer, role in mixed_parameters(model)
        if role == "residual"
    }


def _layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Returns what `layer_decay` makes of the learning rate of each parameter of the timm model in `model`."""
    if decay == 1:
        return {}
    if decay > 1:
        raise UserError(f"layer_decay is {decay!r}; it is at most 1, such as 0.9")
    found = ((name, module) for name, module in model.named_modules() if hasattr(module, "group_matcher"))
    prefix, net = next(found, ("", None))
    matcher: Any = net.group_matcher(coarse=False) if net is not None else None
    if net is None or not isinstance(matcher, Mapping):
        raise UserError(
            f"layer_decay is {decay:g}, and the model has no backbone of timm that says which layers it has; leave it "
            "out, or set rates by custom_keys"
        )
    # What no pattern matches, as "?", is the head's in timm: the last layer, whether it is in this model or not.
    parameters = [*net.named_parameters(), ("?", None)]
    named: Any = SimpleNamespace(named_parameters=lambda: parameters)
    place = group_parameters(named, dict(matcher), reverse=True)
    last = place.pop("?")
    return {f"{prefix}.{name}" if prefix else name: decay ** (last - number) for name, number in place.items()}


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] in ("bias", "task_bias", *BIASES)


def _undecayed(model: nn.Module) -> set[str]:
    """Returns the names of position tables and tokens, and what any submodule's `no_weight_decay()` lists."""
    named = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in TABLES}
    for prefix, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            named |= {f"{prefix}.{name}" if prefix else name for name in module.no_weight_decay()}
    return named


def _check_number(name: str, value: Any) -> None:
    if not is_number(value) or value < 0:
        raise UserError(f"{name} is {value!r}; it takes a finite number of 0 or more, such as 1e-4")


def _report_shared(model: nn.Module) -> None:
    """Names the parameters that several modules share: they train once, at the rates of the first name."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (owner := first.setdefault(parameter, name)) != name and parameter.requires_grad:
            print_log(f"{name} is the same parameter as {owner}: it trains once, at the rates of {owner}", "current")


def _checked_custom_keys(custom_keys: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Returns the custom keys, longest first.

    A key that matches nothing is let pass: stock configs list what only some backbones have.
    """
    where = "optim_wrapper.paramwise_cfg.custom_keys"
    if not isinstance(custom_keys, Mapping):
        raise UserError(f"{where} is {custom_keys!r}; it takes a dict such as {{'norm': dict(decay_mult=0.0)}}")
    for key, options in custom_keys.items():
        if not isinstance(key, str) or not isinstance(options, Mapping):
            raise UserError(f"{where} has {key!r}: {options!r}; it takes a name and a dict of lr_mult and decay_mult")
        for option, value in options.items():
            if option not in ("lr_mult", "decay_mult"):
                hint = nearest(str(option), ("lr_mult", "decay_mult"))
                raise UserError(f"{where}['{key}'] has no key '{option}'{hint}")
            _check_number(f"{where}['{key}'].{option}", value)
    return {key: custom_keys[key] for key in sorted(sorted(custom_keys), key=len, reverse=True)}


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an optimizer group's numbers, such as its learning rate, in a form that JSON keeps."""
    kept = {key: value for key, value in group.items() if key not in _LAYOUT_KEYS}
    return {key: value.item() if isinstance(value, Tensor) else _listed(value) for key, value in kept.items()}


def change_settings(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Sets what `settings` returned."""
    for key, value in saved.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(value, list) else value


def checked_settings(group: Mapping[str, Any], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the settings that a checkpoint has for `group`, once they are found to be the config's.

    The present learning rate, and what else a schedule changes, may differ. How the optimizer computes is not among
    them: that is this run's.

    Raises:
        UserError: another setting differs, such as the weight decay or the rate that a schedule starts from.
    """
    saved = {key: value for key, value in saved.items() if key not in _MEANS}
    own = {key: value for key, value in settings(group).items() if key in saved}
    scheduled = {key.removeprefix("initial_") for key in own if key.startswith("initial_")}
    moving = scheduled | {"lr"} | ({"betas"} if "momentum" in scheduled else set())
    for key, value in own.items():
        if key in moving and is_number(value) == is_number(saved[key]):
            continue
        if key in moving or saved[key] != value:
            raise UserError(
                f"the checkpoint's run had {key} {saved[key]} where this one has {value}: resume with the "
                "optim_wrapper of that run, or start a new run with load_from"
            )
    if "lr" not in scheduled and "lr" in own and own["lr"] != saved["lr"]:
        print_log(f"the learning rate is the checkpoint's, {saved['lr']}, and not {own['lr']}", logger="current")
    return saved


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
