"""Loads as uneven as can be, over two processes with the experts spread over them: nothing hangs or is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_processes
from safetensors.torch import load_file
from toy import write_config, write_json

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
MOE = {"num_experts": 4, "top_k": 1, "rank": 2, "noise": 0.0, "ep_size": 2}
SHORT = {"train_cfg.max_iters": 3, "optim_wrapper.optimizer.weight_decay": 0.0}
TO_ONE = SHORT | {"custom_hooks": [{"type": "fault_injection.OneExpertHook"}]}
ONE_SAMPLE = SHORT | {"train_dataloader.batch_size": 1, "train_dataloader.dataset.length": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs below, one after the other in one group of two processes."""
    folder = tmp_path_factory.mktemp("stress")
    runs: dict[str, dict[str, Any]] = {}
    for exchange in ("tokens", "weights"):
        moe = {"model.moe": MOE | {"exchange": exchange}}
        runs[f"to one by {exchange}"] = TO_ONE | moe
        runs[f"one sample by {exchange}"] = ONE_SAMPLE | moe | {"val_dataloader.dataset.length": 1}
        runs[f"uneven by {exchange}"] = SHORT | moe | {"val_dataloader.dataset.length": 5}
    runs["batch norm"] = SHORT | {"model.norm": True, "custom_hooks": [{"type": "fault_injection.SameStatsHook"}]}
    commands = []
    for name, options in runs.items():
        config = write_config(folder / f"{name.replace(' ', '_')}.py", options)
        words = [str(config), "--deepspeed_config", str(write_json(config.with_suffix(".json"), 0))]
        commands.append([*words, "--work-dir", str(folder / name), "--timeout", "60"])
    (folder / "runs.json").write_text(json.dumps(commands))
    run_processes(folder, [ROOT / "tests" / "several_runs.py", folder / "runs.json"], 2, timeout=280)
    for rank in range(2):  # the hooks' own assertions have held
        assert json.loads((folder / f"runs.json.{rank}").read_text()) == ["done"] * len(runs)
    return folder


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
def test_all_tokens_to_one_expert(folder: Path, exchange: str) -> None:
    """The hook has seen a gradient of every weight in every step: of zeros where there was no token, so that without
    weight decay the residual of such an expert is what it was at the start, nothing.
    """
    weights = load_file(folder / f"to one by {exchange}" / "model.safetensors")
    for expert in range(4):
        factors = [x for key, x in weights.items() if f"deepspeed_experts.{expert}.b" in key]
        assert len(factors) == 4
        assert all(bool(x.any()) == (expert == 0) for x in factors)


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
def test_each_image_counts_once(folder: Path, exchange: str) -> None:
    """Five validation samples in batches of two, and one sample for two processes, are three and one batch."""
    for name, count in (("uneven", 5.0), ("one sample", 1.0)):
        scalars = next((folder / f"{name} by {exchange}").glob("*/vis_data/scalars.json")).read_text()
        rows = [json.loads(line) for line in scalars.splitlines()]
        assert [row["count"] for row in rows if "count" in row] == [count]


def test_how_tokens_travel_changes_nothing(folder: Path) -> None:
    for name in ("to one", "one sample", "uneven"):
        one, other = (load_file(folder / f"{name} by {way}" / "model.safetensors") for way in ("tokens", "weights"))
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=0)
