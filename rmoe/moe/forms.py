"""What a feed-forward network is made of: its linear layers and what is computed between them, a `Form` for each kind.

    plain          fc2(act(fc1 x))                                            timm's Mlp
    with a norm    fc2(norm(act(fc1 x))) or fc2(act(norm(fc1 x)))             EVA's sub-LN; ConvMlp
    with a GRN     fc2(grn(act(fc1 x)))                                       ConvNeXtV2
    gated          fc2(norm(act(g) ⊙ u)), [g; u] = fc1 x or fc1_g x, fc1_x x  GluMlp, SwiGLUPacked; SwiGLU

The names are timm's; those of transformers are known as well (`_LINEARS`, `_ACTS`). Linear layers may be 1×1
convolutions of [B, C, …] tensors. The residuals are those of the linear layers alone; what
stands between them belongs to the core and is one for all experts. Plain networks have arithmetic of their own
(mix.py); the others run their own modules, and the residuals are added to what these give (`mix_around`).

Shape suffixes: T tokens, C model width, H inputs of fc2, F outputs of fc1 (H, or 2H where it is gated), I and O the
inputs and outputs of either linear layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import is_parametrized

from rmoe.errors import UserError
from rmoe.moe.experts import Network, Residuals
from rmoe.moe.mix import compute_dtype, mix, residual_products

_LINEAR = (nn.Linear, nn.Conv2d)
# Names of the linear layers: the first ones, that which goes through the activation before the other, and the last.
_LINEARS = (
    (("fc1_g", "fc1_x"), "fc2"),
    (("fc1",), "fc2"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
)
_ACTS = ("act", "activation_fn", "act_fn", "activation")
_BETWEEN = ("norm", "grn")  # what may stand between the linear layers beside the activation
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ELSEWHERE = "leave it dense by naming other blocks"


@dataclass(frozen=True)
class Form:
    """Describes a kind of network; a layer has one.

    Attributes:
        firsts: names of the linear layers that read the input; they are one, stacked, in a `Network`.
        last: name of the linear layer that leads back.
        act: name of the activation.
        between: names of what is computed between, the activation among them, in this order; each is a module.
        gated: which half of what the first layers give goes through the activation, and multiplies the other.
        channels: the dimension of channels: -1, or 1 for convolutions.
        plain: whether the network is FFN(x; θ) of linear layers around an activation without parameters.
    """

    firsts: tuple[str, ...]
    last: str
    act: str
    between: tuple[str, ...]
    gated: Literal["first", "last"] | None
    channels: int
    plain: bool

    def __str__(self) -> str:
        """Returns what is computed as a formula, such as fc2(act(fc1(x)))."""
        text = f"{self.firsts[0]}(x)"
        for name in self.between:
            other = f" * {self.firsts[-1]}(x)" if name == self.act and self.gated else ""
            text = f"{name}({text}){other}"
        return f"{self.last}({text})"

    @property
    def parts(self) -> tuple[str, ...]:
        """Returns the names of all modules that are computed."""
        return (*self.firsts, *self.between, self.last)

    def network(self, core: Any) -> Network:
        """Returns θ0: views of the weights of `core`, [F, C], [F], [C, H] and [C]; stacked where the first are two."""
        firsts = [getattr(core, name) for name in self.firsts]
        weights, biases = [one.weight.flatten(1) for one in firsts], [one.bias for one in firsts]
        bias = None if biases[0] is None else biases[0] if len(biases) == 1 else torch.cat(biases)
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        last = getattr(core, self.last)
        return Network(weight, bias, last.weight.flatten(1), last.bias)

    def state(self, network: Network) -> dict[str, Tensor]:
        """Returns θ under the names and in the shapes of the linear layers of a dense network."""
        w1_FC, b1_F, w2_CH, b2_C = network
        many = len(self.firsts)
        state = {f"{name}.weight": w for name, w in zip(self.firsts, w1_FC.chunk(many), strict=True)}
        if b1_F is not None:
            state |= {f"{name}.bias": b for name, b in zip(self.firsts, b1_F.chunk(many), strict=True)}
        state[f"{self.last}.weight"] = w2_CH
        if b2_C is not None:
            state[f"{self.last}.bias"] = b2_C
        if self.channels == 1:
            state = {key: x[..., None, None] if key.endswith("weight") else x for key, x in state.items()}
        return state

    def rest(self, core: nn.Module) -> nn.ModuleDict:
        """Returns what stays of a network whose linear layers are the experts' own."""
        return nn.ModuleDict({name: getattr(core, name) for name in self.between})

    def tokens(self, x: Tensor) -> Tensor:
        """Returns the input with channels last, [..., C]."""
        return x if self.channels == -1 else x.movedim(1, -1)

    def inside(self, core: Any, h: Tensor) -> Tensor:
        """Returns what the last layer reads, of h as the first layers give it; channels as in the input."""
        for name in self.between:
            part = getattr(core, name)
            if name == self.act and self.gated:
                one, other = h.chunk(2, self.channels)
                h = part(one) * other if self.gated == "first" else one * part(other)
            else:
                h = part(h)
        return h

    def first(self, core: Any, x: Tensor) -> Tensor:
        """Returns what the first layers of a dense network give."""
        found = [getattr(core, name)(x) for name in self.firsts]
        return found[0] if len(found) == 1 else torch.cat(found, self.channels)

    def dense(self, core: Any, x: Tensor) -> Tensor:
        """Returns what a network of this form computes, and nothing else that it may do."""
        return getattr(core, self.last)(self.inside(core, self.first(core, x)))

    def mix(
        self,
        core: Any,
        x: Tensor,
        expert_TK: Tensor,
        gate_TK: Tensor,
        residuals: Residuals,
        *,
        has_core: bool,
        mixes_weights: bool,
        ready: Callable[[], object] | None,
        drops: bool,
    ) -> Tensor:
        """Applies to every token the network of its experts, see `rmoe.moe.mix.mix`; x and the result as the network's.

        Args:
            core: the dense network, or what `rest` returned where there is no θ0 (`has_core`).
        """
        if self.plain:
            theta = self.network(core) if has_core else None
            x_TC = x.reshape(-1, x.shape[-1])
            y_TC = mix(x_TC, expert_TK, gate_TK, theta, residuals, getattr(core, self.act), mixes_weights, ready, drops)
            return y_TC.reshape(x.shape)
        if ready is not None:
            ready()
        return mix_around(self, core, x, expert_TK, gate_TK, residuals, has_core, mixes_weights)


def mix_around(
    form: Form,
    core: Any,
    x: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    residuals: Residuals,
    has_core: bool,
    mixes_weights: bool,
) -> Tensor:
    """Runs a network's own modules and adds the residuals to what its linear layers give; autograd follows it.

    Where several outputs are weighed, the k-th is that of a network in which each token has its k-th expert: a norm
    over tokens (GRN) sees the tokens of one such network.
    """
    dtype = compute_dtype(x)
    residuals, gate_TK = type(residuals)(*(w.to(dtype) for w in residuals)), gate_TK.to(dtype)

    def network(expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        first, second = residual_products(expert_TK, gate_TK, residuals)

        def linear(x: Tensor, product: Callable[[Tensor], Tensor], of_core: Callable[[Tensor], Tensor]) -> Tensor:
            rows = form.tokens(x)
            added = product(rows.reshape(-1, rows.shape[-1]).to(dtype))
            added = added.reshape(*rows.shape[:-1], added.shape[-1])
            added = added if form.channels == -1 else added.movedim(-1, 1)
            return of_core(x) + added if has_core else added

        h = linear(x, first, lambda x: form.first(core, x))
        return linear(form.inside(core, h), second, lambda a: getattr(core, form.last)(a))

    if mixes_weights:
        return network(expert_TK, gate_TK)
    total: Any = 0.0
    for expert_T1, gate_T1 in zip(expert_TK.split(1, 1), gate_TK.split(1, 1), strict=True):
        y = network(expert_T1, torch.ones_like(gate_T1))
        gate = gate_T1.reshape(form.tokens(x).shape[:-1])
        total = total + y * gate.unsqueeze(form.channels)
    return total


def form_of(network: nn.Module) -> Form | None:
    """Returns the form of a dense network, or None where it is no feed-forward network that is known here.

    What stands in it besides, and whether it computes no more than its form, is not looked at.
    """
    children = dict(network.named_children())
    named = ((firsts, last) for firsts, last in _LINEARS if {*firsts, last} <= {*children})
    acts = [name for name in _ACTS if name in children]
    if (linears := next(named, None)) is None or len(acts) != 1:
        return None
    (firsts, last), act = linears, acts[0]
    layers = [children[name] for name in (*firsts, last)]
    if not all(isinstance(one, _LINEAR) and _is_pointwise(one) for one in layers):
        return None
    if len({isinstance(one, nn.Conv2d) for one in layers}) > 1:
        return None
    channels, shapes = 1 if isinstance(layers[0], nn.Conv2d) else -1, [_shape(one) for one in layers]
    outputs, inputs = sum(out for out, _ in shapes[:-1]), shapes[-1][1]
    if {inner for _, inner in shapes[:-1]} != {shapes[-1][0]} or outputs not in (inputs, 2 * inputs):
        return None
    gated: Literal["first", "last"] | None = None
    if outputs == 2 * inputs:
        gated = "first" if len(firsts) == 2 or not getattr(network, "gate_last", True) else "last"
    elif len(firsts) == 2:
        return None
    # What stands before the first layer is no part of the network.
    later = [*children][[*children].index(firsts[-1]) :]
    inside = [name for name in later if name in _BETWEEN and not isinstance(children[name], nn.Identity)]
    # A norm is computed where it stands; but a gate is always that of what the first layer gives.
    before = [name for name in inside if not gated and [*children].index(name) < [*children].index(act)]
    between = (*before, act, *(name for name in inside if name not in before))
    bare = between == (act,) and not any(True for _ in children[act].parameters())
    return Form(firsts, last, act, between, gated, channels, bare and not gated and channels == -1)


def _is_pointwise(layer: Any) -> bool:
    """Says whether a convolution is a linear layer of each place."""
    if not isinstance(layer, nn.Conv2d):
        return True
    same = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((1, 1), (1, 1), (0, 0), (1, 1))
    return same and layer.groups == 1


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels
    return layer.out_features, layer.in_features


def surplus(network: nn.Module, form: Form) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a network that its form does not have, by name."""
    for child, part in network.named_children():
        if child not in form.parts and type(part) not in (nn.Identity, nn.Dropout) and not _is_drop_path(part):
            yield child, part


def _is_drop_path(part: Any) -> bool:
    return type(part).__name__ == "DropPath"  # timm's


def check_parts(name: str, network: nn.Module, form: Form) -> None:
    """Checks that a network has nothing in it that a mixture of its form would not compute.

    Args:
        name: of the network, for messages.

    Raises:
        UserError: dropout, a hook, a parametrization, or any part or tensor that the form does not have.
    """
    for where, part in network.named_modules(prefix=name):
        if (isinstance(part, _DropoutNd) and part.p) or (_is_drop_path(part) and getattr(part, "drop_prob", 1)):
            raise UserError(f"'{name}' has dropout inside, which experts do not have; build the model with proj_drop=0")
        if is_parametrized(part):
            raise UserError(f"'{where}' has a parametrization, which a mixture would drop; remove it first")
        if any(getattr(part, hooks, None) for hooks in _HOOKS):
            raise UserError(f"'{where}' has a hook (as of weight_norm, pruning), which a mixture would drop; remove it")
        if "forward" in vars(part):
            raise UserError(f"'{where}' has another forward than its class, which a mixture would drop; remove it")
    for child, part in network.named_children():
        kind = type(part).__name__
        if child in (*form.firsts, form.last) and type(part) not in _LINEAR:
            raise UserError(f"'{name}.{child}' is a {kind}; a mixture computes torch.nn.Linear alone: {ELSEWHERE}")
        if child in form.between and any(True for _ in part.buffers()):
            raise UserError(
                f"'{name}.{child}' ({kind}) counts statistics, which each expert would need of its own; {ELSEWHERE}"
            )
    for child, part in surplus(network, form):
        raise UserError(
            f"'{name}' has '{child}' ({type(part).__name__}) inside, which experts do not have; {ELSEWHERE}"
        )
    for own, _ in (*network.named_parameters(recurse=False), *network.named_buffers(recurse=False)):
        raise UserError(f"'{name}' has a tensor '{own}' of its own, which experts do not have; {ELSEWHERE}")
    with_bias = [first for first in form.firsts if getattr(network, first).bias is not None]
    if with_bias and len(with_bias) < len(form.firsts):
        raise UserError(
            f"'{name}.{with_bias[0]}' has a bias and the other half of the same layer has none; give both one, such as "
            f"zeros, or {ELSEWHERE}"
        )
