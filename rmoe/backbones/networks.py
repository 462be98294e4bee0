"""Finds the feed-forward networks of a model and checks that a mixture of experts can replace them.

A mixture computes what the forms of `rmoe.moe.forms` are made of; whatever else a network computes would be lost
silently. So `check_networks` refuses such a network by name: it looks at the network's parts, then runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from rmoe.errors import UserError
from rmoe.moe.experts import WEIGHTS, described, is_weight
from rmoe.moe.forms import ELSEWHERE, Form, check_parts, form_of, surplus
from rmoe.moe.layer import ResidualMoE, keep_input

# The classes of timm and transformers whose names have this give one token for a whole image.
_POOLING = ("ClassAtt", "AttentionPool", "GlobalContext")


def find_networks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the dense feed-forward networks of a model by name, in its order.

    Networks behind class attention or attention pooling are left out, since they get one token of an image.

    Raises:
        UserError: the model has none, is one itself, or has been upcycled already.
    """
    modules = dict(model.named_modules())
    if done := [name for name, module in modules.items() if isinstance(module, ResidualMoE)]:
        raise UserError(f"the model is a mixture of experts already ({done[0]}); upcycle the dense model")
    found = {
        name: module for name, module in modules.items() if _is_network(module) and not _gets_one_token(modules, name)
    }
    if "" in found:
        raise UserError(
            f"the model, {type(model).__name__}, is a feed-forward network itself, which cannot be replaced in place; "
            "give a model that holds it, or build rmoe.ResidualMoE(network, config)"
        )
    if not found:
        raise UserError(
            f"no feed-forward network found in {type(model).__name__}: looked for modules with linear layers 'fc1' (or "
            "'fc1_g' and 'fc1_x') and 'fc2' and an activation 'act', as timm's Mlp and SwiGLU, or named as in "
            "transformers; use a Swin, ViT or CvT"
        )
    return found


def _is_network(module: nn.Module) -> bool:
    form = form_of(module)
    # Squeeze-and-excitation is made of two convolutions as well, and has more in it.
    return form is not None and (form.channels == -1 or not any(surplus(module, form)))


def _gets_one_token(modules: Mapping[str, nn.Module], name: str) -> bool:
    parent = modules[name.rpartition(".")[0]]
    kinds = [type(module).__name__ for module in (parent, *parent.children())]
    return any(words in kind for words in _POOLING for kind in kinds)


@torch.no_grad()
def check_networks(model: nn.Module, networks: Mapping[str, nn.Module]) -> None:
    """Checks that each of `networks` of `model` computes what its form says and nothing else, with weights of its own.

    Raises:
        UserError: a network stands in the model twice or shares a weight; it has dropout, a hook, a parametrization or
            any part that its form does not have, or its forward computes more; its weights are not dense floating-point
            tensors of one dtype on one device; its activation is not elementwise.
    """
    _check_shared(model, networks)
    for name, network in networks.items():
        form = _form(network)
        check_parts(name, network, form)
        _check_weights(name, network)
        _check_act(f"{name}.{form.act}", network, form)
        _check_forward(name, network, form)


def _form(network: nn.Module) -> Form:
    form = form_of(network)
    assert form is not None, "find_networks returns what has a form"
    return form


def _check_shared(model: nn.Module, networks: Mapping[str, nn.Module]) -> None:
    chosen, names = set(map(id, networks.values())), dict[int, str]()
    for name, module in model.named_modules(remove_duplicate=False):
        if (before := names.setdefault(id(module), name)) != name and id(module) in chosen:
            raise UserError(f"'{before}' and '{name}' are one module; give each a network of its own, or {ELSEWHERE}")
    holders = dict[Any, str]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        before = holders.setdefault(_place(parameter), name)
        if before != name and any(one.startswith(f"{network}.") for network in networks for one in (before, name)):
            raise UserError(
                f"'{before}' and '{name}' are one weight, which would be a core in one place and not in the other; "
                f"untie them, or {ELSEWHERE}"
            )


def _place(x: Tensor) -> Any:
    """Returns what is equal for two parameters that are one weight: where their values lie, or the identity."""
    return (x.device, x.data_ptr()) if x.layout == torch.strided and not x.is_meta and x.numel() else id(x)


def _check_weights(name: str, network: nn.Module) -> None:
    weights = list(network.named_parameters(prefix=name))
    for key, x in weights:
        if not is_weight(x):
            raise UserError(f"'{key}' is {described(x)}; {WEIGHTS}: convert it first, or {ELSEWHERE}")
    kinds = sorted({f"{described(x)} on {x.device}" for _, x in weights})
    if len(kinds) > 1:
        raise UserError(f"'{name}' has weights of {' and '.join(kinds)}; bring them to one dtype and device")


def _check_act(name: str, network: nn.Module, form: Form) -> None:
    act: Any = _randomised(name, getattr(network, form.act))
    keep_input(act)  # as the mixture does
    for training in (True, False):
        act.train(training)
        h = example(network, form, 8)
        whole = _output(name, act, given := h.clone())
        if not torch.equal(given, h):
            raise UserError(f"'{name}' ({type(act).__name__}) overwrites its input; use one that returns a new tensor")
        one = (slice(1),) * h.ndim
        if not agree(whole[one], _output(name, act, given[one])):
            raise UserError(f"'{name}' ({type(act).__name__}) is not elementwise; use a model with another activation")


def _check_forward(name: str, network: nn.Module, form: Form) -> None:
    """Runs a copy with random weights in both modes; weights that start at zero could hide what a part computes."""
    kind: Any = type(network)
    if form.plain and kind.forward is Mlp.forward and kind.__call__ is nn.Module.__call__:
        return
    twin = _randomised(name, network)
    for training in (True, False):
        x = example(twin, form)
        if not agree(_output(name, twin.train(training), x.clone()), form.dense(twin, x)):
            raise UserError(
                f"'{name}' ({kind.__name__}) computes more than {form}, which a mixture would drop; "
                f"{ELSEWHERE}, or use a model with timm's Mlp"
            )


def _randomised(name: str, module: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(module)
    except Exception as error:
        raise UserError(
            f"'{name}' cannot be copied to be compared with a mixture ({one_line(error)}); {ELSEWHERE}"
        ) from error
    if any(x.is_meta for x in (*twin.parameters(), *twin.buffers())):
        twin = twin.to_empty(device="cpu")
    for x in twin.parameters():
        x.copy_(torch.randn(x.shape, device="cpu") / max(1, x.shape[-1] if x.ndim else 1) ** 0.5)
    return twin


def _output(name: str, module: nn.Module, x: Tensor) -> Tensor:
    try:
        return module(x)
    except Exception as error:
        raise UserError(
            f"'{name}' ({type(module).__name__}) cannot be run on tokens alone ({one_line(error)}), which are all "
            f"that a mixture gets; {ELSEWHERE}"
        ) from error


def one_line(error: Exception) -> str:
    """Returns the type and the text of an error in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def example(network: nn.Module, form: Form, channels: int | None = None) -> Tensor:
    """Returns the same random input for a network every time, of its weights' dtype and device (CPU for meta).

    Args:
        channels: of the input; None: as many as the network reads.
    """
    theta = form.network(network)
    shape = (2, 3) if form.plain else (2, 2, 3)  # a norm over the tokens of an image has to see rows and columns
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(*shape, channels or theta.w1_HC.shape[1], generator=generator, device="cpu")
    x = x.to("cpu" if theta.w1_HC.is_meta else theta.w1_HC.device, theta.w1_HC.dtype)
    return x if form.channels == -1 else x.movedim(-1, 1).contiguous()


def agree(y: Any, expected: Tensor) -> bool:
    """Returns whether two results are equal but for rounding in their dtype."""
    if not isinstance(y, Tensor) or y.shape != expected.shape or y.dtype != expected.dtype:
        return False
    tolerance = max(1e-4, 8 * torch.finfo(y.dtype).eps)
    y, expected = y.double().nan_to_num(), expected.double().nan_to_num()
    return bool((y - expected).abs().max() <= tolerance * expected.abs().max())
