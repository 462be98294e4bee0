from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common, layer, targets
from benchmarks.common import DEFAULT, JUDGED, SETTINGS, Row

KEYS = {"target", "against", "limit", "measured", "met", "command"}


def grid(contender: str, tokens: int, width: int, ratio: float, dtype: str = "float32", **more: Any) -> Row:
    row = {
        "part": "grid",
        "setting": JUDGED,
        "dtype": dtype,
        "tokens": tokens,
        "width": width,
        "contender": contender,
    }
    return row | {"ratio": ratio, "to_stock": ratio / 1.5} | more


def everything(ratio: float) -> list[Row]:
    """A layer.json in which all cells have one ratio."""
    rows = [
        grid(name, tokens, width, ratio, dtype, setting=setting)
        for setting in SETTINGS
        for dtype in ("float32", "bfloat16")
        for tokens in layer.TOKENS
        for width in layer.WIDTHS
        for name in ("low_rank_8", "low_rank_16", "full", "upper_bound")
    ]
    others = [("gate", "low_rank_8"), ("gate", "full"), ("growth", "low_rank_8"), ("growth", "full")]
    return rows + [grid(name, 1568, 96, ratio, part=part) for part, name in others]


def steps(ratio: float) -> list[Row]:
    return [
        {"task": task, "setting": JUDGED, "contender": arm, "ratio": ratio, "beyond_weights_ratio": ratio}
        for task in ("segmentation", "detection")
        for arm in ("dense", "low_rank", "full")
    ]


def processes(ratio: float, tokens: int = 3152) -> list[Row]:
    """A scaling.json in which all mixtures have one ratio."""
    arms = [("dense", 1), ("low_rank", 1), ("low_rank", 2), ("full", 1), ("full", 2), ("none, all-reduce alone", 1)]
    return [
        {"processes": number, "setting": JUDGED, "residual": name, "ep_size": ep_size, "exchange": "none"}
        | {"ratio": ratio, "tokens": tokens if name in ("low_rank", "full") else None}
        for number in (1, 2)
        for name, ep_size in arms
    ]


def test_no_limit_is_below_the_floor_of_the_arithmetic() -> None:
    limits = {row["target"]: row["limit"] for row in targets.layer_targets([])}
    assert limits["full, float32, C ≥ 384, T ≥ 6272"] == 1.02
    assert limits["full, bfloat16, C ≥ 384, T ≥ 6272"] == 1.20
    assert limits["full, float32"] == limits["upper_bound, float32"] == 1.00
    assert limits["full, bfloat16"] == limits["upper_bound, bfloat16"] == 1.05
    assert limits["low_rank 8 and 16, float32, C ≥ 384, T ≥ 6272"] == 0.78


def test_few_tokens_show_nothing_of_two_processes() -> None:
    low_rank, full = targets.scaling_targets(processes(1.05))
    assert (low_rank["limit"], low_rank["measured"], low_rank["met"]) == (1.03, 1.05, False)
    assert (full["limit"], full["measured"], full["met"]) == (1.10, 1.05, True)
    assert [row["measured"] for row in targets.scaling_targets(processes(1.0, tokens=128))] == [None, None]


def test_the_worst_size_decides() -> None:
    rows = [
        grid("low_rank_8", 1568, 192, 0.90),
        grid("low_rank_16", 6272, 192, 0.94),
        grid("low_rank_8", 6272, 96, 1.2),
    ]
    found = {row["target"]: row for row in targets.layer_targets(rows)}
    fine = found["low_rank 8 and 16, float32, C 192"]
    assert (fine["limit"], fine["measured"], fine["met"]) == (0.95, 0.94, True)
    assert fine["at"] == {"tokens": 6272, "width": 192, "contender": "low_rank_16"}
    slow = found["low_rank 8 and 16, float32, C 96"]
    assert (slow["limit"], slow["measured"], slow["met"]) == (1.10, 1.2, False)


def test_bfloat16_may_cost_more_and_one_setting_is_judged() -> None:
    rows = [grid("full", 1568, 96, 1.30, "bfloat16"), grid("full", 1568, 96, 1.9, "bfloat16", setting=DEFAULT)]
    found = {row["target"]: row for row in targets.layer_targets(rows)}["full, bfloat16, T 1568"]
    assert (found["limit"], found["measured"], found["met"]) == (1.40, 1.30, True)
    assert found["measured_default_allocator"] == 1.9


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    for row in [*targets.layer_targets([]), *targets.step_targets([]), *targets.scaling_targets([])]:
        assert row["measured"] is None
        assert row["met"] is None


@pytest.mark.parametrize(("ratio", "met"), [(0.05, True), (3.0, False)])
def test_every_cell_of_the_grid_has_its_target(tmp_path: Path, ratio: float, met: bool) -> None:
    for name, rows in (("layer", everything(ratio)), ("step", steps(ratio)), ("scaling", processes(ratio))):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    targets.main(["--out", str(tmp_path)])
    found = json.loads((tmp_path / "targets.json").read_text())
    assert len(found) == 2 * (4 + 3 + 2) + 1 + 2 + 4 + 2 + 7
    found, of_gpu = found[:-7], found[-7:]
    assert all(row["measured"] is None and row["met"] is None for row in of_gpu)
    assert all(set(row) >= KEYS for row in found)
    assert all(row["met"] is met for row in found)
    assert common.markdown(targets.table(found)).count("| yes |" if met else "| no |") == len(found)


def test_what_a_gpu_is_measured_at_names_its_card(tmp_path: Path) -> None:
    cell = {"mode": "autocast", "experts": 8, "tokens": 25088, "pass": "forward + backward", "ms": 1.0, "syncs": 0}
    rows = [
        cell | {"contender": "low_rank_8", "width": 384, "ratio": 0.8, "launches": 41},
        cell | {"contender": "low_rank_8", "width": 96, "ratio": 2.0},
        cell | {"contender": "low_rank_8", "width": 768, "ratio": 0.1, "mode": "bfloat16"},
        cell | {"contender": "full", "width": 384, "ratio": 1.2, "launches": 70},
        {"part": "layer", "contender": "megablocks", "skipped": "not installed"},
        {"part": "ceiling", "gemm_tflops": 800.0},
    ]
    (tmp_path / "gpu_layer.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA H100"}, "rows": rows}))
    step, _, *others = targets.gpu_targets(targets._gpu_rows(tmp_path / "gpu_layer.json"), [])
    assert (step["measured"], step["met"], step["at"]["gpu"]) == (0.8, True, "NVIDIA H100")
    assert [row["met"] for row in others] == [False, True, True, None, None]


@pytest.mark.parametrize("limits", [targets.LOW_RANK, targets.FULL])
def test_limits_cover_the_grid_without_overlap(limits: targets.Limits) -> None:
    for tokens in layer.TOKENS:
        for width in layer.WIDTHS:
            assert sum(fits({"tokens": tokens, "width": width}) for _, fits, _ in limits) == 1
