"""What is written for other programs computes there what torch does; what cannot be written is told in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_runs import CLASSES, MOE, classifier, detector, logits, segmentor

import rmoe
from rmoe.cli import main
from rmoe.deploy import export
from rmoe.deploy.graph import Graph, graph_of, more_images
from rmoe.errors import UserError

SLOW = pytest.mark.slow


def onnxruntimes(path: Path) -> Any:
    """A function of images that onnxruntime computes, of a model that onnx has checked."""
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]


def deployed(run: Path, *options: Any) -> Path:
    """The ONNX file that the command writes of a run."""
    path = run.parent / "model.onnx"
    assert main(["deploy", str(run), "--onnx", str(path), *map(str, options)]) == 0
    return path


@SLOW
def test_a_segmentor_of_a_swin_from_pixels_to_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, pt2 = segmentor(tmp_path / "run", "swin"), tmp_path / "model.pt2"
    path = deployed(folder, "--pt2", pt2)
    told = capsys.readouterr().out.splitlines()[-2:]  # after what is built and loaded
    assert [line.partition(":")[0] for line in told] == [str(pt2), str(path)]
    assert (
        "written; 32 x 32, uint8, red, green, blue, [batch, 3, H, W]; logits; differs from torch by at most" in told[1]
    )
    run, of_onnx, of_torch = rmoe.load(folder, device="cpu"), onnxruntimes(path), torch.export.load(pt2).module()
    graph = graph_of(run)
    for count in (1, 5):
        images = more_images(graph, count)
        expected = logits(run, images)
        (found,) = of_onnx(images)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(of_torch(images), expected, atol=1e-4, rtol=1e-4)
    model = onnx.load(path)
    assert [one.version for one in model.opset_import if not one.domain] == [18]
    about = {one.key: one.value for one in model.metadata_props}
    assert (about["task"], json.loads(about["classes"])) == ("segmentation", [*CLASSES])
    files: dict[str, Any] = {"task": ""}
    torch.export.load(pt2, extra_files=files)
    assert files["task"] in ("segmentation", b"segmentation")
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert (shape[0].dim_param, [one.dim_value for one in shape[1:]]) == ("batch", [3, 32, 32])
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~export._umask()
    assert {one.name for one in tmp_path.iterdir()} == {"run", path.name, pt2.name}


@SLOW
@pytest.mark.parametrize(
    ("net", "moe", "options"),
    [
        ("vit", {**MOE, "residual": "full"}, ["--opset", 20]),
        ("vit", {**MOE, "residual": "sparse", "combine": "residual"}, []),
        ("vit", {**MOE, "residual": "segments"}, []),
        ("vit", {**MOE, "router": "expert_choice"}, []),
        ("cvt", {**MOE, "top_k": "all"}, []),
        ("cvt", {**MOE, "combine": "straight_through"}, []),
        ("vit", None, []),
    ],
    ids=str,
)
def test_classifiers(tmp_path: Path, net: str, moe: Any, options: list[Any]) -> None:
    folder = classifier(tmp_path / "run", net, moe)
    path = deployed(folder, *options)
    run = rmoe.load(folder, device="cpu")
    for count in (1, 5):
        images = more_images(graph_of(run), count)
        (found,) = onnxruntimes(path)(images)
        torch.testing.assert_close(found, logits(run, images), atol=1e-4, rtol=1e-4)
    assert onnx.load(path, load_external_data=False).opset_import[0].version == (options[1] if options else 18)


@SLOW
@pytest.mark.parametrize("head", ["UPerHead"])
def test_a_head_that_pools(tmp_path: Path, head: str) -> None:
    folder = segmentor(tmp_path / "run", "vit", None, head)
    run = rmoe.load(folder, device="cpu")
    images = more_images(graph_of(run), 3)
    (found,) = onnxruntimes(deployed(folder))(images)
    torch.testing.assert_close(found, logits(run, images), atol=1e-4, rtol=1e-4)


@SLOW
def test_a_detectors_neck_and_an_image_size(tmp_path: Path) -> None:
    folder = detector(tmp_path / "run", "swin", {**MOE, "residual": "experts"})
    path = deployed(folder, "--part", "neck", "--image-size", 40, 48)
    graph = graph_of(rmoe.load(folder, device="cpu"), "neck", (40, 48))
    images = more_images(graph, 1)
    for found, expected in zip(onnxruntimes(path)(images), graph.module(images), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return classifier(tmp_path / "run", "vit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to write: --onnx FILE, --pt2 FILE or both"),
        (["--pt2", "{}/x.zip"], r"x.zip: torch.export's archives are called \*.pt2"),
        (["--onnx", "{}/x.onnx", "--opset", "17"], "the opset is 17; torch writes 18 to 23"),
        (["--onnx", "{}/x.onnx", "--opset", "99"], "the opset is 99; torch writes 18 to 23"),
        (["--onnx", "{}/x.onnx", "--part", "nek"], "no part 'nek'; did you mean 'neck'"),
        (["--onnx", "{}/x.onnx", "--image-size", "48", "48"], "does not take images of 48 x 48"),
    ],
)
def test_a_command_that_cannot_be_done(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["deploy", str(folder), *(one.format(folder.parent) for one in options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert {one.name for one in folder.parent.iterdir()} == {"run"}


@pytest.mark.parametrize("option", ["--onnx", "--pt2"])
def test_a_file_that_cannot_be_written_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    for path in (tmp_path / "gone" / "x.pt2", tmp_path):
        with pytest.raises(SystemExit, match="2"):
            main(["deploy", str(tmp_path / "run"), option, str(path)])
        assert f"argument {option}: '{path}' cannot be written: its folder must be there" in capsys.readouterr().err


def test_a_package_that_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    with pytest.raises(UserError, match=r"ONNX needs onnxscript, which .* pip install 'rmoe\[deploy\]'"):
        export.check_packages()


class Branches(torch.nn.Module):
    """Is no graph."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images if images.sum() > 0 else -images


class Doubled(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * images


@pytest.mark.slow
def test_a_model_with_branches(tmp_path: Path) -> None:
    graph = Graph(Branches(), torch.ones(2, 3, 4, 4), ("logits",), {})
    with pytest.raises(UserError, match="torch.export cannot follow the model") as error:
        export.traced(graph)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_program_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    right = Graph(torch.nn.Identity(), torch.randn(2, 3, 4, 4), ("logits",), {})
    wrong = export.traced(Graph(Doubled(), right.example, right.outputs, {}))
    path = tmp_path / "x.pt2"
    with pytest.raises(UserError, match="computes other logits than torch"):
        export.write_pt2(wrong, right, path)
    assert not [*tmp_path.iterdir()]
    assert export.write_pt2(wrong, Graph(Doubled(), right.example, right.outputs, {}), path) == 0
    assert [one.name for one in tmp_path.iterdir()] == ["x.pt2"]


def test_a_token_that_changes_its_expert_is_no_other_function() -> None:
    """One of a thousand outputs is another: the mean tells, not the largest."""
    graph = Graph(torch.nn.Identity(), torch.randn(2, 3, 64, 64), ("logits",), {})

    def one_off(images: torch.Tensor) -> list[torch.Tensor]:
        found = images.clone()
        found[0, 0, 0, 0] += 1
        return [found]

    assert export._difference(graph, one_off) == pytest.approx(1, abs=1e-4)
    with pytest.raises(UserError, match="other logits"):
        export._difference(graph, lambda images: [images + 0.01])
    with pytest.raises(UserError, match="other logits"):
        export._difference(graph, lambda images: [images * np.nan])


def test_a_folder_that_nobody_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(torch.nn.Identity(), torch.randn(2, 3, 4, 4), ("logits",), {})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="x.pt2 cannot be written .*No space left on device"):
        export._kept(graph, tmp_path / "x.pt2", lambda partial: (partial.touch(), lambda images: [images])[1])
    assert not [*tmp_path.iterdir()]
