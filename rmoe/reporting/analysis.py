"""What a mixture does with the images of a data set: which experts their tokens go to, and what that tells of classes.

What it is, its weights, is in `rmoe.reporting.weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from rmoe.reporting.mixtures import mixtures_by_name
from rmoe.reporting.routing import RoutingMap, routing_maps
from rmoe.reporting.weights import LayerMovement, LayerWeights


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


def load_statistics(model: nn.Module, images: Iterable[LabelledImage], classes: Sequence[str]) -> dict[str, LayerLoad]:
    """Returns where tokens go, by the name of the layer in the timm model.

    Args:
        model: with `ResidualMoE` layers.
        images: see `LabelledImage`; labels that are no index into `classes` are left out where classes count.
        classes: their names.

    Raises:
        UserError: the model is dense.
    """
    experts = {name: layer.num_experts for name, layer in mixtures_by_name(model).items()}
    counts = {name: np.zeros((len(classes) + 1, number + 1), dtype=np.int64) for name, number in experts.items()}
    entropy = dict.fromkeys(experts, 0.0)
    for image in images:
        labels_hw, routed = image.labels, routing_maps(model, lambda: image.answer(model), image.shape)  # noqa: B023
        for name, found in routed.items():
            labels = _sampled(labels_hw, found)
            labels = np.where((labels >= 0) & (labels < len(classes)), labels, len(classes))
            np.add.at(counts[name], (labels.ravel(), found.expert_hw.ravel()), 1)
            entropy[name] += torch.special.entr(found.probability_hwE).sum().item()
    return {name: _load(counts[name], entropy[name], classes) for name in experts}


def _load(counts: np.ndarray, entropy: float, classes: Sequence[str]) -> LayerLoad:
    """Returns what counts [classes and none of them, experts and none of them], and the sum of the tokens' entropies,
    come to.
    """
    experts, known = counts.shape[1] - 1, counts[:-1, :-1]
    *load, none = (counts.sum(0) / counts.sum()).tolist()
    full = np.log(experts) if experts > 1 else 1.0
    joint = known / max(known.sum(), 1)
    by_class, by_expert = joint.sum(1), joint.sum(0)
    shared = _entropy(by_class) + _entropy(by_expert) - _entropy(joint)
    return LayerLoad(
        load=load,
        load_entropy=_entropy(np.array(load) / max(sum(load), 1e-12)) / full,
        gate_entropy=entropy / counts.sum() / full,
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
