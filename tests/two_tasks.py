"""A segmentor and a detector of one tiny backbone on tiny scenes: a config for each task, and one for both.

Configs import it, so that a run dumps them as they stand: laying them out takes most of the time of such runs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yapf.yapflib.yapf_api
from mmengine.config import Config

from rmoe.data.emoji_scenes.params import SceneParams
from rmoe.data.emoji_scenes.scenes import metainfo, render

if "pytest" not in sys.modules:  # a run's own process
    yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, True)
SIDE, CATEGORIES = 32, 3
SCENES = SceneParams(
    **{"scene_size": 64, "scenes_train": 6, "scenes_val": 3, "categories": CATEGORIES},
    **{"upstream_classes": 2, "upstream_train": 1, "upstream_val": 1},
)
CLASSES = len(metainfo(CATEGORIES)["classes"])
MOE = {"num_experts": 4, "top_k": 1, "rank": 2, "blocks": "all", "noise": 0.0, "tasks": 2, "gate_std": 0.5}
MOE |= {"losses": {"importance": 0.01, "task_information": 0.05}}
PYRAMID = {
    **{"type": "rmoe.TimmPyramid", "model": "swin_tiny_patch4_window7_224", "out_indices": (0, 1)},
    "kwargs": {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4, "drop_path_rate": 0.0},
    "allow_random_core": True,
}
NORMAL = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True}
RESIZE = {"type": "Resize", "scale": (SIDE, SIDE), "keep_ratio": False}
FLIP = {"type": "RandomFlip", "prob": 0.5}
PACK = {"type": "PackSegInputs"}


def loader(dataset: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    return {"batch_size": batch_size, "num_workers": 0, "dataset": dict(dataset)}


def segmentation(data: Path) -> dict[str, Any]:
    """The config of the segmentor; its head reads the last map."""
    root = data / "ade20k"
    load = [{"type": "rmoe.LoadImage"}, {"type": "rmoe.LoadLabels", "num_classes": CLASSES}, RESIZE]
    dataset = {
        **{"type": "rmoe.SegDataset", "data_root": str(root), "classes": str(root / "classes.json")},
        **{"num_classes": CLASSES, "reduce_zero_label": True},
    }
    train = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    val = {"img_path": "images/validation", "seg_map_path": "annotations/validation"}
    return {
        "custom_imports": {"imports": ["rmoe.tasks.segmentation"], "allow_failed_imports": False},
        "default_scope": "mmseg",
        "model": {
            "type": "EncoderDecoder",
            "data_preprocessor": {"type": "SegDataPreProcessor", **NORMAL, "size": (SIDE, SIDE)},
            "backbone": {**PYRAMID, "out_indices": (1,)},
            "decode_head": {
                **{"type": "FCNHead", "in_channels": 16, "in_index": 0, "channels": 8, "num_convs": 1},
                **{"num_classes": CLASSES, "dropout_ratio": 0.0, "align_corners": False},
                "norm_cfg": {"type": "GN", "num_groups": 2},
            },
            "train_cfg": {},
            "test_cfg": {"mode": "whole"},
        },
        "train_dataloader": loader({**dataset, "data_prefix": train, "pipeline": [*load, FLIP, PACK]}, 2),
        "val_dataloader": loader({**dataset, "data_prefix": val, "pipeline": [*load[:1], RESIZE, load[1], PACK]}, 2),
        "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
    }


def detection(data: Path) -> dict[str, Any]:
    """The config of the detector, whose losses do not depend on how a batch is spread over processes."""
    root = data / "coco"
    named = str(root / "annotations" / "instances_val2017.json")
    dataset = {"type": "rmoe.DetDataset", "data_root": str(root), "classes": named, "num_classes": CATEGORIES}
    load = [{"type": "rmoe.LoadImage"}, RESIZE, {"type": "rmoe.LoadObjects"}]
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    train, val = (
        {"ann_file": f"annotations/instances_{split}2017.json", "data_prefix": {"img": f"{split}2017"}}
        for split in ("train", "val")
    )
    return {
        "custom_imports": {"imports": ["rmoe.tasks.detection"], "allow_failed_imports": False},
        "default_scope": "mmdet",
        "model": {
            "type": "FCOS",
            "data_preprocessor": {"type": "DetDataPreprocessor", **NORMAL, "pad_size_divisor": SIDE},
            "backbone": dict(PYRAMID),
            "neck": {"type": "FPN", "in_channels": [8, 16], "out_channels": 8, "num_outs": 2},
            "bbox_head": {
                **{"type": "FCOSHead", "num_classes": CATEGORIES, "in_channels": 8, "feat_channels": 8},
                **{"stacked_convs": 1, "strides": [4, 8], "regress_ranges": ((-1, 16), (16, 10**8))},
                "norm_cfg": {"type": "GN", "num_groups": 2},
            },
            "test_cfg": {
                **{"nms_pre": 20, "score_thr": 0.0, "nms": {"type": "nms", "iou_threshold": 0.6}, "max_per_img": 5}
            },
        },
        "train_dataloader": loader({**dataset, **train, "pipeline": [*load, FLIP, {"type": "PackDetInputs"}]}, 1),
        "val_dataloader": loader(
            {**dataset, **val, "test_mode": True, "pipeline": [*load, {"type": "PackDetInputs", "meta_keys": keys}]}, 2
        ),
        "val_evaluator": {"type": "rmoe.CocoMetric", "ann_file": named, "metric": "bbox"},
    }


def write(folder: Path, moe: Mapping[str, Any] | None = MOE) -> Path:
    """Makes the data and the configs of both tasks in `folder`; returns the config of both at once."""
    render(folder / "data", SCENES)
    for make in (segmentation, detection):
        Config(make(folder / "data")).dump(folder / f"{make.__name__}.py")
    both = {
        "custom_imports": {"imports": ["two_tasks"], "allow_failed_imports": False},
        "stage": "residual",
        "tasks": {
            "segmentation": {"config": "segmentation.py", "weight": 0.5},
            "detection": {"config": "detection.py"},
        },
        "model": {"backbone": {"moe": moe and copy.deepcopy(dict(moe))}},
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 4, "val_interval": 4},
        "optim_wrapper": {
            "optimizer": {"type": "AdamW", "lr": 1e-2, "weight_decay": 0.05},
            **{"constructor": "rmoe.ParamGroups", "clip_grad": {"max_norm": 1.0}},
        },
        "param_scheduler": [{"type": "PolyLR", "eta_min": 0.0, "power": 0.9, "begin": 0, "end": 4, "by_epoch": False}],
        "default_hooks": {
            "checkpoint": {
                **{"type": "CheckpointHook", "interval": 2, "by_epoch": False, "max_keep_ckpts": 2},
                "save_best": "segmentation/mIoU",
            },
            "logger": {"type": "LoggerHook", "interval": 1, "log_metric_by_epoch": False},
        },
        "randomness": {"seed": 3},
    }
    Config(both).dump(folder / "both.py")
    return folder / "both.py"
