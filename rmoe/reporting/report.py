"""What runs achieved and what they cost: a table, `summary.json`, and pictures; and what a mixture is inside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine.registry import init_default_scope
from rich.console import Console
from rich.table import Table

from rmoe.engine.lock import check_folder
from rmoe.errors import UserError
from rmoe.moe.state import moe_layers
from rmoe.reporting.analysis import (
    LayerLoad,
    LayerMovement,
    LayerWeights,
    layer_means,
    load_statistics,
    movement,
    weight_statistics,
)
from rmoe.reporting.pictures import (
    draw_detections,
    draw_experts,
    draw_load,
    draw_movement,
    draw_predictions,
    draw_weights,
)
from rmoe.reporting.runs import Row, Run

SCENES = 6
_TITLES = {"residual": "RMoE"}
_WIDTH = 150  # columns of the table: not cut when the output is a file


def report(folders: Sequence[str | Path], out: str | Path) -> list[Row]:
    """Prints the table of the runs, writes OUT/summary.json, and draws: OUT/predictions.png of runs of segmentation,
    OUT/detections.png of those of detection, and OUT/experts_RUN.png of each mixture among them.

    Args:
        folders: work dirs of finished runs.
        out: folder for the results; made if need be.

    Raises:
        UserError: a folder that is no finished run's.
    """
    runs, out = [Run(Path(folder)) for folder in folders], Path(out)
    check_folder(out, "--out")
    rows = [row for run, majority in zip(runs, _majorities(runs), strict=True) for row in run.rows(majority)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    for task, draw, name in (
        ("segmentation", draw_predictions, "predictions.png"),
        ("detection", draw_detections, "detections.png"),
    ):
        if mine := [run for run in runs if run.task.name == task]:
            models = {run.folder.name: (_TITLES.get(run.arm, run.arm), run.model()) for run in mine}
            scenes = mine[0].scenes(SCENES)
            draw(scenes, list(models.values())).savefig(out / name)
            for folder, (_, model) in models.items():
                if moe_layers(model):
                    draw_experts(scenes, model).savefig(out / f"experts_{folder}.png")
    Console(width=_WIDTH).print(table(rows))
    return rows


def analyze(folder: str | Path, out: str | Path, before: str | Path | None = None, images: int = 100) -> dict[str, Any]:
    """Looks into the mixture of a finished run: prints a table, writes OUT/analysis.json, and draws OUT/weights.png,
    OUT/load.png and OUT/experts.png; with an earlier run, OUT/movement.png.

    Args:
        folder: work dir of the run.
        out: folder for the results; made if need be.
        before: work dir of a run of the same experts, such as the upstream one that this one started from.
        images: validation images that are sent through the gates.

    Returns:
        What analysis.json holds: by layer, see `rmoe.reporting.analysis`.

    Raises:
        UserError: no finished run's work dir, a dense model, or two runs with other experts.
    """
    if images < 1:
        raise UserError(f"--images is {images}; it is at least 1")
    run, out = Run(Path(folder)), Path(out)
    check_folder(out, "--out")
    model = run.model()
    weights = weight_statistics(model)
    moved = movement(Run(Path(before)).model(), model) if before else {}
    init_default_scope(run.config.default_scope)
    scenes = run.scenes(images)
    classes = list(scenes[0].dataset.metainfo["classes"])
    load = load_statistics(model, scenes, classes)
    out.mkdir(parents=True, exist_ok=True)
    layers = {
        name: {"weights": asdict(weights[name]), "load": asdict(load[name])}
        | ({"movement": asdict(moved[name])} if before else {})
        for name in weights
    }
    found = {"run": str(folder), "before": before and str(before), "images": len(scenes), "layers": layers}
    (out / "analysis.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_weights(weights).savefig(out / "weights.png")
    draw_load(load).savefig(out / "load.png")
    draw_experts(scenes[:: max(1, len(scenes) // SCENES)][:SCENES], model).savefig(out / "experts.png")
    if before:
        draw_movement(moved).savefig(out / "movement.png")
    Console(width=_WIDTH).print(_inside(weights, load, moved))
    return found


def _inside(
    weights: Mapping[str, LayerWeights], load: Mapping[str, LayerLoad], moved: Mapping[str, LayerMovement]
) -> Table:
    drawn = Table(title="means over a layer's experts")
    drawn.add_column("layer", no_wrap=True)
    lines = {name: layer_means(weights[name], load[name], moved.get(name)) for name in weights}
    for head, value in next(iter(lines.values())).items():
        if value is not None:
            drawn.add_column(head, justify="right")
    for name, line in lines.items():
        drawn.add_row(name.removesuffix(".mlp"), *(f"{x:.3f}" for x in line.values() if x is not None))
    return drawn


def table(rows: Sequence[Row]) -> Table:
    """Returns the rows as a table for a terminal."""
    texts = ("task", "arm", "metric")
    heads = (*texts, "value", "majority", "train s", "device s", "GFLOP/step", "params", "active", "trainable")
    drawn = Table(title="value and majority in %; majority: always answering the commonest class")
    for head in heads:
        drawn.add_column(head, justify="left" if head in texts else "right")
    for row in rows:
        numbers = (row.value, row.majority, row.train_seconds, row.device_seconds, row.flops_per_step / 1e9)
        counts = (row.params_total, row.params_active, row.params_trainable)
        drawn.add_row(row.task, row.arm, row.metric, *(f"{x:.2f}" for x in numbers), *(f"{x:,}" for x in counts))
    return drawn


def _majorities(runs: Sequence[Run]) -> list[dict[str, float]]:
    """Returns, for each run, what its metrics give to the commonest class; computed once for runs on the same data."""
    known: dict[str, dict[str, float]] = {}
    keys = [str([run.config[f"{split}_dataloader"].dataset for split in ("train", "val")]) for run in runs]
    for key, run in zip(keys, runs, strict=True):
        if key not in known:
            known[key] = run.task.majority(run.dataset("train"), run.dataset("val"))
    return [known[key] for key in keys]
