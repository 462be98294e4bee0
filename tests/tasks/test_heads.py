"""Tests the heads for plain backbones, ours and Mask2Former: their values, their losses, and a run's answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmseg.models.decode_heads import DPTHead as MMSegDPTHead
from mmseg.structures import SegDataSample
from torch import Tensor

import rmoe
from rmoe.deploy.graph import graph_of
from rmoe.engine.strategy import Strategy
from rmoe.errors import UserError
from rmoe.inference.evaluate import _merging
from rmoe.moe.records import collect
from rmoe.moe.state import roles
from rmoe.tasks.detection import made_up_objects
from rmoe.tasks.heads import DPTHead, LinearHead

NORM = {"type": "BN"}
DPT = {"channels": 6, "post_process_channels": [2, 3, 4, 5], "num_classes": 3, "norm_cfg": NORM}
PLAIN = small_runs.PLAIN
MOE = {"num_experts": 2, "rank": 2}


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


def maps(channels: int = 8, count: int = 4) -> list[Tensor]:
    return [*torch.randn(count, 2, channels, 5, 7, generator=torch.Generator().manual_seed(0))]


def test_the_linear_head_is_a_batch_norm_and_a_matrix() -> None:
    head = LinearHead([8, 8], [1, 3], num_classes=3, norm_cfg=NORM).eval()
    with torch.no_grad():
        for x in (*head.norm.parameters(), head.norm.running_mean, *head.conv_seg.parameters()):
            x.normal_()
        head.norm.running_var.uniform_(1, 2)
        found = head(maps())
    cell = torch.cat([maps()[1][1, :, 2, 3], maps()[3][1, :, 2, 3]])
    norm = head.norm
    cell = (cell - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(found[1, :, 2, 3], head.conv_seg.weight[..., 0, 0] @ cell + head.conv_seg.bias)
    assert found.shape == (2, 3, 5, 7)


def test_the_dpt_head_is_mmsegs_without_a_class_token() -> None:
    torch.manual_seed(0)
    ours = DPTHead([8] * 4, [0, 2, 3, 4], **DPT).eval()
    theirs = MMSegDPTHead(
        embed_dims=8, in_channels=[8] * 4, in_index=[0, 1, 2, 3], input_transform="multiple_select", **DPT
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    five = maps(count=5)
    pairs = [(five[number], torch.zeros(2, 8)) for number in (0, 2, 3, 4)]
    with torch.no_grad():
        found = ours(five)
        assert torch.equal(found, theirs(pairs))
    assert found.shape == (2, 3, 48, 64)


@pytest.mark.parametrize("head", [LinearHead, DPTHead])
@pytest.mark.parametrize(
    ("channels", "index"), [(8, None), ([], None), ([8] * 4, [0, 1]), (["8"] * 4, None), ([8] * 4, 3), (None, None)]
)
def test_lists_that_are_refused(head, channels, index) -> None:
    with pytest.raises(UserError, match="they are lists of as many numbers"):
        head(channels, index, **DPT)


@pytest.mark.parametrize("channels", [[8], [8, 8, 8, 16]])
def test_dpt_reads_four_maps_of_as_many_channels(channels) -> None:
    with pytest.raises(UserError, match="it reads four maps of as many channels each"):
        DPTHead(channels, **DPT)


HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is changed of the backbone, and the head
    "linear": (
        {"out_indices": (3,), "strides": (14,)},
        {"type": "rmoe.LinearHead", "in_channels": [8], "num_classes": 3, "norm_cfg": NORM, "align_corners": False},
    ),
    "dpt": (
        {"out_indices": (0, 1, 2, 3), "strides": (14,) * 4},
        {"type": "rmoe.DPTHead", "in_channels": [8] * 4, **DPT, "align_corners": False},
    ),
}


def segmentor(name: str) -> dict[str, Any]:
    if name == "mask2former":
        return small_runs.mask2former()
    backbone, head = HEADS[name]
    preprocessor = {"type": "SegDataPreProcessor", "mean": [0.0] * 3, "std": [1.0] * 3, "size": (70, 84), "pad_val": 0}
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": preprocessor | {"seg_pad_val": 255},
        "backbone": {**PLAIN, **backbone},
        "decode_head": head,
        "test_cfg": {"mode": "whole"},
    }


def step(model: Any, batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The losses of a training step, whose backward pass leaves no gradient that is not finite."""
    model.train()
    with collect() as records, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        losses = model(**model.data_preprocessor(batch, True), mode="loss")
    found = {key: sum(x) if isinstance(x, list) else x for key, x in losses.items() if "loss" in key}
    (sum(found.values()) + records.loss()).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert all(x.isfinite().all() for x in (*found.values(), *trained.values()))
    assert {"gate", "residual"} <= {roles(model)[name] for name in trained}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "dpt", "mask2former"])
def test_a_segmentor_with_experts_trains(name, dtype) -> None:
    torch.manual_seed(0)
    config = segmentor(name)
    config["backbone"]["moe"] = MOE
    config["data_preprocessor"]["size"] = (70, 84)  # of patches of 14
    model = MODELS.build(Config({"model": config}).model)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(3, (1, 60, 80)))) for _ in range(2)]
    samples[1].gt_sem_seg.data[:] = 255  # nothing but void
    for sample in samples:
        sample.set_metainfo({"img_shape": (60, 80), "ori_shape": (60, 80)})
    images = [torch.randint(256, (3, 60, 80), dtype=torch.uint8) for _ in range(2)]
    found = step(model, {"inputs": images, "data_samples": samples}, dtype)
    assert found["decode.loss_mask" if name == "mask2former" else "decode.loss_ce"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_instance_segmentor_with_experts_trains(dtype) -> None:
    torch.manual_seed(0)
    config = small_runs.mask2former(instances=True)
    config["backbone"]["moe"] = MOE
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(Config({"model": config}).model)
        images = [torch.randint(256, (3, 60, 80), dtype=torch.uint8) for _ in range(2)]
        batch = {"inputs": images, "data_samples": [made_up_objects(60, 80) for _ in images]}
        assert step(model, batch, dtype)["loss_mask"] > 0


@pytest.mark.parametrize(
    ("channels", "message"),
    [([8, 8], r"decode_head.in_channels is \[8, 8\], but .* maps of 8 channels"), ([16], "is .16.")],
)
def test_a_head_that_does_not_fit_the_maps_ends_a_run_before_training(channels, message) -> None:
    config = segmentor("linear")
    config["decode_head"] = config["decode_head"] | {"in_channels": channels}
    with pytest.raises(UserError, match=message):
        Strategy.__new__(Strategy).build_model(Config({"model": config}).model)


PIPELINE = [{"type": "rmoe.LoadImage"}, {"type": "PackSegInputs"}]
PICTURES = [np.zeros((40, 60, 3), np.uint8), np.full((9, 5, 3), 200, np.uint8), np.full((40, 60, 3), 90, np.uint8)]


@pytest.mark.parametrize("name", ["linear", "dpt", "mask2former"])
def test_a_run_of_a_segmentor_answers_images_of_any_size(name, tmp_path) -> None:
    config = segmentor(name)
    config["backbone"]["moe"] = MOE
    imports = ["rmoe.tasks.segmentation", "rmoe.tasks.heads"]
    inputs = {"scope": "mmseg", "imports": imports, "pipeline": PIPELINE}
    run = rmoe.load(small_runs.run_of(tmp_path / "run", config, inputs))
    together, alone = run.predict(PICTURES), [run.predict(picture)[0] for picture in PICTURES]
    for picture, one, other in zip(PICTURES, together, alone, strict=True):
        assert one.labels.shape == picture.shape[:2]
        assert (one.labels < 3).all()
        assert np.array_equal(one.labels, other.labels)


@pytest.mark.parametrize("name", ["linear", "dpt"])
def test_a_graph_of_a_run_gives_its_logits(name, tmp_path) -> None:
    inputs = {"scope": "mmseg", "imports": ["rmoe.tasks.segmentation", "rmoe.tasks.heads"], "pipeline": PIPELINE}
    run = rmoe.load(small_runs.run_of(tmp_path / "run", segmentor(name), inputs))
    images = torch.randint(256, (2, 3, 56, 70), dtype=torch.uint8)
    graph = graph_of(run, image_size=(56, 70))
    with torch.no_grad():
        torch.testing.assert_close(graph.module(images), small_runs.logits(run, images), rtol=1e-4, atol=1e-4)


def test_mask2former_is_no_graph_but_its_backbone_is(tmp_path) -> None:
    inputs = {"scope": "mmseg", "imports": ["rmoe.tasks.segmentation"], "pipeline": PIPELINE}
    run = rmoe.load(small_runs.run_of(tmp_path / "run", segmentor("mask2former"), inputs))
    with pytest.raises(
        UserError, match="Mask2FormerHead goes from maps to pixels in a way of its own.*--part backbone"
    ):
        graph_of(run, image_size=(56, 70))
    assert len(graph_of(run, "backbone", (56, 70)).outputs) == 4


def test_a_run_of_an_instance_segmentor_answers_images_of_any_size(tmp_path) -> None:
    config = small_runs.mask2former(instances=True)
    config["backbone"]["moe"] = MOE
    pipeline = [{"type": "rmoe.LoadImage"}, {"type": "PackDetInputs"}]
    inputs = {"scope": "mmdet", "imports": ["rmoe.tasks.detection"], "pipeline": pipeline}
    run = rmoe.load(small_runs.run_of(tmp_path / "run", config, inputs))
    for picture, answer in zip(PICTURES, run.predict(PICTURES), strict=True):
        assert answer.masks.shape == (len(answer.scores), *picture.shape[:2])
        assert len(answer.boxes) == len(answer.labels) == len(answer.scores) > 0
        assert (np.diff(answer.scores) <= 0).all()
        for box, mask in zip(answer.boxes, answer.masks, strict=True):
            rows, columns = np.nonzero(mask)
            if len(rows):
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_an_instance_segmentors_answers_to_flipped_images_are_not_merged(tmp_path) -> None:
    inputs = {"scope": "mmdet", "imports": ["rmoe.tasks.detection"], "pipeline": []}
    run = rmoe.load(small_runs.run_of(tmp_path / "run", small_runs.mask2former(instances=True), inputs))
    with pytest.raises(UserError, match="a Mask2Former has no nms in its test_cfg.*without --flip and --scales"):
        _merging(run)
