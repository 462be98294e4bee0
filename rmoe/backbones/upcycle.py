"""Turns a dense model into a residual mixture of experts: the network of each chosen block becomes a core."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from rmoe.backbones.networks import agree, check_networks, example, find_networks
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError, nearest
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.state import roles
from rmoe.moe.tasks import task


@dataclass(frozen=True)
class UpcycleReport:
    """Tells what `upcycle` did.

    Attributes:
        blocks: names of the networks that became MoE, in the model's order.
        dense: names of the networks that stayed dense.
        parameters: number of parameters in this process by role (core, residual, gate, other).
        trainable: how many of these are trained, by role.
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
    """Holds the upcycled model and the report on what was done to it."""

    model: nn.Module
    report: UpcycleReport


def upcycle(model: nn.Module, config: ResidualMoEConfig, *, copy: bool = False) -> Upcycled:
    """Turns feed-forward networks of a dense model into residual mixtures of experts around themselves.

    Right afterwards the model computes what it computed before, unless config.combine is "softmax" or experts are drawn
    anew; with ep_size 1 this is checked. The states of the random generators are left as they were. Either all selected
    networks are replaced or none.

    Args:
        model: any model whose blocks hold timm-style networks (linear `fc1`, activation `act`, linear `fc2`; gated,
            with a norm or of convolutions: `rmoe.moe.forms`): those of timm and transformers, bare or inside a larger
            model.
        config: which blocks, how many experts, what kind of residual.
        copy: leave `model` as it is and upcycle a copy; else the networks are replaced in `model` itself.

    Returns:
        A pair of the upcycled model and the report on what was done to it.

    Raises:
        UserError: the model has no such network, `config.blocks` selects none, a selected network computes more than a
            mixture would (see `rmoe.backbones.networks.check_networks`), or the model has been upcycled already.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"upcycle got a {type(model).__name__} as its model; give a torch.nn.Module, such as timm's")
    if not isinstance(config, ResidualMoEConfig):
        raise UserError(
            f"upcycle got a {type(config).__name__} as its config; give an rmoe.ResidualMoEConfig, of a dict by "
            "ResidualMoEConfig.from_dict"
        )
    if not isinstance(copy, bool):
        raise UserError(f"upcycle got copy={copy!r}; it is True or False")
    networks = find_networks(model)
    selected = _select(list(networks), config)
    gpus = {x.device for x in model.parameters() if x.is_cuda}
    with torch.random.fork_rng(gpus):  # a head made afterwards gets the same random weights as beside the dense model
        check_networks(model, {name: networks[name] for name in selected})
        if copy:
            model = copying.deepcopy(model)
        with _restored_on_error(model):
            layers = {name: _mixture(name, model.get_submodule(name), config) for name in selected}
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return Upcycled(model, _report(model, selected, [name for name in networks if name not in selected]))


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Undoes, if an error is raised, what a mixture does to the network that it is made of: it freezes it, and has its
    activation leave its input.
    """
    trained = [(x, x.requires_grad) for x in model.parameters()]
    inplace: list[Any] = [module for module in model.modules() if getattr(module, "inplace", False)]
    try:
        yield
    except BaseException:
        for x, required in trained:
            x.requires_grad_(required)
        for module in inplace:
            module.inplace = True
        raise


def _mixture(name: str, network: Any, config: ResidualMoEConfig) -> ResidualMoE:
    layer = ResidualMoE(network, config)
    if config.preserves and config.ep_size == 1 and not layer.form.network(network).w2_CH.is_meta:
        _compare(name, network, layer, example(network, layer.form))
    return layer


@torch.no_grad()
def _compare(name: str, network: nn.Module, layer: ResidualMoE, x: torch.Tensor) -> None:
    modes = {module: module.training for module in layer.modules()}
    with task(0):  # all tasks begin alike
        same = agree(layer.eval()(x), layer.form.dense(network, x))
    for module, training in modes.items():
        module.training = training
    if not same:
        raise UserError(
            f"the mixture made of '{name}' ({type(network).__name__}) does not compute what the network does; leave "
            "it dense by naming other blocks, and report this"
        )


def _select(names: list[str], config: ResidualMoEConfig) -> list[str]:
    if isinstance(config.blocks, tuple):
        if twice := [name for name in set(config.blocks) if config.blocks.count(name) > 1]:
            raise UserError(f"blocks names '{twice[0]}' twice; name each network once")
        for name in config.blocks:
            if name not in names:
                raise UserError(f"blocks names '{name}', which is no feed-forward network{nearest(name, names)}")
        return [name for name in names if name in config.blocks]
    stages: dict[str, list[str]] = {}
    for name in names:
        stages.setdefault(_stage(name), []).append(name)
    # Every second block, beginning with the second, as in V-MoE and Swin-MoE.
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
    """Returns what stands before the last number of a network's name: 'layers.2.blocks' of 'layers.2.blocks.5.mlp'."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[:last])


def _report(model: nn.Module, blocks: list[str], dense: list[str]) -> UpcycleReport:
    role_of, parameters = roles(model), {"core": 0, "residual": 0, "gate": 0, "other": 0}
    trainable = dict(parameters)
    for name, parameter in model.named_parameters():
        parameters[role_of[name]] += parameter.numel()
        trainable[role_of[name]] += parameter.numel() * parameter.requires_grad
    return UpcycleReport(tuple(blocks), tuple(dense), parameters, trainable)
