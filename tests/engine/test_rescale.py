"""`--steps N`: the whole schedule of a config in proportion."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS

from rmoe.engine.rescale import rescale
from rmoe.engine.shipped import CONFIGS
from rmoe.errors import UserError

NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.py") if path.parent.name != "_base_")
SCHEDULES = ["demo/core.py", "segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py"]
SCHEDULES += [f"detection/mask_rcnn_swin_tiny_dense_coco_{times}x.py" for times in (1, 3)]
SCHEDULES += ["detection/atss_dyhead_swin_tiny_dense_coco_2x.py", "upstream/swin_tiny_core_imagenet1k.py"]
READ = {name: Config.fromfile(CONFIGS / name, import_custom_modules=False) for name in NAMES}


def scaled(name: str, steps: int, content: dict[str, Any] | None = None, **options: Any) -> Config:
    cfg = copy.deepcopy(READ[name])
    cfg.merge_from_dict(options)
    rescale(cfg, steps, content or {}, 1, options)
    return cfg


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 12345])
def test_every_schedule_ends_with_training(name: str, steps: int) -> None:
    cfg = scaled(name, steps)
    assert cfg.train_cfg.max_iters == steps
    assert cfg.param_scheduler[0].begin == 0
    assert cfg.param_scheduler[-1].end == steps
    for one, following in zip(cfg.param_scheduler, cfg.param_scheduler[1:], strict=False):
        assert one.begin < one.end == following.begin < following.end
    assert cfg.train_cfg.val_interval >= 1
    assert cfg.default_hooks.checkpoint.interval >= 1


def rates(schedules: list[Any], steps: int) -> list[float]:
    """The learning rate of each step, of 1 at its highest."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    built = [PARAM_SCHEDULERS.build(dict(one), default_args={"optimizer": optimizer}) for one in schedules]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        for one in built:
            one.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 400])
def test_the_whole_rate_is_reached_and_left(name: str, steps: int) -> None:
    found = rates(scaled(name, steps).param_scheduler, steps)
    assert max(found) == pytest.approx(1, rel=0.02)
    assert steps < 10 or found[-1] < 0.2
    long = READ[name].param_scheduler
    if steps == 400:
        assert found[0] == pytest.approx(long[0].start_factor)


def test_by_hand() -> None:
    cfg = scaled("demo/core.py", 80)  # of 800: warm-up of 80, checkpoints every 200, a log line every 50
    assert [(one.begin, one.end) for one in cfg.param_scheduler] == [(0, 8), (8, 80)]
    assert (cfg.train_cfg.val_interval, cfg.default_hooks.checkpoint.interval) == (80, 20)
    assert cfg.default_hooks.logger.interval == 5
    milestones = scaled("detection/mask_rcnn_swin_tiny_dense_coco_1x.py", 1200).param_scheduler[1].milestones
    assert milestones == [800 - 14, 1100 - 14]


def test_longer_too() -> None:
    cfg = scaled("demo/core.py", 1600)
    assert [(one.begin, one.end) for one in cfg.param_scheduler] == [(0, 160), (160, 1600)]
    assert cfg.default_hooks.checkpoint.interval == 400


def test_intervals_hold_whole_updates() -> None:
    cfg = scaled("demo/core.py", 60, {"gradient_accumulation_steps": 4})
    assert cfg.train_cfg.val_interval == 60
    assert cfg.default_hooks.checkpoint.interval == 16
    assert scaled("demo/core.py", 8, {"gradient_accumulation_steps": 4}).default_hooks.checkpoint.interval == 4
    auto = scaled("demo/core.py", 9, {}, **{"optim_wrapper.accumulative_counts": 3})
    assert auto.default_hooks.checkpoint.interval == 3


def test_options_win() -> None:
    cfg = scaled("demo/core.py", 80, None, **{"default_hooks.logger.interval": 3, "train_cfg.val_interval": 7})
    assert cfg.default_hooks.logger.interval == 3
    assert cfg.train_cfg.val_interval == 7
    assert cfg.default_hooks.checkpoint.interval == 20


def test_two_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="--steps 5 and --cfg-options train_cfg.max_iters both"):
        scaled("demo/core.py", 5, None, **{"train_cfg.max_iters": 9})


@pytest.mark.parametrize(
    "changes",
    [
        {"train_cfg": {"_delete_": True, "by_epoch": True, "max_epochs": 3}},
        {"param_scheduler": [{"type": "CosineAnnealingLR", "T_max": 3}]},
    ],
)
def test_epochs_are_refused(changes: dict[str, Any]) -> None:
    cfg = copy.deepcopy(READ["demo/core.py"])
    cfg.merge_from_dict(changes)
    with pytest.raises(UserError, match="trains or schedules by epochs"):
        rescale(cfg, 5, {}, 1, {})


def test_what_is_left_out_is_told() -> None:
    notes = rescale(copy.deepcopy(READ["demo/core.py"]), 10, {}, 1, {})
    assert len(notes) == 2
    assert "scaled by 0.0125" in notes[0]
    assert "LinearLR is left out" in notes[1]


def test_options_mean_the_schedules_of_the_config(tmp_path: Path) -> None:
    """By their number in it, also where one is left out; and one that an option lengthens is not."""
    (only,) = scaled("demo/core.py", 10, None, **{"param_scheduler.1.eta_min": 1e-4}).param_scheduler
    assert (only.type, only.eta_min) == (READ["demo/core.py"].param_scheduler[1].type, 1e-4)
    (only,) = scaled("demo/core.py", 10, None, **{"param_scheduler.0.start_factor": 0.5}).param_scheduler
    assert "start_factor" not in only
    first, _ = scaled("demo/core.py", 10, None, **{"param_scheduler.0.end": 3}).param_scheduler
    assert (first.type, first.end) == ("LinearLR", 3)


@pytest.mark.parametrize(
    ("content", "processes", "begin"),
    [
        ({"gradient_accumulation_steps": 4}, 1, 32),
        ({"train_batch_size": 4 * 32}, 1, 32),
        ({"train_batch_size": 4 * 32}, 4, 30),
        ({"train_batch_size": 4 * 32, "train_micro_batch_size_per_gpu": 8}, 4, 32),
        ({"train_batch_size": "a typo, which is refused elsewhere"}, 1, 30),
    ],
)
def test_checkpoints_stay_at_whole_steps(content: dict[str, Any], processes: int, begin: int) -> None:
    cfg = copy.deepcopy(READ["demo/core.py"])
    assert cfg.train_dataloader.batch_size == 32
    cfg.default_hooks.checkpoint.save_begin = 400
    rescale(cfg, 60, content, processes, {})
    assert cfg.default_hooks.checkpoint.save_begin == begin


def test_lengths_that_a_schedule_counts_from_its_begin(tmp_path: Path) -> None:
    cfg = Config({"train_cfg": {"max_iters": 100}, "optim_wrapper": {}})
    common = {"by_epoch": False, "begin": 20}
    cfg.param_scheduler = [dict(common, type="CosineAnnealingLR", T_max=80), dict(common, type="StepLR", step_size=30)]
    rescale(cfg, 10, {}, 1, {})
    assert [one.begin for one in cfg.param_scheduler] == [2, 2]
    assert (cfg.param_scheduler[0].T_max, cfg.param_scheduler[1].step_size) == (8, 3)
