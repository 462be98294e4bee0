"""What checkpoints are called, and that those of earlier names are counted and removed with the others."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.logging import MessageHub
from toy import write_config

from rmoe.engine.hooks import CheckpointHook
from rmoe.engine.prepare import prepare
from rmoe.engine.strategy import Runner as TrainingRunner
from rmoe.engine.strategy import Strategy
from rmoe.errors import UserError


class Runner(SimpleNamespace):
    """Writes an empty folder or file where a checkpoint would be."""

    def save_checkpoint(self, out_dir: str, filename: str, *rest: Any, save_optimizer: bool, **options: Any) -> None:
        path = Path(out_dir) / filename
        path.mkdir(exist_ok=True) if save_optimizer else path.touch()


def runner(folder: Path, **info: Any) -> Runner:
    hub = MessageHub("test")
    for key, value in info.items():
        hub.update_info(key, value)
    return Runner(work_dir=str(folder), message_hub=hub, logger=logging.Logger("test"), epoch=0, iter=0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "last_checkpoint")


def test_folders_have_no_suffix_and_files_have_one(tmp_path: Path) -> None:
    hook, run = CheckpointHook(interval=2, by_epoch=False, save_best="mIoU"), runner(tmp_path)
    hook.before_train(run)
    for step, quality in ((2, 0.5), (4, 0.25), (6, 0.75)):
        run.iter = step - 1
        hook.after_train_iter(run, step - 1)
        run.iter = step
        hook.after_val_epoch(run, {"mIoU": quality})
    assert names(tmp_path) == ["best_mIoU_iter_6.pth", "iter_2", "iter_4", "iter_6"]


def test_the_only_checkpoint_is_not_removed_before_the_next_is_written() -> None:
    assert [CheckpointHook(max_keep_ckpts=number).max_keep_ckpts for number in (-1, 1, 2, 3)] == [-1, 2, 2, 3]


@pytest.mark.parametrize(
    ("options", "template"),
    [
        ({}, "epoch_{}"),
        ({"by_epoch": False}, "iter_{}"),
        ({"by_epoch": False, "save_optimizer": False}, "iter_{}.pth"),
        ({"filename_tmpl": "step_{}"}, "step_{}"),
    ],
)
def test_names(options: dict[str, Any], template: str) -> None:
    assert CheckpointHook(**options).filename_tmpl == template


def test_earlier_names_go_when_their_time_has_come(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (tmp_path / f"iter_{step}.pth").mkdir()
    hook, run = CheckpointHook(interval=2, by_epoch=False, max_keep_ckpts=2), runner(tmp_path, keep_ckpt_ids=[2, 4, 6])
    hook.before_train(run)
    assert names(tmp_path) == ["iter_4.pth", "iter_6.pth"]
    for step, left in ((8, ["iter_6.pth", "iter_8"]), (10, ["iter_10", "iter_8"])):
        run.iter = step - 1
        hook.after_train_iter(run, step - 1)
        assert names(tmp_path) == left


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ({}, {"type": "rmoe.CheckpointHook", "interval": 1}),
        ({"checkpoint": None}, None),
        ({"checkpoint": {"type": "CheckpointHook", "interval": 3}}, {"type": "rmoe.CheckpointHook", "interval": 3}),
        ({"checkpoint": {"type": "mmengine.CheckpointHook"}}, {"type": "rmoe.CheckpointHook"}),
    ],
)
def test_a_config_of_mmengine_gets_it(hooks: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    cfg = Config.fromfile(write_config(tmp_path / "toy_run.py"))
    cfg.default_hooks, cfg.custom_hooks = hooks, [{"type": "CheckpointHook", "interval": 7}]
    prepare(
        cfg, {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 0}}, 1, tmp_path / "w", False
    )
    assert cfg.default_hooks.checkpoint == expected
    assert {"type": "rmoe.CheckpointHook", "interval": 7} in cfg.custom_hooks


@pytest.mark.parametrize(
    ("saver", "intervals", "name"),
    [
        ({"interval": 3}, [4], "the checkpoint interval, 3"),
        ({"interval": 4, "save_begin": 1}, [4], "save_begin, 1"),
        ({"interval": 4, "save_best": "mIoU"}, [4, 3], "the validation interval, 3"),
        ({"interval": 4}, [4, 3], ""),
        ({"interval": 4, "save_begin": 2, "save_best": "mIoU"}, [4, 2], ""),
    ],
)
def test_checkpoints_between_the_parts_of_a_step_are_refused_before_training(
    saver: dict[str, Any], intervals: list[int], name: str
) -> None:
    run = object.__new__(TrainingRunner)
    run._hooks = [CheckpointHook(by_epoch=False, **saver)]
    run.strategy = SimpleNamespace(layout=SimpleNamespace(accumulation=2))
    refused = pytest.raises(UserError, match=f"{name}, is not a multiple of gradient_accumulation_steps 2")
    with refused if name else nullcontext():
        run._check_accumulation(SimpleNamespace(max_iters=8, dynamic_intervals=intervals))


def test_a_checkpoint_between_the_parts_of_a_step_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    strategy: Any = object.__new__(Strategy)
    strategy.model, strategy.layout = SimpleNamespace(micro_steps=5), SimpleNamespace(accumulation=4)
    with pytest.raises(UserError, match="iter_5 would be saved after 1 of the 4 iterations of a step"):
        strategy.save_checkpoint(str(tmp_path / "iter_5"))
    assert not (tmp_path / "iter_5").exists()
