"""Configs of several tasks: joined from each task's, checked, taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yapf.yapflib.yapf_api
from mmengine.config import Config
from two_tasks import MOE, write

from rmoe.data.preflight import preflight
from rmoe.engine.read_config import read_config
from rmoe.engine.rescale import rescale
from rmoe.engine.task_config import check_json, check_tasks, checked_task, config_of, model_tasks, task_config
from rmoe.errors import UserError

NAMES = ["detection", "segmentation"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("both"))


@pytest.fixture
def joined(both: Path) -> Config:
    return read_config(both, {})


def test_a_run_of_several_is_one_config(joined: Config, both: Path) -> None:
    assert "tasks" not in joined
    assert model_tasks(joined.model) == NAMES
    assert joined.model.backbone.out_indices == [0, 1]
    assert joined.model.backbone.moe == MOE
    assert joined.model.tasks.segmentation.backbone == {"out_indices": [1]}
    assert joined.model.weights == {"detection": 1.0, "segmentation": 0.5}
    assert joined.train_dataloader.batch_size == 3
    assert joined.train_dataloader.sampler.batch_sizes == {"detection": 1, "segmentation": 2}
    assert joined.default_scope == "mmengine"
    assert joined.custom_imports.imports == ["two_tasks", "rmoe.tasks.detection", "rmoe.tasks.segmentation"]
    check_tasks(joined)
    check_json(joined, 3, 2)


def test_a_dumped_config_is_the_same(joined: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yapf.yapflib.yapf_api, "FormatCode", lambda text, **_: (text, True))  # it takes seconds
    joined.dump(tmp_path / "dumped.py")
    again = read_config(tmp_path / "dumped.py", {})
    check_tasks(again)
    assert again.to_dict() == joined.to_dict()
    assert model_tasks(again.model) == NAMES


@pytest.mark.parametrize("task", NAMES)
def test_a_task_of_several_is_a_config_of_its_own(joined: Config, both: Path, task: str) -> None:
    own, found = read_config(both.parent / f"{task}.py", {}), config_of(joined, task)
    for key in ("default_scope", "val_evaluator"):
        assert found[key] == own[key]
    for key in ("train_dataloader", "val_dataloader"):
        assert found[key].dataset == own[key].dataset
        assert found[key].batch_size == own[key].batch_size
    backbone = found.model.pop("backbone")
    assert found.model == {key: value for key, value in own.model.items() if key != "backbone"}
    assert [*backbone.out_indices] == [*own.model.backbone.out_indices]
    assert backbone.moe == {key: value for key, value in MOE.items() if key != "tasks"} | {
        "losses": {"importance": 0.01}
    }


def test_options_reach_tasks_and_the_shared_backbone(both: Path) -> None:
    options = {
        **{"tasks.detection.train_dataloader.batch_size": 4, "model.backbone.moe.ep_size": 2},
        **{"tasks.detection.weight": 3.0, "train_dataloader.num_workers": 1},
    }
    found = read_config(both, options)
    assert found.train_dataloader.sampler.batch_sizes == {"detection": 4, "segmentation": 2}
    assert (found.train_dataloader.batch_size, found.train_dataloader.num_workers) == (6, 1)
    assert (found.model.backbone.moe.ep_size, found.model.weights.detection) == (2, 3.0)
    rescale(found, 12, {}, 1, {key: x for key, x in options.items() if not key.startswith("tasks.")})
    check_tasks(found)
    assert found.train_cfg.max_iters == 12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": {"detection": {"config": "detection.py"}, "_delete_": True}}, "give a dict of two or more by name"),
        ({"tasks.third": 3}, "tasks.third is 3; it has a config"),
        ({"tasks.third": {"config": "thrid.py"}}, "there is no config thrid.py"),
        ({"tasks.third": {"config": "both.py"}}, "has several tasks itself"),
        ({"tasks.detection.wieght": 3}, "tasks.detection has no key 'wieght'; did you mean 'weight'"),
        ({"tasks.detection.weight": -1}, "the weight of the task detection is -1"),
        ({"tasks.detection.train_dataloader": None}, "no train_dataloader, which a task needs"),
        ({"tasks.detection.train_dataloader.dataset": None}, "tasks.detection.train_dataloader has no dataset"),
        ({"tasks.detection.train_dataloader.batch_size": 0}, "batch_size is 0; it is a whole number from 1"),
        (
            {"tasks.detection.val_dataloader": None},
            "the task detection has no val_dataloader and val_evaluator, and seg",
        ),
        ({"tasks.detection.model.backbone": None}, "has no backbone to share"),
        (
            {"tasks.detection.model.backbone.kwargs.embed_dim": 16},
            "the tasks have other backbones: kwargs is .*embed_dim.*16.* of the task detection and .* set "
            "model.backbone.kwargs beside tasks",
        ),
        ({"model.decode_head": {}}, "model has decode_head beside tasks"),
        ({"train_dataloader.batch_size": 4}, "train_dataloader has batch_size beside tasks; it takes num_workers"),
    ],
)
def test_what_cannot_be_joined(both: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_config(both, options)


def test_what_the_shared_backbone_says_is_said_for_all(both: Path) -> None:
    found = read_config(
        both,
        {
            "tasks.detection.model.backbone.kwargs.embed_dim": 16,
            "model.backbone.kwargs": {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "_delete_": True},
        },
    )
    assert found.model.backbone.kwargs.embed_dim == 8


def test_tasks_are_programs(both: Path, tmp_path: Path) -> None:
    Config.fromfile(both, import_custom_modules=False).dump(tmp_path / "both.json")
    text = (tmp_path / "both.json").read_text().replace('"two_tasks"', '"rmoe.tasks.detection"')
    (tmp_path / "both.json").write_text(text)
    with pytest.raises(UserError, match="--safe-config: .* names configs of tasks, which are programs"):
        read_config(tmp_path / "both.json", {}, safe=True)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "model.weights",
            {"segmentatoin": 1.0},
            "model.weights has the task 'segmentatoin'; did you mean 'segmentation'",
        ),
        ("val_evaluator.metrics", {"detektion": {}}, "val_evaluator.metrics has the task 'detektion'"),
        ("val_evaluator.metrics", {"detection": {}}, "val_evaluator.metrics lacks the task segmentation"),
        ("train_dataloader.sampler.batch_sizes", {"detection": 1}, "batch_sizes lacks the task segmentation"),
        ("train_dataloader.dataset.datasets", {}, "train_dataloader.dataset.datasets lacks the task detection"),
        ("val_dataloader.dataset.datasets", {"a": {}}, "has the task 'a'; known: detection, segmentation"),
        ("train_cfg", {"type": "EpochBasedTrainLoop", "max_epochs": 3}, "several tasks train by steps"),
        (
            "default_hooks.checkpoint.save_best",
            "mIoU",
            "'mIoU', of no task.*; write TASK/METRIC, such as detection/mIoU",
        ),
        ("default_hooks.checkpoint.save_best", "auto", "'auto', of no task"),
        ("default_hooks.checkpoint.save_best", ["segmentation/mIoU", "detecton/bbox_mAP"], "did you mean 'detection'"),
    ],
)
def test_names_of_no_task(joined: Config, key: str, value: Any, said: str) -> None:
    where, _, last = key.rpartition(".")
    section = joined
    for name in filter(None, where.split(".")):
        section = section[name]
    section[last] = value
    with pytest.raises(UserError, match=said):
        check_tasks(joined)


def test_a_json_with_another_batch_size(joined: Config) -> None:
    with pytest.raises(UserError, match="gives 4 images to each step of a process, and the tasks' .* add up to 3"):
        check_json(joined, 4, 2)


def test_zero_3_takes_a_network_that_runs_once(joined: Config) -> None:
    with pytest.raises(UserError, match=r"stage is 3, .* use stage 2 \(ds_configs/zero2.json\)"):
        check_json(joined, 3, 3)


def test_a_task_whose_data_are_not_there(joined: Config) -> None:
    preflight(joined)
    joined.train_dataloader.dataset.datasets.detection.data_root = "nowhere"
    with pytest.raises(UserError, match="nowhere/annotations/instances_train2017.json"):
        preflight(joined)


def test_which_task_is_meant(joined: Config) -> None:
    with pytest.raises(UserError, match="RUN is a run of the tasks detection, segmentation; say which: --task NAME"):
        checked_task(NAMES, None, "RUN")
    with pytest.raises(UserError, match="RUN has no task 'detect'; did you mean 'detection'"):
        checked_task(NAMES, "detect", "RUN")
    with pytest.raises(UserError, match="RUN is a run of one task, and the task 'detection' is asked for"):
        checked_task([], "detection", "RUN")
    assert checked_task([], None, "RUN") is None
    assert task_config(joined, "detection", "RUN").default_scope == "mmdet"
