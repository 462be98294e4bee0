"""Runs of a few steps, of each task, as `rmoe train` leaves them: trained once for all tests of a session."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_processes
from mmengine.config import Config

from rmoe.data.emoji_scenes.params import SceneParams
from rmoe.data.emoji_scenes.scenes import render
from rmoe.pipelines import moved, with_classes

DEMO = Path("work_dirs/demo")  # as the configs have it
SIDE = 64
SCENES = SceneParams(
    upstream_classes=4, upstream_train=4, upstream_val=3, scene_size=SIDE, scenes_train=4, scenes_val=6, categories=3
)
SEGMENTATION = {
    "model.backbone.moe.train_core": False,  # as an adapter needs it
    "model.decode_head.loss_decode.class_weight": None,
    "train_cfg.val_interval": 30,  # of 500 steps: of 16, each
    "default_hooks.checkpoint.save_best": "mIoU",
    "custom_hooks": [{"type": "rmoe.EMAHook", "momentum": 0.3}],
    "optim_wrapper.optimizer.lr": 3e-3,
}
DETECTION = {"model.test_cfg.rcnn.score_thr": 0.0}
RUNS: dict[str, tuple[int, int, dict[str, Any]]] = {  # by the names of the configs: classes, steps, what is changed
    "core": (4, 2, {"train_dataloader.batch_size": 4}),
    "residual": (11, 16, SEGMENTATION),
    "detection_residual": (3, 2, DETECTION),
}


@dataclass(frozen=True)
class Runs:
    """Their work dirs and the data set, which is in ADE20K's, COCO's and ImageNet's layout."""

    folder: Path

    classifier = property(lambda self: self.folder / "core")
    segmentor = property(lambda self: self.folder / "residual")
    detector = property(lambda self: self.folder / "detection_residual")
    data = property(lambda self: self.folder / "data")

    def logged(self, run: Path) -> list[dict[str, float]]:
        """What was logged of each evaluation, the first one first."""
        (log,) = run.glob("*/vis_data/scalars.json")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [line for line in lines if "data_time" in line and "loss" not in line]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    render(folder / "data", SCENES)
    commands = []
    for name, (classes, steps, changed) in RUNS.items():
        config = Config.fromfile(ROOT / f"rmoe/configs/demo/{name}.py", import_custom_modules=False)
        config.merge_from_dict(moved(config, DEMO, folder) | with_classes(config, classes) | changed)
        config.dump(folder / f"{name}.py")
        words = [str(folder / f"{name}.py"), "--deepspeed_config", "zero0.json", "--work-dir", str(folder / name)]
        commands.append([*words, "--steps", str(steps)])
    (folder / "commands.json").write_text(json.dumps(commands))
    run_processes(folder, [ROOT / "tests" / "several_runs.py", folder / "commands.json"], timeout=280)
    outcomes = json.loads((folder / "commands.json.0").read_text())
    assert outcomes == ["done"] * len(RUNS), outcomes
    return Runs(folder)
