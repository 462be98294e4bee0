"""Calibrated gates do not depend on how many processes there are, nor on where experts live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("calibrate_gates.py")
PLACED: dict[str, dict[str, Any]] = {
    "low_rank": {},
    "subspaces": {"subspaces": True},
    "subspaces_ep2": {"subspaces": True, "ep_size": 2},
    "images": {"gate_input": "image"},
    "full_ep2": {"residual": "full", "ep_size": 2},
    "copies_ep2": {"residual": "experts", "ep_size": 2},
}


@pytest.mark.distributed
def test_two_processes_set_the_gates_of_one(tmp_path: Path, launch: Any) -> None:
    folders = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, folder in folders.items():
        folder.mkdir()
        cases = {name: {**moe, "ep_size": min(processes, moe.get("ep_size", 1))} for name, moe in PLACED.items()}
        launch([SCRIPT, folder, json.dumps(cases)], nproc=processes)
    for name in PLACED:
        one, two = (torch.load(folder / f"{name}.pt") for folder in folders.values())
        assert one
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
