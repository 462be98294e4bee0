"""Every benchmark runs and writes what its readers read; its numbers mean nothing at these sizes."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scaling, tables, targets
from benchmarks.common import JUDGED, SETTINGS
from rmoe.inference.precision import lacks_bfloat16
from rmoe.reporting.estimate import Setting, share_out
from rmoe.reporting.traffic import messages
from rmoe.reporting.work import run_once

pytestmark = pytest.mark.slow
RATIO = {"contender", "ratio", "ratio_low", "ratio_high", "ms", "rounds"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def quick(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(out / "torch_extensions"))
    importlib.import_module(f"benchmarks.{name}").main(["--quick", "--out", str(out)])
    found = json.loads((out / f"{name}.json").read_text())
    assert found["quick"] is True
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return found["rows"]


def test_layer(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = quick("layer", out, monkeypatch)
    assert all(set(row) >= RATIO | {"part", "setting", "dtype", "tokens", "width"} for row in rows)
    assert {row["setting"] for row in rows} == set(SETTINGS)
    assert {row["part"] for row in rows} == {"grid", "gate", "overhead", "growth"}
    measured = {row["contender"] for row in rows if row["part"] == "grid" and row["setting"] == JUDGED}
    assert {"dense", "low_rank_8", "full", "upper_bound", "stock_dropless", "loop", "lora_8"} <= measured


def test_what_the_balance_of_the_gates_costs(out: Path) -> None:
    importlib.import_module("benchmarks.layer").main(["--quick", "--part", "balance", "--out", str(out)])
    rows = json.loads((out / "layer_balance.json").read_text())["rows"]
    assert {(row["part"], row["contender"]) for row in rows} == {
        ("balance", name) for name in ("layer", "low_rank_8", "full")
    }


def test_step(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = quick("step", out, monkeypatch)
    assert {row["contender"] for row in rows} == {"dense", "low_rank", "full"}
    assert all(set(row) >= RATIO | {"task", "step_bytes", "beyond_weights_bytes"} for row in rows)
    assert all(row["step_bytes"] > 0 for row in rows)


def test_a_step_at_real_sizes(out: Path) -> None:
    importlib.import_module("benchmarks.step").main(["--quick", "--part", "real", "--out", str(out)])
    rows = json.loads((out / "step_real.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["dense", "full_random", "soft", "soft_frozen"]
    before = (out / "step_real.json").read_bytes()
    importlib.import_module("benchmarks.step").main(["--quick", "--part", "real", "--out", str(out)])
    assert (out / "step_real.json").read_bytes() == before  # what stands there is not measured again
    assert all(set(row) >= RATIO | {"flops_ratio", "optimizer_bytes"} for row in rows)
    assert rows[0]["flops_ratio"] == 1.0
    assert all(row["optimizer_bytes"] > 0 for row in rows)


def test_the_method_study_and_its_regimes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = importlib.import_module("benchmarks.claims.__main__")
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS"):  # which it sets for all that follows
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for part, runs in (("method", 2 + 4), ("regime", 2 + 4 + 1 + 2), ("ideas", 9 + 1)):  # cores and others
        claims.main(["--quick", "--part", part, "--out", str(out), "--jobs", "2"])
        assert len(json.loads((out / "method_runs.json").read_text())["rows"]) == runs
        assert (out / f"{part}.png").read_bytes().startswith(b"\x89PNG")
    method, regime = (json.loads((out / f"{part}.json").read_text()) for part in ("method", "regime"))
    assert [(row["arm"], row["seeds"]) for row in method["arms"]] == [("dense", [0, 1]), ("full_calibrated", [0, 1])]
    assert {row["verdict"] for row in method["verdicts"]} <= {"not enough seeds", "not run", "met", "not met"}
    assert [(row["steps"], row["width"]) for row in regime["rows"]] == [(2, 1.0), (3, 0.5)]
    assert {row["arm"] for row in json.loads((out / "ideas.json").read_text())["rows"]} == {"dense", "cosine"}
    before = (out / "method_runs.json").read_bytes()
    claims.main(["--quick", "--part", "method", "--out", str(out)])  # nothing is left to run
    assert (out / "method_runs.json").read_bytes() == before


def test_inference(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = quick("inference", out, monkeypatch)
    left_out = {"dense_bfloat16"} if lacks_bfloat16(torch.device("cpu")) else set()
    assert all(set(row) >= RATIO | {"runtime", "batch"} for row in rows)
    found = {(row["runtime"], row["batch"], row["contender"]) for row in rows}
    lowered = {"dense_int8", "low_rank_int8"} | {"dense_bfloat16"} - left_out
    assert {name for at, batch, name in found if at == "torch"} == {
        "dense",
        "low_rank",
        "soft",
        "full",
        "merged",
    } | lowered
    assert {(batch, name) for at, batch, name in found if at == "onnxruntime"} == {(1, "dense"), (8, "dense")}


def test_training_cost(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = quick("training_cost", out, monkeypatch)
    pipelines = {row["pipeline"]: row for row in rows if row["part"] == "pipeline"}
    assert set(pipelines) == {"dense", "upper bound", "RMoE-D", "RMoE-I"}
    assert all(row["extrapolated"] for row in pipelines.values())
    assert pipelines["RMoE-I"]["gpu_hours"] > pipelines["RMoE-D"]["gpu_hours"]
    stages = [row for row in rows if row["part"] == "stage"]
    assert all(row["share_of_peak"] > 0 for row in stages)


@pytest.mark.distributed
def test_scaling(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = quick("scaling", out, monkeypatch)
    assert all(set(row) >= RATIO - {"contender"} | {"collectives", "sent_bytes", "tokens"} for row in rows)
    alone = [row for row in rows if row["processes"] == 1 and row["ratio"] is not None]
    assert [(row["residual"], row["ep_size"]) for row in alone] == [("dense", 1), ("low_rank", 1), ("full", 1)]
    assert all(sum(row["sent_bytes"].values()) == 0 for row in alone)
    *both, reduction = [row for row in rows if row["processes"] == 2]
    names = [(row["residual"], row["ep_size"], row["exchange"]) for row in both]
    assert names == [
        ("dense", 1, "none"),
        ("low_rank", 1, "none"),
        ("low_rank", 2, "weights"),
        ("full", 1, "none"),
        ("full", 2, "tokens"),
    ]
    assert reduction["sent_bytes"] == {"allreduce": 4 * scaling.REDUCED}
    assert both[0]["tokens"] is None
    assert {row["tokens"] for row in both[1:]} == {2 * (16 + 1)}
    for row in both:
        _agrees(row)


def _agrees(row: dict[str, Any]) -> None:
    """What `rmoe estimate` says is sent is what was counted: bytes of each kind, and calls."""
    size, images = scaling.QUICK_SIZES["image_size"], scaling.QUICK_SIZES["images"]
    case = {name: row[name] for name in ("residual", "ep_size", "exchange")}
    work = run_once(
        scaling.config(case, size, small=True), Setting(processes=2, micro_batch=images, image_size=(size, size))
    )
    guess, sent = share_out(work).traffic, row["sent_bytes"]
    travels = sent.get("alltoall_base", 0), guess.all_to_all
    gathers = sent.get("allgather_base", 0) + sent.get("reduce_scatter_base", 0), guess.gather_weights
    gathers = gathers[0], gathers[1] + guess.gather_experts
    # Uneven gates send more or fewer tokens than even ones, and ZeRO pads what it gathers.
    for name, (counted, told), within in (
        ("tokens", travels, 0.3),
        ("gathers", gathers, 0.1),
        ("reductions", (sent["allreduce"], guess.reduce_gradients), 0.1),
    ):
        assert counted == pytest.approx(told, rel=within, abs=2_000), (case, name, sent)
    told = sum(one.calls for one in messages(work))
    assert abs(sum(row["collectives"].values()) - told) <= 0.5 * told, (case, row["collectives"], told)


def test_their_results_make_a_page(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("layer", "step"):
        if not (out / f"{name}.json").exists():
            quick(name, out, monkeypatch)
    targets.main(["--quick", "--out", str(out)])
    page = tables.render(out)
    assert page.startswith("## Targets")
    assert "| training step, low_rank | dense step |" in page
    assert "`python -m benchmarks.layer --quick`" in page
