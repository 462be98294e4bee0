"""Every benchmark runs and writes what its readers read; its numbers mean nothing at these sizes."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, tables, targets, training
from benchmarks.common import JUDGED, SETTINGS
from rmoe.reporting.estimate import Setting, estimate

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
    assert [row["contender"] for row in rows] == ["dense", "full_calibrated", "soft", "soft_frozen"]
    assert all(set(row) >= RATIO | {"flops_ratio", "optimizer_bytes"} for row in rows)
    assert rows[0]["flops_ratio"] == 1.0
    assert all(row["optimizer_bytes"] > 0 for row in rows)


def test_the_method_study_and_its_regimes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = importlib.import_module("benchmarks.claims.__main__")
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS"):  # which it sets for all that follows
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for part, runs in (("method", 2 + 4), ("regime", 2 + 4 + 1 + 2)):  # cores and others
        claims.main(["--quick", "--part", part, "--out", str(out), "--jobs", "2"])
        assert len(json.loads((out / "method_runs.json").read_text())["rows"]) == runs
        assert (out / f"{part}.png").read_bytes().startswith(b"\x89PNG")
    method, regime = (json.loads((out / f"{part}.json").read_text()) for part in ("method", "regime"))
    assert [(row["arm"], row["seeds"]) for row in method["arms"]] == [("dense", [0, 1]), ("full_random", [0, 1])]
    assert {row["verdict"] for row in method["verdicts"]} <= {"not enough seeds", "not run", "met", "not met"}
    assert [(row["steps"], row["width"]) for row in regime["rows"]] == [(2, 1.0), (3, 0.5)]
    before = (out / "method_runs.json").read_bytes()
    claims.main(["--quick", "--part", "method", "--out", str(out)])  # nothing is left to run
    assert (out / "method_runs.json").read_bytes() == before


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
    dense, weights, tokens = quick("scaling", out, monkeypatch)
    assert (weights["exchange"], tokens["exchange"]) == ("weights", "tokens")
    assert dense["exchanged_bytes"] == 0
    assert weights["exchanged_bytes"] > 0
    assert tokens["exchanged_bytes"] > 0
    for case, kind in ((weights, "gather_experts"), (tokens, "all_to_all")):
        moe = {name: case[name] for name in ("residual", "num_experts", "ep_size", "exchange")}
        cfg = training.config("classification", moe, scaling.SIZE, small=True)
        size = (scaling.SIZE, scaling.SIZE)
        guess = estimate(cfg, Setting(processes=2, micro_batch=scaling.IMAGES, image_size=size))
        assert getattr(guess.traffic, kind) == pytest.approx(case["exchanged_bytes"], rel=0.1)


def test_their_results_make_a_page(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("layer", "step"):
        if not (out / f"{name}.json").exists():
            quick(name, out, monkeypatch)
    targets.main(["--quick", "--out", str(out)])
    page = tables.render(out)
    assert page.startswith("## Targets")
    assert "| training step, low_rank | dense step |" in page
    assert "`python -m benchmarks.layer --quick`" in page
