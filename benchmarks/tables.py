"""Prints the results as Markdown, for docs/performance.md.

python -m benchmarks.tables > tables.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common, layer, scaling, step, targets, training_cost

_BENCHMARKS = {"layer": layer, "step": step, "training_cost": training_cost, "scaling": scaling}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    print(render(common.parse("tables", __doc__, argv).out), end="")


def render(folder: Path) -> str:
    """Markdown of the targets, and of every benchmark with its command, machine and commit; what was run of it."""
    parts = []
    if (path := folder / "targets.json").exists():
        parts.append(f"## Targets\n\n{common.markdown(targets.table(json.loads(path.read_text())))}")
    for name, module in _BENCHMARKS.items():
        if (path := folder / f"{name}.json").exists():
            found = json.loads(path.read_text())
            parts.append(f"## {name}\n\n{_circumstances(found)}\n\n{common.markdown(module.table(found['rows']))}")
    return "\n".join(parts)


def _circumstances(found: common.Row) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    machine = "{cpu}, {cores} cores, {threads} threads".format(**found["machine"])
    commit = f"{found['commit']}{' with changes' * found['dirty']}"
    return f"`{found['command']}`, {found['date']}: {machine}, no GPU; {versions}; commit {commit}."


if __name__ == "__main__":
    main()
