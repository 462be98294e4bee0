"""Checkpoints and weights that nobody should have written, and names that are taken: each is named in one line.

A checkpoint here is always sealed anew after it was harmed: its lengths and digests are right, its content is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.optim import PolyLR
from safetensors.torch import save, save_file
from torch import nn
from toy import ToyModel

from rmoe.engine.checkpoint import files, resharding, run_state
from rmoe.engine.checkpoint.files import (
    HISTORY,
    MARKER,
    RUN,
    Layout,
    check_layout,
    complete_checkpoints,
    newest_intact,
    put_in_place,
)
from rmoe.engine.checkpoint.weights import load_weights
from rmoe.engine.faults import Watch
from rmoe.engine.hooks import ExportHook
from rmoe.engine.optim import DeepSpeedOptimWrapper
from rmoe.engine.strategy import Strategy
from rmoe.errors import UserError
from rmoe.moe.state import global_state_dict

PART = "part_00000.safetensors"
LAYOUT = Layout(1, 1, 0, 4, 1, 0)
DEEP = b"[" * 200_000
NAN = float("nan")


def made(folder: Path, iteration: int) -> Path:
    path = folder / f"iter_{iteration}"
    history = {"loss": torch.ones(2, 3, dtype=torch.float64)}
    files.write_checkpoint(path, {"weight/a": torch.arange(9.0)}, {"x": 1}, history, iteration, LAYOUT)
    return path


def seal(path: Path, change: Callable[[dict[str, Any]], Any] = lambda marker: marker) -> None:
    """Writes the marker of what there is, after `change`."""
    marker = json.loads((path / MARKER).read_text())
    for name, about in marker["files"].items():
        data = (path / name).read_bytes()
        about.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    del marker["sha256"]
    marker = change(marker) or marker
    if isinstance(marker, dict):
        marker = marker | {"sha256": hashlib.sha256(json.dumps(marker).encode()).hexdigest()}
    (path / MARKER).write_text(json.dumps(marker))


def set_in(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets one value deep in a dict."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    """Removes one key deep in a dict."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


SEALED = {"bytes": 3, "sha256": "0" * 64}
MARKERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda marker: [marker],
    "a number": lambda marker: 7,
    "a string": lambda marker: "complete",
    "no keys": lambda marker: marker.clear(),
    **{f"no {key}": without(key) for key in ("iteration", "layout", "files")},
    "an unknown key": set_in("more", value=1),
    "iteration is text": set_in("iteration", value="2"),
    "iteration is negative": set_in("iteration", value=-2),
    "iteration is true": set_in("iteration", value=True),
    "iteration is 2.5": set_in("iteration", value=2.5),
    "iteration is NaN": set_in("iteration", value=NAN),
    "iteration is huge": set_in("iteration", value=10**400),
    "layout is a list": set_in("layout", value=[1, 1, 0, 4, 1, 0]),
    "layout lacks a key": without("layout", "seed"),
    "layout has a key more": set_in("layout", "nodes", value=1),
    "layout has text": set_in("layout", "processes", value="1"),
    "layout has null": set_in("layout", "micro_batch", value=None),
    "files is a list": set_in("files", value=[PART]),
    "files has null": set_in("files", PART, value=None),
    "bytes is text": set_in("files", PART, "bytes", value="9"),
    "digest is null": set_in("files", PART, "sha256", value=None),
    "a file above": set_in("files", "../iter_1/run.json", value=SEALED),
    "a file by an absolute name": set_in("files", "/etc/hostname", value=SEALED),
    "a file of a foreign name": set_in("files", "x.pkl", value=SEALED),
}


@pytest.mark.parametrize("harm", MARKERS)
def test_markers(harm: str, tmp_path: Path) -> None:
    good, bad = made(tmp_path, 1), made(tmp_path, 2)
    seal(bad, MARKERS[harm])
    found, wrong = complete_checkpoints(tmp_path)
    assert found == [good]
    assert wrong == {bad: f"damaged ({MARKER} is not what was written)"}
    assert newest_intact(tmp_path, pytest.fail) == good
    for read in (lambda: check_layout(bad, LAYOUT), lambda: load_weights(ToyModel(), bad)):
        with pytest.raises(UserError, match=r"iter_2 is damaged \(complete.json"):
            read()


BYTES = {
    "empty": b"",
    "null": b"null",
    "deep": DEEP,
    "not JSON": b"{'x': 1}",
    "UTF-16": '{"x": 1}'.encode("utf-16"),
    "Latin-1": b'{"x": "\xe4"}',
    "binary": bytes(range(256)),
    "a list": b"[1]",
    "a number": b"1",
    "a huge number": b"9" * 10_000,
}


@pytest.mark.parametrize("harm", [*BYTES, "too large", "a folder"])
@pytest.mark.parametrize("name", [MARKER, RUN])
def test_json_of_other_kinds(name: str, harm: str, tmp_path: Path) -> None:
    good, bad = made(tmp_path, 1), made(tmp_path, 2)
    if harm == "a folder":
        (bad / name).unlink()
        (bad / name).mkdir()
    else:
        (bad / name).write_bytes(BYTES.get(harm, b"{}"))
        if harm == "too large":
            os.truncate(bad / name, files._MOST_JSON + 1)  # sparse
        if name == RUN:
            seal(bad)
    said = [f"{path} is {text}" for path, text in complete_checkpoints(tmp_path)[1].items()]
    assert newest_intact(tmp_path, said.append) == good
    assert len(said) == 1
    assert name in said[0]
    with pytest.raises(UserError, match="iter_2 is (damaged|half written)"):
        load_weights(ToyModel(), bad)


TENSORS = {
    "garbage": b"x" * 99,
    "empty": b"",
    "a header that lies": (10**6).to_bytes(8, "little") + b"{}",
    "a pickle": pickle.dumps({"a": 1}),
}
HISTORIES = {
    **TENSORS,
    "another shape": save({"loss": torch.ones(3)}),
    "three rows": save({"loss": torch.ones(3, 2)}),
    "whole numbers": save({"loss": torch.ones(2, 3, dtype=torch.int64)}),
}


@pytest.mark.parametrize(
    ("name", "harm"), [*((PART, harm) for harm in TENSORS), *((HISTORY, harm) for harm in HISTORIES)]
)
def test_tensors_that_are_none(name: str, harm: str, tmp_path: Path) -> None:
    good, bad = made(tmp_path, 1), made(tmp_path, 2)
    (bad / name).write_bytes(HISTORIES[harm])
    seal(bad)
    said: list[str] = []
    assert newest_intact(tmp_path, said.append) == good
    assert len(said) == 1
    assert name in said[0]


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def engine() -> Any:
    """As tests/engine/test_elastic.py has it, at ZeRO stage 0, after a step."""
    module = nn.ModuleDict({"a": nn.Linear(3, 2)})
    one = SimpleNamespace(
        module=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=0.1),
        zero_optimization=lambda: False,
        zero_optimization_stage=lambda: 0,
        zero_optimization_partition_weights=lambda: False,
        torch_autocast_z0_gradscaler=None,
        **dict.fromkeys(("global_steps", "global_samples", "skipped_steps", "micro_steps"), 0),
    )
    module["a"](torch.ones(1, 3)).sum().backward()
    one.optimizer.step()
    return one


def run_json() -> dict[str, Any]:
    """What run.json of a sound checkpoint holds."""
    one = engine()
    wrapper = DeepSpeedOptimWrapper(one.optimizer)
    schedule = PolyLR(wrapper, power=1.0, eta_min=0.0, begin=0, end=10, by_epoch=False)
    state = {"meta": {"epoch": 0, "iter": 4}, "message_hub": {"runtime_info": {"best": NAN}, "log_scalars": {}}}
    about, _ = run_state.gather_state(state, wrapper, [schedule])
    about["engine"] = resharding.gather_tensors(one)[1]
    return json.loads(json.dumps(about))


RUNS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{f"no {key}": (without(key), key) for key in ("meta", "info", "schedulers", "engine", "base_settings")},
    **{f"engine lacks {key}": (without("engine", key), key) for key in ("groups", "optimizer", "numbers", "counters")},
    "meta is a list": (set_in("meta", value=[4]), "meta"),
    "iter is text": (set_in("meta", "iter", value="4"), "meta.iter"),
    "iter is NaN": (set_in("meta", "iter", value=NAN), "meta.iter"),
    "epoch is negative": (set_in("meta", "epoch", value=-1), "meta.epoch"),
    "schedulers is a dict": (set_in("schedulers", value={}), "schedulers"),
    "a scheduler is a number": (set_in("schedulers", value=[3]), "schedulers.0"),
    "an attribute of the engine": (set_in("engine", "counters", "module", value=3), "engine.counters.module"),
    "a counter is text": (set_in("engine", "counters", "global_steps", value="3"), "engine.counters.global_steps"),
    "the scale is 0": (set_in("engine", "loss_scale", value={"scale": 0.0}), "engine.loss_scale.scale"),
    "the scale is infinite": (set_in("engine", "loss_scale", value={"scale": float("inf")}), "engine.loss_scale.scale"),
    "groups is null": (set_in("engine", "groups", value=None), "engine.groups"),
    "a checkpoint to remove": (set_in("info", "keep_ckpt_ids", value=["../x"]), "info.keep_ckpt_ids"),
    "the cost is text": (set_in("info", "cost", value="much"), "info.cost"),
    "the cost lacks a key": (set_in("info", "cost", value={"steps": 3}), "info.cost"),
    "a rate is NaN": (lambda run: set_in("settings", "lr", value=NAN)(run["engine"]["groups"][0]), "settings.lr"),
}


@pytest.mark.parametrize("harm", RUNS)
def test_runs_of_other_shapes(harm: str, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resharding, "_replicas", lambda parameter: None)
    about, (change, said) = run_json(), RUNS[harm]
    run_state.check(about, Path("iter_4"))
    change(about)
    with pytest.raises(UserError, match=f"iter_4 has .*{said}.* in run.json"):
        run_state.check(about, Path("iter_4"))


STATES: dict[str, tuple[str, Any, str]] = {
    "a weight is gone": ("weight/a.bias", None, "another model's: 1 weights differ, such as a.bias"),
    "a weight more": ("weight/b.bias", torch.ones(2), "another model's: 1 weights differ, such as b.bias"),
    "a weight of another shape": ("weight/a.bias", torch.ones(3), "a.bias"),
    "a weight of another type": ("weight/a.bias", torch.ones(2, dtype=torch.complex64), "a.bias"),
    "a weight of half the bytes": ("weight/a.bias", torch.ones(2, dtype=torch.float16), "a.bias"),
    "a weight is not finite": ("weight/a.bias", torch.tensor([1.0, NAN]), "a.bias"),
    "a state of another shape": ("exp_avg/a.bias", torch.ones(3), "exp_avg/a.bias is .* of shape"),
    "a state of another type": ("exp_avg/a.bias", torch.ones(2, dtype=torch.int8), "exp_avg/a.bias is torch.int8"),
    "a state is not finite": ("exp_avg_sq/a.bias", torch.tensor([1.0, NAN]), "exp_avg_sq/a.bias"),
    "a step of several": ("step/a.bias", torch.ones(2), "step/a.bias"),
    "a step is not finite": ("step/a.bias", torch.tensor(NAN), "step/a.bias"),
}


@pytest.mark.parametrize("harm", STATES)
def test_tensors_of_another_run(harm: str, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resharding, "_replicas", lambda parameter: None)
    tensors, about = resharding.gather_tensors(engine())
    resharding.restore_tensors(engine(), tensors, about)
    key, value, said = STATES[harm]
    tensors = {name: x for name, x in tensors.items() if name != key} | ({} if value is None else {key: value})
    with pytest.raises(UserError, match=said):
        resharding.restore_tensors(engine(), tensors, about)


def foreign_weights(path: Path, kind: str) -> Path:
    """What `load_from` could name by mistake."""
    state = global_state_dict(ToyModel())
    if kind == "an empty folder":
        path.mkdir()
    elif kind == "an empty file":
        path.touch()
    elif kind == "a text":
        path.write_text("weights")
    elif kind == "a pickle":
        path.write_bytes(pickle.dumps(state))
    elif kind == "a pickle that runs":
        torch.save({"state_dict": os.system}, path)
    elif kind == "a safetensors file that is a pickle":
        path = path.with_suffix(".safetensors")
        torch.save(state, path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "a nested state dict":
        torch.save({"state_dict": {"model": {"inner": state}}}, path)
    elif kind == "names that are numbers":
        torch.save(dict(enumerate(state.values())), path)
    elif kind == "complex weights":
        torch.save({key: x.to(torch.complex64) for key, x in state.items()}, path)
    elif kind == "whole numbers":
        torch.save({key: x.to(torch.int8) for key, x in state.items()}, path)
    elif kind == "another model":
        torch.save({"weight": torch.ones(2)}, path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("absent", "an empty folder", "an empty file", "a text", "a pickle", "a pickle that runs"),
        *("a safetensors file that is a pickle", "a list", "a nested state dict", "names that are numbers"),
        *("complex weights", "whole numbers", "another model"),
    ],
)
def test_weights_to_start_from(kind: str, tmp_path: Path) -> None:
    path = foreign_weights(tmp_path / "x.pth", kind)
    with pytest.raises(UserError, match=r"x\.(pth|safetensors)"):
        load_weights(ToyModel(), path)


@pytest.mark.parametrize("value", ["", 3, False, ["x.pth"]])
def test_no_name_of_weights(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    strategy = Strategy.__new__(Strategy)
    strategy._load_from = value
    with pytest.raises(UserError, match="there is no checkpoint"):
        strategy._init_model_weights(ToyModel())


def in_the_way(path: Path, kind: str) -> None:
    if kind == "a file":
        path.write_text("mine")
    else:
        path.parent.rename(path.parent.with_name("gone"))
        path.parent.write_text("mine")


@pytest.mark.parametrize("kind", ["a file", "a file for the work dir"])
def test_names_that_are_taken(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "work" / "iter_1"
    path.parent.mkdir()
    in_the_way(path, kind)
    with pytest.raises(UserError, match=r"iter_1 cannot be written: .*--resume"):
        files.write_checkpoint(path, {"weight/a": torch.ones(1)}, {}, {}, 1, LAYOUT)
    assert (path if kind == "a file" else path.parent).read_text() == "mine"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "best.pth").mkdir()
    (tmp_path / "best.pth" / "mine").touch()
    with pytest.raises(UserError, match=r"best.pth cannot be written: .*somebody else's; move it away"):
        files.write_weights(tmp_path / "best.pth", {"a": torch.ones(1)})
    assert (tmp_path / "best.pth" / "mine").exists()


def test_what_a_killed_replacement_left_is_no_obstacle(tmp_path: Path) -> None:
    path = made(tmp_path, 1)
    (tmp_path / "iter_1.replaced").mkdir()
    (tmp_path / "iter_1.replaced" / PART).touch()
    partial = made(tmp_path, 2).rename(tmp_path / "iter_1.partial")
    put_in_place(partial, path)
    assert [one.name for one in tmp_path.iterdir()] == ["iter_1"]
    assert files._marker(path).iteration == 2


def test_a_model_that_cannot_be_exported(tmp_path: Path) -> None:
    runner = SimpleNamespace(
        strategy=SimpleNamespace(whole_state_dict=lambda: {"a": torch.ones(1)}),
        work_dir=str(tmp_path / "gone"),
        cfg=Config({"model": {"type": "ToyModel"}}),
        train_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=[])),
        message_hub=SimpleNamespace(runtime_info={}),
    )
    with pytest.raises(UserError, match=r"gone/model.safetensors cannot be written"):
        ExportHook().after_train(runner)


def test_a_work_dir_that_cannot_be_written(tmp_path: Path, alone: Any) -> None:
    (tmp_path / "work").write_text("mine")
    with pytest.raises(UserError, match=r"work/heartbeats cannot be written"):
        Watch(tmp_path / "work", 10.0).__enter__()


def test_stages_that_start_from_a_mixtures_file(tmp_path: Path) -> None:
    save_file(global_state_dict(ToyModel(moe={"num_experts": 2})), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="another model's"):
        load_weights(ToyModel(), tmp_path)
