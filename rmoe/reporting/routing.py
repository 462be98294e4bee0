"""Where the tokens of an image go: a map of experts for each mixture of a model, on the grid of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn

from rmoe.errors import UserError
from rmoe.moe.gate import Routing
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect
from rmoe.reporting.mixtures import mixtures_of, timm_name

# Classes of timm which give the networks inside of them the tokens of an image in another order than row by row: window
# by window (Hiera, NesT), or first the upper left pixel of every patch (MobileViT).
_REORDERING = ("Hiera", "NestLevel", "MobileVitBlock", "MobileVitV2Block")


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
    """Returns the first choice of every token of one image, on the grid of a layer's tokens, by the layer's name in the
    timm model.

    A segmentor that sees images through a sliding window sees this one whole.

    Args:
        model: with `ResidualMoE` layers.
        run: one evaluation of `model` on one image.
        shape: (height, width) in pixels of the image, without what a batch pads it by on the right and below; by
            default all of what the backbone gets.

    Raises:
        UserError: the model is dense, or it is not known where in the image a layer's tokens are.
    """
    mixtures = mixtures_of(model)
    for path in mixtures:
        for kind in (type(module).__name__ for module in _around(model, path)):
            if kind in _REORDERING:
                raise UserError(
                    f"{timm_name(path)} is inside of timm's {kind}, which gives it the tokens of an image in an order "
                    "of its own, so that no map of them can be made; leave this run out of analyses"
                )
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
        found[timm_name(path)] = RoutingMap(first_hw[kept].numpy(), probability_hwE[kept], cell)
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
                f"{timm_name(path)} has {tokens} tokens, and neither a module around it nor a convolution before it "
                "has a map of as many, so that it is not known where they are in the image; leave this run out of "
                "analyses"
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
