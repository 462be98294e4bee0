"""Writes the tables that docs/performance.md and docs/claims.md end with, from what is in benchmarks/results.

    python -m benchmarks.tables

What stands above the first of them is left as it is.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import common, forecast, layer, scaling, step, targets, training_cost
from benchmarks.claims import verdicts

DOCS = common.ROOT / "docs"
_BENCHMARKS = {
    "layer": layer,
    "layer_balance": layer,
    "step": step,
    "training_cost": training_cost,
    "scaling": scaling,
    "forecast": forecast,
}


def main() -> None:
    """Runs the command."""
    for name, tables in (("performance.md", render(common.RESULTS)), ("claims.md", verdicts.render(common.RESULTS))):
        page = DOCS / name
        first = tables.partition("\n")[0]
        page.write_text(page.read_text().partition(first)[0] + tables)


def render(folder: Path) -> str:
    """Returns Markdown of the targets and of every benchmark that was run, with command, machine and commit."""
    parts = []
    if (path := folder / "targets.json").exists():
        parts.append(f"## Targets\n\n{common.markdown(targets.table(json.loads(path.read_text())))}")
    for name, module in _BENCHMARKS.items():
        if (path := folder / f"{name}.json").exists():
            found = json.loads(path.read_text())
            parts.append(
                f"## {name}\n\n{common.circumstances(found)}\n\n{common.markdown(module.table(found['rows']))}"
            )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
