"""Every shipped config parses, and what it describes builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from rmoe.data.params import SceneParams
from rmoe.data.scenes import metainfo
from rmoe.layers.moe import moe_layers

FOLDER = Path(__file__).resolve().parents[1] / "rmoe" / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*/*.py") if path.parent.name != "_base_")
NAMES = [str(path.relative_to(FOLDER)) for path in CONFIGS]
HERE = [name for name in NAMES if "detection" not in name]  # those are built in tests/tasks/test_detection.py
# Built in this size instead of the published one, so that a test takes no minute.
TINY = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}
# BatchNorm over processes needs them, and a GPU.
NORM = {"type": "GN", "num_groups": 1}


def load(name: str) -> Config:
    return Config.fromfile(FOLDER / name)


def tiny(config: Config) -> Any:
    """The config's model in a small size, without the core that another run makes, in one process."""
    model = config.model
    part = model.get("backbone", model)
    part.kwargs.update(TINY)
    part.core = None
    if part.get("moe"):
        part.moe.ep_size = 1
    for name, head in model.items():
        if name.endswith("_head"):
            several = isinstance(head.in_channels, (list, tuple))
            head.in_channels = [8, 16, 32, 64] if several else 32
            head.channels, head.norm_cfg = 8, NORM
    return model


@pytest.mark.parametrize("name", HERE)
def test_what_it_describes_trains(name):
    config = load(name)
    init_default_scope(config.default_scope)
    model = MODELS.build(tiny(config)).train()
    assert bool(moe_layers(model)) == (config.stage == "residual")
    size = config.model.kwargs.get("img_size", 224) if config.stage == "core" else 64
    images = torch.randn(2, 3, size, size)
    if config.stage == "core":
        losses = model(images, torch.tensor([0, 1]), mode="loss")
    else:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        truth = SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 64, 64, dtype=torch.int64)))
        losses = model.loss(images, [truth, truth])
    sum(value for key, value in losses.items() if "loss" in key).backward()


@pytest.mark.parametrize("name", NAMES)
def test_it_says_how_to_run_it_and_what_to_expect(name):
    text = (FOLDER / name).read_text().split('"""')[1]
    assert f"launch/train.py rmoe/configs/{name}" in text
    assert "--deepspeed_config ds_configs/" in text
    assert "full scale" in text or "No published figure" in text
    assert not {"strategy", "runner_type", "launcher"} & set(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_schedules_end_with_training(name):
    config = load(name)
    assert config.param_scheduler[-1].end == config.train_cfg.max_iters
    for one, following in zip(config.param_scheduler, config.param_scheduler[1:], strict=False):
        assert one.end == following.begin


@pytest.mark.parametrize("residual", [name for name in NAMES if "residual" in name])
def test_the_arms_differ_in_the_experts_alone(residual):
    dense = residual.replace("residual", "dense")
    lower, ours = load(dense).to_dict(), load(residual).to_dict()
    assert ours["model"]["backbone"].pop("moe")["num_experts"] == 8
    assert (lower.pop("stage"), ours.pop("stage")) == ("dense", "residual")
    assert lower == ours


def test_the_demo_fits_the_embedded_data_set():
    core, dense = load("demo/core.py"), load("demo/dense.py")
    assert core.num_classes == SceneParams().upstream_classes
    assert dense.num_classes == len(metainfo()["classes"])
    small = dict(core.model.kwargs)
    small.pop("img_size")
    assert small == dense.model.backbone.kwargs


def test_the_published_recipe_of_upernet():
    config = load("segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py")
    assert (config.optim_wrapper.optimizer.lr, config.optim_wrapper.optimizer.weight_decay) == (6e-5, 0.01)
    assert config.train_dataloader.batch_size * 8 == 16
