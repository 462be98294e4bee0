"""Which checkpoints count, and which weights are let in."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toy import ToyModel

from rmoe.engine.checkpoint import files
from rmoe.engine.checkpoint.files import (
    HISTORY,
    MARKER,
    RUN,
    Layout,
    Tensors,
    check_layout,
    complete_checkpoints,
    newest_intact,
    read_run,
    write_checkpoint,
    write_weights,
)
from rmoe.engine.checkpoint.weights import load_weights
from rmoe.errors import UserError
from rmoe.moe.state import global_state_dict

LAYOUT = Layout(1, 1, 0, 4, 1, 0)
PART = "part_00000.safetensors"


def made(path: Path, iteration: int = 1, **tensors: Tensor) -> Path:
    """A checkpoint as one process writes it."""
    write_checkpoint(
        path, tensors or {"weight/a": torch.arange(9.0)}, {"x": 1}, {"loss": torch.ones(2, 3)}, iteration, LAYOUT
    )
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = made(tmp_path / "iter_1")
    assert {file.name for file in path.iterdir()} == {PART, RUN, HISTORY, MARKER}
    assert [one.name for one in tmp_path.iterdir()] == ["iter_1"]
    assert Tensors(path)["weight/a"].equal(torch.arange(9.0))
    about, history = read_run(path)
    assert about == {"x": 1}
    assert history["loss"].equal(torch.ones(2, 3))
    assert newest_intact(tmp_path, pytest.fail) == path


def test_the_newest_whole_one_counts(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "absent") == ([], {})
    made(tmp_path / "iter_12.partial", 12)
    (tmp_path / "iter_12.partial" / MARKER).unlink()
    (tmp_path / "iter_10").mkdir()
    (tmp_path / "iter_10" / RUN).touch()
    (tmp_path / "best_iter_11.pth").write_bytes(b"x")
    (tmp_path / "vis_data").mkdir()
    (tmp_path / "predictions.partial").mkdir()  # which a killed run leaves, too, and which is no checkpoint
    (tmp_path / "predictions.partial" / "1.png").touch()
    found, wrong = complete_checkpoints(tmp_path)
    assert not found
    assert [path.name for path in wrong] == ["iter_10", "iter_12.partial"]
    assert all("half written" in harm for harm in wrong.values())
    for iteration in (9, 8, 10):
        made(tmp_path / f"iter_{iteration}", iteration)
    assert [path.name for path in complete_checkpoints(tmp_path)[0]] == ["iter_10", "iter_9", "iter_8"]
    for iteration in (10, 11):
        made(tmp_path / f"iter_{iteration}.pth", iteration)  # as they were called once
    found = [path.name for path in complete_checkpoints(tmp_path)[0]]
    assert found == ["iter_11.pth", "iter_10", "iter_10.pth", "iter_9", "iter_8"]
    assert newest_intact(tmp_path, pytest.fail).name == "iter_11.pth"


def test_an_old_one_lives_until_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "iter_4", 4)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for step in ("save_tensors", "write_marker", "put_in_place"):
        with monkeypatch.context() as patch:
            patch.setattr(files, step, stop)
            with pytest.raises(KeyboardInterrupt):
                made(path, 4, **{"weight/a": torch.ones(3)})
        assert newest_intact(tmp_path, pytest.fail).name.startswith("iter_4")
        assert Tensors(path)["weight/a"].equal(torch.arange(9.0))
    made(path, 4, **{"weight/a": torch.ones(3)})
    assert Tensors(path)["weight/a"].equal(torch.ones(3))
    assert [one.name for one in tmp_path.iterdir()] == ["iter_4"]


@pytest.mark.parametrize("file", [PART, RUN, HISTORY, MARKER])
@pytest.mark.parametrize("harm", ["cut", "missing", "flipped"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(file: str, harm: str, tmp_path: Path) -> None:
    good, bad = made(tmp_path / "iter_1", 1), made(tmp_path / "iter_2", 2)
    data = bytearray((bad / file).read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "missing":
        (bad / file).unlink()
    else:
        (bad / file).write_bytes(data[:-1] if harm == "cut" else data)
    before = content(tmp_path)
    said: list[str] = [f"{path} is {what}" for path, what in complete_checkpoints(tmp_path)[1].items()]
    assert newest_intact(tmp_path, said.append) == good
    assert len(said) == 1
    assert said[0].startswith(f"{bad} is ")
    assert file in said[0]
    assert content(tmp_path) == before


def test_none_is_left(tmp_path: Path) -> None:
    path = made(tmp_path / "iter_1")
    (path / RUN).write_text('{"x": 2}\n'.ljust((path / RUN).stat().st_size))
    with pytest.raises(UserError, match="every checkpoint in .* is damaged; move them away"):
        newest_intact(tmp_path, lambda said: None)


@pytest.mark.parametrize("limit", [0, 300, 2000])
def test_a_full_disk(limit: int, tmp_path: Path) -> None:
    """No file may get longer than `limit` bytes: at once, in the middle of the tensors, or after them."""
    made(tmp_path / "iter_1")
    made(tmp_path / "iter_2", 2)
    before = content(tmp_path)
    small, large = {"weight/a": torch.ones(4)}, {"weight/a": torch.ones(10**4)}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"iter_2 cannot be written: .*File too large.*--resume"):
            write_checkpoint(tmp_path / "iter_2", small if limit > 300 else large, {"x": "y" * 3000}, {}, 2, LAYOUT)
        with pytest.raises(UserError, match=r"best.pth cannot be written"):
            write_weights(tmp_path / "best.pth", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert content(tmp_path) == before


def test_a_work_dir_that_is_removed_meanwhile(tmp_path: Path) -> None:
    made(tmp_path / "work" / "iter_1")
    shutil.rmtree(tmp_path / "work")
    path = made(tmp_path / "work" / "iter_2", 2)
    assert newest_intact(tmp_path / "work", pytest.fail) == path


@pytest.mark.parametrize("function", ["mkdir", "write_text", "rename"])
def test_a_work_dir_that_becomes_read_only(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "iter_1")
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, function, Mock(side_effect=OSError(30, "Read-only file system")))
        with pytest.raises(UserError, match=r"iter_2 cannot be written: .*Read-only.*--resume"):
            made(tmp_path / "iter_2", 2)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(4, 1, 0, 4, 1, 0), "processes 1.*this run has processes 4.*batch_size 1, for 4 samples"),
        (Layout(3, 1, 0, 4, 1, 0), "Resume with the former"),
        (Layout(1, 1, 0, 4, 2, 0), "accumulation 2"),
        (Layout(1, 1, 8, 4, 1, 0), "num_experts 8"),
        (Layout(1, 1, 0, 4, 1, 9), "seed 9"),
        (Layout(4, 4, 0, 1, 1, 0), None),
    ],
)
def test_which_layouts_resume(layout: Layout, message: str | None, tmp_path: Path) -> None:
    path = made(tmp_path / "iter_1")
    if message is None:
        check_layout(path, layout)
    else:
        with pytest.raises(UserError, match=message + ".*load_from="):
            check_layout(path, layout)


def model(moe: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ToyModel(moe={"num_experts": 4, "rank": 2} if moe else None)


def save(path: Path, state: dict[str, Tensor], kind: str) -> Path:
    """`state` in each of the forms that weights come in; returns what `load_from` would name."""
    if kind == "pth":
        torch.save({"state_dict": state}, path / "x.pth")
        return path / "x.pth"
    if kind == "safetensors":
        save_file(state, path / "x.safetensors")
        return path / "x.safetensors"
    if kind == "work dir":
        save_file(state, path / "model.safetensors")
        return path
    return made(path / "iter_1", **{f"weight/{key}": x for key, x in state.items()}, **{"step/x": torch.ones(())})


@pytest.mark.parametrize("kind", ["pth", "safetensors", "work dir", "training checkpoint"])
def test_weights_come_in_every_form(kind: str, tmp_path: Path) -> None:
    source, target = model(moe=True, seed=1), model(moe=True, seed=2)
    load_weights(target, save(tmp_path, global_state_dict(source), kind))
    loaded = target.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("kind", ["pth", "safetensors", "training checkpoint"])
@pytest.mark.parametrize("harm", ["cut", "nan", "absent"])
def test_harmed_files(kind: str, harm: str, tmp_path: Path) -> None:
    state = global_state_dict(model())
    if harm == "nan":
        state["head.bias"][0] = float("nan")
    path = save(tmp_path, state, kind)
    target = model(seed=2)
    before = [value.clone() for value in target.state_dict().values()]
    file = path / PART if path.is_dir() else path
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    if harm == "absent":
        file.unlink()
    message = {"cut": "cut short|damaged", "nan": "not finite.*head.bias", "absent": "there is no|is missing"}[harm]
    with pytest.raises(UserError, match=message):
        load_weights(target, path)
    assert all(map(torch.equal, before, target.state_dict().values()))


def test_an_incomplete_training_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, global_state_dict(model()), "training checkpoint")
    (path / MARKER).unlink()
    with pytest.raises(UserError, match="half written"):
        load_weights(model(), path)


def drop(state: dict[str, Tensor]) -> None:
    del state["head.bias"]


def add(state: dict[str, Tensor]) -> None:
    state["foot.bias"] = torch.zeros(1)


def reshape(state: dict[str, Tensor]) -> None:
    state["head.bias"] = torch.zeros(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"1 missing \(head.bias\), 0 unexpected"),
        (add, r"0 missing, 1 unexpected \(foot.bias\)"),
        (reshape, r"1 of another shape \(head.bias\)"),
    ],
)
def test_another_models_weights(change: Any, message: str, tmp_path: Path) -> None:
    state = global_state_dict(model())
    change(state)
    with pytest.raises(UserError, match=message):
        load_weights(model(), save(tmp_path, state, "pth"))
    with pytest.raises(UserError, match="another model's"):
        load_weights(model(moe=True), save(tmp_path, state, "pth"))
