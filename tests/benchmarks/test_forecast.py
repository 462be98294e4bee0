"""The forecast of measured steps: what calibrates comes out as measured, and every file's points are taken up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import forecast, scaling
from benchmarks.common import Row
from rmoe.reporting.estimate import share_out, work_of
from rmoe.reporting.machines import GPUS

MOE = {"residual": "low_rank"}


def written(folder: Path, name: str, rows: list[Row], **head: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"quick": True, "rows": rows, **head}))


def scaled(ms: float) -> list[Row]:
    """A scaling.json of two cases in two processes."""
    cases = [{"residual": "dense", "ep_size": 1, "exchange": "none"}, {"residual": "low_rank", "ep_size": 1}]
    rows = [{"exchange": "none", "processes": 2, "ratio": 1.0, "ms": ms} | case for case in cases]
    return [*rows, {"processes": 2, "ratio": None, "ms": 10.0, "sent_bytes": {"allreduce": 10_000_000}}]


def test_the_dense_step_calibrates_and_the_others_follow(tmp_path: Path) -> None:
    written(tmp_path, "scaling", scaled(100.0), config=scaling.QUICK_SIZES)
    dense, low_rank = points = list(forecast.points(tmp_path))
    assert dense.cluster.gpu.peers == pytest.approx(1e9)  # 10 MB in 10 ms
    rows = list(forecast.forecasts(points))
    assert rows[0]["calibrates"]
    assert rows[0]["forecast_ms"] == pytest.approx(100.0, rel=1e-3)
    cluster = forecast._with(low_rank.cluster, rows[0]["reached_flops"])
    expected = 1e3 * share_out(work_of(low_rank.config, low_rank.setting), cluster).seconds.step
    assert rows[1]["forecast_ms"] == pytest.approx(expected)
    assert rows[1]["error"] == pytest.approx(expected / 100.0 - 1)
    assert not rows[1]["calibrates"]


def test_what_no_machine_explains_is_an_error(tmp_path: Path) -> None:
    written(tmp_path, "scaling", scaled(1e-6), config=scaling.QUICK_SIZES)
    with pytest.raises(ValueError, match="no FLOP/s explain 1e-09 s of scaling, 2 processes"):
        list(forecast.forecasts(list(forecast.points(tmp_path))))


def test_points_of_a_gpu_are_taken_up_when_they_are_there(tmp_path: Path) -> None:
    row = {"config": "upstream/swin_tiny_core_imagenet1k.py", "images": 2, "image_size": 64, "precision": "float32"}
    rows = [
        row | {"contender": "dense", "moe": None, "ms": 50.0},
        row | {"contender": "low_rank", "moe": MOE, "ms": 49},
    ]
    rows += [{"part": "layer", "contender": "low_rank", "ms": 1.0}]  # of another kind: not a training step
    written(tmp_path, "gpu_step", rows, machine={"gpu": "NVIDIA H100 80GB HBM3"})
    dense, low_rank = forecast.points(tmp_path)
    assert dense.cluster.gpu == GPUS["h100"]
    assert (dense.arm, low_rank.arm, low_rank.seconds) == ("dense", "low_rank", 0.049)
    assert low_rank.config.model.moe == MOE | {"top_k": 1, "train_core": False}  # as when the row was measured
    assert low_rank.setting == replace(dense.setting)
    assert (dense.setting.micro_batch, dense.setting.image_size) == (2, (64, 64))
    written(tmp_path, "gpu_step", rows, machine={"gpu": "Some Other Card"})
    assert list(forecast.points(tmp_path)) == []


def test_steps_and_stages_of_the_results_are_points(tmp_path: Path) -> None:
    config = {"image_size": 64, "small": True}
    step = {"task": "segmentation", "ms": 3.0}
    written(tmp_path, "step", [step | {"contender": name} for name in ("dense", "full")], config=config | {"images": 2})
    stage = {"part": "stage", "task": "classification", "contender": "experts", "ms": 7.0}
    counts = {"classification": 4, "segmentation": 2}
    written(
        tmp_path,
        "training_cost",
        [stage, {"part": "pipeline", "pipeline": "dense"}],
        config=config | {"images": counts},
        machine={"threads": 2},
    )
    dense, full, experts = forecast.points(tmp_path)
    assert [(one.source, one.group, one.arm) for one in (dense, full)] == [
        ("step", "segmentation", "dense"),
        ("step", "segmentation", "full"),
    ]
    assert (experts.setting.micro_batch, experts.seconds) == (4, 0.007)
    assert experts.cluster.gpu.bandwidth == 2 * dense.cluster.gpu.bandwidth == 2 * forecast.CPU_BANDWIDTH
