"""Models' configs: what is found in them, and what of them one process can build."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import ConfigDict

from rmoe.config import KINDS, ResidualMoEConfig
from rmoe.engine.model_config import (
    allow_random_cores,
    check_maps,
    complete_moe,
    fill_in_saved_moe,
    for_one_process,
    mappings,
    moe_dicts,
    without_paths,
)
from rmoe.errors import UserError
from rmoe.tasks.classification import TimmClassifier

MODEL = ConfigDict(
    type="EncoderDecoder",
    pretrained="torchvision://resnet50",
    backbone=dict(
        type="rmoe.TimmPyramid", core="work_dirs/core", kwargs=dict(pretrained=True), moe=dict(num_experts=4, ep_size=2)
    ),
    heads=[dict(type="TimmClassifier", kwargs=dict(checkpoint_path="x.safetensors"), moe=dict())],
    empty=dict(type="TimmClassifier", moe=None),
)


def test_what_is_in_a_config() -> None:
    assert [moe.to_dict() for moe in moe_dicts(MODEL)] == [{"num_experts": 4, "ep_size": 2}, {}]
    assert [node["type"] for node in mappings(MODEL) if "type" in node] == [
        "EncoderDecoder",
        "rmoe.TimmPyramid",
        "TimmClassifier",
        "TimmClassifier",
    ]


def test_what_a_mixture_leaves_open_is_written_out() -> None:
    values = {"num_experts": 4, "losses": {"z": 0.1}, "train_residual": False, "ep_size": 2}
    config = complete_moe(values)
    open_ones = {"top_k": "all", "combine": "residual", "train_core": True, "exchange": "weights"}
    assert values == {**dataclasses.asdict(config), **open_ones, "ep_size": 2}
    assert values["losses"] == {"importance": 0.005, "load": 0.0, "balance": 0.0, "z": 0.1, "task_information": 0.0}
    again = ResidualMoEConfig.from_dict(values)
    assert again == complete_moe(dict(values)) == config


@pytest.mark.parametrize("residual", KINDS)
@pytest.mark.parametrize("more", [{}, {"num_experts": 1}, {"top_k": 2}, {"combine": "straight_through"}], ids=str)
def test_what_is_written_out_is_the_same_mixture(residual: str, more: dict[str, Any]) -> None:
    if residual == "experts" and "combine" not in more:
        more = {**more, "expert_init": "random"}
    config = ResidualMoEConfig.from_dict({"residual": residual, **more})
    said = config.resolved()
    assert "auto" not in dataclasses.asdict(said).values()
    assert said.resolved() == said
    for name in ("experts_per_token", "combined", "trains_core", "sends_tokens", "chooses", "preserves"):
        assert getattr(said, name) == getattr(config, name), name


def test_a_saved_mixture_that_leaves_something_open_has_one_expert_a_token_and_a_frozen_core() -> None:
    said = {"top_k": "auto", "train_core": True}
    saved: Any = {"backbone": {"moe": {"num_experts": 4}}, "heads": [{"moe": {**said}}, {"moe": None}]}
    fill_in_saved_moe(saved)
    assert saved == {
        "backbone": {"moe": {"num_experts": 4, "top_k": 1, "train_core": False}},
        "heads": [{"moe": said}, {"moe": None}],
    }


def test_a_description_to_share_has_no_paths_of_this_machine() -> None:
    made = {
        "core": "work_dirs/core/model.safetensors",
        "init_cfg": {"type": "Pretrained", "checkpoint": "/home/a/clients/r50.pth"},
        "other": ["C:\\data\\x.pth", "https://download.org/x.pth", "hf-hub:org/name", "mmseg", "a/b", "/", 3, None],
    }
    before = copy.deepcopy(made)
    assert without_paths(made) == {
        "core": "model.safetensors",
        "init_cfg": {"type": "Pretrained", "checkpoint": "r50.pth"},
        "other": ["x.pth", "https://download.org/x.pth", "hf-hub:org/name", "mmseg", "a/b", "/", 3, None],
    }
    assert without_paths({"core": "hf-hub:org/name"}) == {"core": "hf-hub:org/name"}
    assert made == before


def test_one_process_needs_no_file_and_no_other() -> None:
    changed = for_one_process(MODEL)
    assert changed.pretrained is None
    assert changed.backbone.core is None
    assert changed.backbone.kwargs == {"pretrained": False}
    assert changed.heads[0].kwargs == {"checkpoint_path": ""}
    assert [moe.ep_size for moe in moe_dicts(changed)] == [1, 1]
    assert changed.backbone.allow_random_core
    assert MODEL.backbone.core == "work_dirs/core"
    assert MODEL.backbone.moe.ep_size == 2


def test_weights_that_are_loaded_later_are_told_to_every_backbone() -> None:
    backbone = {"type": "rmoe.TimmPyramid", "core": None}
    model = {"type": "EncoderDecoder", "parts": [{"type": TimmClassifier}, {"type": "TimmPyramid", "core": "x.pth"}]}
    allow_random_cores(config := {"backbone": backbone, **model, "head": {"type": "UPerHead"}})
    assert config == {
        "backbone": backbone | {"allow_random_core": True},
        "type": "EncoderDecoder",
        "parts": [{"type": TimmClassifier, "allow_random_core": True}, {"type": "TimmPyramid", "core": "x.pth"}],
        "head": {"type": "UPerHead"},
    }


BUILT = SimpleNamespace(backbone=SimpleNamespace(channels=[2, 4, 8]))


@pytest.mark.parametrize(
    "config",
    [
        {"neck": {"in_channels": [2, 4, 8]}, "decode_head": {"in_channels": 256}},
        {"neck": [{"in_channels": (2, 4, 8)}, {"in_channels": 256}]},
        {
            "decode_head": {"in_channels": [2, 8], "in_index": [0, 2]},
            "auxiliary_head": {"in_channels": 4, "in_index": 1},
        },
        {"decode_head": {"in_channels": 8}, "auxiliary_head": None},
        {"decode_head": [{"in_channels": 8, "in_index": -1}], "bbox_head": {"in_channels": 256}},
        {"panoptic_head": {"in_channels": [2, 4, 8]}},
        {"decode_head": {"type": "of somebody"}},
    ],
)
def test_readers_that_fit_the_maps(config: dict[str, Any]) -> None:
    check_maps(ConfigDict(config), BUILT)
    check_maps(ConfigDict(config), SimpleNamespace(backbone=SimpleNamespace()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"neck": {"in_channels": [2, 4]}},
            r"neck.in_channels is \[2, 4\], but the backbone gives it maps of 2, 4, 8 channels; change it",
        ),
        (
            {"neck": [{"in_channels": [8, 4, 2]}]},
            r"neck\[0\].in_channels is \[8, 4, 2\], but .* maps of 2, 4, 8 channels",
        ),
        (
            {"decode_head": {"in_channels": [2, 4, 8, 8], "in_index": [0, 1, 2, 3]}},
            r"decode_head.in_index is \[0, 1, 2, 3\], but the backbone gives it 3 maps, .*out_indices",
        ),
        ({"decode_head": {"in_channels": 8, "in_index": 3}}, "decode_head.in_index is 3, but .* 3 maps"),
        (
            {"decode_head": {"in_channels": 4}},
            "decode_head.in_channels is 4, but the backbone gives it maps of 8 channels",
        ),
        ({"auxiliary_head": [{}, {"in_channels": 4, "in_index": "a"}]}, r"auxiliary_head\[1\].in_index is a"),
        ({"panoptic_head": {"in_channels": [2]}}, r"panoptic_head.in_channels is \[2\], but .* maps of 2, 4, 8"),
        ({"decode_head": {"in_channels": [2, 4], "in_index": 1}}, r"decode_head.in_channels is \[2, 4\]"),
    ],
)
def test_readers_that_do_not_fit(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_maps(ConfigDict(config), BUILT)
