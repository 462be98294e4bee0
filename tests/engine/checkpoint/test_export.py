"""What a finished run's files are for others: readable, labelled, and timm's where the model is timm's."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Mlp

from rmoe.backbones.pyramid import TimmPyramid
from rmoe.config import ResidualMoEConfig
from rmoe.engine.checkpoint.export import BACKBONE, MODEL, core_sha256, read_metadata, timm_state, write_model
from rmoe.errors import UserError
from rmoe.moe.state import global_state_dict
from rmoe.tasks.classification import TimmClassifier

SWIN = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 4, "img_size": 128}
MODEL_CONFIG = {"type": "ToyModel", "moe": {"num_experts": 2}}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_says_who_may_read(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_model(tmp_path, global_state_dict(Mlp(2, 2)), MODEL_CONFIG)
    finally:
        os.umask(before)
    assert (tmp_path / MODEL).stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == [MODEL]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    state, about = global_state_dict(Mlp(2, 2)), {"stage": "residual", "classes": ("sky", "grass"), "core_sha256": "ab"}
    write_model(tmp_path, state, MODEL_CONFIG, **about)
    model = MODEL_CONFIG | {"moe": json.loads(json.dumps(asdict(ResidualMoEConfig(num_experts=2).resolved())))}
    expected = {"format": "pt", "rmoe": "0.1.0", "model": model, **about, "classes": ["sky", "grass"]}
    assert read_metadata(tmp_path) == read_metadata(tmp_path / MODEL) == expected
    assert all(x.equal(state[key]) for key, x in load_file(tmp_path / MODEL).items())
    write_model(tmp_path, state, MODEL_CONFIG)
    assert read_metadata(tmp_path).keys() == {"format", "rmoe", "model"}


def test_files_without_labels(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / MODEL)
    assert read_metadata(tmp_path) == {}
    save_file({"a": torch.ones(1)}, tmp_path / MODEL, {"rmoe": "0.1.0", "model": "{"})
    for path in (tmp_path, tmp_path / "gone.safetensors"):
        with pytest.raises(UserError, match="cannot be read"):
            read_metadata(path)


def test_which_core_it_was(tmp_path: Path) -> None:
    path = tmp_path / MODEL
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for core in (path, tmp_path):
        assert core_sha256({"backbone": {"core": str(core)}, "heads": [{"core": None}]}) == digest
    assert core_sha256({"backbone": {"core": None}}) is None
    assert core_sha256({"core": str(tmp_path / "gone")}) is None


def test_timm_loads_a_dense_backbone(tmp_path: Path) -> None:
    """Without its last norm and its classifier, which a pyramid has cut off."""
    torch.manual_seed(1)
    pyramid = TimmPyramid(SWIN, SMALL).eval()
    node = {"type": "rmoe.TimmPyramid", "model": SWIN, "kwargs": SMALL, "moe": None}
    state = {f"backbone.{key}": x for key, x in global_state_dict(pyramid).items()} | {"head.w": torch.ones(1)}
    write_model(tmp_path, state, {"type": "EncoderDecoder", "backbone": node})
    assert read_metadata(tmp_path / BACKBONE)["initial"] == ["norm.bias", "norm.weight"]
    net: Any = timm.create_model(SWIN, **SMALL, num_classes=0, checkpoint_path=tmp_path / BACKBONE).eval()
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        maps = net.forward_intermediates(images, intermediates_only=True)
        levels = zip(pyramid.norms, maps, pyramid(images), strict=True)
        assert all(norm(theirs).equal(ours) for norm, theirs, ours in levels)


def test_timm_loads_a_dense_classifier(tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = TimmClassifier(SWIN, 3, SMALL).eval()
    config = {"type": TimmClassifier.__name__, "model": SWIN, "num_classes": 3, "kwargs": SMALL}
    write_model(tmp_path, global_state_dict(classifier), config)
    assert read_metadata(tmp_path / BACKBONE)["initial"] == []
    net: Any = timm.create_model(SWIN, **SMALL, num_classes=3, checkpoint_path=tmp_path / BACKBONE).eval()
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert net(images).equal(classifier(images))


def test_no_backbone_for_timm(tmp_path: Path) -> None:
    """Neither of a mixture nor of another model; what an earlier run has left goes."""
    mixture = {"type": "rmoe.TimmClassifier", "model": SWIN, "moe": {"num_experts": 2}}
    assert timm_state(mixture, {}) is None
    (tmp_path / BACKBONE).touch()
    write_model(tmp_path, global_state_dict(Mlp(2, 2)), MODEL_CONFIG)
    assert not (tmp_path / BACKBONE).exists()
