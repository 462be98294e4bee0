"""Verdicts follow from intervals and bounds by rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims.verdicts import ablation, experts, longer_table, render, verdicts


def residual(diff: list[float] | None, to_moe: list[float], dense: float, moe: float) -> dict[str, Any]:
    """A row of claims.json: intervals of the differences, and cost ratios."""
    row = {"arm": "residual", "task": "segmentation", "metric": "mIoU", "interval95": diff, "interval95_to_moe": to_moe}
    row |= {
        "diff_to_dense": 1.0,
        "diff_to_moe": 0.0,
        "cost_interval95": [0.9, dense],
        "cost_interval95_to_moe": [0.4, moe],
    }
    for key in ("cost", "finetune_cost", "flops"):
        row |= {f"{key}_vs_dense": dense, f"{key}_vs_moe": moe}
    return row


def found(**row: Any) -> dict[str, str]:
    """Verdicts by the beginnings of their claims."""
    rows = verdicts([residual(**row)], [], {})
    return {" ".join(row["claim"].split()[:4]): row["verdict"] for row in rows}


def test_a_folder_without_experts_makes_a_page(tmp_path: Path) -> None:
    assert "Inside the experts" not in render(tmp_path)


def test_what_the_paper_says_would_be_confirmed() -> None:
    rows = found(diff=[0.1, 2.0], to_moe=[-0.4, 0.5], dense=1.029, moe=0.69)
    assert [*rows.values()] == 4 * ["confirmed"] + ["not testable at this size"]


@pytest.mark.parametrize(
    ("claim", "changed"),
    [
        ("RMoE is better than", {"diff": [-0.1, 2.0]}),
        ("RMoE is better than", {"diff": None}),
        ("RMoE is as good", {"to_moe": [-0.6, 5.0]}),
        ("RMoE costs < 3", {"dense": 1.031}),
        ("RMoE saves > 30", {"moe": 0.71}),
    ],
)
def test_one_miss_is_one_claim_less(claim: str, changed: dict[str, Any]) -> None:
    rows = found(**{"diff": [0.1, 2.0], "to_moe": [-0.4, 0.5], "dense": 1.0, "moe": 0.5} | changed)
    assert rows.pop(claim) == "not confirmed"
    assert "not confirmed" not in rows.values()


WEIGHTS = {
    "core_norm": 2.0,
    "residual_norm": [1.0, 1.0],
    "cosine_experts": [[1.0, 0.6], [0.6, 1.0]],
    "cosine_residuals": [[1.0, -1.0], [-1.0, 1.0]],
    "effective_rank": {"w1": [3.0, 5.0], "w2": [1.0, 1.0]},
}
LOAD = {"load": [0.3, 0.7], "load_entropy": 0.9, "gate_entropy": 0.8, "by_class": {}, "information": 0.1}


def test_a_longer_schedule_has_verdicts_of_its_own() -> None:
    short = residual(diff=[-0.1, 2.0], to_moe=[-0.4, 0.5], dense=1.0, moe=0.5)
    rows = verdicts([short], [residual(diff=[0.1, 2.0], to_moe=[-0.4, 0.5], dense=1.0, moe=0.5)], {})
    first, second = (row for row in rows if "better" in row["claim"])
    assert (first["verdict"], second["verdict"]) == ("not confirmed", "confirmed")
    assert second["claim"] == f"{first['claim']}, 3 × the steps downstream"
    assert second["claim"].startswith("RMoE is better than dense")
    assert second["command"] == "`python -m benchmarks.claims --part long`"


def test_the_core_of_two_experts() -> None:
    inside = {"moe_upstream": {"layers": {"blocks.1.mlp": {"weights": WEIGHTS, "load": LOAD}}}}
    (shared, _) = verdicts([], [], inside)
    assert (shared["measured"], shared["verdict"]) == ("0.800", "confirmed")  # 4 / (4 + 1)
    matched = WEIGHTS | {"matched": 0.4, "by_chance": 0.3}
    layers = {"blocks.1.mlp": {"weights": matched, "load": LOAD}}
    _, shared, _ = verdicts([], [], {"moe_upstream": {"layers": layers}})
    assert "hidden units matched" in shared["claim"]
    assert (shared["measured"], shared["cost"], shared["verdict"]) == ("0.400", "by chance 0.300", "not confirmed")
    for chance, verdict in ((0.5, "confirmed"), (0.7, "not confirmed")):
        layers["blocks.1.mlp"]["weights"] = WEIGHTS | {"matched": 0.6, "by_chance": chance}
        assert verdicts([], [], {"moe_upstream": {"layers": layers}})[1]["verdict"] == verdict
    (row,) = experts(inside)
    assert (row["layer"], row["‖Δ‖ / ‖core‖"], row["cosine θ"], row["rank Δw1"]) == ("blocks.1", 0.5, 0.6, 4.0)
    assert row["shared"] is None


def test_a_longer_schedule_shows_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.claims.verdicts.table", lambda rows: [{"arm": row["arm"]} for row in rows])
    row = {"arm": "moe", "finetune_flops_vs_dense": 0.9}
    row |= {"train_loss": {"diff_to_dense": -0.02, "interval95": [-0.0304, 0.01]}}
    assert longer_table([row]) == [
        {"arm": "moe", "finetune FLOPs × dense": 0.9, "loss − dense": -0.02, "its 95 %": "-0.030 … +0.010"}
    ]


def test_an_ablation_is_against_residual_finetuning() -> None:
    keys = ("mean", "diff_to_residual", "cost_vs_residual", "finetune_cost_vs_residual", "finetune_flops_vs_residual")
    row = {"arm": "rank 2", "task": "segmentation", "metric": "mIoU", "seeds": [0, 1]}
    (shown,) = ablation(
        [row | dict(zip(keys, (20.0, -0.5, 1.0, 0.99, 0.98), strict=True)) | {"interval95_to_residual": None}]
    )
    assert (shown["choice"], shown["seeds"], shown["− residual"], shown["95 %"]) == ("rank 2", 2, -0.5, "–")
