"""One backbone, several heads: the model, and each of its tasks as a model of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn
from two_tasks import CATEGORIES, CLASSES, MOE, SIDE, detection, segmentation

import rmoe.tasks.detection
import rmoe.tasks.segmentation  # noqa: F401  registers what the configs name
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.engine.checkpoint.weights import fill
from rmoe.engine.model_config import for_one_process
from rmoe.engine.task_config import model_of, read_alone, state_of
from rmoe.errors import UserError
from rmoe.moe.records import collect
from rmoe.moe.state import global_state_dict, load_global_state_dict, moe_layers
from rmoe.tasks.multi_task import MultiTask, SharedLevels, checked_weights, task_names

OWN = {"num_experts": 2, "rank": 2, "blocks": "all", "tasks": 2, "router": "task"}
MAPS = {"segmentation": (1,), "detection": (0, 1)}


def config(moe: Mapping[str, Any] | None = MOE, **changed: Any) -> dict[str, Any]:
    tasks = {}
    for make, scope in ((segmentation, "mmseg"), (detection, "mmdet")):
        model = make(Path("data"))["model"]
        backbone = model.pop("backbone")
        tasks[make.__name__] = {"_scope_": scope, **model, "backbone": {"out_indices": MAPS[make.__name__]}}
    return {"type": "rmoe.MultiTask", "backbone": {**backbone, "moe": moe}, "tasks": tasks, **changed}


def built(moe: Mapping[str, Any] | None = MOE, **changed: Any) -> Any:
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmengine"):
        model = MODELS.build(Config({"model": config(moe, **changed)}).model)
    for name, x in model.named_parameters():
        if x.requires_grad:
            nn.init.normal_(x, std=1.0 if ".gate." in name else 0.2)
    return model


def batch(images: int = 2) -> dict[str, Any]:
    """Random images of both tasks with their truth, as the loaders give them."""
    from mmdet.structures import DetDataSample
    from mmseg.structures import SegDataSample

    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2 * images, 3, SIDE, SIDE), generator=draws).byte()
    place = {
        "img_shape": (SIDE, SIDE),
        "ori_shape": (SIDE, SIDE),
        "scale_factor": (1.0, 1.0),
        "pad_shape": (SIDE, SIDE),
    }
    labelled, boxed = [], []
    for number in range(images):
        one: Any = SegDataSample(metainfo=place)
        one.set_data({"gt_sem_seg": _labels(draws)})
        labelled.append(one)
        other: Any = DetDataSample(metainfo=place)
        boxes = torch.tensor([[4.0, 4.0, 20.0 + number, 24.0]])
        other.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([number % CATEGORIES]))
        boxed.append(other)
    return {
        "segmentation": {"inputs": list(pixels[:images]), "data_samples": labelled},
        "detection": {"inputs": list(pixels[images:]), "data_samples": boxed},
    }


def _labels(draws: torch.Generator) -> Any:
    from mmengine.structures import PixelData

    return PixelData(data=torch.randint(0, CLASSES, (1, SIDE, SIDE), generator=draws))


def losses_of(model: Any, data: Mapping[str, Any]) -> dict[str, Tensor]:
    found = model(**model.data_preprocessor(copy.deepcopy(data), True), mode="loss")
    return model.parse_losses(found)[1]


def test_the_backbone_is_there_once() -> None:
    model = built()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names))
    assert not [name for name in names if "backbone" in name and not name.startswith("backbone.")]
    assert len(moe_layers(model)) == 3
    again = copy.deepcopy(model)
    assert again.tasks["detection"].backbone.__dict__["_shared"] is again.backbone  # as an average of weights is made


def test_losses_are_those_of_each_task_times_its_weight() -> None:
    data = batch()
    model = built(weights={"detection": 0.25}).train()
    both = losses_of(model, data)
    assert set(both) == {
        *("loss", "segmentation/decode.loss_ce", "segmentation/decode.acc_seg"),
        *(f"detection/loss_{kind}" for kind in ("cls", "bbox", "centerness")),
    }
    total = sum(x for name, x in both.items() if "loss" in name and name != "loss")
    torch.testing.assert_close(both["loss"], total)
    plain = built().train()
    plain.load_state_dict(model.state_dict())
    for name in data:
        alone = losses_of(plain, {name: data[name]})
        weight = {"detection": 0.25}.get(name, 1.0)
        for key in [key for key in alone if "loss_" in key]:
            torch.testing.assert_close(both[key], weight * alone[key])


def test_gates_hear_the_task() -> None:
    """Tasks run in the order of their names: detection is 0. Each has its images' tokens."""
    model, data = built().train(), batch()
    with collect() as records:
        losses_of(model, data)
    assert {number for _, number in records.sums} == {0, 1}
    assert [*model.tasks] == ["detection", "segmentation"]
    layer = next(iter(moe_layers(model).values()))
    for number in (0, 1):
        assert records.sums[layer, number].tokens == 2 * (SIDE // 4) ** 2
    with torch.no_grad():
        layer.gate.task_bias[1, 2] += 50.0
    with collect() as records:
        losses_of(model, data)
    assert records.loads(1)[layer][2] == 1
    assert records.loads(0)[layer][2] < 1


@pytest.mark.parametrize("moe", [MOE, OWN, None], ids=["shared", "own", "dense"])
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_one_task_is_an_ordinary_model(moe: Mapping[str, Any] | None, task: str) -> None:
    """What it answers is what the model of both answers, bit for bit: gates' biases and experts are folded in."""
    model, data = built(moe).eval(), batch()
    described = Config({"model": config(moe)}).model.to_dict()
    scope = described["tasks"][task]["_scope_"]
    with DefaultScope.overwrite_default_scope(scope):
        alone = MODELS.build(for_one_process(Config({"model": model_of(described, task)}).model)).eval()
    load_global_state_dict(alone, read_alone(state_of(described, global_state_dict(model), task), alone))
    with torch.no_grad():
        expected = model.test_step({task: copy.deepcopy(data[task])})
        found = alone.test_step(copy.deepcopy(data[task]))
    for one, other in zip(found, expected, strict=True):
        if task == "segmentation":
            torch.testing.assert_close(one.seg_logits.data, other.seg_logits.data, rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(one.pred_instances.scores, other.pred_instances.scores, rtol=0, atol=1e-6)
            torch.testing.assert_close(one.pred_instances.bboxes, other.pred_instances.bboxes, rtol=0, atol=1e-4)
    layers = moe_layers(alone)
    assert all(layer.gate.task_bias is None for layer in layers.values())
    assert {layer.num_experts for layer in layers.values()} == ({1} if moe is OWN else {4} if moe else set())


def test_a_task_that_ends_before_the_backbone_does() -> None:
    changed = config(MOE)
    changed["tasks"]["segmentation"]["backbone"]["out_indices"] = (0,)
    changed["tasks"]["segmentation"]["decode_head"]["in_channels"] = 8
    with DefaultScope.overwrite_default_scope("mmengine"):
        model = MODELS.build(Config({"model": changed}).model)
    with DefaultScope.overwrite_default_scope("mmseg"):
        alone = MODELS.build(Config({"model": model_of(changed, "segmentation")}).model)
    load_global_state_dict(alone, read_alone(state_of(changed, global_state_dict(model), "segmentation"), alone))
    assert len(moe_layers(alone)) == 1


def test_activation_checkpointing_changes_nothing() -> None:
    data, gradients = batch(), []
    for with_cp in (False, True):
        changed = config()
        changed["backbone"]["with_cp"] = with_cp
        model = built(backbone=changed["backbone"]).train()
        losses_of(model, data)["loss"].backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".gate.task_bias" in name for name in gradients[0])
    for name, x in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], x, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": {"detektion": 1.0}}, "model.weights has the task 'detektion'; did you mean 'detection'"),
        ({"weights": {"detection": 0}}, "the weight of the task detection is 0; it is a positive number"),
        ({"weights": {"detection": float("nan")}}, "is nan; it is a positive number"),
        ({"tasks": {}}, "give a dict of two or more by name"),
    ],
)
def test_wrong_keys(change: Mapping[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        built(**change)


def test_maps_that_the_backbone_does_not_have() -> None:
    changed = config()
    changed["tasks"]["detection"]["backbone"]["out_indices"] = (0, 1, 2)
    with pytest.raises(UserError, match=r"model.tasks.detection.backbone: out_indices are .*; the shared backbone has"):
        built(tasks=changed["tasks"])


def test_maps_of_a_backbone_without_stages_are_read_all_or_none() -> None:
    backbone = config(None)["backbone"] | {"model": "vit_tiny_patch16_224"}
    backbone |= {"kwargs": {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32}}
    with pytest.raises(UserError, match="give all tasks the same out_indices"):
        built(None, backbone=backbone)


def test_a_mixture_of_another_number_of_tasks() -> None:
    with pytest.raises(UserError, match=r"moe.tasks is 3, and the tasks are detection, segmentation: set it to 2"):
        built(MOE | {"tasks": 3})


def test_a_model_without_a_backbone() -> None:
    tasks = config(None)["tasks"]
    tasks["segmentation"] = {"_scope_": "mmengine", "type": "rmoe.SharedLevels"}
    with pytest.raises(TypeError):
        built(None, tasks=tasks)


@pytest.mark.parametrize("name", ["loss", "a.b", "Seg", "", "keys", "1st", 3])
def test_names_that_are_none(name: Any) -> None:
    with pytest.raises(UserError, match="its name begins with a small letter"):
        task_names({name: {}, "detection": {}})


def test_weights_are_1_where_they_are_left_out() -> None:
    assert checked_weights({"b": 2}, ["a", "b"]) == {"a": 1.0, "b": 2.0}
    assert isinstance(built(None), MultiTask)


def test_weights_of_a_single_tasks_run_are_another_models() -> None:
    model = built(None)
    described = Config({"model": config(None)}).model.to_dict()
    alone = state_of(described, global_state_dict(model), "segmentation")
    with pytest.raises(UserError, match=r"single.pth is another model's: \d+ missing .*; give the checkpoint of this"):
        fill(model, alone, Path("single.pth"))


def plain_backbone(**changed: Any) -> Any:
    tiny = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}
    return TimmPyramid("vit_tiny_patch16_224", tiny, allow_random_core=True, **changed)


def test_a_task_gets_all_maps_that_are_made_of_one() -> None:
    backbone, levels = plain_backbone(out_indices=(1,), strides=(8, 16, 32)), SharedLevels((1,))
    levels.share(backbone, 0)
    images = torch.randn(1, 3, 32, 32)
    for found, expected in zip(levels(images), backbone(images), strict=True):
        assert torch.equal(found, expected)


def test_some_maps_of_a_plain_backbone_need_strides_that_are_named() -> None:
    levels = SharedLevels((1,))
    with pytest.raises(UserError, match="strides follow from how many"):
        levels.share(plain_backbone(out_indices=(0, 1)), 0)
    backbone = plain_backbone(out_indices=(0, 1), strides=(8, 16))
    levels.share(backbone, 0)
    images = torch.randn(1, 3, 32, 32)
    (found,) = levels(images)
    assert torch.equal(found, backbone(images)[1])
