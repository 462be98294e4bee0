"""A dense run that is made of a mixture's: rmoe and timm load it, and its metric says what it is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import MOE, NETS, classifier, logits, run_of, segmentor

import rmoe
from rmoe.cli import main
from rmoe.deploy.graph import graph_of, more_images
from rmoe.deploy.merge import MERGED, mean_gate_values, merge
from rmoe.engine.checkpoint.export import BACKBONE, MODEL, read_metadata
from rmoe.errors import UserError
from rmoe.moe.experts import BIASES
from rmoe.moe.state import moe_layers


def with_fixed_gates(run: Path) -> Path:
    """The run with gates that read nothing."""
    metadata = {key: x if isinstance(x, str) else json.dumps(x) for key, x in read_metadata(run).items()}
    state = {key: x.zero_() if key.endswith("gate.weight") else x for key, x in load_file(run / MODEL).items()}
    save_file(state, run / MODEL, metadata)
    return run


@pytest.mark.parametrize("moe", [{**MOE, "num_experts": 1}, MOE, {**MOE, "residual": "experts"}], ids=str)
def test_an_exact_merge_is_the_same_segmentor(tmp_path: Path, moe: dict[str, Any]) -> None:
    source = with_fixed_gates(segmentor(tmp_path / "run", "swin", moe))
    assert main(["merge", str(source), "--out", str(tmp_path / "dense")]) == 0
    before, after = (rmoe.load(path, device="cpu") for path in (source, tmp_path / "dense"))
    assert not moe_layers(after.model)
    images = more_images(graph_of(before), 2)
    torch.testing.assert_close(logits(after, images), logits(before, images), atol=1e-4, rtol=1e-4)
    assert (after.classes, after.palette, after.metadata["stage"]) == (before.classes, before.palette, "merged")
    told = json.loads((tmp_path / "dense" / MERGED).read_text())
    assert (told["exact"], told["gate_values"], told["metrics"]) == (True, None, None)
    assert "holds 0 dumped configs" in told["not_measured"]


def test_timm_loads_the_merged_backbone(tmp_path: Path) -> None:
    source = classifier(tmp_path / "run", "vit", {**MOE, "num_experts": 1})
    merge(source, tmp_path / "dense")
    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32}
    path = tmp_path / "dense" / BACKBONE
    net = timm.create_model("vit_tiny_patch16_224", **kwargs, num_classes=3, checkpoint_path=str(path)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = rmoe.load(source, device="cpu").model(images)
        torch.testing.assert_close(net(images), expected, atol=1e-4, rtol=1e-4)


def test_an_average_weighs_experts_by_what_images_give_them(tmp_path: Path) -> None:
    source, pictures = classifier(tmp_path / "run", "vit", {**MOE, "top_k": 1}), tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    out = tmp_path / "dense"
    assert main(["merge", str(source), "--average", "--images", str(pictures), "--out", str(out)]) == 0
    told = json.loads((out / MERGED).read_text())
    assert told["exact"] is False
    assert not moe_layers(rmoe.load(out, device="cpu").model)
    values = told["gate_values"]["model.blocks.1.mlp"]
    run = rmoe.load(source, device="cpu")
    measured = mean_gate_values(run, sorted(map(str, pictures.iterdir())))
    assert values == measured["model.blocks.1.mlp"].tolist()
    assert 0 < sum(values) < 1  # a token's gate value is a probability
    merge(source, tmp_path / "uniform", average=True)
    plain = json.loads((tmp_path / "uniform" / MERGED).read_text())
    assert plain["gate_values"]["model.blocks.1.mlp"] == [1 / 3] * 3


def test_what_cannot_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture, dense = classifier(tmp_path / "run", "vit"), classifier(tmp_path / "dense", "vit", None)
    out = tmp_path / "out"
    for arguments, message in [
        ([mixture, "--out", out], "blocks.0.mlp: its gate decides for each token among 3 experts.*--average"),
        ([dense, "--out", out], "is dense; there is nothing to merge"),
        ([mixture, "--average", "--out", dense], "is not empty; give another --out"),
        ([mixture, "--average", "--images", tmp_path / "x.png", "--out", out], "x.png"),
    ]:
        assert main(["merge", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert all(part in error for part in message.split(".*")), error
        assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(UserError, match="give --average as well"):
        merge(mixture, out, images=["x.png"])


def test_trained_biases_have_no_place_in_a_network_without(tmp_path: Path) -> None:
    name, kwargs, _ = NETS["vit"]
    moe = {**MOE, "residual": "full", "num_experts": 1}
    network = {"model": name, "kwargs": kwargs | {"img_size": 32, "proj_bias": False}, "moe": moe}
    source = run_of(tmp_path / "run", {"type": "rmoe.TimmClassifier", "num_classes": 3, **network}, None)
    with pytest.raises(UserError, match=r"has none in their place, such as model.blocks.0.mlp.fc1.bias: leave the run"):
        merge(source, tmp_path / "dense")
    state = {key: x * (key.rpartition(".")[2] not in BIASES) for key, x in load_file(source / MODEL).items()}
    metadata = {key: x if isinstance(x, str) else json.dumps(x) for key, x in read_metadata(source).items()}
    save_file(state, source / MODEL, metadata)
    merge(source, tmp_path / "dense")
    assert not [key for key in load_file(tmp_path / "dense" / MODEL) if key.endswith("mlp.fc1.bias")]
