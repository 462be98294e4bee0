"""Pairs, intervals, corrections and verdicts of the method study, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.claims import comparison, method, method_verdicts
from benchmarks.claims.comparison import best_of, difference, divide, holm, rates_tried, reading, regimes, subtract
from benchmarks.claims.ledger import Cell, Context, Ledger
from benchmarks.claims.method import STEPS, Study
from benchmarks.claims.method_verdicts import FEW, MET, MISSED, NOT_RUN, verdicts
from benchmarks.common import Arguments

HERE, THERE = Context("here", "a"), Context("there", "b")
MIOU = reading("mIoU")


def runs(*values: float | None, context: Context = HERE) -> dict[tuple[int, Context], dict[str, Any]]:
    """Runs of seeds 0, 1, … with these values; None: not run."""
    return {(seed, context): {"mIoU": value} for seed, value in enumerate(values) if value is not None}


def test_differences_by_hand() -> None:
    found = difference(runs(2.0, 4.0, 6.0), runs(1.0, 2.0, 3.0, 99.0), MIOU, subtract)
    assert (found.seeds, found.mean) == ([0, 1, 2], 2.0)
    # Student's t of 2 degrees of freedom: 4.3027 at 97.5 %; t = 2 / (1 / √3) = 3.464 has p = 0.0742.
    assert found.interval == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], abs=1e-3)
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    assert difference(runs(4.0), runs(2.0), MIOU, divide) == ([0], 2.0, None, None)
    assert difference(runs(4.0), runs(None, 2.0), MIOU, subtract) == ([], None, None, None)
    assert difference(runs(1.0, 2.0), runs(1.0, 2.0), MIOU, subtract).p == 1.0
    assert difference(runs(2.0, 3.0), runs(1.0, 2.0), MIOU, subtract).p == 0.0


def test_a_pair_is_of_one_machine_and_core() -> None:
    assert difference(runs(2.0, 3.0), runs(1.0, 1.0, context=THERE), MIOU, subtract).seeds == []
    assert difference(runs(2.0), runs(1.0, context=HERE._replace(core="other")), MIOU, subtract).seeds == []


def test_a_seed_on_two_machines_counts_once() -> None:
    mine, theirs = runs(2.0, 5.0) | runs(4.0, context=THERE), runs(1.0, 1.0) | runs(1.0, context=THERE)
    found = difference(mine, theirs, MIOU, subtract)
    assert (found.seeds, found.mean) == ([0, 1], (2.0 + 4.0) / 2)


def test_holm_by_hand() -> None:
    # 3 · 0.01, then 2 · 0.02 = 0.04, then 0.03 · 1, which may not fall below 0.04.
    assert holm({"c": 0.03, "a": 0.01, "b": 0.02}) == pytest.approx({"a": 0.03, "b": 0.04, "c": 0.04})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_best_rate_is_that_with_the_highest_difference_to_dense() -> None:
    dense = runs(1.0, 5.0, 9.0)
    double, fourfold = {"dense_lr_double": runs(2.0, 6.0, 10.0)}, {"dense_lr_fourfold": runs(3.0, None, None)}
    assert best_of("dense", {"dense": dense}, MIOU) == "dense"
    assert best_of("dense", {"dense": dense} | double, MIOU) == "dense_lr_double"
    assert best_of("dense", {"dense": dense} | fourfold, MIOU) == "dense"  # one seed chooses nothing, where three can
    assert best_of("dense", {"dense": runs(1.0)} | fourfold, MIOU) == "dense_lr_fourfold"
    elsewhere = {"dense_lr_double": runs(90.0, 90.0, 90.0, context=THERE)}  # and no dense beside it
    assert best_of("dense", {"dense": dense} | elsewhere, MIOU) == "dense"
    assert best_of("upper_bound_all", {"dense": dense, "upper_bound_all": runs(2.0)}, MIOU) == "upper_bound_all"
    assert best_of("soft", {"dense": dense, "soft": {}}, MIOU) is None


def test_rates_are_compared_on_the_pairs_that_all_of_them_have() -> None:
    dense = runs(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    rates = {"dense": dense, "soft": runs(1.0, 1.0, 1.0, 9.0, 9.0, 9.0), "soft_lr_double": runs(2.0, 2.0, 2.0)}
    assert best_of("soft", rates, MIOU) == "soft_lr_double"  # though on easier seeds of its own the other has more
    assert rates_tried("soft_lr_double", rates, MIOU) == {"soft": 6, "soft_lr_double": 3}
    apart = {"dense": dense, "soft": runs(1.0, 1.0), "soft_lr_double": runs(None, None, 99.0)}
    assert best_of("soft", apart, MIOU) == "soft"  # no pair in common: the one with more seeds


def test_rates_are_judged_beside_the_best_dense_one_alone() -> None:
    arms = {"dense": runs(1.0, 1.0, 1.0), "dense_lr_double": runs(2.0, 2.0, 2.0)}
    arms["dense_lr_double"] |= runs(3.0, 3.0, 3.0, context=THERE)  # where dense's usual rate was not run
    arms |= {"one_low_rank_lr_1_lr_double": runs(3.0, 3.0, 3.0, context=THERE), "one_low_rank_lr_2": runs(9.0)}
    assert best_of("one_low_rank", arms, MIOU) == "one_low_rank_lr_1_lr_double"  # three seeds choose, not one
    assert rates_tried("one_low_rank_lr_2", arms, MIOU)["one_low_rank_lr_1_lr_double"] == 3


# Seeds 0 … 7: values of each arm less dense's.
GAINS = {"dense": 0.0, "dense_lr_half": 0.25, "dense_lr_double": -1.0, "soft": 1.0, "one_low_rank_lr_1": -0.5}
GAINS |= {"one_low_rank_lr_2": 0.5, "one_low_rank_lr_4": -2.0, "upper_bound_alternate": 1.25, "dense_longer": 0.5}


def study(names: Sequence[str] = tuple(GAINS), seeds: int = 8) -> Study:
    cells = [Cell(name, "segmentation", seed, STEPS, "plain,night", 1.0) for seed in range(seeds) for name in names]
    return replace(method.method(), cells=cells)


def ledger(of: Study, path: Path, gains: dict[str, float] = GAINS, spread: float = 0.1) -> Ledger:
    """What a sitting would have written: dense has 40, 41, …; others their gain, more with odd seeds."""
    found = Ledger(path)
    rows = []
    for cell in of.cells:
        longer = of.arms[cell.name].longer
        odd = spread * (cell.seed % 2) * (cell.name != "dense")
        row = {"arm": cell.name, "where": cell.where, "seed": cell.seed, "planned_steps": cell.steps}
        row |= {"styles": cell.styles, "width": cell.width, "fingerprint": of.fingerprint(cell)}
        row |= {"device": "here", "core": f"core {cell.seed}", "mIoU": 40.0 + cell.seed + gains[cell.name] + odd}
        row |= {"train_loss": 1.0 - gains[cell.name] / 10, "steps": round(longer * cell.steps)}
        row |= {"params_total": 100 + 50 * (cell.name == "soft"), "wall_seconds": 1.0}
        row |= dict.fromkeys(comparison.COSTS.values(), 100.0 + 10.0 * (cell.name == "soft"))
        rows.append(row)
    path.write_text(json.dumps({"rows": rows}))
    return Ledger(path) if path.exists() else found


def test_the_rows_of_the_study(tmp_path: Path) -> None:
    rows = {row["arm"]: row for row in comparison.rows(study(), ledger(study(), tmp_path / "runs.json"))}
    assert [*rows] == [*GAINS]
    soft = rows["soft"]
    assert (soft["kind"], soft["task"], soft["metric"], soft["best_dense"]) == (
        *("candidate", "segmentation", "mIoU"),
        "dense_lr_half",
    )
    assert soft["diff_to_dense"] == pytest.approx(1.05)
    assert soft["interval95"][0] < 1.05 < soft["interval95"][1]
    assert soft["diff_to_best_dense"] == pytest.approx(0.75)
    assert soft["train_loss"]["diff_to_dense"] == pytest.approx(-0.1)
    assert soft["params_total_vs_dense"] == pytest.approx(1.5)
    assert soft["finetune_flops_vs_dense"] == pytest.approx(1.1)
    assert soft["arms_compared"] == len(GAINS) - 3  # all but the dense learning rates
    assert soft["p_holm_to_dense"] > soft["p_to_dense"]
    assert rows["dense_lr_half"]["p_holm_to_dense"] is None
    assert rows["one_low_rank_lr_2"]["diff_to_rival"] == pytest.approx(-0.5)
    longer = rows["dense_longer"]
    assert longer["diff_to_dense"] == pytest.approx(0.55)
    assert longer["train_loss"]["diff_to_dense"] is None  # other images in the last tenth


def test_costs_are_told_beside_dense_at_any_rate(tmp_path: Path) -> None:
    small = study(("dense_lr_double", "soft"))
    soft = comparison.rows(small, ledger(small, tmp_path / "runs.json"))[-1]
    assert (soft["diff_to_dense"], soft["diff_to_best_dense"]) == (None, pytest.approx(2.0))
    assert (soft["finetune_flops_vs_dense"], soft["params_total_vs_dense"]) == (pytest.approx(1.1), pytest.approx(1.5))


def test_controls_are_the_best_of_their_kind(tmp_path: Path) -> None:
    rows = comparison.controls(study(), ledger(study(), tmp_path / "runs.json"))
    assert {row["control_arm"]: round(row["difference"], 6) for row in rows} == {
        "dense_lr_half": 0.75,
        "one_low_rank_lr_2": 0.5,
        "upper_bound_alternate": -0.25,
        "dense_longer": 0.5,
    }
    assert {(row["candidate"], row["task"], row["metric"]) for row in rows} == {("soft", "segmentation", "mIoU")}
    faster = GAINS | {"soft_lr_double": 2.0}
    both = study(tuple(faster))
    rows = comparison.controls(both, ledger(both, tmp_path / "more.json", faster))
    assert {(row["arm"], row["control_arm"]) for row in rows if row["control"] == "dense"} == {
        ("soft_lr_double", "dense_lr_half")
    }
    kinds = {row["arm"]: row["kind"] for row in comparison.rows(both, Ledger(tmp_path / "more.json"))}
    assert [kinds[name] for name in ("soft_lr_double", "dense_lr_half", "one_low_rank_lr_4")] == [
        *("candidate", "control", "control")
    ]
    assert [comparison._kind(name) for name in ("one_low_rank_lr_2_lr_double", "top_1_lr_double")] == [
        *("control", "choice")
    ]


STEP = {"task": "segmentation", "contender": "soft", "ratio": 1.02, "ratio_low": 1.01, "ratio_high": 1.04}


def judged(path: Path, seeds: int = 8, gains: dict[str, float] | None = None, **step: float) -> dict[str, str]:
    """Verdicts on `soft`, by target."""
    small = study(seeds=seeds)
    controls = comparison.controls(small, ledger(small, path, GAINS | (gains or {})))
    rows = verdicts(controls, [STEP | {"flops_ratio": 1.02} | step])
    assert {row["candidate"] for row in rows} == {*method.CANDIDATES}
    return {row["target"]: row["verdict"] for row in rows if row["candidate"] == "soft"}


def test_targets_follow_their_rules(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    found = judged(path)
    gain, upper, one = (f"candidate − {x}, mIoU" for x in ("best dense control", "upper bound", "one expert"))
    flops, seconds = (f"{x} of a step at real size, segmentation" for x in ("FLOPs", "seconds"))
    assert [found.pop(x) for x in (gain, upper, one, flops, seconds)] == [MET] * 5
    assert sorted({*found.values()}) == sorted([FEW, NOT_RUN])  # detection was not run
    assert judged(path, gains={"dense_lr_half": 1.5})[gain] == MISSED
    assert judged(path, gains={"dense_lr_double": 1.5})[gain] == MISSED
    assert judged(path, gains={"upper_bound_alternate": 2.0})[upper] == MISSED
    assert judged(path, gains={"one_low_rank_lr_4": 1.5})[one] == MISSED
    assert judged(path, flops_ratio=1.021)[flops] == MISSED
    assert judged(path, ratio=1.031)[seconds] == MISSED
    few = judged(path, seeds=7)
    assert (few[gain], few[upper], few[one]) == (FEW, MET, MET)
    assert judged(path, seeds=4)[one] == FEW


def test_the_tables_and_the_opening(tmp_path: Path) -> None:
    small = study()
    kept = ledger(small, tmp_path / "runs.json")
    arms, controls = comparison.rows(small, kept), comparison.controls(small, kept)
    assert method_verdicts.render(tmp_path) == method_verdicts.opening(tmp_path) == ""
    content = {"arms": arms, "controls": controls, "verdicts": verdicts(controls, [])}
    (tmp_path / "method.json").write_text(json.dumps(content))
    page = method_verdicts.render(tmp_path)
    assert page.count("\n## ") == 3
    assert "| segmentation | soft | mIoU | 8 |" in page
    opening = method_verdicts.opening(tmp_path)
    assert "| segmentation | mIoU | soft | dense_lr_half | 0.750 |" in opening
    words = f"# Page\n{tables.MARKS[0]}old\n{tables.MARKS[1]}more\n"
    assert tables.opened(words, opening) == words.replace("old\n", opening)
    assert tables.opened("# Page\n", opening) == "# Page\n"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    from benchmarks.claims.pictures import draw_method, draw_regime

    arguments = Arguments("claims", True, 1, tmp_path, "method")
    draw_method(arguments, comparison.rows(study(), ledger(study(), tmp_path / "runs.json")))
    names, conditions = ("dense", "soft"), ((400, "plain", 1.0), (1200, "plain", 1.0), (1200, "plain,night", 1.0))
    cells = [Cell(name, "segmentation", 0, *one) for one in conditions for name in names]
    small = replace(study(), cells=cells)
    rows = regimes(small, ledger(small, tmp_path / "more.json"))
    assert [(row["arm"], row["steps"], len(row["styles"]), row["seeds"]) for row in rows] == [
        *(("soft", 400, 1, [0]), ("soft", 1200, 1, [0])),
        ("soft", 1200, 2, [0]),
    ]
    assert rows[0]["diff_to_dense"] == pytest.approx(1.0)
    draw_regime(arguments, rows, (1200, 1, 1.0))
    for name in ("method", "regime"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_order_is_that_of_worth() -> None:
    cells = method.method().cells
    assert [(cell.name, cell.seed, cell.where) for cell in cells[:15]] == [
        (name, seed, "segmentation") for seed in range(5) for name in method.HEADLINE
    ]
    assert len({*cells}) == len(cells)
    seeds: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        seeds.setdefault((cell.where, cell.name), []).append(cell.seed)
    best = {"segmentation": method.FASTER, "detection": ("dense", "soft", "soft_frozen")}
    for task, names in best.items():
        for name in names:
            assert sorted(seeds[task, name]) == [*range(8)], (task, name)
    assert {name for _, name in seeds} <= {*method.ARMS}
    for family, names in method.FAMILIES.items():
        assert any(len(seeds.get(("segmentation", name), ())) >= 3 for name in names), family
    for name, rival in method.RIVALS.items():
        assert {"dense", rival} <= method.ARMS.keys() | {"dense"}
        assert name in method.ARMS


def test_further_seeds_of_the_best_rate_need_no_run_at_the_usual_one() -> None:
    def compared_with(name: str, seed: int) -> list[str]:
        one = method.Cell(name, "segmentation", seed, 1200, "plain,night", 1.0)
        return [cell.name for cell in method.method().compared_with(one)]

    assert compared_with("soft_lr_double", 4) == ["dense", "dense_lr_double"]
    assert compared_with("soft_lr_double", 5) == ["dense_lr_double"]
    assert compared_with("dense_lr_double", 4) == ["dense"]
    assert compared_with("dense_lr_double", 5) == []
    assert compared_with("soft", 5) == ["dense"]


def test_runs_are_picked_by_their_conditions() -> None:
    picked = method.regime().only("^segmentation/soft.*/[01]/(400|3600)/plain,night/1$").cells
    assert [(cell.name, cell.seed, cell.steps) for cell in picked] == [
        ("soft_lr_double", seed, steps) for steps in (400, 3600) for seed in (0, 1)
    ]


def test_regimes_share_the_runs_of_the_study() -> None:
    usual, regime = method.method(), method.regime()
    shared = {*usual.cells} & {*regime.cells}
    assert {cell.name for cell in shared} == {*method.REGIME_ARMS}
    assert {usual.fingerprint(cell) for cell in shared} == {regime.fingerprint(cell) for cell in shared}
    assert len({regime.fingerprint(cell) for cell in regime.cells}) == len(
        {cell._replace(seed=0) for cell in regime.cells}
    )
    for place, values in (("steps", 3), ("styles", 3), ("width", 3)):
        assert len({getattr(cell, place) for cell in regime.cells}) == values
