"""What runs achieved and what they cost: a table, `summary.json`, and pictures; and what a mixture is inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine.registry import init_default_scope
from rich.console import Console

from rmoe.engine.lock import check_folder
from rmoe.errors import UserError
from rmoe.inference.load import quiet
from rmoe.inference.runs import ANALYSIS, ANALYSIS_JSON, Run, runs_in
from rmoe.moe.state import moe_layers
from rmoe.reporting.analysis import layer_means, load_statistics
from rmoe.reporting.comparison import Comparison, Group, compare
from rmoe.reporting.page import render
from rmoe.reporting.pictures import (
    draw_detections,
    draw_experts,
    draw_load,
    draw_movement,
    draw_norms,
    draw_predictions,
    draw_weights,
)
from rmoe.reporting.terminal import show, show_inside
from rmoe.reporting.weights import movement, weight_statistics

SCENES = 6
_TITLES = {"residual": "RMoE"}


def report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    html: str | Path | None = None,
    json_file: str | Path | None = None,
) -> Comparison:
    """Prints runs and arms side by side, as wide as the terminal.

    Args:
        folders: work dirs; one of several tasks counts as a run of each. The arm of the first is what the others are
            compared with.
        out: folder for summary.json and pictures that the models draw on validation images: predictions.png of runs of
            segmentation, detections.png of those of detection, experts_RUN.png of each mixture among them. Then
            majorities are told, too. It takes the data sets, and finished runs alone.
        html: file for a page with everything, which needs the work dirs alone.
        json_file: file for everything that is printed, and costs in full.

    Raises:
        UserError: a folder that is no run's, or is damaged; a file that cannot be written.
    """
    with quiet():
        runs = [run for folder in folders for run in runs_in(Path(folder))]
        if out is not None:
            check_folder(Path(out), "--out")
            for run in runs:
                run.cost()
                run.values()
        found = compare(runs, _majorities(runs) if out is not None else None)
        text = json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n"
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            _write(Path(out) / "summary.json", text, "--out")
            tasks = [group.entries[0].run.task.name for group in found.groups]
            for number, group in enumerate(found.groups):
                before = tasks[:number].count(tasks[number])
                _draw(group, Path(out), f"_{before + 1}" if before else "")
        if json_file is not None:
            _write(Path(json_file), text, "--json")
        if html is not None:
            _write(Path(html), render(found), "--html")
    show(found, Console())
    return found


def _write(path: Path, text: str, option: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; give another {option}") from error


def _draw(group: Group, out: Path, suffix: str) -> None:
    """Draws what the models of a group answer, and where their tokens go; `suffix` is of the pictures' names."""
    draw, name = {
        "segmentation": (draw_predictions, f"predictions{suffix}.png"),
        "detection": (draw_detections, f"detections{suffix}.png"),
    }.get(group.entries[0].run.task.name, (None, ""))
    if draw is None:
        return
    arms = [entry.arm for entry in group.entries]
    models = [(entry, entry.run.model()) for entry in group.entries]
    scenes = group.entries[0].run.scenes(SCENES)
    titles = [
        _TITLES.get(arm, arm) if arms.count(arm) == 1 else entry.name
        for entry, arm in zip(group.entries, arms, strict=True)
    ]
    draw(scenes, [(title, model) for title, (_, model) in zip(titles, models, strict=True)]).savefig(out / name)
    for entry, model in models:
        if moe_layers(model):
            draw_experts(scenes, model).savefig(out / f"experts_{entry.name.replace('/', '_')}.png")


def analyze(
    folder: str | Path,
    out: str | Path | None = None,
    before: str | Path | None = None,
    images: int = 100,
    task: str | None = None,
) -> dict[str, Any]:
    """Looks into the mixture of a finished run: prints a table, writes OUT/analysis.json, and draws OUT/weights.png,
    OUT/load.png and OUT/experts.png; OUT/norms.png, if the run has logged norms; with an earlier run, OUT/movement.png.

    Args:
        folder: work dir of the run.
        out: folder for the results; made if need be. Without it they are in the work dir, where a report finds them.
        before: work dir of a run of the same experts, such as the upstream one that this one started from; of several
            tasks it has this one, too.
        images: validation images that are sent through the gates.
        task: which one, of a run of several, whose results are in a folder of that name.

    Returns:
        What analysis.json holds: by layer, see `LayerWeights`, `LayerLoad` and `LayerMovement`.

    Raises:
        UserError: no finished run's work dir, a dense model, or two runs with other experts.
    """
    if images < 1:
        raise UserError(f"--images is {images}; it is at least 1")
    with quiet():
        run = Run(Path(folder), task=task)
        out = Path(out) if out is not None else run.left(ANALYSIS)
        check_folder(out, "--out")
        model = run.model()
        weights = weight_statistics(model)
        moved = movement(_earlier(Path(before), task).model(), model) if before else {}
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
        (out / ANALYSIS_JSON).write_text(json.dumps(found, indent=1) + "\n")
        draw_weights(weights).savefig(out / "weights.png")
        draw_load(load).savefig(out / "load.png")
        draw_experts(scenes[:: max(1, len(scenes) // SCENES)][:SCENES], model).savefig(out / "experts.png")
        if norms := run.residual_norms():
            draw_norms(norms).savefig(out / "norms.png")
        if before:
            draw_movement(moved).savefig(out / "movement.png")
    lines = {name.removesuffix(".mlp"): layer_means(weights[name], load[name], moved.get(name)) for name in weights}
    show_inside(lines, Console())
    return found


def _earlier(folder: Path, task: str | None) -> Run:
    """Returns the run in a folder; of a run of several tasks, that of the same task."""
    return Run(folder, task=task if runs_in(folder)[0].part else None)


def _majorities(runs: Sequence[Run]) -> list[dict[str, float]]:
    """Returns, for each run, what its metrics give to the commonest class; computed once for runs on the same data."""
    known: dict[str, dict[str, float]] = {}
    keys = [str([run.config[f"{split}_dataloader"].dataset for split in ("train", "val")]) for run in runs]
    for key, run in zip(keys, runs, strict=True):
        if key not in known:
            known[key] = run.task.majority(run.dataset("train"), run.dataset("val"))
    return [known[key] for key in keys]
