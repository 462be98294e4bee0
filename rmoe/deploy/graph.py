"""What of a finished run becomes a graph: the whole model or a part of it, from pixels to numbers, as one module."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import Normalize

import rmoe
from rmoe.engine.building import described
from rmoe.errors import UserError, nearest
from rmoe.inference.predictor import Predictor
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.state import moe_layers

Part = Literal["model", "backbone", "neck"]
INPUT = "images"
_LARGEST = 8192  # pixels of a side


@dataclasses.dataclass(frozen=True)
class Graph:
    """Holds what is exported.

    Attributes:
        module: takes one tensor of images and returns one tensor, or a tuple of them; on the CPU, in evaluation.
        example: images of the graph's size, [2, 3, H, W].
        outputs: names of what the module returns.
        about: what a file with the graph says of it: by name, strings.
    """

    module: nn.Module
    example: Tensor
    outputs: tuple[str, ...]
    about: dict[str, str]


def graph_of(
    run: Predictor, part: Part = "model", image_size: tuple[int, int] | None = None, normalised: bool = False
) -> Graph:
    """Returns a finished run as one module, for images of one size.

    Args:
        run: what `rmoe.load` returned.
        part: "model": logits, [B, classes, H, W] of a segmentor and [B, classes] of a classifier; "backbone": the
            backbone's maps, or of a classifier what its last linear layer reads; "neck": maps behind the neck.
        image_size: height and width; by default that of the run's inputs, where it has one.
        normalised: whether the module takes float32 images as the backbone does. By default it takes pixels, uint8 in
            red, green, blue, and does itself with them what the run does, but for resizing and cropping.

    Raises:
        UserError: the model has no such part, or one that is no function of the images alone; it does not take images
            of that size; how images are normalised, or of what size they are, is not known.
    """
    if part not in get_args(Part):
        raise UserError(f"there is no part '{part}'{nearest(str(part), get_args(Part))}")
    model: Any = _for_graphs(run)
    function, outputs = _part(run, model, part)
    height, width = image_size or _usual_size(run)
    if not all(type(side) is int and 1 <= side <= _LARGEST for side in (height, width)):
        raise UserError(f"the image size is {height!r} x {width!r}; both are whole numbers from 1 to {_LARGEST}")
    _check_windows(run, part, (height, width))
    pixels = nn.Identity() if normalised else _Pixels(run, model)
    module = _Graph(pixels, model, function).eval()
    shape, generator = (2, 3, height, width), torch.Generator().manual_seed(0)
    example = torch.randn(shape, generator=generator) if normalised else _pixels(shape, generator)
    try:
        with torch.no_grad():
            found = module(example)
    except Exception as error:  # the model's own message, or timm's and torch's of many types
        raise UserError(
            f"the model does not take images of {height} x {width} ({described(error)}); give another --image-size"
        ) from error
    names = tuple(f"map{i}" for i in range(len(found))) if isinstance(found, tuple) else outputs
    kind = "float32, normalised as in training" if normalised else "uint8, red, green, blue"
    about = {"rmoe": rmoe.__version__, "task": str(run.task), "part": part, "images": f"{kind}, [batch, 3, H, W]"}
    return Graph(module, example, names, about | {"classes": json.dumps(run.classes)})


def more_images(graph: Graph, count: int) -> Tensor:
    """Returns other images that the graph takes."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, *graph.example.shape[1:])
    return torch.randn(shape, generator=generator) if graph.example.is_floating_point() else _pixels(shape, generator)


def _pixels(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


class _Graph(nn.Module):
    """Applies a function of a model to images."""

    def __init__(self, pixels: nn.Module, model: nn.Module, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.pixels, self.model, self.function = pixels, model, function

    def forward(self, images: Tensor) -> Any:
        return self.function(self.model, self.pixels(images))


class _Pixels(nn.Module):
    """Makes images, uint8 [B, 3, H, W] in red, green, blue, what the backbone takes, as the run's validation does.

    Raises:
        UserError: the run does not say how.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, run: Predictor, model: Any) -> None:
        super().__init__()
        self.reverse = False
        if run.task == "classification":
            steps = getattr(run.inputs and run.inputs.transform, "transforms", ())
            norm = next((step for step in steps if isinstance(step, Normalize)), None)
            if norm is None:
                raise UserError(
                    f"{run.source} does not say how images are normalised; give --normalised, and images that are"
                )
            mean, std = (255 * torch.as_tensor(values).float().view(-1, 1, 1) for values in (norm.mean, norm.std))
        else:
            own = model.data_preprocessor
            self.reverse = not own._channel_conversion  # the run reads blue, green, red
            norms = own._enable_normalize
            mean, std = (own.mean, own.std) if norms else (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: Tensor) -> Tensor:
        images = images.flip(1) if self.reverse else images
        return (images.float() - self.mean) / self.std


def function_of(run: Predictor, part: Part = "model") -> Callable[[Any, Tensor], Any]:
    """Returns the function that a graph of the run has, of a model and normalised images; see `graph_of`."""
    return _part(run, run.model, part)[0]


def _part(run: Predictor, model: Any, part: Part) -> tuple[Callable[[Any, Tensor], Any], tuple[str, ...]]:
    """Returns the function of the model that is asked for, and the name of what it returns."""
    if run.task == "classification":
        if part == "neck":
            raise UserError("a classifier has no neck; give --part model or --part backbone")
        return (_logits, ("logits",)) if part == "model" else (_embedding, ("features",))
    if run.task not in ("segmentation", "detection"):
        raise UserError(f"{run.source} is a {type(run.model).__name__}; known are mmseg's, mmdet's and ours")
    if part == "neck" and not getattr(model, "with_neck", False):
        raise UserError(f"the {type(model).__name__} has no neck; give --part backbone")
    if part != "model":
        return (_neck if part == "neck" else _backbone), ()
    if run.task == "detection":
        last = "neck" if getattr(model, "with_neck", False) else "backbone"
        raise UserError(
            f"a detector's boxes are chosen by code that is no graph; give --part {last}, and run its head in Python"
        )
    from rmoe.tasks.segmentation import check_plain, whole_logits

    check_plain(model)
    return whole_logits, ("logits",)


def _logits(model: Any, images: Tensor) -> Tensor:
    return model.model(images)


def _embedding(model: Any, images: Tensor) -> Tensor:
    return model.model.forward_head(model.model.forward_features(images), pre_logits=True)


def _backbone(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    return tuple(model.backbone(_padded(model, images)))


def _neck(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    return tuple(model.extract_feat(_padded(model, images)))


def _padded(model: Any, images: Tensor) -> Tensor:
    """Pads images as mmdet's preprocessor does, to whole cells of its `pad_size_divisor`."""
    own = model.data_preprocessor
    cell = getattr(own, "pad_size_divisor", 1)
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % cell, 0, -height % cell), value=getattr(own, "pad_value", 0))


def _usual_size(run: Predictor) -> tuple[int, int]:
    """Returns the size of the images that a run's model gets, where all have one."""
    inputs = run.metadata.get("inputs") or {}
    size: Any = (inputs.get("transform") or {}).get("input_size")
    if run.task == "segmentation":
        test: Any = getattr(run.model, "test_cfg", None) or {}
        size = test.get("crop_size") or getattr(run.model.data_preprocessor, "size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) >= 2:
        return size[-2], size[-1]
    raise UserError(f"{run.source} takes images of several sizes, and a graph has one; give --image-size H W")


def _check_windows(run: Predictor, part: Part, image_size: tuple[int, int]) -> None:
    test: Any = getattr(run.model, "test_cfg", None) or {}
    if run.task != "segmentation" or part != "model" or test.get("mode") != "slide":
        return
    crop = test["crop_size"]
    if any(side > most for side, most in zip(image_size, crop, strict=True)):
        raise UserError(
            f"the run slides a window of {crop[0]} x {crop[1]} over larger images, which is no graph; give "
            f"--image-size {crop[0]} {crop[1]}, and slide in the program that runs it"
        )


def _for_graphs(run: Predictor) -> nn.Module:
    """Returns a copy of a run's model on the CPU, in which residuals of a core's shape are added to it once for all."""
    floats = {x.dtype for x in run.model.parameters()}
    if run.precision is not None or floats - {torch.float32}:
        raise UserError("a graph is made of float32 weights; load the run without precision")
    if spread := [name for name, layer in moe_layers(run.model).items() if layer.ep_size > 1]:
        raise UserError(
            f"the experts of {spread[0]} are spread over processes; load the run by rmoe.load, which has all"
        )
    model = copy.deepcopy(run.model).cpu().eval().requires_grad_(False)
    for name, layer in moe_layers(model).items():
        if layer.config.kind.has_core and layer.residuals().merges and not layer.config.mixes_weights:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _own_networks(layer))
    return model


@torch.no_grad()
def _own_networks(layer: ResidualMoE) -> ResidualMoE:
    """Returns the layer whose experts are the networks θ0 + Δ_e."""
    config = dataclasses.replace(
        layer.config, residual="experts", expert_init="core", train_core=False, combine=layer.config.combined
    )
    own = ResidualMoE(layer.core, config).eval()  # copies of the core
    own.gate = layer.gate
    for mine, delta in zip(own.deepspeed_moe.parameters(), layer.residuals(), strict=True):
        mine.add_(delta)
    return own.requires_grad_(False)
