"""Pages that show measured figures show those of the files in benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import tables
from benchmarks.common import RESULTS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_of_performance_ends_with_the_tables_of_the_results() -> None:
    assert (DOCS / "performance.md").read_text().endswith(tables.render(RESULTS))


def test_every_target_says_what_was_measured() -> None:
    rows = json.loads((RESULTS / "targets.json").read_text())
    assert len(rows) == 25
    for row in rows:
        assert {"target", "against", "limit", "measured", "met", "command"} <= row.keys()
        assert row["met"] is (row["measured"] <= row["limit"])
