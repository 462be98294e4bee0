"""Runs of two tasks: whatever the number of processes, the placement of experts and the ZeRO stage, recomputation, a
kill in between.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Finished, run_processes
from mmengine.config import Config
from safetensors.torch import load_file
from torch import Tensor
from toy import write_json
from two_tasks import CATEGORIES, CLASSES, MOE, write

import rmoe
from rmoe.errors import UserError
from rmoe.inference.evaluate import evaluate
from rmoe.reporting.report import analyze, report

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
SIZES = {"tasks.segmentation.train_dataloader.batch_size": 4, "tasks.detection.train_dataloader.batch_size": 2}
OWN = {"num_experts": 2, "rank": 2, "blocks": "all", "tasks": 2, "router": "task"}
SILENT = {"val_dataloader": None, "val_evaluator": None}
UNSEEN = {f"tasks.{name}.{key}": None for name in ("segmentation", "detection") for key in SILENT}
NO_BEST = {"default_hooks.checkpoint.save_best": None}
WILD = {"model.backbone.kwargs": {"drop_path_rate": 0.3}, "model.backbone.moe.noise": 1.0}
EMA = {"custom_hooks": [{"type": "rmoe.EMAHook", "momentum": 0.3}]}


@dataclass
class Runs:
    """The work dirs of all runs, and how each ended."""

    folder: Path
    killed: list[Finished]
    outcomes: dict[str, list[str]]

    def weights(self, name: str) -> dict[str, Tensor]:
        assert set(self.outcomes[name]) == {"done"}, self.outcomes[name]
        return load_file(self.folder / name / "model.safetensors")

    def scalars(self, name: str, key: str) -> list[float]:
        files = sorted((self.folder / name).glob("*/vis_data/scalars.json"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [row[key] for row in rows if key in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs that the tests below look at: a killed one, then a group of two processes and one alone."""
    folder = tmp_path_factory.mktemp("runs")
    both = write(folder)

    def make(name: str, options: dict[str, Any], stage: int, *words: str, **content: Any) -> list[str]:
        config = Config.fromfile(both, import_custom_modules=False)
        config.merge_from_dict(dict(options))
        path = folder / f"{name.replace(' ', '_')}_{len(list(folder.iterdir()))}.py"
        config.dump(path)
        written = write_json(path.with_suffix(".json"), stage, **content)
        return [str(path), "--deepspeed_config", str(written), "--work-dir", str(folder / name), *words]

    kill = {"custom_hooks": [*EMA["custom_hooks"], {"type": "toy.KillHook", "at": 3}]}
    kill |= {"custom_imports": {"imports": ["two_tasks", "toy"], "allow_failed_imports": False}}
    train = ROOT / "launch" / "train.py"
    killed = run_processes(folder, [train, *make("resumed", SIZES | WILD | kill, 2)], 0, check=False, timeout=280)
    own = {"model.backbone.moe": {"_delete_": True, **OWN}, **UNSEEN, **NO_BEST}
    spread = {"model.backbone.moe.ep_size": 2}
    outcomes = {}
    groups: list[tuple[int, dict[str, list[str]]]] = [
        (
            2,
            {
                "pair": make("pair", spread | {"model.backbone.with_cp": True}, 2),
                "pair plain": make("pair plain", UNSEEN | NO_BEST | {"model.backbone.moe.recompute": True}, 1),
                "pair own": make("pair own", own | {"model.backbone.moe": {"_delete_": True, **OWN, "ep_size": 2}}, 1),
            },
        ),
        (
            1,
            {
                "alone": make("alone", SIZES, 0),
                "alone own": make("alone own", SIZES | own, 0),
                "whole": make("whole", SIZES | WILD | EMA, 2),
                "resumed": make("resumed", SIZES | WILD | EMA, 2, "--resume"),
                "calibrated": make(
                    "calibrated", SIZES | {"calibrate": {"batches": 2}, "train_cfg.max_iters": 1} | UNSEEN | NO_BEST, 2
                ),
                "two at once": make("two at once", SIZES, 2, train_micro_batch_size_per_gpu=4),
            },
        ),
    ]
    for processes, commands in groups:
        listed = folder / f"runs_{processes}.json"
        listed.write_text(json.dumps(list(commands.values())))
        run_processes(folder, [ROOT / "tests" / "several_runs.py", listed], processes, timeout=280)
        ended = [json.loads(Path(f"{listed}.{rank}").read_text()) for rank in range(processes)]
        outcomes |= {name: list(each) for name, each in zip(commands, zip(*ended, strict=True), strict=True)}
    return Runs(folder, killed, outcomes)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("reference", "other"), [("alone", "pair"), ("alone", "pair plain"), ("alone own", "pair own")]
)
def test_placement_changes_nothing(runs: Runs, reference: str, other: str) -> None:
    """Losses, gradient norms and weights: ep_size, ZeRO, activation checkpointing, the number of processes."""
    losses, norms = runs.scalars(reference, "loss"), runs.scalars(reference, "grad_norm")
    assert len(losses) == 4
    assert runs.scalars(other, "loss") == pytest.approx(losses, abs=1e-5)
    assert runs.scalars(other, "grad_norm") == pytest.approx(norms, abs=1e-4)
    assert_equal(runs.weights(other), runs.weights(reference), atol=2e-5)


def test_killed_and_resumed_is_never_stopped(runs: Runs) -> None:
    """With drop path, gate noise, flips and an average of the weights: bit for bit."""
    assert [one.returncode for one in runs.killed] == [-9]
    assert_equal(runs.weights("resumed"), runs.weights("whole"), atol=0)


def test_both_tasks_are_in_the_loss_and_in_the_metrics(runs: Runs) -> None:
    keys = ("segmentation/decode.loss_ce", *(f"detection/loss_{kind}" for kind in ("cls", "bbox", "centerness")))
    parts = zip(*(runs.scalars("pair", key) for key in ("loss", "loss_moe_aux", *keys)), strict=True)
    assert all(loss == pytest.approx(sum(rest), rel=1e-5) for loss, *rest in parts)
    for name in ("segmentation/mIoU", "detection/bbox_mAP"):
        assert runs.scalars("pair", name) == pytest.approx(runs.scalars("alone", name), abs=0.02)
        assert len(runs.scalars("pair", name)) == 1
    best = [path.name for path in (runs.folder / "pair").glob("best_*")]
    assert len(best) == 1
    assert best[0].startswith("best_segmentation_mIoU_iter_")


def test_gates_are_told_by_task(runs: Runs) -> None:
    """The load of each task; what experts tell of tasks; of experts of their own, everything: log 2."""
    layer = "backbone.model.layers.1.blocks.0.mlp"
    for name in ("pair", "alone"):
        total, *tasks = (
            [x for e in range(MOE["num_experts"]) for x in runs.scalars(name, f"load/{place}{layer}/{e}")]
            for place in ("", "segmentation/", "detection/")
        )
        assert len(total) == len(tasks[0]) == len(tasks[1]) > 0
        assert all(0 <= one <= 1 for one in total + tasks[0] + tasks[1])
        assert all(one > -1e-6 for one in runs.scalars(name, f"gate/{layer}/task_information"))
    told = runs.scalars("alone own", f"gate/{layer}/task_information")
    assert told == pytest.approx([torch.tensor(2.0).log().item()] * len(told))
    logs = "".join(path.read_text() for path in (runs.folder / "pair").glob("*/*.log"))
    assert "gates of segmentation, largest share" in logs
    assert "has collapsed" not in logs


def test_experts_of_tasks_train_by_their_task_alone(runs: Runs) -> None:
    """Residuals of both have moved; gates that give each task an expert have not."""
    weights = runs.weights("alone own")
    moved = [key for key, x in weights.items() if key.endswith("b1_ERH") and x.any()]
    assert len(moved) == 6  # three layers of two experts
    assert not any(x.any() for key, x in weights.items() if ".gate." in key)


def test_gates_begin_as_clusters_of_what_all_tasks_give_them(runs: Runs) -> None:
    """The function stays, and so does what the first step sees."""
    assert runs.weights("calibrated")
    plain, calibrated = (runs.scalars(name, "detection/loss_cls") for name in ("alone", "calibrated"))
    assert calibrated[0] == pytest.approx(plain[0], abs=1e-6)
    logs = "".join(path.read_text() for path in (runs.folder / "calibrated").glob("*/*.log"))
    assert logs.count("gates set from clusters") == 1


def test_a_batch_size_that_is_not_the_tasks(runs: Runs) -> None:
    assert "gives 4 images to each step of a process, and the tasks' batch sizes add up to 6" in str(
        runs.outcomes["two at once"]
    )


@pytest.mark.parametrize(("task", "metric"), [("segmentation", "mIoU"), ("detection", "bbox_mAP")])
def test_a_finished_run_is_a_run_of_each_task(runs: Runs, task: str, metric: str) -> None:
    """Evaluated again it has the metrics of its log; predicting needs neither the other task nor the data."""
    last = runs.folder / "alone" / "model.safetensors"
    found = evaluate(last, task=task).metrics
    (value,) = (x for key, x in found.items() if key.rpartition("/")[2] == metric)
    assert value == pytest.approx(runs.scalars("alone", f"{task}/{metric}")[-1], abs=1e-4)
    run = rmoe.load(runs.folder / "alone", task=task)
    assert run.task == task
    assert len(run.classes) == {"segmentation": CLASSES, "detection": CATEGORIES}[task]
    assert run.source.name.startswith("best_segmentation_mIoU")
    assert len(run.predict([np.zeros((40, 30, 3), np.uint8)] * 2)) == 2
    kept = json.loads((runs.folder / "alone" / "predictions" / task / "index.json").read_text())
    assert len(kept["items"]) == 3
    assert set(analyze(runs.folder / "alone", runs.folder / f"analysis_{task}", images=2, task=task)["layers"])


def test_a_report_counts_each_task_as_a_run(runs: Runs) -> None:
    found = report([runs.folder / "alone", runs.folder / "pair"], json_file=runs.folder / "report.json")
    assert {group.entries[0].run.task.name: group.metrics for group in found.groups} == {
        "segmentation": ["mIoU"],
        "detection": ["box AP"],
    }
    assert all(len(group.entries) == 2 for group in found.groups)


def test_a_run_of_several_needs_a_task(runs: Runs) -> None:
    for use in (rmoe.load, evaluate, analyze):
        with pytest.raises(UserError, match="is a run of the tasks detection, segmentation; say which"):
            use(runs.folder / "alone")
