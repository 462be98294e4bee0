"""What a mixture is: a feed-forward network whose weights are a core plus the residuals of a token's experts.

    θ(x) = θ0 + Σ_{e ∈ top-k(x)} g_e(x) · Δ_e          (Residual Mixture of Experts, arXiv 2204.09636)

The arithmetic knows two forms of Δ, one class each, with its parameters, its start, its Δ and its products: factors
(`LowRank`) and the core's own shape (`Full`, `Own`). Kinds of residual that are kept otherwise, and brought into one of
these, are in kinds.py. `reference` is the definition, token by token; `rmoe.moe.mix` computes it fast.

Shape suffixes: T tokens, C model width, H hidden width, E experts, K experts per token, R residual rank,
N rows sorted by expert. An expert id of E says "no expert": Δ = 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.config import ResidualMoEConfig

if TYPE_CHECKING:
    from rmoe.moe.grouped import Groups

Activation = Callable[[Tensor], Tensor]
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = "a core's weights are dense tensors of float64, float32, float16 or bfloat16"


class Network(NamedTuple):
    """Holds θ of a two-layer network, y = W2 act(W1 x + b1) + b2, in the layout of `torch.nn.Linear`.

    W1 has twice as many outputs as W2 has inputs where the network is gated (forms.py).
    """

    w1_HC: Tensor
    b1_H: Tensor | None
    w2_CH: Tensor
    b2_C: Tensor | None

    def __call__(self, x_TC: Tensor, act: Activation) -> Tensor:
        """Returns FFN(x; θ), [T, C]."""
        return F.linear(act(F.linear(x_TC, self.w1_HC, self.b1_H)), self.w2_CH, self.b2_C)


class LowRank(NamedTuple):
    """Holds Δ_e = (B1_eᵀ A1_e, 0, B2_eᵀ A2_e, 0), without biases. B lies rank first: its products run fastest so.

    Where the experts share one A (HydraLoRA, arXiv 2404.19245), its first dimension is 1.
    """

    a1_ERC: Tensor
    b1_ERH: Tensor
    a2_ERH: Tensor
    b2_ERC: Tensor

    @property
    def num_experts(self) -> int:
        """Returns E."""
        return self.b1_ERH.shape[0]

    @property
    def merges(self) -> bool:
        """Says whether Δ_e is added to the core's weights, rather than computed beside them."""
        return False

    @classmethod
    def initial(cls, config: ResidualMoEConfig, core: Network) -> LowRank:
        """Returns residuals of zero effect, B = 0 beside a random A (as LoRA, arXiv 2106.09685)."""
        (first, width), many, rank = core.w1_HC.shape, config.num_experts, config.rank
        zeros, of_a = core.w1_HC.new_zeros, 1 if config.shared_a else many
        a1_ERC, a2_ERH = (_random(core, of_a, rank, inputs) for inputs in (width, core.w2_CH.shape[1]))
        return cls(a1_ERC, zeros(many, rank, first), a2_ERH, zeros(many, rank, width))

    def scaled(self, scale: float) -> LowRank:
        """Returns residuals that are `scale` times these."""
        return self if scale == 1 else self._replace(b1_ERH=scale * self.b1_ERH, b2_ERC=scale * self.b2_ERC)

    def spread(self) -> LowRank:
        """Returns the same with an A for each expert, where they share one: views of it."""
        a1_ERC, a2_ERH = (a.expand(self.num_experts, -1, -1) for a in (self.a1_ERC, self.a2_ERH))
        return self._replace(a1_ERC=a1_ERC, a2_ERH=a2_ERH)

    def delta(self, e: int) -> Network:
        """Returns Δ_e in the core's shape."""
        a1_ERC, b1_ERH, a2_ERH, b2_ERC = self.spread()
        return Network(b1_ERH[e].T @ a1_ERC[e], None, b2_ERC[e].T @ a2_ERH[e], None)

    def first(self, x_NC: Tensor, groups: Groups) -> Tensor:
        """Returns ΔW1_e x of rows sorted by expert, [N, H]."""
        return groups.product(groups.product(x_NC, self.a1_ERC.mT), self.b1_ERH)

    def second(self, a_NH: Tensor, groups: Groups) -> Tensor:
        """Returns ΔW2_e a of rows sorted by expert, [N, C]."""
        return groups.product(groups.product(a_NH, self.a2_ERH.mT), self.b2_ERC)


class Full(NamedTuple):
    """Holds Δ_e of the core's own shape, biases included."""

    w1_EHC: Tensor
    b1_EH: Tensor
    w2_ECH: Tensor
    b2_EC: Tensor

    @property
    def num_experts(self) -> int:
        """Returns E."""
        return self.w1_EHC.shape[0]

    @property
    def merges(self) -> bool:
        """Says whether Δ_e is added to the core's weights, rather than computed beside them."""
        return True

    @classmethod
    def initial(cls, config: ResidualMoEConfig, core: Network) -> Full:
        """Returns residuals that are zero."""
        (first, width), (_, hidden), many = core.w1_HC.shape, core.w2_CH.shape, config.num_experts
        zeros = core.w1_HC.new_zeros
        return cls(zeros(many, first, width), zeros(many, first), zeros(many, width, hidden), zeros(many, width))

    def scaled(self, scale: float) -> Full:
        """Returns residuals that are `scale` times these: no configuration asks for another scale than 1."""
        assert scale == 1
        return self

    def spread(self) -> Full:
        """Returns itself: experts share nothing."""
        return self

    def delta(self, e: int) -> Network:
        """Returns Δ_e in the core's shape."""
        return Network(self.w1_EHC[e], self.b1_EH[e], self.w2_ECH[e], self.b2_EC[e])

    def first(self, x_NC: Tensor, groups: Groups) -> Tensor:
        """Returns ΔW1_e x + Δb1_e of rows sorted by expert, [N, H]."""
        return groups.product(x_NC, self.w1_EHC.mT) + self.b1_EH.index_select(0, groups.expert_N)

    def second(self, a_NH: Tensor, groups: Groups) -> Tensor:
        """Returns ΔW2_e a + Δb2_e of rows sorted by expert, [N, C]."""
        return groups.product(a_NH, self.w2_ECH.mT) + self.b2_EC.index_select(0, groups.expert_N)


class Own(Full):
    """Holds networks of their own, without a core: the upper bound. Δ_e is the network of expert e."""

    @classmethod
    def initial(cls, config: ResidualMoEConfig, core: Network) -> Own:
        """Returns copies of the dense network, or networks that are each drawn anew (`expert_init`)."""
        zero = super().initial(config, core)
        if config.expert_init == "core":
            copies = (zeros if x is None else zeros + x for zeros, x in zip(zero, core, strict=True))
            return cls(*copies)
        many = config.num_experts
        w1_EHC, w2_ECH = _random(core, many, *core.w1_HC.shape), _random(core, many, *core.w2_CH.shape)
        return cls(w1_EHC, zero.b1_EH, w2_ECH, zero.b2_EC)


Residuals = LowRank | Full
OF_A = ("a1_ERC", "a2_ERH")  # names of the parameters that low-rank experts may share
BIASES = ("b1_EH", "b2_EC")  # names of parameters


def reference(
    x_TC: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    core: Network | None,
    residuals: Residuals,
    act: Activation,
    mixes_weights: bool,
) -> Tensor:
    """Computes what the layer means, token by token; the fast paths are compared with it. Arguments as `mix`.

    `act` gets all tokens' hidden values of one network, [T, H], and may change their number and mix tokens (forms.py).
    """
    num_experts = residuals.num_experts
    core = core or nothing(residuals)
    every = [core, *(_add(core, residuals.delta(e), 1.0) for e in range(num_experts))]

    def network(thetas: list[Network]) -> Tensor:
        h_TH = torch.stack([F.linear(x_C, one.w1_HC, one.b1_H) for x_C, one in zip(x_TC, thetas, strict=True)])
        return torch.stack([F.linear(a_H, one.w2_CH, one.b2_C) for a_H, one in zip(act(h_TH), thetas, strict=True)])

    if not len(x_TC):
        return x_TC.clone()
    if not mixes_weights:
        slots = [network([every[e + 1 if e < num_experts else 0] for e in one]) for one in expert_TK.T.tolist()]
        return sum(gate_T[:, None] * y_TC for gate_T, y_TC in zip(gate_TK.T, slots, strict=True))
    thetas = []
    for experts, gates_K in zip(expert_TK.tolist(), gate_TK, strict=True):
        theta = core
        for e, g in zip(experts, gates_K, strict=True):
            theta = _add(theta, residuals.delta(e), g) if e < num_experts else theta
        thetas.append(theta)
    return network(thetas)


def nothing(residuals: Residuals) -> Network:
    """Returns the core of experts that are networks of their own: θ0 = 0."""
    return Network(*(None if d is None else torch.zeros_like(d) for d in residuals.delta(0)))  # type: ignore[arg-type]


def first_order(backward: Any) -> Any:
    """Marks a backward pass that has no derivative of its own: asked for one, by create_graph=True, it raises.

    torch's `once_differentiable` raises only where the way to the inputs leads through it a second time: a Hessian that
    `torch.autograd.grad` is asked for would lack a part, without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a mixture of experts has first derivatives alone: leave create_graph=True out, or take second ones of "
                "rmoe.moe.experts.reference"
            )
        return backward(ctx, *grads)

    return checked


def act_backward(act: Activation, grad: Tensor, h: Tensor) -> Tensor:
    """Returns the gradient of the activation's input h, given its output's, which it may overwrite."""
    if type(act) is nn.GELU:  # not a subclass, which may compute something else
        return torch.ops.aten.gelu_backward.grad_input(grad, h, approximate=act.approximate, grad_input=grad)
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        # forward: past the hooks by which the FLOP counter follows modules, which do not stand a gradient in a gradient
        return torch.autograd.grad(getattr(act, "forward", act)(h), h, grad)[0]


def _add(core: Network, delta: Network, scale: Tensor | float) -> Network:
    def add(c: Tensor | None, d: Tensor | None) -> Any:
        return c if d is None else scale * d if c is None else c + scale * d

    return Network(*map(add, core, delta))


def _random(core: Network, experts: int, outputs: int, inputs: int) -> Tensor:
    return torch.randn(experts, outputs, inputs).to(core.w1_HC) / inputs**0.5


def is_weight(x: Tensor) -> bool:
    """Says whether a tensor can be a weight of a core: dense, of a dtype that can be trained."""
    return x.layout == torch.strided and x.dtype in WEIGHT_DTYPES


def described(x: Tensor) -> str:
    """Returns the dtype and layout of a tensor in words."""
    words = str(x.dtype).removeprefix("torch.")
    return words if x.layout == torch.strided else f"{words}, {str(x.layout).removeprefix('torch.')}"
