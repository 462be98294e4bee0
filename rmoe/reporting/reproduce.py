"""How to make a run again: its command, what computed it, and its whole config."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rmoe.reporting.comparison import Entry


def commands(entry: Entry) -> dict[str, Any]:
    """Returns what a reader needs to make the run again.

    Returns:
        `command` as it was typed, or None where the run does not say; `again`, the command that trains by the config
        and the JSON that the run has left; `config` and `json`, their texts; `facts`, versions, commit and device.
    """
    run, cost = entry.run, entry.cost or {}
    processes = cost.get("devices") or (run.config.get("strategy") or {}).get("layout", {}).get("processes") or 1
    config = Path(run.config.filename)
    words = ["launch/train.py", f"RUN/{config.name}", "--deepspeed_config", "ds.json", "--work-dir", "NEW"]
    software = dict(cost.get("software") or {})
    commit = software.pop("commit", None)
    facts = {"commit": commit or "unknown"} | software
    if commit and str(commit).endswith("-dirty"):
        facts["commit"] = f"{commit.removesuffix('-dirty')}, with changes that were not committed"
    facts |= {name: cost[name] for name in ("device", "devices", "precision", "zero_stage", "ep_size") if name in cost}
    return {
        "command": _typed(cost.get("command"), processes),
        "again": shlex.join([*_launcher(processes), *words]),
        "config": config.read_text(errors="replace"),
        "json": json.dumps((run.config.get("strategy") or {}).get("config") or {}, indent=1, default=str),
        "facts": facts,
    }


def _typed(command: Any, processes: int) -> str | None:
    if not isinstance(command, list) or not command:
        return None
    program, *words = map(str, command)
    if processes == 1 and Path(program).name == "rmoe":
        return shlex.join(["rmoe", *words])
    return shlex.join([*_launcher(processes), program, *words])


def _launcher(processes: int) -> list[str]:
    return ["python"] if processes == 1 else ["deepspeed", "--num_gpus", str(processes)]
