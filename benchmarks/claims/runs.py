"""The runs of the arms: their configs, which comes after which, and training them side by side."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.claims.arms import ANALYSED, CATEGORIES, HEADLINE, MODEL, TASKS, UPSTREAM, Arm, Size
from benchmarks.common import Row
from rmoe.pipelines import Training, installed, moved, with_classes
from rmoe.reporting.report import analyze
from rmoe.reporting.runs import Run

BASES = Path("rmoe/configs/demo")
DATA = Path("work_dirs/demo/data")  # where the configs there look for their data
JSON = "ds_configs/zero0.json"

# A run's key: (stage or arm, "upstream" or task, seed).
Key = tuple[str, str, int]


def carry_out(folder: Path, size: Size, arms: Mapping[str, Arm], jobs: int) -> tuple[dict[Key, Training], list[Row]]:
    """Renders the data and runs what is not complete; returns the runs, and `describe` of each."""
    _render(folder / "data/pictures", size.pictures)
    _render(folder / "data/scenes", size.scenes)
    runs = plan(folder, size, arms)
    execute(list(runs.values()), jobs)
    return runs, [describe(key, training) for key, training in runs.items()]


def plan(folder: Path, size: Size, arms: Mapping[str, Arm]) -> dict[Key, Training]:
    """Returns all runs, each after those that it starts from; by task, then by seed."""
    runs: dict[Key, Training] = {}

    def upstream(stage: str, seed: int) -> Training:
        key = (stage, "upstream", seed)
        if key not in runs:
            one = UPSTREAM[stage]
            before = () if one.after is None else (upstream(one.after, seed),)
            steps = max(1, round(one.share * size.upstream_steps))
            config = _demo("core.py")
            options = {
                **moved(config, DATA, folder / "data/pictures"),
                "stage": stage,
                "model.core": str(before[0].folder) if before else None,
            }
            options |= {f"model.{key}": value for key, value in MODEL.items()}
            _change(config, steps, size.batch["upstream"], seed, options, "model", one.moe)
            runs[key] = _training(folder / f"{stage}_{seed}", config, before)
        return runs[key]

    for task_name in size.tasks:
        task = TASKS[task_name]
        for seed in sorted({*size.seeds, *size.headline_seeds}):
            for name, arm in arms.items():
                if seed not in (size.headline_seeds if name in HEADLINE else size.seeds):
                    continue
                before = upstream(arm.upstream, seed)
                config = _demo(task.base)
                options = {
                    **moved(config, DATA, folder / "data/scenes"),
                    **with_classes(config, task.stuff + CATEGORIES),
                    "stage": name,
                    "model.backbone.core": str(before.folder),
                    **task.options,
                    **arm.options,
                }
                options |= {f"model.backbone.{key}": value for key, value in MODEL.items()}
                steps, batch = size.steps[task_name], size.batch[task_name]
                _change(config, steps, batch, seed, options, "model.backbone", arm.moe)
                place = folder / f"{task_name}_{steps}" / f"{name.replace(' ', '_')}_{seed}"
                runs[(name, task_name, seed)] = _training(place, config, (before,))
    return runs


def _demo(name: str) -> Config:
    """Returns a config of the demo without its card, which would not be true of these runs."""
    config = Config.fromfile(BASES / name, import_custom_modules=False)
    config.pop("card")
    return config


def _change(
    config: Config,
    steps: int,
    batch: int,
    seed: int,
    options: Mapping[str, Any],
    place: str,
    moe: Mapping[str, Any] | None,
) -> None:
    """Gives a demo config another length, seed and mixture."""
    warmup = max(1, steps // 10)
    config.merge_from_dict(
        {
            "train_cfg.max_iters": steps,
            "train_cfg.val_interval": steps,
            "param_scheduler.0.end": warmup,
            "param_scheduler.1.begin": warmup,
            "param_scheduler.1.end": steps,
            "default_hooks.checkpoint.interval": max(1, steps // 4),
            "train_dataloader.batch_size": batch,
            "randomness.seed": seed,
            **options,
            **({f"{place}.moe": dict(moe)} if moe else {}),
        }
    )


def _training(folder: Path, config: Config, after: tuple[Training, ...]) -> Training:
    path = folder.with_name(f"{folder.name}.py")  # a name may have a dot
    path.parent.mkdir(parents=True, exist_ok=True)
    config.dump(path)
    return Training(folder, str(path), JSON, after=after)


def execute(runs: Sequence[Training], jobs: int) -> None:
    """Runs them all, `jobs` at a time, each on one core, with their progress on the terminal.

    Raises:
        rmoe.pipelines.Failed: of the first run that failed; the others that had begun are finished first.
    """
    # The same everywhere: on the CPU, whatever the machine has.
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    overall, single, lock = Progress(*columns), Progress(*columns), threading.Lock()
    total = overall.add_task("runs", total=len(runs))
    done: set[Path] = set()

    def one(training: Training) -> Training:
        bar = single.add_task(str(training.folder), total=None)

        def show(step: int, steps: int, loss: str) -> None:
            single.update(bar, completed=step, total=steps)

        try:
            training.run(show)
        finally:
            with lock:
                single.remove_task(bar)
        return training

    with Live(Group(overall, single), refresh_per_second=2), ThreadPoolExecutor(jobs) as pool:
        waiting, running = list(runs), set[Future[Training]]()
        while waiting or running:
            ready = [training for training in waiting if all(before.folder in done for before in training.after)]
            for training in ready[: jobs - len(running)]:
                waiting.remove(training)
                running.add(pool.submit(one, training))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done.add(future.result().folder)
                overall.advance(total)


def describe(key: Key, training: Training) -> Row:
    """Returns what claims_runs.json says of a run."""
    name, where, seed = key
    found = json.loads((training.folder / "cost.json").read_text())
    kept = ("device_seconds", "steps", "images", "flops_per_step", "params_total", "params_active", "params_trainable")
    run = {"arm": name, "where": where, "seed": seed, "fingerprint": training.fingerprint()[:12]}
    finished = Run(training.folder)
    done = {"device": found["device"], "commit": found["software"]["commit"], "train_loss": finished.train_loss()}
    return run | finished.values() | done | {name: found[name] for name in kept}


def look_inside(runs: Mapping[Key, Training], seed: int, names: Iterable[str], out: Path) -> None:
    """Does what `rmoe analyze` does, for those of the `ANALYSED` runs that there are; into OUT/NAME."""
    for name in names:
        after, before = ANALYSED[name]
        if (*after, seed) in runs:
            analyze(runs[*after, seed].folder, out / name, before and runs[*before, seed].folder)


def _render(folder: Path, parameters: Mapping[str, str]) -> None:
    words = [f"--{name}={value}" for name, value in parameters.items()]
    subprocess.run(installed(["rmoe", "data", "scenes", str(folder), *words]), check=True)
