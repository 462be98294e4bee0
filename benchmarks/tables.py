"""Writes the tables of docs/performance.md, docs/claims.md and docs/arms.md, from what is in benchmarks/results.

    python -m benchmarks.tables

The first two end with tables, and what stands above is left as it is, but for the lines between the two of `MARKS`:
docs/claims.md opens with the table of who should choose what, and docs/arms.md has its own there.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import common, forecast, inference, layer, scaling, step, targets, training_cost
from benchmarks.claims import method_verdicts, verdicts
from benchmarks.gpu import layer as gpu_layer
from benchmarks.gpu import parity as gpu_parity
from benchmarks.gpu import step as gpu_step

DOCS = common.ROOT / "docs"
MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")
_BENCHMARKS = {"layer": layer, "layer_balance": layer, "step": step, "step_real": step, "forecast": forecast}
_BENCHMARKS |= {"training_cost": training_cost, "scaling": scaling, "inference": inference}
_BENCHMARKS |= {"gpu_parity": gpu_parity, "gpu_layer": gpu_layer, "gpu_step": gpu_step}


def main() -> None:
    """Runs the command."""
    for name, tables in (("performance.md", render(common.RESULTS)), ("claims.md", claims(common.RESULTS))):
        page = DOCS / name
        first = tables.partition("\n")[0]
        words = page.read_text().partition(first)[0]
        page.write_text(opened(words, method_verdicts.opening(common.RESULTS)) + tables)
    page = DOCS / "arms.md"
    page.write_text(opened(page.read_text(), arms(common.RESULTS)))


def arms(folder: Path) -> str:
    """Returns Markdown of the ideas of other papers, with what was measured of each."""
    path = folder / "ideas.json"
    return common.markdown(method_verdicts.ideas_table(json.loads(path.read_text())["rows"] if path.exists() else []))


def claims(folder: Path) -> str:
    """Returns Markdown of the claims, and of the method study."""
    return verdicts.render(folder) + method_verdicts.render(folder)


def opened(words: str, table: str) -> str:
    """Returns a page's words with `table` between the `MARKS`, if they are there."""
    before, mark, rest = words.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    return f"{before}{mark}{table}{end}{after}" if end else words


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
