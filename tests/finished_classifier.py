"""Finished runs of a small classifier, as training leaves them, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmoe.engine.checkpoint.export import core_sha256, write_model
from rmoe.moe.state import global_state_dict
from rmoe.tasks.classification import TimmClassifier

NET = "swin_tiny_patch4_window7_224"
KWARGS = {"img_size": 32, "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
INPUTS = {"scope": "mmengine", "imports": [], "transform": {"input_size": 32, "crop_pct": 1.0}}
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
TRAINED = ("gate", "deepspeed_moe", "head.", "layers.0.blocks.0.norm1")


def finished(folder: Path, core: Path, seed: int, moe: dict[str, Any] | None, **given: Any) -> Path:
    """A run as training leaves it, in which gates, residuals, the head and a norm have moved."""
    torch.manual_seed(seed)
    config = {"type": "rmoe.TimmClassifier", "model": NET, "kwargs": KWARGS, "num_classes": 3, "moe": moe}
    config |= {"core": str(core), **given}
    model = TimmClassifier(**{key: x for key, x in config.items() if key != "type"})
    for name, x in model.named_parameters():
        if any(word in name for word in TRAINED):
            torch.nn.init.normal_(x, std=0.3)
    folder.mkdir()
    known = {"classes": ("a", "b", "c"), "inputs": INPUTS, "core_sha256": core_sha256(config)}
    write_model(folder, global_state_dict(model), config, **known)
    return folder


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


def probabilities(run: Any) -> Any:
    return run.predict(IMAGE)[0].probabilities
