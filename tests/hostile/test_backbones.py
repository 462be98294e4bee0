"""Hostile input to backbones: models, arguments and checkpoints that are wrong are told in one line, by name."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import Mlp
from torch import Tensor, nn

import rmoe
from rmoe.backbones.build import add_weights, import_core, timm_model
from rmoe.backbones.load_core import load_core
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.tasks.classification import TimmClassifier

VIT = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"embed_dim": 8, "depth": 2, "num_heads": 2, "img_size": 32}
SWIN = "swin_tiny_patch4_window7_224"
SMALL_SWIN = {"embed_dim": 4, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2, "img_size": 64}
CONFIG = ResidualMoEConfig(num_experts=2, rank=2, blocks="all")


def vit(**changed: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(VIT, **{**SMALL, "num_classes": 3, **changed})


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def pyramid(**changed: Any) -> TimmPyramid:
    return TimmPyramid(**{"model": VIT, "kwargs": SMALL, "out_indices": (0, 1), **changed})


def classifier(**changed: Any) -> TimmClassifier:
    return TimmClassifier(**{"model": VIT, "num_classes": 3, "kwargs": SMALL, **changed})


def twice() -> object:
    return rmoe.upcycle(rmoe.upcycle(vit(), CONFIG).model, CONFIG)


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "upcycle nothing": (lambda: rmoe.upcycle(None, CONFIG), "got a NoneType as its model"),
    "upcycle a name": (lambda: rmoe.upcycle(VIT, CONFIG), "got a str as its model"),
    "upcycle by a dict": (lambda: rmoe.upcycle(vit(), {"num_experts": 2}), "got a dict as its config.*from_dict"),
    "upcycle by None": (lambda: rmoe.upcycle(vit(), None), "got a NoneType as its config"),
    "upcycle by a class": (lambda: rmoe.upcycle(vit(), ResidualMoEConfig), "got a type as its config"),
    "copy is a word": (lambda: rmoe.upcycle(vit(), CONFIG, copy="yes"), "copy='yes'; it is True or False"),
    "a block twice": (
        lambda: rmoe.upcycle(vit(), ResidualMoEConfig(blocks=("blocks.0.mlp", "blocks.0.mlp"))),
        "blocks names 'blocks.0.mlp' twice",
    ),
    "an unknown block": (lambda: rmoe.upcycle(vit(), ResidualMoEConfig(blocks=("",))), "blocks names ''"),
    "a mixture again": (twice, r"mixture of experts already \(blocks.0.mlp\)"),
    "no networks": (lambda: rmoe.upcycle(nn.Linear(2, 2), CONFIG), "no feed-forward network found in Linear"),
    "an empty model": (lambda: rmoe.upcycle(nn.Sequential(), CONFIG), "no feed-forward network found in Sequential"),
    "a network alone": (lambda: rmoe.upcycle(Mlp(4, 8), CONFIG), "Mlp, is a feed-forward network itself"),
    "experts without processes": (
        lambda: rmoe.upcycle(vit(), ResidualMoEConfig(num_experts=2, ep_size=2)),
        "ep_size 2 needs torch.distributed",
    ),
    "timm: no name": (lambda: timm_model(None, {}), "model is None; it is the name"),
    "timm: a module": (lambda: timm_model(nn.Identity, {}), "model is <class"),
    "timm: unknown": (lambda: timm_model("vit_tiny_patch16_225", {}), "no model 'vit_tiny_patch16_225'; did you mean"),
    "timm: empty": (lambda: timm_model("", {}), "no model ''"),
    "timm: kwargs a list": (lambda: timm_model(VIT, ["img_size"]), r"kwargs are \['img_size'\]; they are a dict"),
    "timm: kwargs of numbers": (lambda: timm_model(VIT, {1: 2}), r"kwargs are \{1: 2\}"),
    "timm: unknown kwarg": (lambda: timm_model(VIT, {"dept": 2}), "timm cannot build .*'dept'"),
    "timm: heads that do not divide": (lambda: timm_model(VIT, {"num_heads": 5}), "timm cannot build .*AssertionError"),
    "timm: depth a word": (lambda: timm_model(VIT, {"depth": "two"}), "timm cannot build .*TypeError"),
    "timm: nothing pretrained": (lambda: timm_model("cvt_13", {"pretrained": True}), "timm cannot build cvt_13"),
    "pyramid: kwargs a list": (lambda: pyramid(kwargs=[1]), r"kwargs are \[1\]"),
    "pyramid: model None": (lambda: pyramid(model=None), "model is None"),
    "pyramid: no levels": (lambda: pyramid(out_indices=()), r"out_indices are \(\)"),
    "pyramid: a level twice": (lambda: pyramid(out_indices=(0, 0)), r"out_indices are \(0, 0\)"),
    "pyramid: levels backwards": (lambda: pyramid(out_indices=(1, 0)), r"out_indices are \(1, 0\)"),
    "pyramid: a negative level": (lambda: pyramid(out_indices=(-1, 0)), r"out_indices are \(-1, 0\)"),
    "pyramid: a level too high": (lambda: pyramid(out_indices=(0, 2)), "has the levels 0 to 1"),
    "pyramid: a number of levels": (lambda: pyramid(out_indices=2), "out_indices are 2"),
    "pyramid: a truth value": (lambda: pyramid(out_indices=(False, True)), r"out_indices are \(False, True\)"),
    "pyramid: fractions": (lambda: pyramid(out_indices=(0.0, 1.0)), r"out_indices are \(0.0, 1.0\)"),
    "pyramid: words": (lambda: pyramid(out_indices="01"), "out_indices are '01'"),
    "pyramid: None": (lambda: pyramid(out_indices=None), "out_indices are None"),
    "pyramid: more strides than maps": (
        lambda: pyramid(strides=(4, 8, 16)),
        "there are 3 strides and 2 out_indices; give one stride for each, or one index",
    ),
    "pyramid: a stride between": (
        lambda: pyramid(strides=(4, 12)),
        r"strides are \(4, 12\); they are a list of numbers, each 16, the side of the patches of .*, or a power of two",
    ),
    "pyramid: no strides": (lambda: pyramid(strides=()), r"strides are \(\)"),
    "pyramid: strides a word": (lambda: pyramid(strides="48"), "strides are '48'"),
    "pyramid: strides a number": (lambda: pyramid(strides=8), "strides are 8"),
    "pyramid: a stride of 0": (lambda: pyramid(strides=(0, 4)), r"strides are \(0, 4\)"),
    "pyramid: strides of stages": (
        lambda: TimmPyramid(SWIN, SMALL_SWIN, strides=(4, 8, 16, 32)),
        "swin_tiny_patch4_window7_224 has stages, whose strides are theirs: leave strides out",
    ),
    "pyramid: channels that cannot be halved": (
        lambda: TimmPyramid(VIT, SMALL | {"embed_dim": 6}, (1,), strides=(4, 8)),
        "the 6 channels of the map cannot be halved 2 times for stride 4",
    ),
    "pyramid: lists of features": (lambda: pyramid(kwargs={"features_only": True}), "no forward_intermediates|cannot"),
    "pyramid: random core": (lambda: pyramid(moe={}), "there is none, only random weights"),
    "pyramid: random full core": (lambda: pyramid(moe={"residual": "full"}), "there is none, only random weights"),
    "pyramid: fixed random experts": (
        lambda: pyramid(moe={"residual": "experts", "train_residual": False}),
        "fixes the experts and there is none",
    ),
    "pyramid: core a number": (lambda: pyramid(core=1), "core is 1; give the path"),
    "pyramid: core empty": (lambda: pyramid(core=""), "core is ''"),
    "pyramid: core with a NUL": (lambda: pyramid(core="a\0b"), "no checkpoint a"),
    "pyramid: core too long": (lambda: pyramid(core="x" * 5000), "cannot be looked for: .*too long"),
    "pyramid: moe a list": (lambda: pyramid(moe=[8]), r"ResidualMoEConfig is \[8\]"),
    "classifier: random core": (lambda: classifier(moe={"train_core": True}), "there is none, only random weights"),
    "classifier: kwargs a word": (lambda: classifier(kwargs="small"), "kwargs are 'small'"),
    "classifier: core a list": (lambda: classifier(core=["a"]), r"core is \['a'\]"),
    "add_weights: no model": (lambda: add_weights(None, None, {}), "the model is None"),
    "add_weights: random core": (lambda: add_weights(vit(), None, {}), "there is none, only random weights"),
    "load_core: no model": (lambda: load_core(None, "core.pth"), "the model is None"),
    "load_core: no path": (lambda: load_core(vit(), None), "the checkpoint is None"),
    "import: no source": (lambda: import_core(None, VIT, "x.safetensors"), "source is None"),
    "import: source missing": (lambda: import_core("gone.pth", VIT, "x.safetensors"), "no checkpoint gone.pth"),
    "import: out None": (lambda: import_core("gone.pth", VIT, None), "out is None"),
    "import: out too long": (
        lambda: import_core("gone.pth", VIT, "x" * 300 + ".safetensors"),
        "cannot be looked for: .*too long",
    ),
    "import: another suffix": (lambda: import_core("gone.pth", VIT, "x.pth"), "x.pth cannot be written"),
    "import: out nowhere": (
        lambda: import_core("gone.pth", VIT, "no/x.safetensors"),
        "x.safetensors cannot be written",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_arguments(case: str) -> None:
    refused(*CALLS[case])


def test_weights_that_are_there_or_come_later_need_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs))
    for build in (pyramid, classifier):
        build(kwargs=SMALL | {"pretrained": True}, moe={})
        build(moe={}, allow_random_core=True)
        build(moe={"residual": "experts"})
        build()


State = dict[Any, Any]
QKV = "blocks.0.attn.qkv.weight"
COUNTED = "stages.0.blocks.0.attn.conv_proj_q.bn.num_batches_tracked"


def cast(dtype: torch.dtype, key: str = QKV) -> Callable[[State], State]:
    return lambda state: state | {key: torch.zeros_like(state[key]).to(dtype)}


def with_value(key: Any, value: Any) -> Callable[[State], State]:
    return lambda state: state | {key: value}


def hugging_face(state: State) -> State:
    """Query, key and value of other shapes, under the names of another code base."""
    part = "encoder.layer.0.attention.attention"
    return {
        "encoder.layer.0.layernorm_before.weight": torch.ones(8),
        f"{part}.query.weight": torch.ones(8, 8),
        f"{part}.key.weight": torch.ones(9, 9),
        f"{part}.value.weight": torch.tensor(1.0),
    }


STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "float8": (cast(torch.float8_e4m3fn), f"'{QKV}' in .* is float8_e4m3fn"),
    "float8 of a head": (lambda state: state | {"x.y": torch.ones(2).to(torch.float8_e5m2)}, "'x.y' in .* float8_e5m2"),
    "sparse": (lambda state: state | {QKV: state[QKV].to_sparse()}, f"'{QKV}' in .* is float32, sparse_coo"),
    "sparse rows": (lambda state: state | {QKV: state[QKV].to_sparse_csr()}, f"'{QKV}' in .* is float32, sparse_csr"),
    "complex": (cast(torch.complex64), f"'{QKV}' in .* is complex64"),
    "integers": (cast(torch.int64), f"'{QKV}' is int64 in .* and float32 in the model"),
    "bytes": (cast(torch.uint8), f"'{QKV}' is uint8 in .* and float32 in the model"),
    "truth values": (cast(torch.bool), f"'{QKV}' is bool in .* and float32 in the model"),
    "no values": (lambda state: state | {QKV: state[QKV].to("meta")}, f"'{QKV}' in .* is float32"),
    "quantized": (
        lambda state: state | {QKV: torch.quantize_per_tensor(state[QKV], 0.1, 0, torch.qint8)},
        f"'{QKV}' in .* is qint8|cannot be read|is not a checkpoint",
    ),
    "a key that is a number": (with_value(1, torch.ones(1)), r"under '1' \(int\) is a Tensor"),
    "a key that is None": (with_value(None, torch.ones(1)), r"under 'None' \(NoneType\) is a Tensor"),
    "a key of tuples": (with_value((1, 2), torch.ones(1)), r"\(tuple\) is a Tensor"),
    "a key without end": (with_value("a." * 100_000, torch.ones(1)), "holds no state dict"),
    "nested": (with_value("blocks", {"0": torch.ones(1)}), r"under 'blocks' \(str\) is a dict"),
    "a list": (lambda state: list(state.values()), "holds no state dict .* it is a list"),
    "a tensor": (lambda state: torch.ones(3), "holds no state dict .* it is a Tensor"),
    "None": (lambda state: None, "holds no state dict .* it is a NoneType"),
    "another container": (lambda state: {"weights": state}, "under 'weights' .str. is a OrderedDict"),
    "a container of words": (lambda state: {"model": "vit", "state_dict": 1}, "under 'model' .str. is a str"),
    "nothing": (lambda state: {}, r"lacks \d+ weights"),
    "0-d": (with_value(QKV, torch.tensor(1.0)), rf"{QKV} has the shape \(\) in .* and \(24, 8\)"),
    "0-d of a table": (with_value("pos_embed", torch.tensor(1.0)), r"pos_embed has the shape \(\)"),
    "empty": (with_value(QKV, torch.ones(0, 8)), rf"{QKV} has the shape \(0, 8\)"),
    "another shape": (with_value("norm.weight", torch.ones(9)), r"norm.weight has the shape \(9,\) .* \(8,\)"),
    "a table that is no square": (with_value("pos_embed", torch.ones(1, 4, 8)), r"pos_embed has the shape \(1, 4, 8\)"),
    "a table of two": (with_value("pos_embed", torch.ones(2, 10, 8)), r"pos_embed has the shape \(2, 10, 8\)"),
    "beyond float32": (
        lambda state: state | {QKV: torch.full((24, 8), 1e300, dtype=torch.float64)},
        f"'{QKV}' in .* values beyond the model's float32",
    ),
    "infinite": (lambda state: state | {QKV: state[QKV] / 0}, f"not finite in {QKV}"),
    "parts that do not fit": (hugging_face, "has no place for|lacks"),
}


@pytest.mark.parametrize("case", STATES)
def test_wrong_states(case: str, tmp_path: Path) -> None:
    change, message = STATES[case]
    torch.save(change(vit().state_dict()), tmp_path / "core.pth")
    target = vit()
    before = {key: x.clone() for key, x in target.state_dict().items()}
    refused(lambda: load_core(target, tmp_path / "core.pth"), message)
    assert all(torch.equal(x, before[key]) for key, x in target.state_dict().items())


def test_counts_stay_counts_and_weights_of_any_floating_dtype_are_taken(tmp_path: Path) -> None:
    def cvt() -> nn.Module:
        return timm.create_model("cvt_13", embed_dims=(4, 4, 4), depths=(1, 1, 1), num_heads=(1, 1, 1), num_classes=0)

    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        state: dict[str, Tensor] = cvt().to(dtype).state_dict()
        assert not state[COUNTED].is_floating_point()
        torch.save(state, tmp_path / "core.pth")
        load_core(cvt(), tmp_path / "core.pth")
    torch.save(state | {COUNTED: torch.tensor(1.0)}, tmp_path / "core.pth")
    refused(lambda: load_core(cvt(), tmp_path / "core.pth"), f"'{COUNTED}' is float32 in .* and int64 in the model")


def test_a_table_of_windows_that_is_no_square(tmp_path: Path) -> None:
    net = timm.create_model(SWIN, **SMALL_SWIN, num_classes=0)
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    torch.save(net.state_dict() | {key: torch.ones(7, 1)}, tmp_path / "core.pth")
    refused(lambda: load_core(net, tmp_path / "core.pth"), rf"{key} has the shape \(7, 1\)")


def test_a_norm_of_a_level_without_a_length(tmp_path: Path) -> None:
    torch.save(
        vit().state_dict() | {"norm0.weight": torch.tensor(1.0), "head.bias": torch.tensor(1.0)}, tmp_path / "x.pth"
    )
    refused(lambda: import_core(tmp_path / "x.pth", VIT, tmp_path / "y.safetensors"), "has the shape|lacks")
    assert not (tmp_path / "y.safetensors").exists()


def test_a_model_without_memory(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "core.pth")
    with torch.device("meta"):
        net = vit()
    refused(lambda: load_core(net, tmp_path / "core.pth"), r"no memory for .*meta device.*to_empty")


FILES: dict[str, bytes] = {
    "empty": b"",
    "a byte": b"\0",
    "text": b"not a checkpoint\n",
    "HTML": b"<!DOCTYPE html><html></html>",
    "zip without an end": b"PK\x03\x04" + b"\0" * 50,
    "zip without members": b"PK\x05\x06" + b"\0" * 18,
    "pickle without an end": b"\x80\x02}q\x00",
    "pickle of a deep list": b"\x80\x02" + b"]" * 100_000,
    "pickle that pops nothing": b"\x80\x020.",
    "pickle of a call": b"cos\nsystem\n(S'true'\ntR.",
    "a header beyond the file": struct.pack("<Q", 10**12) + b"{}",
    "a header of an odd dtype": struct.pack("<Q", 55)
    + b'{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,4]}}  '
    + b"\0" * 4,
    "a header that is no JSON": struct.pack("<Q", 4) + b"{{{{",
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoints(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"core{suffix}"
    path.write_bytes(FILES[name])
    refused(lambda: load_core(vit(), path), rf"core{suffix} (cannot be read|is not a checkpoint|holds no state dict)")
    refused(lambda: import_core(path, VIT, tmp_path / "out.safetensors"), rf"core{suffix} ")
    assert not (tmp_path / "out.safetensors").exists()


def test_safetensors_of_float8(tmp_path: Path) -> None:
    state = vit().state_dict()
    save_file(state | {QKV: state[QKV].to(torch.float8_e4m3fn)}, tmp_path / "core.safetensors")
    refused(lambda: load_core(vit(), tmp_path / "core.safetensors"), f"'{QKV}' in .* is float8_e4m3fn")


def test_two_keys_of_one_weight(tmp_path: Path) -> None:
    state = {
        "layers.0.layernorm_before.weight": torch.ones(8),
        "encoder.layer.0.layernorm_before.weight": torch.ones(8),
    }
    torch.save(state, tmp_path / "core.pth")
    refused(lambda: load_core(vit(), tmp_path / "core.pth"), r"two keys .*timm's 'blocks.0.norm1.weight'|no place")


def test_import_into_what_is_there_or_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(timm.create_model(VIT, num_classes=3).state_dict(), source := tmp_path / "core.pth")
    (tmp_path / "folder.safetensors").mkdir()
    refused(lambda: import_core(source, VIT, tmp_path / "folder.safetensors"), "folder.safetensors exists")
    refused(lambda: import_core(source, "vit_tny", tmp_path / "out.safetensors"), "no model 'vit_tny'")
    refused(lambda: import_core(source, SWIN, tmp_path / "out.safetensors"), "has no place for|lacks")

    def full(path: Path, state: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rmoe.backbones.build.save_tensors", full)
    refused(
        lambda: import_core(source, VIT, tmp_path / "out.safetensors"), "out.safetensors cannot be written .*No space"
    )
    assert sorted(os.listdir(tmp_path)) == ["core.pth", "folder.safetensors"]
