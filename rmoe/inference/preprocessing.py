"""How a run's images become inputs, in the words of timm and of Hugging Face's image processors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.data import resolve_data_config

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers


def preprocessing(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns timm's data config of a run: mean and std in 0 … 1 and, of classifiers, input_size, crop_pct and so on.

    Args:
        metadata: of `rmoe.inference.load.read_description`.
    """
    transform = (metadata.get("inputs") or {}).get("transform")
    if transform is not None:
        size = transform.get("input_size", 224)
        channels = size if isinstance(size, list | tuple) and len(size) == 3 else None
        square = (size, size) if isinstance(size, int) else tuple(size)
        given = {key: transform[key] for key in ("mean", "std", "crop_pct", "crop_mode") if transform.get(key)}
        whole = {"interpolation": transform.get("interpolation", "bilinear"), "crop_pct": 0.875} | given
        return resolve_data_config({**whole, "input_size": tuple(channels or (3, *square))}, pretrained_cfg={})
    steps = metadata["model"].get("data_preprocessor") or {}
    if not steps.get("mean") or not steps.get("std"):
        return {}
    # mmseg and mmdet turn BGR pixels of 0 … 255 around first, where they are told to.
    values = {key: [x / 255 for x in steps[key]] for key in ("mean", "std")}
    if not steps.get("bgr_to_rgb"):
        values = {key: x[::-1] for key, x in values.items()}
    return {key: tuple(x) for key, x in values.items()}


def image_processor(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the content of preprocessor_config.json; None where the run does not say how images become inputs.

    A classifier's is CLIP's of transformers, which resizes, crops and normalises as timm does. Those of other tasks say
    sizes, mean and std in the same words, and name no class of transformers.
    """
    inputs, data = metadata.get("inputs") or {}, preprocessing(metadata)
    if not data:
        return None
    found: dict[str, Any] = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
    }
    if "transform" in inputs:
        height, width = data["input_size"][1:]
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": math.floor(min(height, width) / data["crop_pct"])},
            "resample": _RESAMPLE.get(data["interpolation"], 2),
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            **found,
        }
    resize = next((step for step in inputs.get("pipeline", ()) if str(step.get("type")).endswith("Resize")), None)
    if resize and isinstance(resize.get("scale"), list | tuple):
        short, long = sorted(resize["scale"])
        size = {"shortest_edge": short, "longest_edge": long}
        if not resize.get("keep_ratio"):
            size = {"height": resize["scale"][1], "width": resize["scale"][0]}
        found |= {"do_resize": True, "size": size, "resample": 2}
    return found
