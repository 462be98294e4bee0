"""Tests the loading of a dense core: equal before and after, nothing lost silently, anything else refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rmoe.backbones.load_core import load_core
from rmoe.errors import UserError

SMALL = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4, "img_size": 128}
SMALL_VIT = {"embed_dim": 12, "depth": 2, "num_heads": 2, "img_size": 32}


def swin(seed: int = 0, **changed: object) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("swin_tiny_patch4_window7_224", **{**SMALL, "num_classes": 5, **changed}).eval()


def vit(seed: int = 0, **changed: object) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL_VIT, "num_classes": 5, **changed}).eval()


def saved(state: dict[str, Tensor], folder: Path, name: str = "core.pth") -> Path:
    path = folder / name
    save_file(state, path) if name.endswith(".safetensors") else torch.save(state, path)
    return path


@pytest.mark.parametrize(("build", "size"), [(swin, 128), (vit, 32)])
@pytest.mark.parametrize("name", ["core.pth", "core.safetensors", "model.safetensors"])
@pytest.mark.parametrize("prefix", ["", "model.", "backbone.model."])
def test_equal_before_and_after(build, size, name, prefix, tmp_path):
    source, target, images = build(0), build(1), torch.randn(2, 3, size, size)
    path = saved({prefix + key: x for key, x in source.state_dict().items()}, tmp_path, name)
    assert not torch.equal(source(images), target(images))
    report = load_core(target, tmp_path if name == "model.safetensors" else path)
    assert torch.equal(source(images), target(images))
    assert report.loaded == len(source.state_dict())
    assert report.left_out == {}


@pytest.mark.parametrize("container", ["model", "state_dict"])
def test_the_usual_containers_are_opened(container, tmp_path):
    source = swin(0)
    torch.save({container: source.state_dict(), "epoch": 3}, tmp_path / "core.pth")
    assert load_core(swin(1), tmp_path / "core.pth").loaded == len(source.state_dict())


def test_a_second_time_changes_nothing(tmp_path):
    path, target = saved(swin(0).state_dict(), tmp_path), swin(1)
    load_core(target, path)
    once = {key: x.clone() for key, x in target.state_dict().items()}
    load_core(target, path)
    assert all(torch.equal(x, once[key]) for key, x in target.state_dict().items())


def test_what_is_left_out_is_listed_with_its_reason(tmp_path):
    state = {f"backbone.{key}": x for key, x in swin(0).state_dict().items()}
    state |= {
        "decode_head.weight": torch.ones(1),
        "backbone.layers.0.blocks.0.attn.relative_position_index": torch.ones(1),
    }
    report = load_core(swin(1, num_classes=0), saved(state, tmp_path))
    assert report.left_out == {
        "not part of the backbone": ["decode_head.weight"],
        "classifier": ["head.fc.weight", "head.fc.bias"],
        "computed by the model": ["layers.0.blocks.0.attn.relative_position_index"],
    }
    assert "2 left out (classifier): head.fc.weight, head.fc.bias" in str(report)
    assert f"{report.loaded} weights loaded" in str(report)


def test_a_classifier_of_other_classes_is_left_out(tmp_path):
    target = swin(1, num_classes=7)
    before = target.head.fc.weight.clone()
    report = load_core(target, saved(swin(0).state_dict(), tmp_path))
    assert report.left_out == {"classifier of other classes": ["head.fc.weight", "head.fc.bias"]}
    assert torch.equal(target.head.fc.weight, before)


def test_a_checkpoint_without_head_and_last_norm_is_a_core(tmp_path):
    state = {key: x for key, x in swin(0).state_dict().items() if not key.startswith(("head.", "norm."))}
    report = load_core(swin(1), saved(state, tmp_path))
    assert sorted(key for keys in report.left_out.values() for key in keys) == [
        "head.fc.bias",
        "head.fc.weight",
        "norm.bias",
        "norm.weight",
    ]


def test_position_tables_are_resized(tmp_path):
    source, target = swin(0, img_size=64), swin(1, always_partition=True)  # at 64 pixels the last map is 2 x 2
    report = load_core(target, saved(source.state_dict(), tmp_path))
    assert report.resized == [f"layers.3.blocks.{i}.attn.relative_position_bias_table" for i in range(2)]
    small, large = (m.layers[3].blocks[0].attn.relative_position_bias_table for m in (source, target))
    assert (small.shape, large.shape) == ((9, 2), (49, 2))
    torch.testing.assert_close(large[24], small[4])  # no offset: the middle of both

    report = load_core(vit(1, img_size=64), saved(vit(0).state_dict(), tmp_path, "vit.pth"))
    assert report.resized == ["pos_embed"]


def refused(target: nn.Module, path: Path, message: str) -> None:
    before = {key: x.clone() for key, x in target.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_core(target, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(x, before[key]) for key, x in target.state_dict().items())


def test_another_models_checkpoint_is_refused(tmp_path):
    refused(swin(), saved(vit().state_dict(), tmp_path), r"vit|has no place for|lacks")
    refused(
        swin(),
        saved(swin(depths=(2, 2, 4, 2)).state_dict(), tmp_path),
        r"holds \d+ weights \(layers.2.blocks.2.*and \d+ more",
    )
    refused(
        swin(depths=(2, 2, 4, 2)),
        saved(swin().state_dict(), tmp_path),
        r"lacks 26 weights \(layers.2.blocks.2.norm1.weight",
    )
    refused(swin(), saved(swin(embed_dim=16).state_dict(), tmp_path), r"patch_embed.* has the shape \(16, .*and \(8, ")
    refused(swin(), saved({"unrelated": torch.ones(1)}, tmp_path), r"1 weight \(unrelated\)")


@pytest.mark.parametrize("timms", [True, False])
def test_a_student_and_its_teacher_are_refused(timms, tmp_path):
    state = swin().state_dict()
    if not timms:  # Microsoft's names: patches are merged at the end of a stage
        state = {
            re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k): x
            for k, x in state.items()
        }
    both = {f"{name}.{key}": x for name in ("student", "teacher") for key, x in state.items()}
    refused(swin(), saved(both, tmp_path), "holds the backbone 2 times, under 'student.' and 'teacher.'; save")


def test_a_table_of_positions_of_an_unknown_grid_is_refused(tmp_path):
    class Tokens(nn.Module):
        def __init__(self, many: int) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, many, 4))

    refused(Tokens(9), saved(Tokens(4).state_dict(), tmp_path), r"pos_embed has the shape \(1, 4, 4\)")


def test_one_weight_missing_is_refused(tmp_path):
    state = swin().state_dict()
    del state["layers.1.blocks.0.mlp.fc1.bias"]
    refused(swin(), saved(state, tmp_path), r"lacks 1 weight \(layers.1.blocks.0.mlp.fc1.bias\)")


@pytest.mark.parametrize("name", ["core.pth", "core.safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 0.5])
def test_a_file_cut_short_is_refused(name, kept, tmp_path):
    path = saved(swin().state_dict(), tmp_path, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    refused(swin(), path, "cannot be read|is not a checkpoint")


def test_values_that_are_not_finite_are_refused(tmp_path):
    state = swin().state_dict()
    state["norm.weight"][0] = float("nan")
    refused(swin(), saved(state, tmp_path), "not finite in norm.weight")


def test_python_objects_are_not_executed(tmp_path):
    torch.save({"model": swin()}, tmp_path / "core.pth")
    refused(swin(), tmp_path / "core.pth", "Python objects besides tensors")


def test_no_file_is_refused(tmp_path):
    refused(swin(), tmp_path / "core.pth", "there is no checkpoint .*core.pth")
    refused(swin(), tmp_path, "there is no checkpoint .*model.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(swin(), tmp_path / "list.pth", "holds no state dict of tensors")
