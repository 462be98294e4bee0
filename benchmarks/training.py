"""Models of the shipped configs on made-up images, and one training step of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import nn

import rmoe
from rmoe.registry import MODELS
from rmoe.reporting.tracing import training_loss

CONFIGS = Path(rmoe.__file__).parent / "configs"
TASKS = {
    "classification": CONFIGS / "upstream/swin_tiny_core_imagenet1k.py",
    "segmentation": CONFIGS / "segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py",
    "detection": CONFIGS / "detection/mask_rcnn_swin_tiny_dense_coco_1x.py",
}
# `moe` of a config for each kind of layer that is compared; 8 experts, top-1, every other block of the last two stages.
ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "low_rank": {"residual": "low_rank", "top_k": 1, "train_core": False},
    "full": {"residual": "full"},
    "experts": {"residual": "experts"},
}
_LIBRARIES = {"classification": "timm", "segmentation": "mmseg.models", "detection": "mmdet.models"}
_SMALL_WIDTH = 16
Batch = dict[str, Any]


def preload(task: str) -> None:
    """Imports what `build` will need, for the sake of processes that are forked afterwards."""
    importlib.import_module(_LIBRARIES[task])


def config(task: str, moe: dict[str, Any] | None, image_size: int, small: bool, file: str | None = None) -> Config:
    """Returns a shipped config whose model starts from random weights.

    Args:
        task: key of `TASKS`.
        moe: keys of `ResidualMoEConfig`, such as an entry of `ARMS`.
        image_size: height and width.
        small: a few channels and blocks, for tests.
        file: within `CONFIGS`, another config of that task.
    """
    cfg = Config.fromfile(CONFIGS / file if file else TASKS[task])
    model = cfg.model
    part = model if task == "classification" else model.backbone
    part.update(core=None, moe=moe, allow_random_core=True)
    if task == "classification":
        part.kwargs["img_size"] = image_size
        part.mixup = None
    if task == "segmentation":
        model.data_preprocessor.size = (image_size, image_size)
    if small:
        _shrink(task, model, part)
    return cfg


def build(cfg: Config) -> nn.Module:
    """Builds the model of a config, in training mode."""
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(cfg.model)).train()


def batch(task: str, images: int, image_size: int) -> Batch:
    """Makes images with labels, as a data loader hands them to the model's preprocessor."""
    shape = (image_size, image_size)
    if task == "classification":
        return {"inputs": torch.randn(images, 3, *shape), "labels": torch.arange(images)}
    pixels = [torch.randint(256, (3, *shape), dtype=torch.uint8) for _ in range(images)]
    sample = {"segmentation": _segmented, "detection": _detected}[task]
    return {"inputs": pixels, "data_samples": [sample(*shape) for _ in range(images)]}


def training_step(model: Any, optimizer: torch.optim.Optimizer, images: Batch) -> Callable[[], None]:
    """Returns a function that does one step: forward, losses of heads and gates, backward, the optimizer."""

    def step() -> None:
        optimizer.zero_grad()
        training_loss(model, model.data_preprocessor(images, True)).backward()
        optimizer.step()

    return step


def _shrink(task: str, model: Any, part: Any) -> None:
    width, channels = _SMALL_WIDTH, [_SMALL_WIDTH * 2**stage for stage in range(4)]
    part.kwargs.update(embed_dim=width, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 8), window_size=4)
    if task == "segmentation":
        model.decode_head.update(in_channels=channels, channels=width)
        model.auxiliary_head.update(in_channels=channels[2], channels=width)
    if task == "detection":
        model.neck.in_channels = channels


def _segmented(height: int, width: int) -> Any:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = torch.randint(150, (1, height // 16, width // 16)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    sample = SegDataSample(metainfo={"img_shape": (height, width), "ori_shape": (height, width)})
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def _detected(height: int, width: int) -> Any:
    from rmoe.tasks.detection import made_up_objects

    return made_up_objects(height, width)
