"""How often the processes speak in a step: two of them, a network with two mixtures and the same one dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_processes
from toy import write_config, write_json

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(450)]
MOE: dict[str, Any] = {"num_experts": 4, "top_k": 1, "train_core": False, "rank": 2, "losses": {"importance": 0.01}}
MODELS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "low rank": MOE,
    "full": MOE | {"residual": "full"},
    "low rank ep 2": MOE | {"ep_size": 2},
    "full ep 2": MOE | {"residual": "full", "ep_size": 2},
}
HALF = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
OPTIONS = {
    "custom_imports.imports": ["toy", "collectives"],
    "custom_hooks": [{"type": "collectives.CollectivesHook"}],
    "optim_wrapper.paramwise_cfg": {"residual_lr_mult": 1.0},  # or they are a group, which ZeRO steps apart
    "train_cfg.max_iters": 2,
    "default_hooks.checkpoint.interval": -1,
    "default_hooks.checkpoint.save_best": None,
    **dict.fromkeys(("val_cfg", "val_dataloader", "val_evaluator")),
}
Steps = dict[tuple[str, Any], list[str]]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """What a step sends, by model and ZeRO stage; "half" is bfloat16 at stage 2."""
    folder = tmp_path_factory.mktemp("collectives")
    cases: list[tuple[str, Any]] = [(name, stage) for name in ("dense", "low rank", "full") for stage in (0, 1, 2)]
    cases += [("low rank ep 2", 0), ("full ep 2", 0)]
    cases.append(("low rank ep 2", "half"))  # last: DeepSpeed knows of one number format in a process
    words = {}
    for name, stage in cases:
        path = write_config(folder / f"{name}_{stage}.py".replace(" ", "_"), OPTIONS | {"model.moe": MODELS[name]})
        keys = HALF if stage == "half" else {}
        json_path = write_json(path.with_suffix(".json"), 2 if stage == "half" else stage, **keys)
        words[name, stage] = [str(path), "--deepspeed_config", str(json_path), "--work-dir", str(folder / path.stem)]
    listed = folder / "runs.json"
    listed.write_text(json.dumps(list(words.values())))
    run_processes(folder, [ROOT / "tests" / "several_runs.py", listed], 2, timeout=400)
    assert set(json.loads(Path(f"{listed}.0").read_text())) == {"done"}
    found = {}
    for case, line in words.items():
        first, second = json.loads((Path(line[-1]) / "collectives.json").read_text())
        assert first == second
        found[case] = second
    return found


def test_a_dense_step(steps: Steps) -> None:
    """Averages to log and gradients; with ZeRO also the norm and the new weights of two groups of the optimizer."""
    assert len(steps["dense", 0]) == 2
    assert len(steps["dense", 1]) == len(steps["dense", 2]) == 6


@pytest.mark.parametrize("name", ["low rank", "full"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_residuals_that_are_not_spread_cost_none(steps: Steps, name: str, stage: int) -> None:
    """What the gates' losses need travels with what is logged, gradients with all others."""
    assert steps[name, stage] == steps["dense", stage]


def test_what_is_spread_costs(steps: Steps) -> None:
    """Weights travel once each way in each mixture; tokens twice each way, and how many they are before."""
    weights, tokens = (steps[f"{name} ep 2", 0] for name in ("low rank", "full"))
    assert [what.split()[0] for what in weights if "gather" in what or "scatter" in what] == [
        *["allgather_base"] * 2,
        *["reduce_scatter_base"] * 2,
    ]
    assert sum("alltoall" in what for what in tokens) == 2 * (1 + 2 + 2)
    # One more, at stage 0: the gradients of the experts, which are reduced apart.
    assert len(weights) - 4 <= len(steps["dense", 0]) + 2


def test_weights_travel_in_the_format_that_they_are_computed_in(steps: Steps) -> None:
    """And the sums of their gradients in the one that they are kept in."""
    sent = steps["low rank ep 2", "half"]
    assert sent[:2] == ["allgather_base bfloat16"] * 2
    assert sent.count("reduce_scatter_base float32") == 2
    assert steps["low rank ep 2", 0][:2] == ["allgather_base float32"] * 2
