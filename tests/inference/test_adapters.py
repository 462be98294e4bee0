"""What training changed is shared apart from the core: both together are the run, another core is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_classifier import INPUTS, KWARGS, NET, TRAINED, assert_same, finished, probabilities
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rmoe
from rmoe.backbones.build import timm_model
from rmoe.cli import main
from rmoe.engine.checkpoint.export import ADAPTER, BACKBONE, MODEL, read_metadata, write_model
from rmoe.engine.model_config import without_paths
from rmoe.errors import UserError
from rmoe.inference.adapters import attach, export_adapter
from rmoe.moe.state import global_state_dict


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cores") / "core.pth"
    torch.save({"model": timm_model(NET, {**KWARGS, "num_classes": 5}).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def residual(core: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("runs") / "residual", core, 1, {"num_experts": 4, "train_core": False})


@pytest.fixture(scope="module")
def adapter(residual: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_adapter(residual, tmp_path_factory.mktemp("adapters") / "one").path


def test_what_training_changed_and_nothing_else(residual: Path, adapter: Path, core: Path) -> None:
    """Read by safetensors alone, as another program would."""
    with safe_open(adapter, framework="np") as file:
        held = set(file.keys())
        metadata = file.metadata()
    whole = load_file(residual / MODEL)
    assert held == {key for key in whole if any(word in key for word in TRAINED)}
    assert_same(load_file(adapter), {key: whole[key] for key in held})
    about = json.loads(metadata["adapter"])
    assert about["taken"].keys() == whole.keys() - held
    assert about["taken"]["model.layers.2.blocks.1.mlp.core.fc1.weight"] == "layers.2.blocks.1.mlp.fc1.weight"
    assert (about["sha256"], about["name"]) == (rmoe.Core(core).sha256, "core.pth")
    assert metadata["format"] == "pt"


def test_core_and_adapter_are_the_run(residual: Path, adapter: Path, core: Path, tmp_path: Path) -> None:
    out = attach(core, adapter.parent, tmp_path / "again")
    assert_same(load_file(out / MODEL), load_file(residual / MODEL))
    assert read_metadata(out) == without_paths(read_metadata(residual))
    assert np.array_equal(probabilities(rmoe.load(out)), probabilities(rmoe.load(residual)))


@pytest.mark.parametrize("kind", [{"residual": "segments", "rank": 1}, {"residual": "sparse"}], ids=str)
def test_other_kinds_of_residual_are_their_core_and_adapter_too(
    core: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    run = finished(tmp_path / "run", core, 1, {"num_experts": 4, **kind})
    made = export_adapter(run, tmp_path / "one").path
    assert_same(load_file(attach(core, made, tmp_path / "again") / MODEL), load_file(run / MODEL))


def test_several_on_one_core_without_loading_it_again(
    residual: Path, adapter: Path, core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other numbers of experts and classes; and a dense run, of which little trained."""
    runs = [residual, finished(tmp_path / "eight", core, 2, {"num_experts": 8, "top_k": 2}, num_classes=3)]
    runs.append(finished(tmp_path / "dense", core, 3, None))
    adapters = [adapter, *(export_adapter(run, tmp_path / f"{run.name} adapter").path for run in runs[1:])]
    moved = core.rename(core.with_name("gone.pth"))
    base = rmoe.Core(moved, device="cpu")
    moved.rename(core)
    kept = copy.deepcopy(base.weights)
    attached = [base.attach(one) for one in adapters]
    for _ in range(2):
        for run, one in zip(runs, attached, strict=True):
            assert np.array_equal(probabilities(one), probabilities(rmoe.load(run)))
    assert_same(base.weights, kept)
    places = [one.model.state_dict(keep_vars=True) for one in attached]
    shared = {key for key in places[0] if "attn" in key or ".core." in key}
    assert shared
    for key in shared:
        assert places[0][key].data_ptr() == places[1][key].data_ptr()
        assert places[0][key].data_ptr() == places[2][key.replace(".core.", ".")].data_ptr()


def test_the_same_weights_in_another_file_are_the_same_core(adapter: Path, core: Path, tmp_path: Path) -> None:
    state = torch.load(core, weights_only=True)["model"]
    save_file(dict(reversed(state.items())), tmp_path / "core.safetensors")
    assert rmoe.Core(tmp_path / "core.safetensors").sha256 == rmoe.Core(core).sha256
    rmoe.Core(tmp_path / "core.safetensors").attach(adapter)


def test_cores_that_train_only_froze_show_whose_they_are(core: Path, tmp_path: Path) -> None:
    """The mixture's config says that its core trains, and train_only is no part of a finished run; the bits are."""
    run = finished(tmp_path / "run", core, 1, {"num_experts": 4, "train_core": True})
    save_file(torch.load(core, weights_only=True)["model"], tmp_path / "core.safetensors")
    made = export_adapter(run, tmp_path / "adapter", core=tmp_path / "core.safetensors").path
    assert_same(load_file(attach(core, made, tmp_path / "again") / MODEL), load_file(run / MODEL))


@pytest.mark.parametrize("change", ["bit", "name", "shape", "dtype"])
def test_another_core_is_refused_with_both_hashes(adapter: Path, core: Path, tmp_path: Path, change: str) -> None:
    state = torch.load(core, weights_only=True)["model"]
    key = "head.fc.bias"  # even where the adapter takes nothing of it
    if change == "bit":
        state[key].view(torch.int32)[0] ^= 1
    elif change == "name":
        state["head.fc.bias2"] = state.pop(key)
    else:
        state[key] = state[key][:-1] if change == "shape" else state[key].double()
    torch.save(state, tmp_path / "other.pth")
    hashes = [rmoe.Core(path).sha256 for path in (core, tmp_path / "other.pth")]
    with pytest.raises(UserError, match=rf"belongs to the core with SHA-256 {hashes[0]}, .*core.pth.* has {hashes[1]}"):
        attach(tmp_path / "other.pth", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cores_of_half_precision_are_taken(core: Path, tmp_path: Path) -> None:
    """The model's weights are float32, and are so again."""
    state = torch.load(core, weights_only=True)["model"]
    torch.save({key: x.bfloat16() for key, x in state.items()}, tmp_path / "half.pth")
    run = finished(tmp_path / "run", tmp_path / "half.pth", 1, {"num_experts": 4})
    found = export_adapter(run, tmp_path / "adapter")
    assert found.bytes < 0.5 * found.of_bytes
    out = attach(tmp_path / "half.pth", found.path, tmp_path / "again")
    assert_same(load_file(out / MODEL), load_file(run / MODEL))
    attached = rmoe.Core(tmp_path / "half.pth", device="cpu").attach(found.path)
    assert np.array_equal(probabilities(attached), probabilities(rmoe.load(run)))


def test_a_run_is_a_core_and_so_is_a_mixture(core: Path, residual: Path, tmp_path: Path) -> None:
    """As in an intermediate stage, whose gates and residuals the next one goes on with."""
    torch.manual_seed(5)
    config = read_metadata(residual)["model"] | {"core": str(residual)}
    state = load_file(residual / MODEL)
    moved = {key: x + 1 if "gate" in key or "norm1" in key else x for key, x in state.items()}
    (tmp_path / "next").mkdir()
    write_model(tmp_path / "next", moved, config, inputs=INPUTS)
    found = export_adapter(tmp_path / "next", tmp_path / "adapter")
    assert {key.partition(".deepspeed_moe")[2] for key in load_file(found.path)} == {""}
    out = attach(residual, found.path, tmp_path / "again")
    assert_same(load_file(out / MODEL), moved)
    attached = rmoe.Core(residual, device="cpu").attach(found.path)
    assert_same(global_state_dict(attached.model), moved)


def test_a_dense_runs_backbone_is_written_for_timm_again(core: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "dense", core, 3, None)
    out = attach(core, export_adapter(run, tmp_path / "adapter").path, tmp_path / "again")
    assert_same(load_file(out / BACKBONE), load_file(run / BACKBONE))


def test_the_wrong_core_is_noticed_when_an_adapter_is_made(residual: Path, core: Path, tmp_path: Path) -> None:
    state = torch.load(core, weights_only=True)["model"]
    torch.save({key: x + 1 if "fc1" in key else x for key, x in state.items()}, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=r"was not made from .*other.pth: \d of \d+ weights of its frozen.*[0-9a-f]{64}, this one"
    ):
        export_adapter(residual, tmp_path / "out", core=tmp_path / "other.pth")
    for number, moe in enumerate((None, {"num_experts": 2, "train_core": True})):
        run = finished(tmp_path / f"without_frozen_{number}", core, 1, moe)
        with pytest.raises(UserError, match=r"was not made from .*other.pth; its core's file had the SHA-256"):
            export_adapter(run, tmp_path / "out", core=tmp_path / "other.pth")
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pth")
    whole = finished(tmp_path / "whole", core, 1, {"num_experts": 2, "residual": "experts"})
    with pytest.raises(UserError, match="no weight in common .* an adapter would be the whole model"):
        export_adapter(whole, tmp_path / "out", core=tmp_path / "other.pth")
    assert not (tmp_path / "out").exists()


def relabelled(adapter: Path, path: Path, /, **changed: Any) -> Path:
    metadata = read_metadata(adapter) | changed
    save_file(
        load_file(adapter), path, {key: x if isinstance(x, str) else json.dumps(x) for key, x in metadata.items() if x}
    )
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"adapter": None}, "is no adapter but a whole model"),
        ({"adapter": [1]}, "does not say which core it belongs to: it is damaged"),
        ({"adapter": {"sha256": "x", "taken": {}}}, "does not say which core"),
        ({"adapter": {"sha256": 3, "taken": {}}}, "does not say which core"),
        ({"adapter": {"sha256": "0" * 64, "taken": {"a": 1}}}, "does not say which core"),
        ({"rmoe": "99.0.0"}, "was written by rmoe 99.0.0, this is .*; install"),
        ({"model": None}, "does not say what model it holds"),
    ],
)
def test_damaged_words(adapter: Path, core: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rmoe.Core(core).attach(relabelled(adapter, tmp_path / "a.safetensors", **changed))


def test_damaged_files(adapter: Path, core: Path, residual: Path, tmp_path: Path) -> None:
    base = rmoe.Core(core)
    about = read_metadata(adapter)["adapter"]
    about["taken"] |= {"model.norm.weight": "norm.gone"}
    with pytest.raises(UserError, match="is damaged: it takes 'norm.gone' of the core"):
        base.attach(relabelled(adapter, tmp_path / "a.safetensors", adapter=about))
    del about["taken"]["model.norm.weight"]
    with pytest.raises(UserError, match="1 missing .*model.norm.weight"):
        base.attach(relabelled(adapter, tmp_path / "a.safetensors", adapter=about))
    (tmp_path / "cut.safetensors").write_bytes(adapter.read_bytes()[:-9])
    with pytest.raises(UserError, match="cut.safetensors cannot be read"):
        base.attach(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="there is no .*gone; give an adapter.safetensors"):
        base.attach(tmp_path / "gone")
    with pytest.raises(UserError, match="there is no checkpoint"):
        rmoe.Core(tmp_path / "gone")
    for wrong in (None, 3, ""):
        with pytest.raises(UserError, match="the adapter is"):
            base.attach(wrong)
        with pytest.raises(UserError, match="the core is"):
            rmoe.Core(wrong)
    with pytest.raises(UserError, match="is an adapter, which lacks its core's weights; give both to rmoe attach"):
        rmoe.load(adapter)
    with pytest.raises(UserError, match="is an adapter, which lacks"):
        rmoe.load(adapter.parent)


def test_runs_without_what_it_takes(residual: Path, core: Path, tmp_path: Path) -> None:
    state, metadata = load_file(residual / MODEL), read_metadata(residual)
    (tmp_path / "run").mkdir()
    write_model(tmp_path / "run", state, metadata["model"] | {"core": None}, inputs=INPUTS)
    with pytest.raises(UserError, match="does not say what core it was made from; give it by --core"):
        export_adapter(tmp_path / "run", tmp_path / "out")
    export_adapter(tmp_path / "run", tmp_path / "out", core=core)
    with pytest.raises(UserError, match="the folder .*out is not empty; give another --out"):
        export_adapter(residual, tmp_path / "out")
    (tmp_path / "begun" / "a" / "vis_data").mkdir(parents=True)
    with pytest.raises(UserError, match="the run is not finished"):
        export_adapter(tmp_path / "begun", tmp_path / "out 2")
    with pytest.raises(UserError, match="the folder to write is None"):
        export_adapter(residual, None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        export_adapter(residual, tmp_path / "file")


def test_the_commands(residual: Path, core: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, again = str(tmp_path / "adapter"), str(tmp_path / "again")
    assert main(["export", str(residual), "--trained-only", "--core", str(core), "--out", out]) == 0
    said = capsys.readouterr().out
    held = load_file(tmp_path / "adapter" / ADAPTER)
    assert f": {sum(x.nbytes for x in held.values()) / 1e6:.2f} MB in {len(held)} of " in said
    assert " of the run; for the core with SHA-256 " in said
    assert main(["attach", str(core), out, "--out", again]) == 0
    assert "rmoe predict" in capsys.readouterr().out
    assert_same(load_file(tmp_path / "again" / MODEL), load_file(residual / MODEL))
    assert main(["attach", str(core), out, "--out", again]) == 2
    assert "is not empty" in capsys.readouterr().err
