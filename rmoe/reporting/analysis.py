"""What a trained mixture is and does, in numbers: its weights as core and residuals, what training moved, and which
experts tokens go to.

The paper's observation (arXiv 2204.09636): the weights of experts factor into a core, which does not depend on the
input, and a residual, which does. A mixture whose experts are networks of their own is factored into their mean and the
rest. Only the two weight matrices of each network count here, not the biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from mmengine.config import ConfigDict
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from rmoe.errors import UserError
from rmoe.moe.experts import Network
from rmoe.moe.gate import Routing
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect
from rmoe.moe.state import moe_layers


class LabelledImage(Protocol):
    """An image that a model can be asked about, and the classes of its pixels."""

    @property
    def labels(self) -> np.ndarray:
        """Returns class indices, int [H, W]."""

    def answer(self, model: Any) -> Any:
        """Evaluates the model on it."""

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (height, width) in pixels as the backbone gets it, without what a batch pads it by."""


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


@dataclass(frozen=True)
class LayerLoad:
    """Where the tokens of some images went in one layer; first choices, see `routing_maps`.

    Attributes:
        load: share of the tokens in which each expert has the largest part.
        load_entropy: entropy of `load` over log E: 1 where all experts have the same load.
        gate_entropy: mean entropy of a token's gate probabilities over log E: 0 where the gate is sure.
        by_class: for each class that occurs, its tokens by expert, int [E].
        information: mutual information of expert and class over the entropy of the classes: 0 where experts do not
            look at classes, 1 where an expert tells the class; 0 with one class.
        none: share of the tokens that have no expert; of what is above, they count in the gate's entropy alone.
    """

    load: list[float]
    load_entropy: float
    gate_entropy: float
    by_class: dict[str, list[int]]
    information: float
    none: float = 0.0


def weight_statistics(model: nn.Module) -> dict[str, LayerWeights]:
    """Returns the statistics by the name of the layer in the timm model, such as "layers.2.blocks.1.mlp".

    Raises:
        UserError: the model is dense.
    """
    found = {}
    for name, layer in _layers(model).items():
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
    old, new = _layers(before), _layers(after)
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


def layer_means(weights: LayerWeights, load: LayerLoad, moved: LayerMovement | None) -> dict[str, float | None]:
    """Returns a layer in one line, by column: means over its experts; None for what nothing is known of."""
    return {
        "‖core‖": weights.core_norm,
        "‖Δ‖ / ‖core‖": float(np.mean(weights.residual_norm)) / weights.core_norm,
        "cosine θ": _beside(weights.cosine_experts),
        "cosine Δ": _beside(weights.cosine_residuals),
        "rank Δw1": float(np.mean(weights.effective_rank["w1"])),
        "rank Δw2": float(np.mean(weights.effective_rank["w2"])),
        "matched": weights.matched,
        "by chance": weights.by_chance,
        "load entropy": load.load_entropy,
        "gate entropy": load.gate_entropy,
        "tells class": load.information,
        "core moved": moved.core if moved else None,
        "experts moved": float(np.mean(moved.experts)) if moved else None,
        "shared": moved.shared if moved else None,
    }


def _beside(square: Sequence[Sequence[float]]) -> float:
    """Returns the mean of the entries beside the diagonal; for one expert, 1."""
    values = np.array(square)
    return float(values[~np.eye(len(values), dtype=bool)].mean()) if len(values) > 1 else 1.0


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


def load_statistics(model: nn.Module, images: Iterable[LabelledImage], classes: Sequence[str]) -> dict[str, LayerLoad]:
    """Returns where tokens go, by layer as above.

    Args:
        model: with `ResidualMoE` layers.
        images: see `LabelledImage`; labels that are no index into `classes` are left out where classes count.
        classes: their names.

    Raises:
        UserError: the model is dense.
    """
    experts = {name: layer.num_experts for name, layer in _layers(model).items()}
    counts = {name: np.zeros((len(classes) + 1, number + 1), dtype=np.int64) for name, number in experts.items()}
    entropy: dict[str, list[float]] = {name: [] for name in experts}
    for image in images:
        labels_hw, routed = image.labels, routing_maps(model, lambda: image.answer(model), image.shape)  # noqa: B023
        for name, found in routed.items():
            labels = _sampled(labels_hw, found)
            labels = np.where((labels >= 0) & (labels < len(classes)), labels, len(classes))
            np.add.at(counts[name], (labels.ravel(), found.expert_hw.ravel()), 1)
            entropy[name].append(torch.special.entr(found.probability_hwE).sum(-1).mean().item())
    return {name: _load(counts[name], entropy[name], classes) for name in experts}


def _load(counts: np.ndarray, entropies: list[float], classes: Sequence[str]) -> LayerLoad:
    """Returns what counts [classes and none of them, experts and none of them] come to."""
    experts, known = counts.shape[1] - 1, counts[:-1, :-1]
    *load, none = (counts.sum(0) / counts.sum()).tolist()
    full = np.log(experts) if experts > 1 else 1.0
    joint = known / max(known.sum(), 1)
    by_class, by_expert = joint.sum(1), joint.sum(0)
    shared = _entropy(by_class) + _entropy(by_expert) - _entropy(joint)
    return LayerLoad(
        load=load,
        load_entropy=_entropy(np.array(load) / max(sum(load), 1e-12)) / full,
        gate_entropy=float(np.mean(entropies)) / full,
        by_class={name: row.tolist() for name, row in zip(classes, known, strict=True) if row.any()},
        information=shared / _entropy(by_class) if _entropy(by_class) else 0.0,
        none=none,
    )


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float((positive * np.log(1 / positive)).sum())


def _sampled(labels_hw: np.ndarray, found: RoutingMap) -> np.ndarray:
    """Returns the label in the middle of each cell of a map; of a cell whose middle is outside, at the edge."""
    rows, columns = (
        np.minimum((np.arange(count) + 0.5) * cell * side, side - 1).astype(int)
        for count, cell, side in zip(found.expert_hw.shape, found.cell, labels_hw.shape, strict=True)
    )
    return labels_hw[np.ix_(rows, columns)]


def _layers(model: nn.Module) -> dict[str, ResidualMoE]:
    """Returns the layers by name in the timm model.

    Raises:
        UserError: the model is dense.
    """
    return {_name(path): layer for path, layer in _mixtures(model).items()}


def _mixtures(model: nn.Module) -> dict[str, ResidualMoE]:
    """Returns the layers by path in the model.

    Raises:
        UserError: the model is dense.
    """
    layers = moe_layers(model)
    if not layers:
        raise UserError("the model is dense: there are no experts; give a run whose config has a moe")
    return layers


def _name(path: str) -> str:
    """Returns a module's name in the timm model, which the last wrapper calls `model`, whatever head that is in."""
    return path.rpartition("model.")[2]


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


class RoutingMap(NamedTuple):
    """Tells which expert each token of an image went to, and where in the image the token is.

    Attributes:
        expert_hw: the expert with the largest part, int64 [h, w]; the number of experts where there is none.
        probability_hwE: the gate's, float32.
        cell: (height, width) of a token's part of the image, over the image's; the last ones may reach beyond it.
    """

    expert_hw: np.ndarray
    probability_hwE: Tensor
    cell: tuple[float, float]


def routing_maps(
    model: nn.Module, run: Callable[[], Any], shape: tuple[int, int] | None = None
) -> dict[str, RoutingMap]:
    """Returns the first choice of every token of one image, by layer as above, on the grid of that layer's tokens.

    A segmentor that sees images through a sliding window sees this one whole.

    Args:
        model: with `ResidualMoE` layers.
        run: one evaluation of `model` on one image.
        shape: (height, width) in pixels of the image, without what a batch pads it by on the right and below; by
            default all of what the backbone gets.

    Raises:
        UserError: the model is dense, or the grid of a layer's tokens is not known.
    """
    mixtures = _mixtures(model)
    with torch.no_grad(), _whole_images(model), _watched(model, mixtures) as grids, collect() as records:
        run()
    found = {}
    for path, layer in mixtures.items():
        routing, grid = records.routing[layer], grids[path]
        tokens = slice(-grid.rows * grid.columns, None)
        first_hw, probability_hwE = (
            x[tokens].unflatten(0, (grid.rows, grid.columns)).cpu()
            for x in (_first_choices(layer, routing), routing.probability_TE)
        )
        cell, kept = grid.within(shape)
        found[_name(path)] = RoutingMap(first_hw[kept].numpy(), probability_hwE[kept], cell)
    return found


def _first_choices(layer: ResidualMoE, routing: Routing) -> Tensor:
    """Returns the expert with the largest part in each token, int64 [T]; the number of experts where none has any."""
    if not layer.config.chooses:
        return routing.probability_TE.argmax(1)
    gate_T, place_T = routing.gate_TK.max(1)
    expert_T = routing.expert_TK.gather(1, place_T[:, None])[:, 0]
    return torch.where(gate_T > 0, expert_T, layer.num_experts)


@dataclass(frozen=True)
class _Grid:
    """Says how the tokens of a layer lie in the image that the backbone got.

    Attributes:
        rows, columns: of tokens.
        image: (height, width) of that image in pixels, if it is known.
        strides: those of the backbone's maps, in pixels; rows and columns are rounded up.
    """

    rows: int
    columns: int
    image: tuple[int, int] | None
    strides: Sequence[int]

    def within(self, shape: tuple[int, int] | None) -> tuple[tuple[float, float], tuple[slice, slice]]:
        """Returns the size of a cell over that of the part `shape` of the image, and which cells are in that part."""
        cells, kept = [], []
        for axis, count in enumerate((self.rows, self.columns)):
            whole = self.image[axis] if self.image else count
            part = shape[axis] if shape and self.image else whole
            pixels = min((stride for stride in self.strides if stride * count >= whole), default=whole / count)
            cells.append(pixels / part)
            kept.append(slice(min(count, math.ceil(part / pixels))))
        return (cells[0], cells[1]), (kept[0], kept[1])


@contextmanager
def _whole_images(model: Any) -> Iterator[None]:
    """Lets a segmentor see images whole where it would see one window of them after another."""
    settings: Any = getattr(model, "test_cfg", None)
    if not isinstance(settings, Mapping) or settings.get("mode") != "slide":
        yield
        return
    model.test_cfg = ConfigDict(settings, mode="whole")
    try:
        yield
    finally:
        model.test_cfg = settings


@contextmanager
def _watched(model: nn.Module, mixtures: Mapping[str, ResidualMoE]) -> Iterator[dict[str, _Grid]]:
    """Yields what becomes, by path, the grid of each mixture's tokens while the model runs.

    A mixture often gets tokens in a row. Then the modules around it may get them as a map, or a convolution has made a
    map of as many.
    """
    grids: dict[str, _Grid] = {}
    given: dict[nn.Module, torch.Size] = {}  # maps that modules around mixtures got
    made: list[torch.Size] = []  # maps that convolutions gave

    def get(module: nn.Module, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() == 4:
            given[module] = inputs[0].shape

    def make(module: nn.Module, inputs: Any, output: Tensor) -> None:
        made.append(output.shape)

    def find(path: str, layer: ResidualMoE, inputs: Any) -> None:
        around = _around(model, path)
        tokens_BTC = layer.form.tokens(inputs[0])
        tokens, width = tokens_BTC[..., 0].numel() - _prefix_tokens(model, path), tokens_BTC.shape[-1]
        maps = [given[module] for module in around if module in given]
        sides = [x[1:3] for x in maps if x[3] == width] + [x[2:] for x in [*maps, *reversed(made)] if x[1] == width]
        sides += [x[2:] for x in reversed(made)]
        fitting = [(rows, columns) for rows, columns in sides if rows * columns == tokens]
        if not fitting:
            raise UserError(
                f"{_name(path)} has {tokens} tokens, and neither a module around it nor a convolution before it has a "
                "map of as many, so that it is not known where they are in the image; leave this run out of analyses"
            )
        known = maps and fitting[0] not in (tuple(maps[-1][1:3]), tuple(maps[-1][2:]))
        image = (maps[-1][2], maps[-1][3]) if known else None
        strides = [x["reduction"] for module in around for x in getattr(module, "feature_info", ())]
        grids[path] = _Grid(*fitting[0], image, strides)

    watched = {module for path in mixtures for module in _around(model, path)}
    hooks = [module.register_forward_pre_hook(get) for module in watched]
    hooks += [x.register_forward_hook(make) for x in model.modules() if isinstance(x, nn.Conv2d)]
    hooks += [layer.register_forward_pre_hook(partial(find, path)) for path, layer in mixtures.items()]
    try:
        yield grids
    finally:
        for hook in hooks:
            hook.remove()


def _around(model: nn.Module, path: str) -> list[nn.Module]:
    """Returns the module at a path and those around it, from the innermost to the whole model."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]


def _prefix_tokens(model: nn.Module, path: str) -> int:
    """Returns how many tokens stand before those of the map, as the innermost module around `path` says that knows."""
    known = (getattr(module, "num_prefix_tokens", None) for module in _around(model, path))
    return int(next((number for number in known if number is not None), 0))
