"""Which runs are compared with which, what they are called, and by how much they differ; by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import COST, finished_run

from rmoe.engine.checkpoint.export import MODEL, write_tensors
from rmoe.errors import UserError
from rmoe.inference.runs import Run
from rmoe.reporting.comparison import compare


def compared(*folders: Path):
    return compare([Run(folder) for folder in folders])


def test_two_arms_over_seeds_by_hand(tmp_path):
    values = {("dense", 0): 40.0, ("dense", 1): 42.0, ("dense", 2): 50.0, ("residual", 0): 41.0, ("residual", 1): 45.0}
    found = compared(*(finished_run(tmp_path / f"{s}_{n}", s, n, value) for (s, n), value in values.items()))
    (group,) = found.groups
    assert group.title == "segmentation on scenes"
    assert group.arm_names() == ["dense", "residual"]
    dense, residual = group.arms
    assert (dense.mean, dense.seeds, dense.difference) == (44.0, [0, 1, 2], None)
    assert dense.std == pytest.approx(28**0.5)
    # differences 1 and 3: mean 2, standard error 1, Student's t of one degree of freedom 12.706
    assert (residual.mean, residual.pairs, residual.difference) == (43.0, [0, 1], 2.0)
    assert residual.interval95 == pytest.approx([2 - 12.706, 2 + 12.706], abs=1e-3)
    assert found.notes == []
    assert [(e.name, e.arm, e.seed) for e in found.entries][:2] == [("dense_0", "dense", 0), ("dense_1", "dense", 1)]


def test_the_first_run_is_what_others_are_compared_with(tmp_path):
    residual, dense = (finished_run(tmp_path / s, s, 0, v) for s, v in (("residual", 44.0), ("dense", 40.0)))
    (group,) = compared(residual, dense).groups
    assert group.reference == "residual"
    assert [(arm.name, arm.difference, arm.interval95) for arm in group.arms] == [
        ("residual", None, None),
        ("dense", -4.0, None),
    ]


def test_runs_of_one_stage_with_other_settings_are_other_arms(tmp_path):
    key = "model.backbone.moe"
    folders = [
        finished_run(tmp_path / f"{rank}_{seed}" / "run", "residual", seed, config={key: {"rank": rank, "top_k": 1}})
        for rank in (8, 32)
        for seed in (0, 1)
    ]
    (group,) = compared(*folders).groups
    assert [entry.arm for entry in group.entries] == ["residual rank=8"] * 2 + ["residual rank=32"] * 2
    assert [entry.name for entry in group.entries] == ["8_0/run", "8_1/run", "32_0/run", "32_1/run"]
    assert group.differences["model.backbone.moe.rank"] == {"8_0/run": "8", "8_1/run": "8"} | {
        "32_0/run": "32",
        "32_1/run": "32",
    }
    assert "stage" not in group.differences


def test_many_settings_or_long_ones_do_not_make_long_names(tmp_path):
    folders = [
        finished_run(tmp_path / f"{n}", config={"model.a": n, "model.b": "x" * 99 + str(n), "model.c": [n]})
        for n in range(3)
    ]
    names = compared(*folders).groups[0].arm_names()
    assert len(set(names)) == 3
    assert all(len(name) < 90 for name in names)


def test_cores_of_several_seeds_are_one_arm_and_those_of_two_pipelines_are_not(tmp_path):
    seeds = [finished_run(tmp_path / f"d_{n}", "residual", n) for n in (0, 1)]
    other = finished_run(tmp_path / "i", "residual", 0, config={"model.backbone.core": "runs/intermediate_0"})
    assert len(compared(*seeds).groups[0].arm_names()) == 1
    assert len(compared(*seeds, other).groups[0].arm_names()) == 2


CORE = "model.backbone.core"


def arms(*folders: Path) -> list[str]:
    return [entry.arm for entry in compared(*folders).groups[0].entries]


@pytest.mark.parametrize(
    "cores", [("w/core_400", "w/core_1200"), ("imagenet/model.safetensors", "random/model.safetensors")]
)
def test_other_cores_are_other_arms_whatever_numbers_and_folders_tell_them_apart(cores, tmp_path):
    folders = [
        finished_run(tmp_path / f"{i}_{s}", seed=s, config={CORE: x}) for i, x in enumerate(cores) for s in (0, 1)
    ]
    assert arms(*folders) == [f"dense core={core}" for core in cores for _ in (0, 1)]


def test_a_core_that_a_run_here_has_made_counts_by_the_config_of_that_run(tmp_path):
    folders = []
    for steps in (400, 1200):
        for seed in (0, 1):
            core = finished_run(
                tmp_path / f"{seed}{steps}a", "upstream", seed, config={"train_cfg": {"max_iters": steps}}
            )
            folders.append(finished_run(tmp_path / f"{steps}_{seed}", seed=seed, config={CORE: str(core)}))
    assert arms(*folders) == [f"dense max_iters={steps}" for steps in (400, 1200) for _ in (0, 1)]


def test_a_core_in_one_place_is_told_from_an_earlier_one_by_its_hash(tmp_path):
    folders = [finished_run(tmp_path / f"{n}", seed=n % 2, config={CORE: "core.pth"}) for n in range(4)]
    for folder, digest in zip(folders, ("a" * 64, "a" * 64, "b" * 64), strict=False):
        write_tensors(folder / MODEL, {"x": torch.zeros(1)}, {"rmoe": "1", "core_sha256": digest})
    assert len(set(arms(*folders[:2], folders[2]))) == 2
    moved = finished_run(tmp_path / "moved", seed=2, config={CORE: "elsewhere/core.pth"})
    write_tensors(moved / MODEL, {"x": torch.zeros(1)}, {"rmoe": "1", "core_sha256": "a" * 64})
    assert len(set(arms(*folders[:2], moved, folders[3]))) == 1  # the last does not say, but has the path


def test_what_a_run_was_loaded_from_belongs_to_its_arm(tmp_path):
    a, b = (finished_run(tmp_path / x, seed=n, config={"load_from": f"{x}.pth"}) for n, x in enumerate("ab"))
    assert arms(a, b) == ["dense load_from=a.pth", "dense load_from=b.pth"]
    resumed = finished_run(tmp_path / "r", seed=2, config={"load_from": None, "resume": "r/iter_4"})
    assert len(set(arms(a, resumed))) == 1


def test_batch_precision_and_clipping_belong_to_an_arm_and_processes_do_not(tmp_path):
    def run(name: str, seed: int, processes: int, batch: int, **more: Any) -> Path:
        one = {"config": {"train_batch_size": batch, **more}, "layout": {"processes": processes}}
        loader = {"batch_size": batch // processes}
        return finished_run(tmp_path / name, seed=seed, config={"strategy": one, "train_dataloader": loader})

    alone, together = run("a", 0, 1, 8), run("b", 1, 8, 8, fp16={"enabled": False}, gradient_clipping=0.0)
    assert arms(alone, together) == ["dense", "dense"]
    assert arms(alone, run("c", 1, 1, 16)) == ["dense train_batch_size=8", "dense train_batch_size=16"]
    assert len(set(arms(alone, run("d", 1, 1, 8, fp16={"enabled": True})))) == 2
    assert len(set(arms(alone, run("e", 1, 1, 8, gradient_clipping=0.01)))) == 2


def test_logs_of_a_run_in_the_folder_of_another_are_not_its_own(tmp_path):
    outer, inner = (finished_run(tmp_path / x, value=v) for x, v in (("outer", 40.0), ("outer/sub", 77.0)))
    assert [Run(folder).values() for folder in (outer, inner)] == [{"mIoU": 40.0}, {"mIoU": 77.0}]


def test_other_data_is_not_compared_and_that_is_said(tmp_path):
    here, there = finished_run(tmp_path / "a"), finished_run(tmp_path / "b", "residual", data="elsewhere")
    found = compared(here, there)
    assert [group.title for group in found.groups] == ["segmentation on scenes", "segmentation on elsewhere"]
    assert all(arm.difference is None for group in found.groups for arm in group.arms)
    assert "not comparable" in found.notes[0]


def test_one_arm_and_seed_twice_counts_once(tmp_path):
    folders = [finished_run(tmp_path / f"{n}", value=40.0 + n) for n in (0, 2)]
    found = compared(*folders)
    assert [(arm.seeds, arm.values) for arm in found.groups[0].arms] == [([0], [41.0])]
    assert "0, 2 are of one arm, dense, and one seed, 0: their mean counts as one." in found.notes
    again = compared(folders[0], folders[0])
    assert [entry.name for entry in again.entries] == ["0", "0 [2]"]


def test_what_is_missing_is_said(tmp_path):
    young = finished_run(tmp_path / "young", value=None, cost=None)
    blown = finished_run(tmp_path / "blown", value=math.nan, losses=(1.0, math.nan, math.inf))
    found = compared(young, blown)
    assert found.groups[0].arms == []
    said = " ".join(found.notes)
    assert "young has no cost.json: it is not finished." in said
    assert "young has no mIoU in its logs: it was not evaluated yet." in said
    assert "blown: the loss is not finite, first at step 2." in said
    assert "blown: mIoU is not finite; it does not count." in said
    text = json.dumps(found.as_json(), allow_nan=False)
    assert json.loads(text)["groups"][0]["runs"][1]["metrics"] == {"mIoU": None}


def test_the_json_has_everything(tmp_path):
    runs = [finished_run(tmp_path / s, s, 3, 40.0 + n) for n, s in enumerate(("dense", "residual"))]
    (group,) = compared(*runs).as_json()["groups"]
    assert group["runs"][1] == {
        "run": "residual",
        "folder": str(runs[1]),
        "arm": "residual",
        "stage": "residual",
        "seed": 3,
        "task": "segmentation",
        "metrics": {"mIoU": 41.0},
        "majority": None,
        "train_loss": 1.0,
        "cost": {**COST, "stage": "residual"},
    }
    assert (group["arms"][1]["difference"], group["arms"][1]["interval95"]) == (1.0, None)
    assert set(group["config_differences"]) == {"stage", "work_dir"}


@pytest.mark.parametrize("content", ['{"mIoU": "high", "step": 1}', '{"mIoU": 1.0, "step": "x"}', "[]", "{"])
def test_a_damaged_log_is_refused(content, tmp_path):
    folder = finished_run(tmp_path / "run")
    (folder / "20260101_000000" / "vis_data" / "scalars.json").write_text(content)
    with pytest.raises(UserError, match=str(folder)):
        compared(folder)


def test_classes_are_read_from_the_last_table_of_the_log(tmp_path):
    classes = {"grass": 30.5, "a | b": 12.0, "<script>": 0.0}
    assert Run(finished_run(tmp_path / "run", classes=classes)).per_class() == ("IoU", classes)
    assert Run(finished_run(tmp_path / "without")).per_class() == ("IoU", {})


def test_classes_of_detection_are_among_the_metrics(tmp_path):
    more = {"val_evaluator": {"type": "rmoe.CocoMetric", "metric": ["bbox", "segm"]}}
    folder = finished_run(tmp_path / "run", value=None, config=more)
    log = folder / "20260101_000000" / "vis_data" / "scalars.json"
    log.write_text('{"coco/bbox_mAP": 0.5, "coco/bbox_mAP_50": 0.6, "coco/cat_precision": 0.25, "step": 3}\n')
    run = Run(folder)
    assert run.values() == {"box AP": 50.0}
    assert run.per_class() == ("mask AP", {"cat": 25.0})
