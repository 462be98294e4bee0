"""Dense model → residual mixture of experts: which blocks, and each block's own feed-forward network as the core."""

from __future__ import annotations

import copy as copying
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError, nearest
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.state import roles


@dataclass(frozen=True)
class Report:
    """What `upcycle` did.

    Attributes:
        blocks: names of the networks that became MoE, in the model's order.
        dense: names of those that stayed dense.
        parameters: number of parameters of this process by role (core, residual, gate, other).
        trainable: of these, those with gradient.
    """

    blocks: tuple[str, ...]
    dense: tuple[str, ...]
    parameters: dict[str, int]
    trainable: dict[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{role} {n:,} ({self.trainable[role]:,} trained)" for role, n in self.parameters.items())
        return (
            f"{len(self.blocks)} of {len(self.blocks) + len(self.dense)} feed-forward networks became MoE: "
            f"{', '.join(self.blocks)}\nparameters: {counts}"
        )


class Upcycled(NamedTuple):
    """The model and what was done to it."""

    model: nn.Module
    report: Report


def upcycle(model: nn.Module, config: ResidualMoEConfig, *, copy: bool = False) -> Upcycled:
    """Turns feed-forward networks of a dense model into residual mixtures of experts around themselves.

    Right afterwards the model computes what it computed before (unless config.combine is "softmax"), and the random
    generators stand where they stood.

    Args:
        model: any model whose blocks hold timm-style `Mlp`s (linear `fc1`, activation `act`, linear `fc2`): timm's
            Swin and ViT, bare or inside a larger model.
        config: which blocks, how many experts, what kind of residual.
        copy: leave `model` as it is and upcycle a copy.

    Raises:
        UserError: no such network in the model, none that `config.blocks` selects, dropout inside one, or one that
            is a mixture already.
    """
    if copy:
        model = copying.deepcopy(model)
    networks = find_networks(model)
    selected = _select(list(networks), config)
    for name in selected:
        _check_dropout(name, networks[name])
    with torch.random.fork_rng([]):  # what is drawn after this, a head say, is what the dense model would have drawn
        for name in selected:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ResidualMoE(networks[name], config))
    return Upcycled(model, _report(model, selected, [name for name in networks if name not in selected]))


def find_networks(model: nn.Module) -> dict[str, nn.Module]:
    """The dense feed-forward networks of a model by name, in its order.

    Raises:
        UserError: there is none, or the model has been upcycled already.
    """
    modules = dict(model.named_modules())
    if done := [name for name, module in modules.items() if isinstance(module, ResidualMoE)]:
        raise UserError(f"the model is a mixture of experts already ({done[0]}); upcycle the dense model")
    found = {name: module for name, module in modules.items() if name and _is_network(module)}
    if not found:
        raise UserError(
            f"no feed-forward network found in {type(model).__name__}: looked for modules with linear layers 'fc1' and "
            "'fc2' (fc1's outputs being fc2's inputs) and an activation 'act', as timm's Mlp; use a Swin, ViT or CvT"
        )
    return found


def _is_network(module: nn.Module) -> bool:
    fc1, fc2 = getattr(module, "fc1", None), getattr(module, "fc2", None)
    if not (
        isinstance(fc1, nn.Linear)
        and isinstance(fc2, nn.Linear)
        and isinstance(getattr(module, "act", None), nn.Module)
    ):
        return False
    # A gated network (GLU) splits fc1's outputs, one with a norm inside is another function: neither is FFN(x; θ).
    plain = isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)
    return fc1.out_features == fc2.in_features and fc1.in_features == fc2.out_features and plain


def _select(names: list[str], config: ResidualMoEConfig) -> list[str]:
    if isinstance(config.blocks, tuple):
        for name in config.blocks:
            if name not in names:
                raise UserError(f"blocks names '{name}', which is no feed-forward network{nearest(name, names)}")
        return [name for name in names if name in config.blocks]
    stages: dict[str, list[str]] = {}
    for name in names:
        stages.setdefault(_stage(name), []).append(name)
    # Every second block, beginning with the second: as V-MoE and Swin-MoE place their experts.
    selected = {
        "all": names,
        "last_two": names[-2:],
        "alternate": [name for stage in stages.values() for name in stage[1::2]],
        "alternate_last_two_stages": [name for stage in list(stages.values())[-2:] for name in stage[1::2]],
    }[config.blocks]
    if not selected:
        raise UserError(
            f"blocks='{config.blocks}' selects none of the {len(names)} feed-forward networks, whose stages hold "
            f"{[len(stage) for stage in stages.values()]}; use blocks='all' or name them"
        )
    return selected


def _stage(name: str) -> str:
    """'layers.2.blocks.5.mlp' → 'layers.2.blocks': what stands before the last number."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[:last])


def _check_dropout(name: str, network: nn.Module) -> None:
    if any(isinstance(module, nn.Dropout) and module.p for module in network.modules()):
        raise UserError(f"'{name}' has dropout inside, which experts do not have; build the model with proj_drop=0")


def _report(model: nn.Module, blocks: list[str], dense: list[str]) -> Report:
    role_of, parameters = roles(model), {"core": 0, "residual": 0, "gate": 0, "other": 0}
    trainable = dict(parameters)
    for name, parameter in model.named_parameters():
        parameters[role_of[name]] += parameter.numel()
        trainable[role_of[name]] += parameter.numel() * parameter.requires_grad
    return Report(tuple(blocks), tuple(dense), parameters, trainable)
