"""Models of timm of several kinds, in small: each becomes a mixture and a pyramid, or is refused in one line.

`python -m benchmarks.backbones` does the same for every module of timm, at the models' own sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import backbones
from benchmarks.common import RESULTS

SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "test_vit": ({}, "fc2(act(fc1(x)))"),
    "eva02_tiny_patch14_224": (SMALL_VIT, "fc2(act(fc1(x)) * fc1(x))"),
    "eva02_base_patch16_clip_224": (SMALL_VIT, "fc2(norm(act(fc1_g(x)) * fc1_x(x)))"),
    "vit_small_plus_patch16_dinov3": (SMALL_VIT, "fc2(act(fc1_g(x)) * fc1_x(x))"),
    "vit_giant_patch14_dinov2": (SMALL_VIT | {"img_size": 56}, "fc2(act(fc1(x)) * fc1(x))"),
    "convnextv2_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, "fc2(grn(act(fc1(x))))"),
    "convnext_atto": (
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "conv_mlp": True},
        "fc2(act(fc1(x)))",
    ),
}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MODELS)
def test_it_becomes_a_mixture(name: str) -> None:
    kwargs, form = MODELS[name]
    row = backbones.of_model(name, kwargs)
    assert row["forms"] == [form]
    assert row["mixture"] is True
    assert row["pyramid"] is True


def test_what_is_refused_says_so_in_one_line() -> None:
    row = backbones.of_model("pvt_v2_b0", {"depths": (1, 1, 1, 1)})
    assert "'stages.0.blocks.0.mlp' has 'dwconv' (Conv2d) inside" in row["mixture"]
    assert row["pyramid"] is None


def test_an_error_that_is_none_of_ours_is_told_from_a_refusal() -> None:
    def broken() -> bool:
        raise ZeroDivisionError("division\nby zero")

    line = backbones.tried(broken)
    assert line == "ZeroDivisionError: division by zero"
    assert backbones.failed([{"mixture": line}, {"mixture": True, "pyramid": "it takes 224 x 224 only"}]) == [
        {"mixture": line}
    ]


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tried: list[str] = []

    def of_module(module: str) -> dict[str, Any]:
        tried.append(module)
        return {"module": module, "model": "none"}

    monkeypatch.setattr(backbones, "of_module", of_module)
    monkeypatch.setattr(backbones.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(backbones.timm, "list_modules", lambda: ["beit", "eva"])
    monkeypatch.setattr(backbones, "ALSO", {"eva, more": "eva02_tiny_patch14_224"})
    for argv in ([], [], ["--only", "beit"]):
        backbones.main([*argv, "--out", str(tmp_path)])
    assert tried == ["beit", "eva", "eva, more", "beit"]
    rows = json.loads((tmp_path / "backbones.json").read_text())["rows"]
    assert [row["module"] for row in rows] == ["beit", "eva", "eva, more"]


def test_the_page_shows_the_results_and_nothing_is_broken() -> None:
    found = json.loads((RESULTS / "backbones.json").read_text())
    assert backbones.PAGE.read_text().endswith(backbones.render(found))
    assert backbones.failed(found["rows"]) == []
