"""Rule 6: losses, gradient norms and weights do not depend on how many processes there are and where experts live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_processes

SCRIPT = Path(__file__).with_name("place.py")
LOSSES = {"importance": 0.1, "balance": 0.1, "z": 0.01}
# What is trained: every kind, every way to combine and to exchange, with a capacity and without.
LAYERS: dict[str, dict[str, Any]] = {
    "low_rank": {"losses": LOSSES},
    "low_rank_tokens": {"exchange": "tokens", "losses": LOSSES, "train_core": True},
    "low_rank_recomputed": {"recompute": True, "losses": LOSSES},
    "soft": {"top_k": "all", "losses": LOSSES},
    "soft_trained_core": {"top_k": "all", "train_core": True},
    "low_rank_two": {"top_k": 2, "losses": LOSSES},
    "low_rank_outside": {"combine": "straight_through", "top_k": 2},
    "segments": {"residual": "segments", "rank": 2, "top_k": 2, "losses": LOSSES},
    "segments_tokens": {"residual": "segments", "rank": 2, "exchange": "tokens", "alpha": 2.0},
    "sparse": {"residual": "sparse", "density": 0.3, "losses": LOSSES},
    "sparse_inside_two": {"residual": "sparse", "density": 0.3, "combine": "residual", "top_k": 2, "train_core": True},
    "expert_choice": {"router": "expert_choice", "losses": LOSSES},
    "full_recomputed": {"residual": "full", "recompute": True},
    "full": {"residual": "full", "losses": LOSSES},
    "full_two": {"residual": "full", "top_k": 2, "losses": LOSSES},
    "full_weights": {"residual": "full", "exchange": "weights"},
    "full_softmax": {"residual": "full", "combine": "softmax"},
    "experts": {"residual": "experts", "expert_init": "random", "capacity_factor": 1.05, "top_k": 2, "losses": LOSSES},
    "full_inside_two": {"residual": "full", "combine": "residual", "top_k": 2},
    "experts_copied": {"residual": "experts", "losses": LOSSES},
    "fixed": {"residual": "full", "train_residual": False, "losses": LOSSES},
    "capacity": {"capacity_factor": 0.8, "exchange": "tokens"},
    "capacity_full_two": {"residual": "full", "capacity_factor": 0.8, "top_k": 2},
}
GATED: dict[str, dict[str, Any]] = {
    "gated_low_rank": {"top_k": 2, "losses": LOSSES, "train_core": True},
    "gated_full": {"residual": "full", "exchange": "weights", "capacity_factor": 0.8},
}
STAGES = (0, 1, 2)
PLACES = [(2, 1), (2, 2), (4, 2)]


def cases(ep_size: int) -> dict[str, dict[str, Any]]:
    gated = {
        f"{name}_2": {"zero": 2, "clip": 0.5, "gated": True, "moe": {**moe, "ep_size": ep_size}}
        for name, moe in GATED.items()
    }
    return gated | {
        f"{name}_{zero}": {"zero": zero, "clip": 0.5, "moe": {**moe, "ep_size": ep_size}}
        for name, moe in LAYERS.items()
        for zero in (*STAGES, 3)
        # All of them under ZeRO-2, some under the others too; spread experts not under ZeRO-3.
        if zero == 2 or (name in ("low_rank", "soft", "full", "fixed") and (zero < 3 or ep_size == 1))
    }


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    run_processes(out, [SCRIPT, out, json.dumps({k: case for k, case in cases(1).items() if case["zero"] < 3})])
    return out


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "ep_size"), PLACES)
def test_placement_free(processes: int, ep_size: int, tmp_path: Path, one_process: Path, launch: Any) -> None:
    launch([SCRIPT, tmp_path, json.dumps(cases(ep_size))], nproc=processes)
    for name in cases(ep_size):
        one, here = torch.load(one_process / f"{name.replace('_3', '_2')}.pt"), torch.load(tmp_path / f"{name}.pt")
        for what in ("losses", "norms", "logits", "state"):
            torch.testing.assert_close(
                here[what], one[what], rtol=1e-5, atol=1e-5, msg=lambda m, n=name, w=what: f"{n}, {w}: {m}"
            )
        assert min(one["norms"]) > 0.5, "clipping is not active"
