"""Predictions on validation images, routing and norms: as files, and as TensorBoard reads its events."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from mmengine.visualization import Visualizer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.layers import Mlp
from torch import nn

from rmoe.config import ResidualMoEConfig
from rmoe.engine.gate_hooks import GateBalanceHook
from rmoe.engine.predictions import PredictionsHook
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect


class Images:
    metainfo: ClassVar = {"classes": ("dark", "light")}

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": torch.rand(3, 8, 8), "labels": index % 2}


class Runner:
    """What the hooks look at: a model that answers "light", and mmengine's visualizer."""

    max_iters, iter = 10, 4

    def __init__(self, folder: Path) -> None:
        backends = [{"type": "LocalVisBackend"}, {"type": "TensorboardVisBackend"}]
        self.work_dir, self.logs = str(folder), folder / "logs"
        self.visualizer = Visualizer(vis_backends=backends, save_dir=str(self.logs))
        self.model, self.val_dataloader = self, SimpleNamespace(dataset=Images())
        self.logger = logging.Logger("test")
        self.logger.addHandler(logging.StreamHandler(sys.stdout))
        config = ResidualMoEConfig(num_experts=4, noise=0.0, residual="full")
        self.module = nn.Sequential(nn.Identity(), ResidualMoE(Mlp(2, 4), config))

    def zero_optimization_partition_weights(self) -> bool:
        return False

    def test_step(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"logits": torch.tensor([0.0, 1.0])}]

    def events(self) -> EventAccumulator:
        self.visualizer.close()
        (path,) = self.logs.rglob("events.out.tfevents*")
        return EventAccumulator(str(path)).Reload()


def test_predictions_are_in_files_and_in_tensorboard(tmp_path):
    runner, hook = Runner(tmp_path), PredictionsHook(images=3)
    for runner.iter in (4, 8):
        for batch in range(3):
            hook.after_val_iter(runner, batch, outputs=[{"logits": torch.zeros(2)}])
    index = json.loads((tmp_path / "predictions" / "index.json").read_text())
    assert index["step"] == 8
    assert [item["name"] for item in index["items"]] == ["image 0", "image 4", "image 8"]
    assert index["items"][0]["caption"] == "light 73%, dark 27%"
    assert index["items"][1]["true_caption"] == "dark"
    with Image.open(tmp_path / "predictions" / index["items"][2]["image"]) as image:
        assert image.size == (8, 8)
    events = runner.events()
    assert events.Tags()["images"] == ["prediction_0", "prediction_1", "prediction_2"]
    assert [one.step for one in events.Images("prediction_1")] == [4, 8]
    assert events.Images("prediction_1")[0].height > 8  # with its captions


def test_routing_and_norms_are_in_tensorboard(tmp_path):
    runner, hook = Runner(tmp_path), GateBalanceHook(interval=5)
    hook.before_train(runner)
    layer = runner.module[1]
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(4)[:, :2])
        for x in layer.residuals():
            x[1] = 2.0
        layer.core.fc1.weight.fill_(1.0)
        layer.core.fc2.weight.fill_(1.0)
    with collect() as runner.records:
        runner.module(torch.tensor([[4.0, 1.0], [1.0, 4.0], [5.0, 0.0], [3.0, 1.0]]))
    hook.after_train_iter(runner, 4)
    events = runner.events()
    value = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert [value[f"load/1/{e}"] for e in range(4)] == [0.75, 0.25, 0.0, 0.0]
    assert value["gate/1/largest_share"] == 0.75
    assert 0.25 < value["gate/1/confidence"] < 1
    # of four experts one has twice the core's weights
    assert value["residual/1"] == pytest.approx(0.5)
    assert events.Scalars("residual/1")[0].step == 5


@pytest.mark.parametrize("images", [0, 3])
def test_nothing_is_drawn_where_there_is_nothing_to_draw(images, tmp_path):
    runner, hook = Runner(tmp_path), PredictionsHook(images=images)
    hook.after_val_iter(runner, 0, outputs=[{"logits": torch.zeros(2)}] if not images else [torch.zeros(2)])
    hook.after_val_iter(runner, 1, outputs=[{"logits": torch.zeros(2)}])
    assert not (tmp_path / "predictions").exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    runner, hook = Runner(tmp_path), PredictionsHook(images=1)
    runner.work_dir = str(tmp_path / "logs.txt")
    Path(runner.work_dir).write_text("")
    hook.after_val_iter(runner, 0, outputs=[{"logits": torch.zeros(2)}])
    assert "the predictions on validation images could not be written" in capsys.readouterr().out


@pytest.mark.parametrize("images", [-1, 1.5, "6", True, None])
def test_numbers_of_images(images):
    with pytest.raises(UserError, match=r"rmoe\.PredictionsHook: images is"):
        PredictionsHook(images=images)
