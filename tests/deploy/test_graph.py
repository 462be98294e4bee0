"""A run's graph computes from pixels what the run does, and what is no graph is told in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import MOE, classifier, detector, logits, segmentor

import rmoe
from rmoe.deploy.graph import graph_of, more_images
from rmoe.errors import UserError
from rmoe.inference.predictor import Predictor


@pytest.mark.parametrize("moe", [None, MOE, {**MOE, "top_k": "all"}, {**MOE, "residual": "full"}], ids=str)
def test_a_classifiers_logits(tmp_path: Path, moe: dict[str, Any] | None) -> None:
    run = rmoe.load(classifier(tmp_path / "run", "vit", moe), device="cpu")
    graph = graph_of(run)
    assert (graph.example.dtype, tuple(graph.example.shape)) == (torch.uint8, (2, 3, 32, 32))
    torch.testing.assert_close(graph.module(graph.example), logits(run, graph.example), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [None, (48, 32)])
def test_a_segmentors_logits_at_the_images_size(tmp_path: Path, size: Any) -> None:
    run = rmoe.load(segmentor(tmp_path / "run", "swin"), device="cpu")
    graph = graph_of(run, image_size=size)
    found, expected = graph.module(graph.example), logits(run, graph.example)
    assert found.shape == (2, 3, *(size or (32, 32)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "moe",
    [
        {"residual": "full"},
        {"residual": "sparse"},
        {"residual": "full", "train_core": True},
        {"residual": "full", "expert_init": "random"},  # which means nothing beside a core
    ],
    ids=str,
)
def test_residuals_of_the_cores_shape_are_added_in_a_copy(tmp_path: Path, moe: dict[str, Any]) -> None:
    run = rmoe.load(segmentor(tmp_path / "run", "vit", {**MOE, **moe}), device="cpu")
    before = {key: x.clone() for key, x in run.model.state_dict().items()}
    graph = graph_of(run)
    assert not any(".core.fc1" in name for name, _ in graph.module.named_parameters())
    torch.testing.assert_close(graph.module(graph.example), logits(run, graph.example), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(x, before[key]) for key, x in run.model.state_dict().items())


@pytest.mark.parametrize("part", ["backbone", "neck"])
def test_a_detectors_maps_with_its_own_channel_order_and_padding(tmp_path: Path, part: Any) -> None:
    run = rmoe.load(detector(tmp_path / "run", "swin"), device="cpu")
    graph = graph_of(run, part, (40, 48))
    images = [x.flip(0) for x in graph.example]  # the run reads blue, green, red
    taken = run.model.data_preprocessor({"inputs": images, "data_samples": None})["inputs"]
    assert taken.shape[-2:] == (48, 48)
    with torch.no_grad():
        expected = run.model.backbone(taken) if part == "backbone" else run.model.extract_feat(taken)
        found = graph.module(graph.example)
    assert graph.outputs == tuple(f"map{i}" for i in range(len(expected)))
    torch.testing.assert_close(found, tuple(expected), atol=1e-5, rtol=1e-5)


def test_normalised_images_go_to_the_backbone_as_they_are(tmp_path: Path) -> None:
    run = rmoe.load(segmentor(tmp_path / "run", "swin", None), device="cpu")
    graph = graph_of(run, "backbone", normalised=True)
    images = more_images(graph, 1)
    assert images.dtype == torch.float32
    torch.testing.assert_close(graph.module(images), run.model.backbone(images))


def test_a_classifiers_embedding_is_what_its_last_layer_reads(tmp_path: Path) -> None:
    run = rmoe.load(classifier(tmp_path / "run", "swin"), device="cpu")
    whole, part = graph_of(run), graph_of(run, "backbone")
    assert part.outputs == ("features",)
    found = run.model.model.head.fc(part.module(part.example))
    torch.testing.assert_close(found, whole.module(whole.example))


class Other(torch.nn.Module):
    """Is no head of mmseg's."""


def sliding(run: Predictor) -> Predictor:
    run.model.test_cfg = {"mode": "slide", "crop_size": (32, 32), "stride": (16, 16)}
    return run


def with_other_head(run: Predictor) -> Predictor:
    run.model.decode_head = Other()
    return run


def padding(run: Predictor) -> Predictor:
    run.model.data_preprocessor.test_cfg = {"size_divisor": 32}
    return run


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"part": "modell"}, "no part 'modell'; did you mean 'model'"),
        (None, {"part": "neck"}, "the EncoderDecoder has no neck; give --part backbone"),
        (None, {"image_size": (0, 32)}, "0 x 32; both are whole numbers from 1 to 8192"),
        (None, {"image_size": (32, 10**6)}, "from 1 to 8192"),
        (sliding, {"image_size": (64, 32)}, "slides a window of 32 x 32"),
        (with_other_head, {}, "a EncoderDecoder with a Other goes from maps to pixels in a way of its own"),
        (padding, {}, r"pads images in evaluation \({'size_divisor': 32}\)"),
        (lambda run: dataclasses.replace(run, precision="int8"), {}, "made of float32 weights"),
        (lambda run: dataclasses.replace(run, model=run.model.bfloat16()), {}, "made of float32 weights"),
        (lambda run: dataclasses.replace(run, model=Other()), {}, "is a Other; known are mmseg's"),
    ],
)
def test_what_is_no_graph_of_a_segmentor(tmp_path: Path, change: Any, options: dict[str, Any], message: str) -> None:
    run = rmoe.load(segmentor(tmp_path / "run", "swin"), device="cpu")
    with pytest.raises(UserError, match=message) as error:
        graph_of(change(run) if change else run, **options)
    assert "\n" not in str(error.value)


def test_what_is_no_graph_of_other_runs(tmp_path: Path) -> None:
    one = rmoe.load(classifier(tmp_path / "one", "swin"), device="cpu")
    with pytest.raises(UserError, match="does not take images of 48 x 32 .*give another --image-size"):
        graph_of(one, image_size=(48, 32))
    with pytest.raises(UserError, match="a classifier has no neck"):
        graph_of(one, "neck")
    with pytest.raises(UserError, match="does not say how images are normalised; give --normalised"):
        graph_of(dataclasses.replace(one, inputs=None), image_size=(32, 32))
    two = rmoe.load(detector(tmp_path / "two", "swin"), device="cpu")
    with pytest.raises(UserError, match="boxes are chosen by code that is no graph; give --part neck"):
        graph_of(two)
    with pytest.raises(UserError, match="takes images of several sizes, and a graph has one; give --image-size"):
        graph_of(two, "neck")
    layer = next(x for x in two.model.modules() if isinstance(x, rmoe.ResidualMoE))
    layer.ep_size = 2
    with pytest.raises(UserError, match="are spread over processes; load the run by rmoe.load"):
        graph_of(two, "neck", (32, 32))
