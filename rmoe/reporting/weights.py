"""What the experts of a mixture are: their weights as core and residuals, and what training moved.

The paper's observation (arXiv 2204.09636): the weights of experts factor into a core, which does not depend on the
input, and a residual, which does. A mixture whose experts are networks of their own is factored into their mean and the
rest. Only the two weight matrices of each network count here, not the biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from rmoe.errors import UserError
from rmoe.moe.experts import Network
from rmoe.moe.layer import ResidualMoE
from rmoe.reporting.mixtures import mixtures_by_name


@dataclass(frozen=True)
class LayerWeights:
    """The experts of one layer, each θ_e = core + Δ_e. Norms are Frobenius norms over both weight matrices.

    Attributes:
        core_norm: of the core; of experts of their own, of their mean.
        residual_norm: of each Δ_e.
        cosine_experts: between θ_e and θ_f, [E][E].
        cosine_residuals: between Δ_e and Δ_f, [E][E]; 0 where one is zero.
        effective_rank: of each Δ_e, by "w1" and "w2": the exponential of the entropy of its singular values, taken as
            shares of their sum (Roy and Vetterli, EUSIPCO 2007); 0 where it is zero.
        matched: of experts of their own, see `matched_share`; else None.
        by_chance: `matched` of experts whose units are normal random numbers of the same second moments; else None.
    """

    core_norm: float
    residual_norm: list[float]
    cosine_experts: list[list[float]]
    cosine_residuals: list[list[float]]
    effective_rank: dict[str, list[float]]
    matched: float | None = None
    by_chance: float | None = None


@dataclass(frozen=True)
class LayerMovement:
    """What training did to the experts of one layer, as parts of what they were.

    Attributes:
        core: norm of the core's change over the core's norm.
        experts: of each θ_e, norm of its change over its norm.
        shared: share of all experts' squared change that is the same for all of them: 1 where training moved a common
            core alone, 0 where it moved residuals alone; 0 where nothing moved.
    """

    core: float
    experts: list[float]
    shared: float


def weight_statistics(model: nn.Module) -> dict[str, LayerWeights]:
    """Returns the statistics by the name of the layer in the timm model, such as "layers.2.blocks.1.mlp".

    Raises:
        UserError: the model is dense.
    """
    found = {}
    for name, layer in mixtures_by_name(model).items():
        core, deltas = _factored(layer)
        whole = torch.stack([core + delta for delta in map(_flat, deltas)])
        rest = torch.stack([*map(_flat, deltas)])
        units_EHU = None if layer.config.kind.has_core else _units(layer)
        found[name] = LayerWeights(
            core_norm=core.norm().item(),
            residual_norm=rest.norm(dim=1).tolist(),
            cosine_experts=_cosines(whole),
            cosine_residuals=_cosines(rest),
            effective_rank={
                "w1": [effective_rank(delta.w1_HC) for delta in deltas],
                "w2": [effective_rank(delta.w2_CH) for delta in deltas],
            },
            matched=None if units_EHU is None else matched_share(units_EHU),
            by_chance=None if units_EHU is None else matched_share(_like(units_EHU)),
        )
    return found


def movement(before: nn.Module, after: nn.Module) -> dict[str, LayerMovement]:
    """Returns, by layer as above, what happened between two models of the same experts, upstream and downstream, say.

    Raises:
        UserError: they do not have the same layers and numbers of experts.
    """
    old, new = mixtures_by_name(before), mixtures_by_name(after)
    shapes = [{name: (layer.num_experts, _factored(layer)[0].numel()) for name, layer in x.items()} for x in (old, new)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the two runs have other experts: {shapes[0]} and {shapes[1]} (number, weights); give two runs of one moe"
        )
    found = {}
    for name in new:
        (core0, deltas0), (core1, deltas1) = _factored(old[name]), _factored(new[name])
        theta0, theta1 = (
            torch.stack([c + d for d in map(_flat, ds)]) for c, ds in ((core0, deltas0), (core1, deltas1))
        )
        moved = theta1 - theta0
        everything = moved.square().sum()
        common = len(moved) * moved.mean(0).square().sum()
        found[name] = LayerMovement(
            core=((core1 - core0).norm() / core0.norm()).item(),
            experts=(moved.norm(dim=1) / theta0.norm(dim=1)).tolist(),
            shared=(common / everything).item() if everything else 0.0,
        )
    return found


def effective_rank(x: Tensor) -> float:
    """Returns the effective rank of the matrix x, see `LayerWeights.effective_rank`."""
    values = torch.linalg.svdvals(x)
    if not values.sum():
        return 0.0
    return torch.special.entr(values / values.sum()).sum().exp().item()


def matched_share(units_EHU: Tensor) -> float:
    """Returns the share of all experts' squared norm that is in their mean, once their hidden units are ordered alike.

    A network computes the same in whatever order its hidden units stand: experts that are foreign to one another weight
    by weight may still be alike. Each expert in turn is put in the order that agrees best, by the sum of scalar
    products, with the sum of those before it (weight matching, Ainsworth et al., arXiv 2209.04836, for one layer).

    Args:
        units_EHU: a hidden unit's incoming and outgoing weights, U of them; on the CPU, without gradient.

    Returns:
        1 where experts are equal but for the order. Matching finds some agreement between any: that of experts which
        have nothing in common lies above 1/E, the more the more units there are to choose from.
    """
    total_HU = units_EHU[0]
    for units_HU in units_EHU[1:]:
        _, order_H = linear_sum_assignment((total_HU @ units_HU.T).numpy(), maximize=True)
        total_HU = total_HU + units_HU[torch.from_numpy(order_H)]
    return (total_HU.square().sum() / (len(units_EHU) * units_EHU.square().sum())).item()


def _like(units_EHU: Tensor) -> Tensor:
    """Returns as many independent normal units, of the second moments that these have over all experts."""
    flat_NU = units_EHU.flatten(0, 1)
    values_U, vectors_UU = torch.linalg.eigh(flat_NU.T @ flat_NU / len(flat_NU))
    normal_NU = torch.randn(flat_NU.shape, dtype=flat_NU.dtype, generator=torch.Generator().manual_seed(0))
    return (normal_NU * values_U.clamp_min(0).sqrt() @ vectors_UU.T).view_as(units_EHU)


@torch.no_grad()
def _factored(layer: ResidualMoE) -> tuple[Tensor, list[Network]]:
    """Returns the core's weight matrices in one vector, and Δ of each expert; float64."""
    residuals = type(layer.residuals())(*(x.double() for x in layer.residuals()))
    deltas = [residuals.delta(e) for e in range(layer.num_experts)]
    if (core := layer.theta()) is not None:
        return _flat(Network(core.w1_HC.double(), None, core.w2_CH.double(), None)), deltas
    w1, w2 = (torch.stack(parts).mean(0) for parts in zip(*((d.w1_HC, d.w2_CH) for d in deltas), strict=True))
    rest = [Network(d.w1_HC - w1, None, d.w2_CH - w2, None) for d in deltas]
    return _flat(Network(w1, None, w2, None)), rest


@torch.no_grad()
def _units(layer: ResidualMoE) -> Tensor:
    """Returns the weights of each expert's hidden units, [E, H, 2C], or 3C where they are gated; float64."""
    w1_EFC, _, w2_ECH, _ = layer.residuals()
    first_EHC = w1_EFC.unflatten(1, (-1, w2_ECH.shape[2])).unbind(1)
    return torch.cat([*first_EHC, w2_ECH.mT], -1).double()


def _flat(network: Network) -> Tensor:
    return torch.cat([network.w1_HC.flatten(), network.w2_CH.flatten()])


def _cosines(x_EN: Tensor) -> list[list[float]]:
    unit = nn.functional.normalize(x_EN, dim=1)
    return (unit @ unit.T).tolist()
