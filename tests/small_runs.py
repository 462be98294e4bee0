"""Runs of tiny models as `rmoe train` leaves their `model.safetensors`, without any training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DefaultScope

from rmoe.engine.checkpoint.export import write_model
from rmoe.engine.model_config import for_one_process
from rmoe.inference.predictor import Predictor
from rmoe.moe.state import global_state_dict, moe_layers
from rmoe.registry import MODELS

# timm's model, its arguments, and the maps that heads get.
NETS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
        (8, 16),
    ),
    "cvt": ("cvt_13", {"embed_dims": [8, 8, 16], "depths": [1, 1, 1], "num_heads": [1, 1, 2]}, (8, 8, 16)),
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32}, (16, 16)),
}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
CLASSES = ("cat", "dog", "owl")
PLAIN = {
    **{"type": "rmoe.TimmPyramid", "model": "vit_small_patch14_dinov2", "allow_random_core": True},
    "kwargs": {"embed_dim": 8, "depth": 4, "num_heads": 2, "img_size": 56},
}
_SEMANTIC = "segmentation/mask2former_dinov2_base_dense_ade20k_512_160k"
MOE = {"num_experts": 3, "rank": 2, "blocks": "all"}


def run_of(folder: Path, config: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Path:
    """Writes a run of a model with random weights, in which no residual is zero."""
    scope = (inputs or {}).get("scope", "mmengine")
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(for_one_process(Config({"model": config}).model)).eval()
    for layer in moe_layers(model).values():
        for x in layer.parameters():
            torch.nn.init.normal_(x, std=0.3)
    folder.mkdir(parents=True)
    write_model(folder, global_state_dict(model), dict(config), classes=CLASSES, inputs=inputs, stage="residual")
    return folder


def classifier(folder: Path, net: str, moe: Mapping[str, Any] | None = MOE, side: int = 32) -> Path:
    """Writes a run of a classifier for images of side × side."""
    name, kwargs, _ = NETS[net]
    sized = {} if net == "cvt" else {"img_size": side}
    config = {"type": "rmoe.TimmClassifier", "model": name, "kwargs": kwargs | sized, "num_classes": 3, "moe": moe}
    transform = {"input_size": side, "crop_pct": 1.0, "interpolation": "bilinear"}
    return run_of(folder, config, {"scope": "mmengine", "imports": [], "transform": transform})


def segmentor(folder: Path, net: str, moe: Mapping[str, Any] | None = MOE, head: str = "FCNHead", **model: Any) -> Path:
    """Writes a run of a segmentor; `model` has more keys of its config."""
    channels = NETS[net][2]
    last = {"in_channels": channels[-1], "in_index": len(channels) - 1, "num_convs": 1}
    every = {"in_channels": [*channels], "in_index": [*range(len(channels))], "pool_scales": (1, 2)}
    config = {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            **{"type": "SegDataPreProcessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True},
            **{"pad_val": 0, "seg_pad_val": 255, "size": (32, 32)},
        },
        "backbone": pyramid(net, moe),
        "decode_head": {
            "type": head,
            **(every if head == "UPerHead" else last),
            **{"channels": 8, "num_classes": 3, "norm_cfg": {"type": "BN"}, "align_corners": False},
        },
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }
    inputs = {"scope": "mmseg", "imports": ["rmoe.tasks.segmentation"]}
    pipeline = [{"type": "rmoe.LoadImage"}, {"type": "PackSegInputs"}]
    return run_of(folder, config | model, {**inputs, "pipeline": pipeline})


def detector(folder: Path, net: str, moe: Mapping[str, Any] | None = MOE) -> Path:
    """Writes a run of a detector with a feature pyramid behind its backbone."""
    config = {
        "type": "RetinaNet",
        "data_preprocessor": {
            **{"type": "DetDataPreprocessor", "mean": MEAN, "std": STD, "bgr_to_rgb": False},
            "pad_size_divisor": 16,
        },
        "backbone": pyramid(net, moe),
        "neck": {"type": "FPN", "in_channels": [*NETS[net][2]], "out_channels": 8, "num_outs": 2},
        "bbox_head": {
            **{"type": "RetinaHead", "num_classes": 3, "in_channels": 8, "feat_channels": 8, "stacked_convs": 1},
            "anchor_generator": {
                **{"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1},
                "strides": [4, 8],
            },
        },
        "test_cfg": {"nms_pre": 10, "score_thr": 0.0, "nms": {"type": "nms", "iou_threshold": 0.6}, "max_per_img": 5},
    }
    return run_of(folder, config, {"scope": "mmdet", "imports": ["rmoe.tasks.detection"], "pipeline": []})


def mask2former(instances: bool = False) -> dict[str, Any]:
    """The model of a shipped config, for semantic classes or instances, of three: heads of one narrow layer."""
    name = "detection/mask2former_swinv2_base_dense_coco_50e" if instances else _SEMANTIC
    small: dict[str, Any] = {"num_layers": 1, "num_queries": 8, "num_points": 4, "num_feats": 4, "num_groups": 1}
    small |= {"num_heads": 2, "max_per_image": 10, "num_things_classes": 3, "num_classes": 3}
    small |= dict.fromkeys(("embed_dims", "feedforward_channels", "feat_channels", "out_channels"), 8)
    small |= {"class_weight": [1.0, 1.0, 1.0, 0.1]}

    def cut(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: small.get(key, cut(value)) for key, value in node.items()}
        return [cut(one) for one in node] if isinstance(node, list) else node

    model = cut(Config.fromfile(ROOT / f"rmoe/configs/{name}.py", import_custom_modules=False).model.to_dict())
    model["data_preprocessor"].pop("batch_augments", None)
    model["backbone"] = {**PLAIN, "out_indices": (0, 1, 2, 3)}
    model["panoptic_head" if instances else "decode_head"]["in_channels"] = [8, 8, 8, 8]
    return model


def logits(run: Predictor, images: torch.Tensor) -> torch.Tensor:
    """What the run itself computes for images, uint8 [B, 3, H, W]."""
    items = [run.item(np.ascontiguousarray(image.movedim(0, -1).numpy())) for image in images]
    found = run.run(run.inputs.collate(items))  # type: ignore[union-attr]
    return torch.stack([one["logits"] if run.task == "classification" else one.seg_logits.data for one in found])


def pyramid(net: str, moe: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config of a backbone whose core is not at hand."""
    name, kwargs, channels = NETS[net]
    return {
        **{"type": "rmoe.TimmPyramid", "model": name, "kwargs": kwargs, "core": "gone/core", "moe": moe},
        "out_indices": [*range(len(channels))],
    }
