"""Pictures of what models answer and of what a mixture does: one row for each scene or layer, titled columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import nn

from rmoe.data.palette import palette
from rmoe.moe.state import moe_layers
from rmoe.reporting.analysis import LayerLoad
from rmoe.reporting.mixtures import timm_name
from rmoe.reporting.routing import routing_maps
from rmoe.reporting.weights import LayerMovement, LayerWeights
from rmoe.tasks.scenes import SURE, Scene, colours_of

_CLASSES = 30  # of the commonest, shown with the experts that they go to


def draw_predictions(scenes: Sequence[Scene], models: Sequence[tuple[str, nn.Module]]) -> Figure:
    """Draws a row for each of the `scenes`: image, truth, and the answer of each titled model."""
    names = scenes[0].dataset.metainfo["classes"]
    colours = colours_of(scenes[0].dataset.metainfo)
    figure, axes = _grid(len(scenes), ["image", "truth", *(title for title, _ in models)], legend=1.4)
    seen = {len(names)}  # void, which no model answers
    for row, scene in zip(axes, scenes, strict=True):
        answers = [scene.answer(model).pred_sem_seg.data[0].numpy() for _, model in models]
        row[0].imshow(scene.image)
        for axis, labels in zip(row[1:], [scene.labels, *answers], strict=True):
            axis.imshow(colours[labels])
            seen |= set(np.unique(labels).tolist())
    _legend(figure, [(name, colours[label] / 255) for label, name in enumerate([*names, "void"]) if label in seen])
    return figure


def draw_detections(scenes: Sequence[Scene], models: Sequence[tuple[str, nn.Module]]) -> Figure:
    """Draws a row for each of the `scenes`: image, truth, and what each titled model is sure of."""
    names = scenes[0].dataset.metainfo["classes"]
    colours = colours_of(scenes[0].dataset.metainfo) / 255
    figure, axes = _grid(len(scenes), ["image", "truth", *(title for title, _ in models)], legend=1.4)
    seen: set[int] = set()
    for row, scene in zip(axes, scenes, strict=True):
        image, truth = scene.image, scene.objects
        drawn: list[tuple[Any, Any, Any]]
        drawn = [([one["bbox"] for one in truth], [one["bbox_label"] for one in truth], None)]
        for answer in (scene.answer(model).pred_instances for _, model in models):
            sure = answer[answer.scores > SURE]
            drawn.append((sure.bboxes.tolist(), sure.labels.tolist(), sure.get("masks")))
        row[0].imshow(image)
        for axis, (boxes, labels, masks) in zip(row[1:], drawn, strict=True):
            axis.imshow(image)
            for number, ((x0, y0, x1, y1), label) in enumerate(zip(boxes, labels, strict=True)):
                colour = colours[label]
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
                if masks is not None:
                    axis.imshow(masks[number].numpy()[..., None] * np.array([*colour, 0.5]))
                seen.add(label)
    _legend(figure, [(names[label], colours[label]) for label in sorted(seen)])
    return figure


def draw_experts(scenes: Sequence[Scene], model: nn.Module) -> Figure:
    """Draws a row for each of the `scenes`: the image, and over it, for each MoE layer, each token's expert with the
    largest part; the image alone where none has any."""
    layers = moe_layers(model)
    experts = max(layer.num_experts for layer in layers.values())
    colours = np.array(palette(experts)) / 255  # no grey: the image under them is
    shades = np.concatenate([np.pad(colours, ((0, 0), (0, 1)), constant_values=0.65), np.zeros((1, 4))])
    maps = [routing_maps(model, partial(scene.answer, model), scene.shape) for scene in scenes]
    titles = [name.removesuffix(".mlp") for name in maps[0]]
    figure, axes = _grid(len(scenes), ["image", *titles], legend=1.2)
    for row, scene, found in zip(axes, scenes, maps, strict=True):
        image = scene.image
        row[0].imshow(image)
        for axis, one in zip(row[1:], found.values(), strict=True):
            height, width = image.shape[:2]
            (rows, columns), (tall, wide) = one.expert_hw.shape, one.cell
            drawn = shades[np.where(one.expert_hw < one.probability_hwE.shape[-1], one.expert_hw, experts)]
            axis.imshow(image.mean(-1), cmap="gray", extent=(0, width, height, 0))
            axis.imshow(drawn, extent=(0, columns * wide * width, rows * tall * height, 0), interpolation="nearest")
            axis.set(xlim=(0, width), ylim=(height, 0))
    _legend(figure, [(f"expert {expert}", colours[expert]) for expert in range(experts)])
    return figure


def draw_weights(layers: Mapping[str, LayerWeights]) -> Figure:
    """Draws a row for each layer: cosines between experts and between residuals, residuals' norms, effective ranks."""
    figure, axes = _panels(layers, ["cosine of experts", "cosine of residuals", "‖Δ‖ / ‖core‖", "effective rank of Δ"])
    for row, weights in zip(axes, layers.values(), strict=True):
        for axis, cosines in zip(row, (weights.cosine_experts, weights.cosine_residuals), strict=False):
            shown = axis.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu")
            axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
            figure.colorbar(shown, ax=axis, fraction=0.05)
        experts = range(len(weights.residual_norm))
        row[2].bar(experts, [norm / weights.core_norm for norm in weights.residual_norm])
        for shift, (name, ranks) in zip((-0.2, 0.2), weights.effective_rank.items(), strict=True):
            row[3].bar([expert + shift for expert in experts], ranks, width=0.4, label=name)
        row[3].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def draw_load(layers: Mapping[str, LayerLoad]) -> Figure:
    """Draws a row for each layer: the experts' shares of the tokens, and the commonest classes' tokens by expert."""
    figure, axes = _panels(layers, ["load", "classes by expert"], widths=(1, 2))
    for (left, right), load in zip(axes, layers.values(), strict=True):
        left.bar(range(len(load.load)), load.load)
        left.axhline(1 / len(load.load), color="black", linewidth=0.5)
        left.set_xlabel(f"entropy {load.load_entropy:.2f}, of the gate {load.gate_entropy:.2f}", fontsize="x-small")
        names = sorted(load.by_class, key=lambda name: -sum(load.by_class[name]))[:_CLASSES]
        counts = np.array([load.by_class[name] for name in names], dtype=float).reshape(len(names), -1)
        shown = right.imshow((counts / counts.sum(1, keepdims=True)).T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        figure.colorbar(shown, ax=right, fraction=0.05, label="share of the class")
        right.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        right.set_xticks(range(len(names)), [_plain(name) for name in names], rotation=90, fontsize="xx-small")
        right.set_xlabel(f"what the expert tells of the class: {load.information:.2f}", fontsize="x-small")
    return figure


def draw_movement(layers: Mapping[str, LayerMovement]) -> Figure:
    """Draws what training moved, by layer: the core, each expert, and how much of it was common to all experts."""
    figure = Figure(figsize=(1.6 * len(layers) + 4, 3.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name.removesuffix(".mlp") for name in layers]
    left.boxplot([moved.experts for moved in layers.values()], tick_labels=names)
    left.plot(range(1, len(names) + 1), [moved.core for moved in layers.values()], "ko", label="core")
    left.set_title("change / norm: experts, core", fontsize="small")
    left.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(0.0, -0.1), frameon=False)
    right.bar(names, [moved.shared for moved in layers.values()])
    right.set(ylim=(0, 1))
    right.set_title("share of the change common to all experts", fontsize="small")
    for axis in (left, right):
        axis.tick_params(labelsize="x-small")
    return figure


def draw_norms(layers: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Draws ‖Δ‖ / ‖core‖, the mean over the experts of each layer, against the training step."""
    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axis = figure.subplots()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for colour, (name, points) in zip(colours, layers.items(), strict=True):
        label, marker = timm_name(name).removesuffix(".mlp"), "." if len(points) < 20 else ""
        axis.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker)
    axis.set(xlabel="training step", ylabel="‖Δ‖ / ‖core‖")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small", frameon=False)
    return figure


def _panels(layers: Mapping[str, Any], titles: Sequence[str], widths: Sequence[float] | None = None) -> Any:
    figure = Figure(figsize=(3.2 * sum(widths or [1] * len(titles)), 2.6 * len(layers)), dpi=100, layout="constrained")
    axes = figure.subplots(len(layers), len(titles), squeeze=False, width_ratios=widths)
    for row, name in zip(axes, layers, strict=True):
        row[0].set_ylabel(name.removesuffix(".mlp"), fontsize="small")
        for axis, title in zip(row, titles, strict=True):
            axis.set_title(title, fontsize="small")
            axis.tick_params(labelsize="x-small")
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # experts
    return figure, axes


def _grid(rows: int, titles: Sequence[str], legend: float) -> tuple[Figure, np.ndarray]:
    """Returns a figure with a titled column for each of `titles` and `legend` inches on the right."""
    side = 2.0
    width = side * len(titles)
    figure = Figure(figsize=(width + legend, side * rows + 0.3), dpi=100)
    axes = figure.subplots(rows, len(titles), squeeze=False)
    top = 1 - 0.3 / (side * rows + 0.3)
    figure.subplots_adjust(left=0.005, right=width / (width + legend), bottom=0.005, top=top, wspace=0.03, hspace=0.03)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(_plain(title))
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _plain(text: str) -> str:
    """Returns a text that matplotlib draws as it is: a dollar begins a formula there, an underscore hides a label."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def _legend(figure: Figure, entries: Sequence[tuple[str, Any]]) -> None:
    handles = [Patch(facecolor=colour, edgecolor="black", label=_plain(name)) for name, colour in entries]
    figure.legend(handles=handles, loc="center right", frameon=False)
