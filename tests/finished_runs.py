"""Work dirs as runs leave them, without any training: what a report reads, by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from rmoe.engine.predictions import FOLDER, write_pictures
from rmoe.tasks.scenes import Picture

COST = {
    "stage": "dense",
    "device": "a CPU",
    "devices": 2,
    "train_seconds": 12.5,
    "device_seconds": 25.0,
    "flops_per_step": 3_000_000_000,
    "steps": 7,
    "params_total": 300_000,
    "params_active": 200_000,
    "params_trainable": 100_000,
    "command": ["launch/train.py", "config.py", "--work-dir", "x y"],
    "software": {"python": "3.11", "torch": "2.11", "commit": "0123abc-dirty"},
}
LAYER = "backbone.model.layers.2.blocks.1.mlp"


def finished_run(
    folder: Path,
    stage: str = "dense",
    seed: int = 0,
    value: float | None = 40.0,
    *,
    data: str = "scenes",
    config: Mapping[str, Any] | None = None,
    losses: Sequence[float] = (3.0, 2.0, 1.0),
    classes: Mapping[str, float] | None = None,
    cost: Mapping[str, Any] | None = COST,
) -> Path:
    """Makes the work dir of a run of segmentation.

    Args:
        folder: to make.
        stage: of the pipeline.
        seed: of the run.
        value: its mIoU in percent; None for a run that was not evaluated.
        data: the data set.
        config: more of the config, by dotted keys.
        losses: as logged.
        classes: IoU in percent by class, as mmseg logs them.
        cost: content of cost.json; None for none.
    """
    logs = folder / "20260101_000000" / "vis_data"
    logs.mkdir(parents=True)
    cfg = Config(
        {
            "stage": stage,
            "model": {"type": "EncoderDecoder", "backbone": {"core": f"runs/core_{seed}"}},
            "val_dataloader": {"dataset": {"type": "rmoe.SegDataset", "data_root": data}},
            "val_evaluator": {"type": "IoUMetric"},
            "randomness": {"seed": seed},
            "work_dir": str(folder),
            "strategy": {"config": {"zero_optimization": {"stage": 2}}, "layout": {"processes": 2}},
        }
    )
    cfg.merge_from_dict(dict(config or {}))
    (folder / "config.py").write_text("\n".join(f"{key} = {item!r}" for key, item in cfg.to_dict().items()) + "\n")
    lines: list[dict[str, Any]] = [
        {"loss": loss, "lr": 1e-3 / step, "step": step} for step, loss in enumerate(losses, 1)
    ]
    if value is not None:
        lines += [{"mIoU": value / 2, "step": 2}, {"mIoU": value, "aAcc": 80.0, "step": len(losses)}]
    if stage != "dense":
        lines += [{f"gate/{LAYER}/entropy": 0.9, f"gate/{LAYER}/confidence": 0.3, "step": step} for step in (1, 3)]
        lines += [{f"load/{LAYER}/{e}": (e + 1) / 10 for e in range(4)} | {"step": 3}]
        lines += [{f"residual/{LAYER}": 0.01 * step, "step": step} for step in (1, 2, 3)]
    (logs / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if classes:
        rows = "".join(f"|   {name}   | {number:.2f} | 50.0 |\n" for name, number in classes.items())
        old = "per class results:\n+---+\n| Class | IoU | Acc |\n+---+\n|  sky | 1.0 | 2.0 |\n+---+\n"
        table = (
            f"per class results:\n2026 - INFO - \n+---+\n| Class | IoU | Acc |\n+---+\n{rows}+---+\n2026 - INFO - x\n"
        )
        (logs.parent / "run.log").write_text(old + table)
    if cost is not None:
        (folder / "cost.json").write_text(json.dumps({**cost, "stage": stage}))
    return folder


def add_predictions(folder: Path, names: Sequence[str] = ("a.jpg", "b.jpg"), shade: int = 200) -> None:
    """Adds stored predictions to a work dir: on images that are the same in every run."""
    shown = []
    for number, name in enumerate(names):
        image = np.full((40, 60, 3), 40 * number, dtype=np.uint8)
        image[10:30, 15:45] = 255 - 40 * number
        truth, answer = image.copy(), image.copy()
        truth[10:30, 15:45] = (200, 120, 0)
        answer[8:28, 15:45] = (shade, 0, 90)
        shown.append((name, Picture(image, truth, answer, f"{90 - number}% of the pixels right", "")))
    write_pictures(folder / FOLDER, shown, 3)


def add_analysis(folder: Path, classes: Sequence[str] = ("sky", "grass")) -> None:
    """Adds what `rmoe analyze` writes of one layer, but for the pictures."""
    load = {
        "load": [0.1, 0.2, 0.3, 0.4],
        "load_entropy": 0.92,
        "gate_entropy": 0.8,
        "by_class": {name: [1 + number, 2, 3, 4] for number, name in enumerate(classes)},
        "information": 0.12,
    }
    (folder / "analysis").mkdir()
    (folder / "analysis" / "analysis.json").write_text(
        json.dumps({"layers": {"layers.2.blocks.1.mlp": {"load": load}}})
    )
