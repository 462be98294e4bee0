"""Tests official checkpoints: the model computes what the foreign one does, no key is lost, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from random_weights import images, randomised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmoe.backbones import build
from rmoe.backbones.build import import_core
from rmoe.backbones.checkpoint_formats import translate
from rmoe.backbones.load_core import load_core, read_checkpoint
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.cli import main
from rmoe.errors import UserError
from rmoe.tasks.classification import TimmClassifier

SWIN, VIT, CVT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "cvt_13"
DEPTHS, HEADS = (2, 2, 4, 2), (1, 1, 2, 2)
SMALL: dict[str, dict[str, Any]] = {
    SWIN: {"embed_dim": 8, "depths": DEPTHS, "num_heads": HEADS, "window_size": 4, "img_size": 128},
    VIT: {"embed_dim": 12, "depth": 2, "num_heads": 2, "img_size": 32},
    CVT: {"embed_dims": (8, 16, 24), "depths": (1, 2, 3), "num_heads": (1, 2, 3)},
}
OPENMMLAB_SWIN = {"embed_dims": 8, "depths": DEPTHS, "num_heads": HEADS, "window_size": 4}


def ours(name: str, **changed: Any) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, **{**SMALL[name], "num_classes": 5, **changed}).eval()


@torch.no_grad()
def close(one: Tensor, other: Tensor) -> None:
    print(f"largest difference {(one - other).abs().max().item():.1e}")  # shown by pytest -rP
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Foreign:
    """Holds a classifier of another code base: its weights, its logits, and the name of our model."""

    state: dict[str, Tensor]
    logits: Callable[[Tensor], Tensor]
    model: str
    size: int
    source: str


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Foreign]:
    """Makes a model of each format. transformers is imported here because it takes seconds."""
    import transformers as hf

    swin, vit, cvt = SMALL[SWIN], SMALL[VIT], SMALL[CVT]
    shape = {"embed_dim": 8, "depths": DEPTHS, "num_heads": HEADS, "window_size": 4, "image_size": 128}
    hf_swin = randomised(hf.SwinForImageClassification(hf.SwinConfig(**shape, num_labels=5)))
    shape = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    shape |= {"image_size": 32, "layer_norm_eps": 1e-6}
    hf_vit = randomised(hf.ViTForImageClassification(hf.ViTConfig(**shape, num_labels=5)))
    shape = {"embed_dim": cvt["embed_dims"], "depth": cvt["depths"], "num_heads": cvt["num_heads"]}
    hf_cvt = randomised(hf.CvtForImageClassification(hf.CvtConfig(**shape, num_labels=5)))
    timm_swin = randomised(ours(SWIN))
    timm_vit = randomised(ours(VIT))
    folder = tmp_path_factory.mktemp("hugging_face")

    def published(model: nn.Module) -> dict[str, Tensor]:
        """Returns the names in files, which are not always those in memory."""
        model.save_pretrained(folder / type(model).__name__)
        return load_file(folder / type(model).__name__ / "model.safetensors")

    def logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x).logits

    assert swin["img_size"] == 128
    assert vit["img_size"] == 32
    return {
        "timm Swin": Foreign(timm_swin.state_dict(), timm_swin, SWIN, 128, "timm"),
        "timm ViT": Foreign(timm_vit.state_dict(), timm_vit, VIT, 32, "timm"),
        "Microsoft Swin": Foreign(microsoft_swin(timm_swin), timm_swin, SWIN, 128, "Microsoft Swin"),
        "Microsoft CvT": Foreign(microsoft_cvt(hf_cvt), logits(hf_cvt), CVT, 64, "Microsoft CvT"),
        "HF Swin": Foreign(published(hf_swin), logits(hf_swin), SWIN, 128, "Hugging Face Swin"),
        "HF Swin in memory": Foreign(hf_swin.state_dict(), logits(hf_swin), SWIN, 128, "Hugging Face Swin"),
        "HF ViT": Foreign(published(hf_vit), logits(hf_vit), VIT, 32, "Hugging Face ViT"),
        "HF ViT in memory": Foreign(hf_vit.state_dict(), logits(hf_vit), VIT, 32, "Hugging Face ViT"),
        "HF CvT": Foreign(published(hf_cvt), logits(hf_cvt), CVT, 64, "Hugging Face CvT"),
    }


def microsoft_swin(model: nn.Module) -> dict[str, Tensor]:
    """Returns the published names, from the module names of its repository; computed buffers are stored too."""
    state = {}
    for key, x in model.state_dict().items():
        for stage in (1, 2, 3):
            key = key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        state[key.replace("head.fc", "head")] = x
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 16, 16)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    return state


def microsoft_cvt(hf_model: nn.Module) -> dict[str, Tensor]:
    """Returns the published names of Hugging Face's model, paired as in its conversion script."""
    state = hf_model.state_dict()
    renamed = {"norm.": "layernorm.", "head.": "classifier."}
    pairs = {new + part: old + part for new, old in renamed.items() for part in ("weight", "bias")}
    pairs["stage2.cls_token"] = "cvt.encoder.stages.2.cls_token"
    for i, depth in enumerate(SMALL[CVT]["depths"]):
        stage = f"cvt.encoder.stages.{i}"
        modules = {
            "patch_embed.proj": "embedding.convolution_embeddings.projection",
            "patch_embed.norm": "embedding.convolution_embeddings.normalization",
        }
        for j in range(depth):
            block = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
            block |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
            for letter, word in {"q": "query", "k": "key", "v": "value"}.items():
                convolution = f"attention.attention.convolution_projection_{word}.convolution_projection"
                block[f"attn.conv_proj_{letter}.conv"] = f"{convolution}.convolution"
                block[f"attn.conv_proj_{letter}.bn"] = f"{convolution}.normalization"
                block[f"attn.proj_{letter}"] = f"attention.attention.projection_{word}"
            modules |= {f"blocks.{j}.{new}": f"layers.{j}.{old}" for new, old in block.items()}
        for new, old in modules.items():
            for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                if f"{stage}.{old}.{part}" in state:
                    pairs[f"stage{i}.{new}.{part}"] = f"{stage}.{old}.{part}"
    assert sorted(pairs.values()) == sorted(state)
    return {new: state[old] for new, old in pairs.items()}


NAMES = ["timm Swin", "timm ViT", "Microsoft Swin", "Microsoft CvT", "HF Swin", "HF Swin in memory", "HF ViT"]
NAMES += ["HF ViT in memory", "HF CvT"]
FOREIGN = [name for name in NAMES if not name.startswith("timm")]
every_format = pytest.mark.parametrize("name", NAMES)
every_foreign_format = pytest.mark.parametrize("name", FOREIGN)


def saved(state: Mapping[str, Tensor], folder: Path, name: str = "core.pth") -> Path:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(dict(state), path)
    else:
        torch.save({"model": dict(state)} if "microsoft" in name else dict(state), path)
    return path


@every_format
@pytest.mark.parametrize("file", ["core.pth", "microsoft.pth", "core.safetensors"])
def test_logits_equal_the_foreign_models(foreign, name, file, tmp_path):
    theirs = foreign[name]
    model = ours(theirs.model)
    report = load_core(model, saved(theirs.state, tmp_path, file))
    assert report.source == theirs.source
    assert report.loaded == len(model.state_dict())
    with torch.no_grad():
        close(model(images(theirs.size, theirs.size)), theirs.logits(images(theirs.size, theirs.size)))


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("library", ["mmseg", "mmdet"])
def test_maps_equal_mmsegs_and_mmdets(library, prefix, tmp_path):
    """Compares the norms of output levels too, at any size: our pyramid pads windows as theirs does."""
    module = pytest.importorskip(f"{library}.models.backbones")
    theirs = randomised(module.SwinTransformer(**OPENMMLAB_SWIN))
    state = {prefix + key: x for key, x in theirs.state_dict().items()}
    if prefix:
        state["decode_head.conv_seg.weight"] = torch.ones(2)
    torch.save({"meta": {"CLASSES": ["sky"]}, "state_dict": state}, tmp_path / "core.pth")
    pyramid = TimmPyramid(
        SWIN, {k: x for k, x in SMALL[SWIN].items() if k != "img_size"}, core=str(tmp_path / "core.pth")
    )
    with torch.no_grad():
        for size in ((128, 128), (50, 75)):
            for one, other in zip(pyramid.eval()(images(*size)), theirs(images(*size)), strict=True):
                close(one, other)


@pytest.mark.parametrize("name", ["HF Swin", "Microsoft Swin", "HF CvT", "Microsoft CvT"])
def test_maps_are_those_of_the_imported_model(foreign, name, tmp_path):
    """Checks that a pyramid takes a core of any format; its maps are compared with the foreign ones elsewhere."""
    theirs = foreign[name]
    path = saved(theirs.state, tmp_path)
    levels = (0, 1, 2) if theirs.model == CVT else (0, 1, 2, 3)
    pyramid = TimmPyramid(theirs.model, SMALL[theirs.model], out_indices=levels, core=str(path)).eval()
    pyramid.norms = nn.ModuleList(nn.Identity() for _ in levels)
    model = ours(theirs.model, **({"always_partition": True} if theirs.model == SWIN else {}))
    load_core(model, path)
    x = images(128, 128)
    torch.testing.assert_close(list(pyramid(x)), model.forward_intermediates(x, intermediates_only=True))


def test_a_classifier_takes_a_core_of_any_format(foreign, tmp_path):
    theirs = foreign["HF CvT"]
    path = saved(theirs.state, tmp_path)
    model = TimmClassifier(CVT, num_classes=5, kwargs=SMALL[CVT], core=str(path)).eval()
    with torch.no_grad():
        close(model(images(64, 64)), theirs.logits(images(64, 64)))


def test_norms_of_hugging_faces_backbone_are_carried_over(tmp_path):
    import transformers as hf

    shape = {"embed_dim": 8, "depths": DEPTHS, "num_heads": HEADS, "window_size": 4, "image_size": 128}
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    theirs = randomised(hf.SwinBackbone(hf.SwinConfig(**shape, out_features=stages)))
    torch.save(theirs.state_dict(), tmp_path / "core.pth")
    pyramid = TimmPyramid(SWIN, SMALL[SWIN], core=str(tmp_path / "core.pth")).eval()
    with torch.no_grad():
        for one, other in zip(pyramid(images(128, 128)), theirs(images(128, 128)).feature_maps, strict=True):
            close(one, other)


def test_patch_merging_is_reordered_by_neighbours():
    """Reorders two channels a, b of the neighbours at (0, 0), (0, 1), (1, 0), (1, 1) from mmcv's order."""
    sign = {"stages.0.blocks.0.attn.w_msa.qkv.weight": torch.ones(1)}
    mmcv = torch.tensor([0.00, 0.01, 0.10, 0.11, 1.00, 1.01, 1.10, 1.11])  # channel.row column
    norm, reduction = "stages.0.downsample.norm.weight", "stages.0.downsample.reduction.weight"
    translated = translate({**sign, norm: mmcv, reduction: mmcv.repeat(3, 1)})
    expected = torch.tensor([0.00, 1.00, 0.10, 1.10, 0.01, 1.01, 0.11, 1.11])
    assert torch.equal(translated.state["layers.1.downsample.norm.weight"], expected)
    assert torch.equal(translated.state["layers.1.downsample.reduction.weight"], expected.repeat(3, 1))
    assert sorted(translated.converted["patch merging reordered"]) == sorted(
        ["layers.1.downsample.norm.weight", "layers.1.downsample.reduction.weight"]
    )


@every_format
def test_every_key_is_matched_converted_or_listed(foreign, name, tmp_path):
    theirs = foreign[name]
    surplus = {"decode_head.weight": torch.ones(1)} if name.startswith("HF") else {}
    report = load_core(ours(theirs.model), saved(theirs.state | surplus, tmp_path))
    joined = 2 * len(report.converted.get("query, key and value joined", []))
    listed = [key for keys in report.left_out.values() for key in keys]
    assert report.loaded + joined + len(listed) == len(theirs.state) + len(surplus)
    assert all(key in str(report) for key in listed)
    assert all(key in str(report) for keys in report.converted.values() for key in keys)
    assert theirs.source in str(report)
    assert ("act_layer='quick_gelu'" in str(report)) == (name == "Microsoft CvT")


def test_what_is_left_out_has_its_reason(foreign, tmp_path):
    report = load_core(ours(SWIN, num_classes=0), saved(foreign["Microsoft Swin"].state, tmp_path))
    assert report.left_out == {
        "classifier": ["head.fc.weight", "head.fc.bias"],
        "computed by the model": [
            "layers.0.blocks.1.attn_mask",
            "layers.0.blocks.0.attn.relative_position_index",
        ],
    }
    state = foreign["HF ViT"].state
    extra = {"vit.pooler.dense.weight": torch.ones(1), "vit.embeddings.mask_token": torch.ones(1)}
    report = load_core(ours(VIT), saved(state | extra, tmp_path))
    assert report.left_out == {
        "pooler of the last layer": ["vit.pooler.dense.weight"],
        "for masked pretraining only": ["vit.embeddings.mask_token"],
    }


def test_norms_of_levels_that_the_target_lacks_are_listed(tmp_path):
    from mmseg.models.backbones import SwinTransformer

    path = saved(randomised(SwinTransformer(**OPENMMLAB_SWIN)).state_dict(), tmp_path)
    norms = [f"norm{level}.{part}" for level in range(4) for part in ("weight", "bias")]
    assert load_core(ours(SWIN), path).left_out["norm of an output level"] == norms
    level = nn.LayerNorm(64)
    report = load_core(ours(SWIN), path, {3: level})
    assert report.left_out["norm of an output level"] == norms[:6]
    assert torch.equal(level.weight, read_checkpoint(path)["norm3.weight"])


def test_norms_that_the_file_lacks_keep_their_values(foreign, tmp_path):
    level = nn.LayerNorm(8)
    report = load_core(ours(SWIN), saved(foreign["HF Swin"].state, tmp_path), {0: level})
    assert report.left_out == {"norm of an output level, not in the file": ["norm0.weight", "norm0.bias"]}
    assert torch.equal(level.weight, torch.ones(8))


def test_position_tables_are_resized(foreign, tmp_path):
    target = ours(SWIN, window_size=8, img_size=256)
    report = load_core(target, saved(foreign["HF Swin"].state, tmp_path))
    assert len(report.resized) == sum(DEPTHS)
    table = foreign["HF Swin"].state["swin.encoder.layers.3.blocks.0.attention.self.relative_position_bias_table"]
    resized = target.layers[3].blocks[0].attn.relative_position_bias_table
    assert (table.shape, resized.shape) == ((49, 2), (225, 2))
    torch.testing.assert_close(resized[112], table[24])  # no offset: the middle of both

    target = ours(VIT, img_size=64)
    state = foreign["HF ViT"].state
    report = load_core(target, saved(state, tmp_path, "vit.pth"))
    assert report.resized == ["pos_embed"]
    assert target.pos_embed.shape == (1, 17, 12)
    assert torch.equal(target.pos_embed[:, 0], state["vit.embeddings.position_embeddings"][:, 0])  # the class token's


@every_format
def test_translating_twice_is_translating_once(foreign, name):
    once = translate(foreign[name].state)
    twice = translate(once.state)
    assert twice.source == "timm"
    assert list(twice.state) == list(once.state)
    assert all(torch.equal(x, once.state[key]) for key, x in twice.state.items())


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the models of `import_core` small, which takes only their names."""
    real = build.timm_model
    monkeypatch.setattr(build, "timm_model", lambda name, kwargs: real(name, {**SMALL.get(name, {}), **kwargs}))


@every_format
def test_an_imported_file_is_the_foreign_model(foreign, name, tmp_path, small_models):
    theirs = foreign[name]
    out = tmp_path / "out.safetensors"
    first = import_core(saved(theirs.state, tmp_path), theirs.model, out)
    assert first.source == theirs.source
    model = ours(theirs.model)
    assert load_core(model, out).left_out == {}
    with torch.no_grad():
        close(model(images(theirs.size, theirs.size)), theirs.logits(images(theirs.size, theirs.size)))
    import_core(out, theirs.model, tmp_path / "again.safetensors")
    assert out.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_an_imported_file_keeps_norms_of_levels_and_has_no_invented_classifier(tmp_path, small_models):
    from mmseg.models.backbones import SwinTransformer

    state = randomised(SwinTransformer(**OPENMMLAB_SWIN)).state_dict()
    out = tmp_path / "out.safetensors"
    import_core(saved(state, tmp_path), SWIN, out)
    written = load_file(out)
    assert not any(key.startswith(("head", "norm.")) for key in written)
    assert torch.equal(written["norm2.bias"], state["norm2.bias"])
    level = nn.LayerNorm(16)
    load_core(ours(SWIN), out, {1: level})
    assert torch.equal(level.weight, state["norm1.weight"])


def refused(model: nn.Module, path: Path, message: str) -> None:
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_core(model, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


@every_foreign_format
def test_another_model_is_refused(foreign, name, tmp_path):
    theirs = foreign[name]
    path = saved(theirs.state, tmp_path)
    refused(ours(VIT if theirs.model != VIT else SWIN), path, r"holds \d+ weights .*no place for")
    deeper = {SWIN: {"depths": (2, 2, 6, 2)}, VIT: {"depth": 3}, CVT: {"depths": (1, 2, 4)}}[theirs.model]
    refused(
        ours(theirs.model, **deeper), path, r"lacks \d+ weights .*(layers\.2\.blocks\.4|blocks\.2|stages\.2\.blocks\.3)"
    )


@every_foreign_format
def test_one_weight_missing_is_refused(foreign, name, tmp_path):
    state = dict(foreign[name].state)
    gone = next(key for key in state if key.endswith(("fc1.weight", "intermediate.dense.weight")))
    del state[gone]
    refused(ours(foreign[name].model), saved(state, tmp_path), r"lacks 1 weight \(.*mlp\.fc1\.weight\)")


def test_query_without_key_is_refused(foreign, tmp_path):
    state = dict(foreign["HF Swin"].state)
    del state["swin.encoder.layers.1.blocks.0.attention.self.key.weight"]
    refused(
        ours(SWIN), saved(state, tmp_path), r"holds 2 weights \(layers\.1\.blocks\.0\.attn\.qkv\.weight\.0, .*weight\.2"
    )


@every_foreign_format
def test_values_that_are_not_finite_are_refused(foreign, name, tmp_path):
    state = {key: x.clone() for key, x in foreign[name].state.items()}
    key = next(key for key, x in state.items() if x.is_floating_point())
    state[key].view(-1)[0] = float("nan")
    refused(ours(foreign[name].model), saved(state, tmp_path), f"not finite in {key}")


@every_foreign_format
def test_a_file_cut_short_is_refused(foreign, name, tmp_path):
    path = saved(foreign[name].state, tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(ours(foreign[name].model), path, "cut short")


def test_the_command_imports_and_says_so(foreign, tmp_path, capsys, small_models):
    source, out = saved(foreign["HF Swin"].state, tmp_path), tmp_path / "out.safetensors"
    assert main(["import", str(source), SWIN, str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"core {source} (Hugging Face Swin): {len(load_file(out))} weights loaded"
    assert lines[1].startswith("  20 converted (query, key and value joined): layers.0.blocks.0.attn.qkv.")
    assert len(lines) == 3
    assert lines[-1] == f"{out}: written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core.pth", "out.safetensors"]


@pytest.mark.parametrize(
    ("model", "out", "message"),
    [
        (CVT, "out.safetensors", "no place for"),
        ("swin_tiny", "out.safetensors", "did you mean"),
        (SWIN, "out.pth", "suffix .safetensors"),
        (SWIN, "nowhere/out.safetensors", "folder that exists"),
        (SWIN, "there.safetensors", "exists; remove it"),
    ],
)
def test_the_command_refuses_and_writes_nothing(foreign, model, out, message, tmp_path, capsys, small_models):
    source = saved(foreign["HF Swin"].state, tmp_path)
    (tmp_path / "there.safetensors").write_text("precious")
    assert main(["import", str(source), model, str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rmoe: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core.pth", "there.safetensors"]
    assert (tmp_path / "there.safetensors").read_text() == "precious"
