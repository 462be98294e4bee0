"""The benchmark of a GPU, at tiny sizes on the CPU: the same code, numbers that mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import common, training
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import layer, measure, parity
from benchmarks.gpu.contenders import ARMS, Cell, core_flops
from benchmarks.gpu.measure import Arguments, Report, attempt, time_in_turns
from rmoe.moe import mix as mixing

CPU = torch.device("cpu")


def dry(part: str, out: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--part", part, "--out", str(out)]
    subprocess.run(command, cwd=common.ROOT, check=True)
    found = json.loads((out / f"gpu_{part}.json").read_text())
    assert found["command"] == f"python -m benchmarks.gpu --part {part} --dry-run"
    assert found["machine"]["gpu"] is None
    return found["rows"]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(Arguments(("layer",), True, False, 1.0, tmp_path), "layer", {})


@pytest.mark.slow
def test_layer(tmp_path: Path) -> None:
    rows = dry("layer", tmp_path)
    timed = [row for row in rows if "ms" in row]
    assert {row["mode"] for row in timed} == {"autocast", "bfloat16"}
    assert {row["pass"] for row in timed} == {"forward", "forward + backward", "forward + backward, CUDA graph"}
    measured = {row["contender"] for row in timed}
    assert measured | {row["contender"] for row in rows if "skipped" in row} >= set(ARMS)
    assert measured >= {"dense", "dense_frozen", "low_rank_8", "soft_8", "full", "upper_bound", "torch_grouped", "loop"}
    assert all(row["ms"] > 0 and row["share_of_gemm_peak"] > 0 for row in timed if row["pass"] == "forward + backward")
    assert {row["contender"] for row in timed if row["part"] == "graph"} == set(layer.GRAPHED_ARMS)
    assert (tmp_path / "gpu_layer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_parity(tmp_path: Path) -> None:
    rows = dry("parity", tmp_path)
    assert {row["contender"] for row in rows if row["part"] == "layer"} == {case.name for case in parity.CASES}
    losses = [row for row in rows if row["part"] == "losses"]
    assert len(losses) == 2 * len(parity._MODELS)
    assert all(row["error"] == 0 for row in losses if row["precision"] == "float32")  # the CPU against itself
    assert all(0 <= row["error"] <= row["bound"] for row in rows if row["part"] != "grouped_mm")
    assert [row["left"] for row in rows if row["part"] == "grouped_mm"]


@pytest.mark.slow
def test_step(tmp_path: Path) -> None:
    rows = dry("step", tmp_path)
    timed = [row for row in rows if "ms" in row]
    assert {row["contender"] for row in timed if row["task"] == "Swin, bare"} == {
        "dense",
        "low_rank",
        "soft",
        "full",
        "upper_bound",
    }
    assert all(row["flops"] > 0 for row in timed)
    assert all(row["precision"] == "bfloat16" and row["image_size"] and row["images"] for row in timed)
    assert {row["contender"] for row in timed if row["moe"] is None} == {"dense"}
    heads = [row for row in rows if row.get("task") == "Swin-T + UPerNet"]
    assert heads
    assert all((training.CONFIGS / row["config"]).exists() for row in heads)
    assert all("ms" in row or "not installed" in row["skipped"] for row in heads)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_path_that_is_off_is_found(wrong: float) -> None:
    exact = mixing.mix
    case = parity.Case("full", "full", mixes=False, tokens=8)
    assert "failed" not in parity._check(case, "float32", CPU)
    with mock.patch.object(mixing, "mix", lambda *arguments: wrong * exact(*arguments)):
        assert "failed" in parity._check(case, "float32", CPU)


def test_a_report_is_whole_after_every_row(report: Report) -> None:
    for number in range(3):
        report.add({"contender": str(number), "ms": 1.0})
        assert len(json.loads(report.path.read_text())["rows"]) == number + 1


def test_what_fails_or_is_not_there_is_told_apart(report: Report) -> None:
    def fail(error: Exception) -> None:
        raise error

    for error in (ModuleNotFoundError("no", name="peft"), torch.OutOfMemoryError("no"), ValueError("wrong\nlines")):
        assert attempt(report, {"contender": "x"}, fail, error) is None
    assert [row.get("skipped") or row["failed"] for row in report.rows] == [
        "peft is not installed",
        "does not fit into the memory of the GPU",
        "ValueError: wrong",
    ]
    assert report.failures == ["x: ValueError: wrong"]


def test_arms_take_turns_and_one_that_fails_is_left_out(report: Report) -> None:
    calls: list[str] = []

    def broken(_: int) -> None:
        raise RuntimeError("not this one")

    arms = {"dense": lambda number: calls.append("d"), "other": lambda number: calls.append("o"), "broken": broken}
    with mock.patch.object(measure, "_milliseconds", lambda step, repeats, device: (step(0), 2.0)[1]):
        found = time_in_turns(report, {}, arms, "dense", 4, CPU)
    assert set(found) == {"dense", "other"}
    assert "".join(calls[-8:]) == "dooddood"
    assert found["other"]["ratio"] == 1.0
    assert report.failures == ["broken: RuntimeError: not this one"]


def test_after_a_step_that_no_graph_holds_none_is_tried(report: Report) -> None:
    def fail(step: Any, device: torch.device) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    cell = Cell(tokens=16, width=16, experts=2, mode="autocast", device=CPU)
    with mock.patch.object(layer, "captured", fail):
        assert not layer._measure_graphs(report, cell, 2)
    assert [row["skipped"] for row in report.rows] == ["no graph of it: operation not permitted"]
    assert report.failures == []


def test_flops_of_a_network_by_hand() -> None:
    cell = Cell(tokens=10, width=4, experts=2, mode="bfloat16", device=CPU)
    assert core_flops(cell, "dense") == 3 * 2 * 10 * (4 * 16 + 16 * 4)
    assert core_flops(cell, "low_rank_8") == 2 * 2 * 10 * (4 * 16 + 16 * 4)


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(torch.cuda, "is_available", return_value=False), pytest.raises(SystemExit):
        gpu.main(["--part", "layer"])
    assert "--dry-run" in capsys.readouterr().err
