"""Tests Swin-MoE's checkpoints: ours computes what their network does, from files of any number of processes.

Files are written here in Swin-MoE's layout from a plain network of ours, by its repository's names and shapes.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from random_weights import images, randomised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmoe.backbones import build, swin_moe
from rmoe.backbones.build import add_weights, import_core, split_experts
from rmoe.backbones.checkpoint_formats import translate
from rmoe.backbones.load_core import load_core, read_checkpoint
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.backbones.upcycle import upcycle
from rmoe.cli import main
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.state import moe_layers

NAME, EXPERTS = "swin_tiny_patch4_window7_224", 4
SMALL: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4}
BLOCKS = ("layers.2.blocks.1.mlp", "layers.3.blocks.1.mlp")
MOE = {"num_experts": EXPERTS, "residual": "experts", "combine": "softmax", "train_residual": False}


class TheirExperts(nn.Module):
    """Computes what Tutel's layer does without a capacity: top-1, weighed by the softmax, fc2 stored [E, H, C]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wg = nn.Parameter(torch.randn(EXPERTS, width))
        self.w1, self.w2 = (nn.Parameter(torch.randn(EXPERTS, hidden, width) / width**0.5) for _ in range(2))
        self.b1, self.b2 = nn.Parameter(torch.randn(EXPERTS, hidden)), nn.Parameter(torch.randn(EXPERTS, width))

    def forward(self, x: Tensor) -> Tensor:
        share = F.linear(x, self.wg).softmax(-1)
        every = torch.einsum("...c,ehc->...eh", x, self.w1) + self.b1
        every = torch.einsum("...eh,ehc->...ec", F.gelu(every), self.w2) + self.b2
        best = share.argmax(-1, keepdim=True)
        return every.take_along_dim(best[..., None], -2).squeeze(-2) * share.take_along_dim(best, -1)


@pytest.fixture(scope="module")
def theirs() -> tuple[nn.Module, dict[str, Tensor]]:
    """A network that computes what Swin-MoE's does, and its weights under Swin-MoE's names, of all experts."""
    torch.manual_seed(0)
    model: Any = randomised(timm.create_model(NAME, **SMALL, img_size=128, num_classes=5))
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if (table := getattr(module, "relative_position_bias_table", None)) is not None:
            side = round(len(table) ** 0.5)
            axis = torch.linspace(-8, 8, side)
            coords = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)[None]
            cpb = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, table.shape[1], bias=False))
            table.data = cpb(coords).detach().reshape(-1, table.shape[1])
            state |= {f"{name}.cpb_mlp.{key}": x for key, x in cpb.state_dict().items()}
            state[f"{name}.relative_coords_table"] = coords
            state[f"{name}.relative_position_index"] = module.relative_position_index
            del state[f"{name}.relative_position_bias_table"]
        if name.endswith(".mlp") and name not in BLOCKS:  # MLP_FC2_BIAS: False
            module.fc2.bias.data.zero_()
            del state[f"{name}.fc2.bias"]
    for name in BLOCKS:
        dense = model.get_submodule(name)
        layer = TheirExperts(dense.fc1.in_features, dense.fc1.out_features)
        model.get_submodule(name.removesuffix(".mlp")).mlp = layer
        state = {key: x for key, x in state.items() if not key.startswith(f"{name}.")}
        of = f"{name}._moe_layer."
        state |= {f"{of}gates.0.wg.weight": layer.wg, f"{of}experts.batched_fc1_w": layer.w1}
        state |= {f"{of}experts.batched_fc2_w": layer.w2, f"{of}experts.batched_fc1_bias": layer.b1}
        state |= {f"{of}experts.batched_fc2_bias": layer.b2}
    renamed = {}
    for key, x in state.items():
        for stage in (1, 2, 3):
            key = key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        renamed[key.replace("head.fc", "head")] = x.detach().clone()
    return model.eval(), renamed


def is_of_experts(key: str) -> bool:
    return ".experts.batched_" in key


def part(key: str, x: Tensor, rank: int, ranks: int) -> Tensor:
    """What one process holds of stacked experts: some of them, or hidden units of one."""
    if ranks <= EXPERTS:
        return x.chunk(ranks)[rank].clone()
    share = ranks // EXPERTS
    one = x[rank // share]
    if key.endswith("fc2_bias"):
        one = F.pad(one, (0, -len(one) % share))
    return one.chunk(share)[rank % share][None].clone()


def write(state: dict[str, Tensor], folder: Path, ranks: int, *, layout: str = "master", old: bool = False) -> Path:
    """Writes the files as Swin-MoE does: all else in a file of its own or in each; biases as older ones have them."""
    path = folder / "swin_moe.pth"
    shared = {key: x for key, x in state.items() if not is_of_experts(key)}
    for rank in range(ranks):
        own = {key: part(key, x, rank, ranks) for key, x in state.items() if is_of_experts(key)}
        if old:
            own = {key: x[:, None] if key.endswith("bias") else x for key, x in own.items()}
        torch.save({"model": own if layout == "master" else own | shared}, f"{path}.rank{rank}")
    if layout == "master":
        torch.save({"model": shared}, f"{path}.master")
    return path


def ours(**changed: Any) -> nn.Module:
    model = timm.create_model(NAME, **SMALL, img_size=128, num_classes=5)
    return upcycle(model, ResidualMoEConfig.from_dict({**MOE, "blocks": BLOCKS, **changed})).model.eval()


@pytest.mark.parametrize("layout", ["master", "each"])
@pytest.mark.parametrize(("ranks", "old"), [(1, False), (2, True), (4, True), (4, False), (8, False)])
@torch.no_grad()
def test_files_of_any_number_of_processes_compute_what_theirs_do(theirs, ranks, old, layout, tmp_path):
    network, state = theirs
    model = ours()
    report = load_core(model, write(state, tmp_path, ranks, layout=layout, old=old))
    assert report.source == "Microsoft Swin-MoE"
    assert report.converted["experts under global ids"] == list(BLOCKS)
    x = images(128, 128)
    torch.testing.assert_close(model(x), network(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".rank1", ".master"])
def test_each_of_the_files_stands_for_all(theirs, suffix, tmp_path):
    path = write(theirs[1], tmp_path, 2)
    whole = read_checkpoint(path)
    assert whole.keys() == read_checkpoint(f"{path}{suffix}").keys() == theirs[1].keys()
    assert all(torch.equal(x, theirs[1][key]) for key, x in whole.items())


def test_one_file_of_all_experts_is_read_too(theirs, tmp_path):
    torch.save({"model": theirs[1]}, tmp_path / "swin_moe.pth.global")
    model = ours()
    load_core(model, tmp_path / "swin_moe.pth.global")
    layer = moe_layers(model)[BLOCKS[0]]
    assert torch.equal(layer.residuals().w1_EHC, theirs[1][f"{BLOCKS[0]}._moe_layer.experts.batched_fc1_w"])
    assert torch.equal(layer.residuals().w2_ECH.mT, theirs[1][f"{BLOCKS[0]}._moe_layer.experts.batched_fc2_w"])
    assert torch.equal(layer.gate.weight, theirs[1][f"{BLOCKS[0]}._moe_layer.gates.0.wg.weight"])
    assert not layer.gate.bias.any()


def test_a_pyramid_starts_from_them(theirs, tmp_path):
    path = write(theirs[1], tmp_path, 2)
    moe = {**MOE, "blocks": "alternate_last_two_stages"}
    pyramid = TimmPyramid(NAME, SMALL, core=str(path), moe=moe)
    layers = moe_layers(pyramid.model)
    assert tuple(layers) == BLOCKS
    assert not any(p.requires_grad for layer in layers.values() for p in layer.deepspeed_moe.parameters())
    with pytest.raises(UserError, match="is the checkpoint of a mixture of experts, and moe is None"):
        add_weights(timm.create_model(NAME, **SMALL), str(path), None)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    real = build.timm_model
    monkeypatch.setattr(build, "timm_model", lambda name, kwargs: real(name, {**SMALL, "img_size": 128, **kwargs}))


@torch.no_grad()
def test_import_writes_one_mixture_and_split_writes_it_back(theirs, tmp_path, small_models, capsys):
    network, state = theirs
    source, out = write(state, tmp_path, 4), tmp_path / "ours.safetensors"
    assert main(["import", str(source), NAME, str(out)]) == 0
    assert "combine='softmax'" in capsys.readouterr().out
    model = ours()
    load_core(model, out)
    x = images(128, 128)
    torch.testing.assert_close(model(x), network(x), rtol=1e-5, atol=1e-5)
    for ranks in (1, 2, 4, 8):
        (folder := tmp_path / str(ranks)).mkdir()
        assert main(["split", str(out), str(folder / "back.pth"), "--ranks", str(ranks)]) == 0
        assert len(list(folder.iterdir())) == ranks + 1
        again = ours()
        load_core(again, folder / "back.pth")
        assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(("before", "after"), list(pairwise((1, 8, 2, 4, 1))))
def test_splitting_their_files_keeps_every_weight(theirs, before, after, tmp_path):
    source = write(theirs[1], tmp_path, before)
    (tmp_path / "new").mkdir()
    assert split_experts(source, tmp_path / "new" / "swin_moe.pth", after) == []
    back = read_checkpoint(tmp_path / "new" / "swin_moe.pth")
    assert back.keys() == theirs[1].keys()
    assert all(torch.equal(x, theirs[1][key]) for key, x in back.items())
    for rank in range(after):  # shapes are theirs, without those of older ones
        own = torch.load(tmp_path / "new" / f"swin_moe.pth.rank{rank}", weights_only=True)["model"]
        expected = {key: part(key, x, rank, after) for key, x in theirs[1].items() if is_of_experts(key)}
        assert own.keys() == expected.keys()
        assert all(torch.equal(x, expected[key]) for key, x in own.items())


def test_what_tutel_does_not_have_is_told(theirs, tmp_path):
    model = ours(balance_rate=0.01, combine="straight_through")
    for layer in moe_layers(model).values():
        layer.gate.bias.data.fill_(1)
        layer.gate.choice_bias.fill_(1)
    state = {f"backbone.model.{key}": x.contiguous() for key, x in model.state_dict().items()}
    save_file(state | {"decode_head.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    notes = "\n".join(split_experts(tmp_path, tmp_path / "out.pth", 2))
    assert "1 weights outside the backbone are left out, such as 'decode_head.weight'" in notes
    assert f"'{BLOCKS[0]}._moe_layer.gates.0.wg.bias' is not zero" in notes
    assert f"'{BLOCKS[1]}.gate.choice_bias' (of balance_rate) is left out" in notes
    back = translate(read_checkpoint(tmp_path / "out.pth")).state
    assert torch.equal(back[f"{BLOCKS[0]}.gate.bias"], torch.ones(EXPERTS))


def damaged(kind: str, path: Path, state: dict[str, Tensor]) -> None:
    def rewrite(rank: int, change: Any) -> None:
        file = f"{path}.rank{rank}"
        content = torch.load(file, weights_only=True)
        torch.save({"model": change(content["model"])}, file)

    first = f"{BLOCKS[0]}._moe_layer.experts.batched_fc1_w"
    if kind == "lost":
        Path(f"{path}.rank1").unlink()
    elif kind == "last lost":
        Path(f"{path}.rank3").unlink()
    elif kind == "truncated":
        Path(f"{path}.rank2").write_bytes(Path(f"{path}.rank2").read_bytes()[:500])
    elif kind == "twice":
        Path(f"{path}.rank2").write_bytes(Path(f"{path}.rank1").read_bytes())
    elif kind == "two names":
        Path(f"{path}.rank02").write_bytes(Path(f"{path}.rank2").read_bytes())
    elif kind == "more experts":
        rewrite(3, lambda own: {key: torch.cat([x, x]) if is_of_experts(key) else x for key, x in own.items()})
    elif kind == "other blocks":
        rewrite(
            3, lambda own: {key.replace("layers.2.blocks.1.mlp", "layers.1.blocks.0.mlp"): x for key, x in own.items()}
        )
    elif kind == "other training":
        rewrite(3, lambda own: own | {"norm.weight": own["norm.weight"] + 1})
    elif kind == "not finite":
        rewrite(3, lambda own: own | {first: own[first] * float("nan")})
    elif kind == "no experts":
        rewrite(0, lambda own: {key: x for key, x in own.items() if not is_of_experts(key)})
    elif kind == "scalar":
        rewrite(0, lambda own: own | {first: torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lost", r"has files of 3 ranks up to 3, without rank 1; bring the missing files"),
        ("last lost", r"the 3 files of .* hold 3 experts of 'layers\.2\.blocks\.1\.mlp\._moe_layer', .* from 4; bring"),
        ("truncated", r"rank2 cannot be read .* cut short"),
        ("twice", r"rank2 and rank 1 hold the same experts; one is a copy"),
        ("two names", r"rank02 and .*rank2 are both of rank|rank2 and .*rank02 are both of rank"),
        ("more experts", r"is \(2, 128, 32\) in .*rank3 and \(1, 128, 32\) in rank 0"),
        ("other blocks", r"rank3 has other experts than rank 0: layers\.1\.blocks"),
        ("other training", r"rank3 has another 'norm.weight' than the files before it"),
        ("not finite", r"rank3 holds values that are not finite"),
        ("no experts", r"rank0 holds no experts of Swin-MoE"),
        ("scalar", r"is \(\) in .*rank0"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(theirs, kind, message, tmp_path):
    path = write(theirs[1], tmp_path, 4, layout="each")
    damaged(kind, path, theirs[1])
    with pytest.raises(UserError, match=message) as caught:
        load_core(ours(), path)
    assert "\n" not in str(caught.value)


def without(state: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    return {key: x for key, x in state.items() if word not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "wg.weight"), r"lacks '.*gates\.0\.wg\.weight' \[experts, width\]"),
        (
            lambda s: without(s, "wg.weight") | {f"{BLOCKS[0]}._moe_layer.gates.0.sim_matrix": torch.ones(2, EXPERTS)},
            "is a cosine router, and rmoe's gates are linear",
        ),
        (lambda s: without(s, "batched_fc2_w"), r"is \(4, 128, 32\) and batched_fc2_w not there; both have"),
        (lambda s: without(s, "relative_coords_table"), "do not belong together, or are not all there"),
        (lambda s: {k: x.repeat(2, 1) if "wg." in k else x for k, x in s.items()}, "hold 4 experts .* chooses from 8"),
    ],
)
def test_weights_that_do_not_belong_together_are_refused(theirs, change, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load_core(ours(), write(change(theirs[1]), tmp_path, 2))
    assert "\n" not in str(caught.value)


def test_another_number_of_experts_is_refused(theirs, tmp_path):
    with pytest.raises(UserError, match=r"holds 4 experts in a layer, and the model's moe has num_experts=2; give"):
        load_core(ours(num_experts=2), write(theirs[1], tmp_path, 2))


@pytest.mark.parametrize(
    ("ranks", "out", "message"),
    [
        (3, "new.pth", "4 experts cannot be spread over 3 files; use a divisor or a multiple of 4"),
        (4 * 256, "new.pth", "has 128 hidden units, which 256 files cannot share"),
        (0, "new.pth", "--ranks is 0; it is 1 to"),
        (2, "swin_moe.pth", "swin_moe.pth.master exists; remove it"),
        (2, "new.bin", "give NAME.pth in a folder"),
    ],
)
def test_splits_that_cannot_be_are_refused(theirs, ranks, out, message, tmp_path, capsys):
    source = write(theirs[1], tmp_path, 2)
    before = sorted(tmp_path.iterdir())
    assert main(["split", str(source), str(tmp_path / out), "--ranks", str(ranks)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_mixture_with_a_core_is_not_split(tmp_path):
    dense = timm.create_model(NAME, **SMALL, img_size=128)
    model = upcycle(dense, ResidualMoEConfig(num_experts=2, residual="full")).model
    save_file({key: x.contiguous() for key, x in model.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no experts that are networks of their own"):
        split_experts(tmp_path, tmp_path / "out.pth", 2)


def test_a_lone_import_keeps_the_file(theirs, tmp_path, small_models):
    out = tmp_path / "ours.safetensors"
    import_core(write(theirs[1], tmp_path, 2), NAME, out)
    keys = load_file(out).keys()
    assert f"{BLOCKS[0]}.deepspeed_moe.experts.deepspeed_experts.3.w1_EHC" in keys
    assert swin_moe.to_theirs(load_file(out))[1] == []
