"""Pages that show measured figures show those of the files in benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.claims import method_verdicts
from benchmarks.common import RESULTS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_of_performance_ends_with_the_tables_of_the_results() -> None:
    assert (DOCS / "performance.md").read_text().endswith(tables.render(RESULTS))


def test_every_target_says_what_was_measured() -> None:
    rows = json.loads((RESULTS / "targets.json").read_text())
    assert len(rows) == 34
    for row in rows:
        assert {"target", "against", "limit", "measured", "met", "command"} <= row.keys()
        assert row["met"] is (None if row["measured"] is None else row["measured"] <= row["limit"])


def test_the_estimate_is_near_the_memory_that_was_measured() -> None:
    for row in json.loads((RESULTS / "step.json").read_text())["rows"]:
        assert abs(row["estimated_bytes"] / row["beyond_weights_bytes"] - 1) < 0.1


def test_the_page_of_claims_ends_with_the_tables_of_the_results() -> None:
    page = (DOCS / "claims.md").read_text()
    assert page.endswith(tables.claims(RESULTS))
    assert tables.opened(page, method_verdicts.opening(RESULTS)) == page


def test_what_was_run_twice_came_out_alike() -> None:
    """On one machine, and on two of a kind: the longer schedule's upstream stages were run anew, unless shared runs lay
    there already."""
    claims, longer, again = (
        json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        for name in ("claims_runs", "long_runs", "claims_again")
    )
    assert all(row["equal"] for row in again)
    first = {row["fingerprint"]: row["top1"] for row in claims if row["where"] == "upstream"}
    repeated = {row["fingerprint"]: row["top1"] for row in longer if row["fingerprint"] in first}
    assert len(repeated) == 3 * 3  # cores, upper bounds and intermediate stages of three seeds
    assert repeated.items() <= first.items()


def test_every_figure_in_the_words_about_claims_is_in_a_result() -> None:
    """As it stands, in percent, or as a percentage more than 1; rounded as the page rounds it."""
    words = (DOCS / "claims.md").read_text().partition("## Claim by claim")[0]
    words = re.sub(r"`[^`]*`|\([^)]*://[^)]*\)|arXiv [\d.]+", "", words)
    patterns = ("claims*.json", "long*.json", "ablation*.json", "method*.json", "regime.json", "experts*/*/*.json")
    files = [path for pattern in patterns for path in RESULTS.glob(pattern)]
    results = {*numbers([json.loads(path.read_text()) for path in files])}
    figures = set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])", words))
    for digits in {len(figure.partition(".")[2]) for figure in figures}:
        known = {round(abs(y), digits) for x in results for y in (x, 100 * x, 100 * (x - 1))}
        for figure in figures:
            if len(figure.partition(".")[2]) == digits:
                assert float(figure) in known, f"docs/claims.md says {figure}"


def numbers(value: Any) -> Iterator[float]:
    """All that are anywhere in it; a word like "2000" is one too."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):
        value = float(value)
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
