"""Models' configs: what is found in them, and what of them one process can build."""

from __future__ import annotations

from mmengine.config import ConfigDict

from rmoe.engine.model_config import allow_random_cores, for_one_process, mappings, moe_dicts
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
