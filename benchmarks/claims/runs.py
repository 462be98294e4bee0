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

from benchmarks.claims.arms import ANALYSED, CATEGORIES, HEADLINE, TASKS, UPSTREAM, Arm, Size, Upstream
from benchmarks.common import Row
from rmoe.inference.runs import Run
from rmoe.pipelines import Training, installed, moved, with_classes
from rmoe.reporting.report import analyze

BASES = Path("rmoe/configs/demo")
DATA = Path("work_dirs/demo/data")  # where the configs there look for their data
# Both compute in float32, which zero0.json does not on a GPU.
JSON = {"cpu": "ds_configs/zero0.json", "cuda": "ds_configs/zero0_fp32.json"}

# A run's key: (stage or arm, "upstream" or task, seed).
Key = tuple[str, str, int]


def carry_out(folder: Path, size: Size, arms: Mapping[str, Arm], jobs: int) -> tuple[dict[Key, Training], list[Row]]:
    """Renders the data and runs what is not complete; returns the runs, and `describe` of each."""
    render(folder / "data/pictures", size.pictures)
    render(folder / "data/scenes", size.scenes)
    runs = plan(folder, size, arms)
    execute(list(runs.values()), jobs)
    return runs, [describe(key, training) for key, training in runs.items()]


def plan(folder: Path, size: Size, arms: Mapping[str, Arm]) -> dict[Key, Training]:
    """Returns all runs, each after those that it starts from; by task, then by seed."""
    made = Trainings(folder, size, UPSTREAM, folder / "data")
    for task in size.tasks:
        for seed in sorted({*size.seeds, *size.headline_seeds}):
            for name, arm in arms.items():
                if seed in (size.headline_seeds if name in HEADLINE else size.seeds):
                    made.downstream(name, arm, task, seed)
    return made.runs


class Trainings:
    """Makes the runs of one size, each once, and writes their configs.

    Attributes:
        runs: those made so far, each after those that it starts from.
    """

    def __init__(
        self, folder: Path, size: Size, stages: Mapping[str, Upstream], data: Path, json: str = JSON["cpu"]
    ) -> None:
        self.runs: dict[Key, Training] = {}
        self._folder, self._size, self._stages, self._data, self._json = folder, size, stages, data, json

    def upstream(self, stage: str, seed: int) -> Training:
        """Returns the run of an upstream stage."""
        if (key := (stage, "upstream", seed)) not in self.runs:
            one, size = self._stages[stage], self._size
            before = () if one.after is None else (self.upstream(one.after, seed),)
            config = _demo("core.py")
            options = {
                **moved(config, DATA, self._data / "pictures"),
                "stage": stage,
                "model.core": str(before[0].folder) if before else None,
                **size.model(),
                **one.options,
            }
            steps = upstream_steps(one, size)
            _change(config, steps, size.batch["upstream"], seed, options, "model", one.moe)
            self.runs[key] = _training(self._folder / f"{stage}_{seed}", config, before, self._json)
        return self.runs[key]

    def downstream(self, name: str, arm: Arm, task: str, seed: int) -> Training:
        """Returns the run of an arm."""
        if (key := (name, task, seed)) not in self.runs:
            size, before = self._size, self.upstream(arm.upstream, seed)
            config = _demo(TASKS[task].base)
            options = {
                **moved(config, DATA, self._data / f"scenes{size.label}"),
                **with_classes(config, TASKS[task].stuff + CATEGORIES),
                "stage": name,
                "model.backbone.core": str(before.folder),
                **size.model(task),
                **arm.options,
            }
            steps = round(arm.longer * size.steps[task])
            _change(config, steps, size.batch[task], seed, options, "model.backbone", arm.moe)
            place = self._folder / f"{task}_{steps}{size.label}" / f"{name.replace(' ', '_')}_{seed}"
            self.runs[key] = _training(place, config, (before,), self._json)
        return self.runs[key]


def upstream_steps(stage: Upstream, size: Size) -> int:
    """Returns how many steps a stage of upstream training has."""
    return max(1, round(stage.share * size.upstream_steps))


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
            # An arm says its rates itself: a change of a kind's own rate must change no arm.
            "optim_wrapper.paramwise_cfg.residual_lr_mult": 1.0,
            **options,
            **({f"{place}.moe": dict(moe)} if moe else {}),
        }
    )


def _training(folder: Path, config: Config, after: tuple[Training, ...], json: str) -> Training:
    path = folder.with_name(f"{folder.name}.py")  # a name may have a dot
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}")
    config.dump(written)
    written.replace(path)  # at once: a run may be reading the same one
    return Training(folder, str(path), json, after=after)


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


def render(folder: Path, parameters: Mapping[str, str]) -> None:
    """Draws a data set of emoji scenes, unless the folder holds the same already."""
    words = [f"--{name}={value}" for name, value in parameters.items()]
    subprocess.run(installed(["rmoe", "data", "scenes", str(folder), *words]), check=True)
