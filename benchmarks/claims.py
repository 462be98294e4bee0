"""The paper's claims in miniature: its four pipelines and the arms between them, on the embedded set.

    python -m benchmarks.claims

Every arm of a seed starts from the same weights, sees the same images in the same order, and has the same schedule and
batch; they differ in the experts alone. Differences to dense are paired over the seeds, with Student's 95 % interval. A
pipeline costs the sum of its stages. Each run has one core to itself; as many run side by side as there are cores.

A run that is complete is not run again unless its configuration has changed, and one that was interrupted goes on: this
may be stopped at any time. Writes claims.json, one object for each task, metric and arm; claims_runs.json, every run
with its cost; claims.png; and into experts/, what `rmoe analyze` finds in some of the mixtures.

There is more, called by `--part`:
long      The paper's four pipelines and some arms with `LONGER` times the steps downstream, segmentation; writes
          long.json, long_runs.json, long.png and experts_long/.
ablation  One choice at a time, segmentation; writes ablation.json, ablation_runs.json and ablation.png.
again     A dense and a residual pipeline twice on this machine, each time from rendering the data on: both results in
          claims_again.json, beside those in claims_runs.json, which another machine may have made.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy.stats import t as student

from benchmarks import common
from benchmarks.common import ROOT, Row
from rmoe.data.textures import STUFF
from rmoe.report import Run, analyze
from rmoe.stages import Training, installed

BASES = Path("rmoe/configs/demo")
JSON = "ds_configs/zero0.json"
SEEDS, HEADLINE_SEEDS = (0, 1, 2), (0, 1, 2, 3, 4)
HEADLINE = ("dense", "residual")
REFERENCES = ("dense", "moe", "residual", "dense_core_longer")  # what arms are compared with
LONGER = 3  # times the steps downstream
EXPERTS: dict[str, Any] = {"num_experts": 8, "top_k": 1}
# Of the backbones here, the one that learns from few images in few steps: docs/claims.md.
MODEL: dict[str, Any] = {
    "model": "cvt_13",
    "kwargs": {"_delete_": True, "embed_dims": (32, 96, 192), "depths": (1, 2, 4), "num_heads": (1, 3, 6)},
}
OWN = EXPERTS | {"residual": "experts", "expert_init": "random", "capacity_factor": 1.25}


@dataclass(frozen=True)
class Arm:
    """A way through the two stages.

    Attributes:
        upstream: the stage that it starts from, a key of `UPSTREAM`.
        moe: keys of `ResidualMoEConfig` downstream; None is dense.
        options: further dotted keys of the downstream config, and their values.
    """

    upstream: str
    moe: Mapping[str, Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Upstream:
    """A stage of upstream training.

    Attributes:
        moe: as of `Arm`.
        after: the stage that it starts from, if any.
        share: its steps as a part of core pretraining's.
    """

    moe: Mapping[str, Any] | None = None
    after: str | None = None
    share: float = 1.0


UPSTREAM = {
    "core": Upstream(),
    "moe": Upstream(OWN),
    "core_longer": Upstream(None, "core", 0.2),
    "intermediate": Upstream(EXPERTS, "core", 0.2),
    "intermediate_short": Upstream(EXPERTS, "core", 0.05),
    "intermediate_long": Upstream(EXPERTS, "core", 0.6),
}
ARMS = {
    "dense": Arm("core", None),
    "moe": Arm("moe", OWN),
    "residual": Arm("core", EXPERTS),
    "intermediate_residual": Arm("intermediate", EXPERTS),
    "full_residual": Arm("core", EXPERTS | {"residual": "full"}),
    "core_trained": Arm("core", EXPERTS | {"train_core": True}),
    "upcycled": Arm("core", EXPERTS | {"residual": "experts"}),
    "experts_fixed": Arm("moe", OWN | {"train_residual": False}),
}
_PIPELINES = ("dense", "moe", "residual", "intermediate_residual", "full_residual")
LONG = {name: ARMS[name] for name in _PIPELINES} | {
    "straight_through": Arm("core", EXPERTS | {"combine": "straight_through"}),
    "rank_32_straight_through": Arm("core", EXPERTS | {"rank": 32, "combine": "straight_through"}),
    "no_residuals": Arm("core", EXPERTS | {"train_residual": False}),  # what freezing the cores does by itself
    "dense_core_longer": Arm("core_longer", None),  # RMoE-I's control: as many more steps upstream
}
_LR = "optim_wrapper.paramwise_cfg."
# One choice at a time, against `residual` of ARMS.
ABLATION = {
    "2 experts": Arm("core", EXPERTS | {"num_experts": 2}),
    "4 experts": Arm("core", EXPERTS | {"num_experts": 4}),
    "16 experts": Arm("core", EXPERTS | {"num_experts": 16}),
    "2 of 8": Arm("core", EXPERTS | {"top_k": 2}),
    "all blocks": Arm("core", EXPERTS | {"blocks": "all"}),
    "last two blocks": Arm("core", EXPERTS | {"blocks": "last_two"}),
    "rank 2": Arm("core", EXPERTS | {"rank": 2}),
    "rank 32": Arm("core", EXPERTS | {"rank": 32}),
    "residual lr × 3": Arm("core", EXPERTS, {f"{_LR}residual_lr_mult": 3.0}),
    "residual lr × 10": Arm("core", EXPERTS, {f"{_LR}residual_lr_mult": 10.0}),
    "gate lr × 10": Arm("core", EXPERTS, {f"{_LR}gate_lr_mult": 10.0}),
    "no decay of residuals": Arm("core", EXPERTS, {f"{_LR}residual_decay_mult": 0.0}),
    "decay of residuals × 100": Arm("core", EXPERTS, {f"{_LR}residual_decay_mult": 100.0}),
    "decay of gate × 100": Arm("core", EXPERTS, {f"{_LR}custom_keys": {".gate.": {"decay_mult": 100.0}}}),
    "no aux loss": Arm("core", EXPERTS | {"losses": {"importance": 0.0}}),
    "importance 0.05": Arm("core", EXPERTS | {"losses": {"importance": 0.05}}),
    "no noise": Arm("core", EXPERTS | {"noise": 0.0}),
    "straight-through": Arm("core", EXPERTS | {"combine": "straight_through"}),
    "intermediate": Arm("intermediate", EXPERTS),
    "intermediate × ¼": Arm("intermediate_short", EXPERTS),
    "intermediate × 3": Arm("intermediate_long", EXPERTS),
}


# Whose experts are looked into: runs (see `Key`) of the first seed, each with the run that it started from if that has
# the same experts.
ANALYSED: dict[str, tuple[tuple[str, str], tuple[str, str] | None]] = {
    "moe_upstream": (("moe", "upstream"), None),
    "moe_downstream": (("moe", "segmentation"), ("moe", "upstream")),
    "upcycled": (("upcycled", "segmentation"), None),
    "residual": (("residual", "segmentation"), None),
    "full_residual": (("full_residual", "segmentation"), None),
    "rank_32_straight_through": (("rank_32_straight_through", "segmentation"), None),
    "intermediate_residual": (("intermediate_residual", "segmentation"), ("intermediate", "upstream")),
}
# By the name of a part's files: the folder for that, and which of them. Upstream stages are the same in both.
INSIDE: dict[str, tuple[str, tuple[str, ...]]] = {
    "claims": ("experts", tuple(ANALYSED)),
    "long": ("experts_long", tuple(name for name, ((_, where), _) in ANALYSED.items() if where != "upstream")),
}


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Attributes:
        base: its dense config, in `BASES`.
        data: its folder within the embedded set.
        classes: file with its class list, within that.
        stuff: classes besides the scenes' categories of things.
        counts: dotted keys that hold the number of classes.
        options: dotted keys, and their values, that fit the config to `MODEL` and the data.
    """

    base: str
    data: str
    classes: str
    stuff: int
    counts: tuple[str, ...]
    options: Mapping[str, Any]


CATEGORIES = 8  # of things
TASKS = {
    "segmentation": Task(
        "dense.py",
        "ade20k",
        "classes.json",
        len(STUFF),
        (
            "model.decode_head.num_classes",
            "train_dataloader.dataset.num_classes",
            "train_dataloader.dataset.pipeline.1.num_classes",
            "val_dataloader.dataset.num_classes",
            "val_dataloader.dataset.pipeline.1.num_classes",
        ),
        {
            "model.backbone.out_indices": (0, 1, 2),
            "model.decode_head.in_channels": [32, 96, 192],
            "model.decode_head.in_index": [0, 1, 2],
            "model.decode_head.loss_decode.class_weight": [0.5] * len(STUFF) + [2.0] * CATEGORIES,
        },
    ),
    "detection": Task(
        "detection_dense.py",
        "coco",
        "annotations/instances_val2017.json",
        0,
        (
            "model.roi_head.bbox_head.num_classes",
            "model.roi_head.mask_head.num_classes",
            "train_dataloader.dataset.num_classes",
            "val_dataloader.dataset.num_classes",
        ),
        {"model.backbone.out_indices": (1, 2), "model.neck.in_channels": [96, 192]},
    ),
}


@dataclass(frozen=True)
class Size:
    """How much is trained on what.

    Attributes:
        pictures, scenes: words of `rmoe data scenes`, for the set that cores are trained on and for the tasks' set.
        upstream_steps: of core pretraining.
        steps: of a downstream task.
        batch: images of a step, by task and "upstream"; one process.
        seeds: of all arms.
        headline_seeds: of `HEADLINE`.
        arms, tasks: which of them.
    """

    pictures: Mapping[str, str]
    scenes: Mapping[str, str]
    upstream_steps: int
    steps: Mapping[str, int]
    batch: Mapping[str, int]
    seeds: tuple[int, ...] = SEEDS
    headline_seeds: tuple[int, ...] = HEADLINE_SEEDS
    arms: tuple[str, ...] = tuple(ARMS)
    tasks: tuple[str, ...] = tuple(TASKS)


FULL = Size(
    pictures={"scenes-train": "1", "scenes-val": "1"},
    scenes={
        "styles": "plain,night",
        "categories": str(CATEGORIES),
        "scenes-train": "2000",
        "upstream-train": "1",
        "upstream-val": "1",
    },
    upstream_steps=800,
    steps={"segmentation": 400, "detection": 400},
    batch={"upstream": 64, "segmentation": 8, "detection": 4},
)
_TINY = {
    "size": "64",
    "upstream-size": "32",
    "upstream-train": "2",
    "upstream-val": "1",
    "scenes-train": "8",
    "scenes-val": "2",
    "categories": str(CATEGORIES),
}
QUICK = Size(
    pictures=_TINY,
    scenes=_TINY,
    upstream_steps=2,
    steps={"segmentation": 2, "detection": 2},
    batch={"upstream": 8, "segmentation": 2, "detection": 2},
    seeds=(0, 1),
    headline_seeds=(0, 1),
    arms=("dense", "residual", "moe"),
    tasks=("segmentation",),
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = common.parse("claims", __doc__, argv, parts=("long", "ablation", "again"))
    size = QUICK if arguments.quick else FULL
    folder = Path("work_dirs") / ("claims_quick" if arguments.quick else "claims")
    file, size, arms = portion(arguments.part, size)
    os.chdir(ROOT)
    runs, details = carry_out(folder, size, arms, arguments.threads)
    config = asdict(size) | {"arms": {name: asdict(arm) for name, arm in arms.items()}, "model": MODEL}
    if arguments.part == "again":
        _, second = carry_out(folder.with_name(f"{folder.name}_again"), size, arms, arguments.threads)
        published = json.loads((arguments.out / "claims_runs.json").read_text())["rows"]
        common.publish(arguments, config, compared := again(details, second, published), compared, file=file)
        return
    if file in INSIDE:
        inside, names = INSIDE[file]
        look_inside(runs, size.seeds[0], names, arguments.out / inside)
    rows = results(runs, size, arms)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{file}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (draw_choices if arguments.part == "ablation" else draw)(arguments, rows, file)
    common.publish(arguments, config, details, table(rows), file=f"{file}_runs")


def portion(part: str | None, size: Size) -> tuple[str, Size, Mapping[str, Arm]]:
    """What a part of this benchmark runs: the name of its files, how much of what, and the arms."""
    if part == "long":
        steps = {"segmentation": LONGER * size.steps["segmentation"]}
        return "long", replace(size, tasks=("segmentation",), steps=steps, headline_seeds=size.seeds), LONG
    headline = {name: ARMS[name] for name in HEADLINE}
    if part == "ablation":
        return "ablation", replace(size, tasks=("segmentation",), headline_seeds=size.seeds), headline | ABLATION
    if part == "again":
        return "claims_again", replace(size, seeds=size.seeds[:1], headline_seeds=size.seeds[:1]), headline
    return "claims", size, {name: ARMS[name] for name in size.arms}


# A run's key: (stage or arm, "upstream" or task, seed).
Key = tuple[str, str, int]


def carry_out(folder: Path, size: Size, arms: Mapping[str, Arm], jobs: int) -> tuple[dict[Key, Training], list[Row]]:
    """Renders the data and runs what is not complete; the runs, and `describe` of each."""
    _render(folder / "data/pictures", size.pictures)
    _render(folder / "data/scenes", size.scenes)
    runs = plan(folder, size, arms)
    execute(list(runs.values()), jobs)
    return runs, [describe(key, training) for key, training in runs.items()]


def plan(folder: Path, size: Size, arms: Mapping[str, Arm]) -> dict[Key, Training]:
    """All runs, each after those that it starts from; by task, then by seed."""
    runs: dict[Key, Training] = {}

    def upstream(stage: str, seed: int) -> Training:
        key = (stage, "upstream", seed)
        if key not in runs:
            one = UPSTREAM[stage]
            before = () if one.after is None else (upstream(one.after, seed),)
            steps = max(1, round(one.share * size.upstream_steps))
            split = {
                f"{part}_dataloader.dataset.root": str(folder / "data/pictures/upstream") for part in ("train", "val")
            }
            options = {**split, "stage": stage, "model.core": str(before[0].folder) if before else None}
            options |= {f"model.{key}": value for key, value in MODEL.items()}
            config = _config("core.py", steps, size.batch["upstream"], seed, options, "model", one.moe)
            runs[key] = _training(folder / f"{stage}_{seed}", config, before)
        return runs[key]

    for task_name in size.tasks:
        task, data = TASKS[task_name], folder / "data/scenes" / TASKS[task_name].data
        for seed in sorted({*size.seeds, *size.headline_seeds}):
            for name, arm in arms.items():
                if seed not in (size.headline_seeds if name in HEADLINE else size.seeds):
                    continue
                before = upstream(arm.upstream, seed)
                options = {"stage": name, "model.backbone.core": str(before.folder), **task.options, **arm.options}
                options |= {f"model.backbone.{key}": value for key, value in MODEL.items()}
                options |= dict.fromkeys(("num_classes", *task.counts), task.stuff + CATEGORIES)
                options |= {f"{split}_dataloader.dataset.data_root": str(data) for split in ("train", "val")}
                options |= {
                    f"{split}_dataloader.dataset.classes": str(data / task.classes) for split in ("train", "val")
                }
                if task_name == "detection":
                    options["val_evaluator.ann_file"] = str(data / task.classes)
                steps, batch = size.steps[task_name], size.batch[task_name]
                config = _config(task.base, steps, batch, seed, options, "model.backbone", arm.moe)
                place = folder / f"{task_name}_{steps}" / f"{name.replace(' ', '_')}_{seed}"
                runs[(name, task_name, seed)] = _training(place, config, (before,))
    return runs


def _config(
    base: str, steps: int, batch: int, seed: int, options: Mapping[str, Any], place: str, moe: Mapping[str, Any] | None
) -> Config:
    """A demo config with another length, seed and mixture."""
    config = Config.fromfile(BASES / base, import_custom_modules=False)
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
    return config


def _training(folder: Path, config: Config, after: tuple[Training, ...]) -> Training:
    path = folder.with_name(f"{folder.name}.py")  # a name may have a dot
    path.parent.mkdir(parents=True, exist_ok=True)
    config.dump(path)
    return Training(folder, str(path), JSON, after=after)


def execute(runs: Sequence[Training], jobs: int) -> None:
    """Runs them all, `jobs` at a time, each on one core, with their progress on the terminal.

    Raises:
        rmoe.stages.Failed: of the first run that failed; the others that had begun are finished first.
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


def again(first: Sequence[Row], second: Sequence[Row], published: Sequence[Row]) -> list[Row]:
    """Every figure of `first` beside that of `second` and of `published`; all as `describe` says it."""
    by_run = [{(row["arm"], row["where"], row["seed"]): row for row in rows} for rows in (second, published)]
    rows = []
    for row in first:
        repeated, known = (found[row["arm"], row["where"], row["seed"]] for found in by_run)
        rows += [
            {"arm": row["arm"], "where": row["where"], "seed": row["seed"], "metric": metric}
            | {"first": row[metric], "again": repeated[metric], "equal": row[metric] == repeated[metric]}
            | {"claims_runs": known[metric]}
            for metric in ("top1", "mIoU", "box AP", "mask AP")
            if metric in row
        ]
    return rows


def look_inside(runs: Mapping[Key, Training], seed: int, names: Iterable[str], out: Path) -> None:
    """What `rmoe analyze` does, for those of the `ANALYSED` runs that there are; into OUT/NAME."""
    for name in names:
        after, before = ANALYSED[name]
        if (*after, seed) in runs:
            analyze(runs[*after, seed].folder, out / name, before and runs[*before, seed].folder)


def results(runs: Mapping[Key, Training], size: Size, arms: Mapping[str, Arm]) -> list[Row]:
    """One object for each task, metric and arm."""
    rows: list[Row] = []
    for task in size.tasks:
        values: dict[str, dict[str, dict[int, float]]] = {}
        losses: dict[str, dict[int, float]] = {}
        costs: dict[str, dict[int, dict[str, float]]] = {}
        for (name, where, seed), training in runs.items():
            if where == task:
                run = Run(training.folder)
                if (loss := run.train_loss()) is not None:
                    losses.setdefault(name, {})[seed] = loss
                for metric, value in run.values().items():
                    values.setdefault(metric, {}).setdefault(name, {})[seed] = value
                costs.setdefault(name, {})[seed] = pipeline_cost(training)
        for metric, of_arm in values.items():
            for name in of_arm:
                row: Row = {"arm": name, "task": task, "metric": metric, "upstream": arms[name].upstream}
                fit = quality(losses, name) if name in losses else None
                rows.append(row | quality(of_arm, name) | {"train_loss": fit} | cost(costs, name))
    return rows


def quality(of_arm: Mapping[str, Mapping[int, float]], name: str) -> Row:
    """Of an arm's values by seed: mean and spread, and the differences to the `REFERENCES` over the seeds of both."""
    mine = dict(sorted(of_arm[name].items()))
    row: Row = {
        "seeds": [*mine],
        "values": [*mine.values()],
        "mean": statistics.mean(mine.values()),
        "std": statistics.stdev(mine.values()) if len(mine) > 1 else None,
    }
    for other in REFERENCES:
        theirs = of_arm.get(other, {})
        shared = [seed for seed in mine if seed in theirs]
        mean, interval = paired([mine[seed] - theirs[seed] for seed in shared]) if shared else (None, None)
        row |= {f"diff_to_{other}": mean, _interval("interval95", other): interval}
    return row


def cost(of_arm: Mapping[str, Mapping[int, Mapping[str, float]]], name: str) -> Row:
    """Of an arm's costs by seed: their means, and the mean ratios to the `REFERENCES` over the seeds of both."""
    mine = of_arm[name]
    row: Row = {key: statistics.mean(one[key] for one in mine.values()) for key in next(iter(mine.values()))}
    for other in REFERENCES:
        theirs = of_arm.get(other, {})
        shared = [seed for seed in mine if seed in theirs]
        for key, label in (
            ("pipeline_device_seconds", "cost"),
            ("finetune_device_seconds", "finetune_cost"),
            ("pipeline_flops", "flops"),
            ("finetune_flops", "finetune_flops"),
        ):
            ratios = [mine[seed][key] / theirs[seed][key] for seed in shared]
            mean, interval = paired(ratios) if ratios else (None, None)
            row[f"{label}_vs_{other}"] = mean
            if key.endswith("seconds"):
                row[_interval(f"{label}_interval95", other)] = interval
    return row


def _interval(name: str, other: str) -> str:
    """Of a difference to dense the key has no further name."""
    return name if other == "dense" else f"{name}_to_{other}"


def paired(differences: Sequence[float]) -> tuple[float, list[float] | None]:
    """Mean of paired differences and Student's 95 % interval around it; None for one pair."""
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return mean, None
    half = float(student.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
    return mean, [mean - half, mean + half]


def pipeline_cost(training: Training) -> dict[str, float]:
    """Device seconds and FLOPs of a run, and of it and all that it starts from."""
    own = json.loads((training.folder / "cost.json").read_text())
    seconds, flops = own["device_seconds"], own["flops_per_step"] * own["steps"]
    before = [pipeline_cost(one) for one in training.after]
    return {
        "finetune_device_seconds": seconds,
        "finetune_flops": flops,
        "pipeline_device_seconds": seconds + sum(one["pipeline_device_seconds"] for one in before),
        "pipeline_flops": flops + sum(one["pipeline_flops"] for one in before),
    }


def describe(key: Key, training: Training) -> Row:
    """A run, for claims_runs.json."""
    name, where, seed = key
    found = json.loads((training.folder / "cost.json").read_text())
    kept = ("device_seconds", "steps", "images", "flops_per_step", "params_total", "params_active", "params_trainable")
    run = {"arm": name, "where": where, "seed": seed, "fingerprint": training.fingerprint()[:12]}
    finished = Run(training.folder)
    done = {"device": found["device"], "commit": found["software"]["commit"], "train_loss": finished.train_loss()}
    return run | finished.values() | done | {name: found[name] for name in kept}


def table(rows: Iterable[Row]) -> list[Row]:
    """For people: quality against cost."""
    return [
        {
            "task": row["task"],
            "arm": row["arm"],
            "metric": row["metric"],
            "seeds": len(row["seeds"]),
            "mean": row["mean"],
            "std": row["std"],
            "− dense": row["diff_to_dense"],
            "95 %": span(row["interval95"]),
            "pipeline s × dense": row["cost_vs_dense"],
            "× moe": row["cost_vs_moe"],
            "pipeline FLOPs × dense": row["flops_vs_dense"],
            "finetune s × dense": row["finetune_cost_vs_dense"],
        }
        for row in rows
    ]


def span(interval: Sequence[float] | None, digits: int = 2) -> str:
    """An interval of differences for print."""
    return "–" if interval is None else " … ".join(f"{end:+.{digits}f}" for end in interval)


def draw(arguments: common.Arguments, rows: Sequence[Row], file: str) -> None:
    """Difference to dense, with its interval, over the pipeline's cost."""
    metrics = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    with common.picture(arguments, len(metrics), "Quality against cost, dense = 0 and 1", file=file) as axes:
        for axis, (task, metric) in zip(axes, metrics, strict=True):
            for row in (row for row in rows if (row["task"], row["metric"]) == (task, metric)):
                mean, interval = row["diff_to_dense"], row["interval95"] or [row["diff_to_dense"]] * 2
                error = [[mean - interval[0]], [interval[1] - mean]]
                axis.errorbar(row["cost_vs_dense"], mean, yerr=error, fmt="o", capsize=3, label=row["arm"])
            axis.axhline(0.0, color="black", linewidth=0.5)
            axis.set(title=f"{task}: {metric} − dense", xlabel="device seconds of the pipeline, × dense")
        axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_choices(arguments: common.Arguments, rows: Sequence[Row], file: str) -> None:
    """Each choice's difference to the defaults, and its cost, with their intervals; the defaults are the line."""
    shown = rows[::-1]
    panels = (
        ("diff_to_residual", "interval95_to_residual", f"{rows[0]['metric']} − residual", 0.0),
        ("finetune_cost_vs_residual", "finetune_cost_interval95_to_residual", "finetune, seconds × residual", 1.0),
        ("cost_vs_residual", "cost_interval95_to_residual", "pipeline, seconds × residual", 1.0),
    )
    height = 1.0 + 0.25 * len(rows)
    with common.picture(arguments, len(panels), "One choice at a time", height, file=file) as axes:
        for axis, (mean, interval, label, same) in zip(axes, panels, strict=True):
            for place, row in enumerate(shown):
                axis.plot(row[interval] or [row[mean]] * 2, [place, place], color="tab:blue")
                axis.plot(row[mean], place, "o", color="tab:blue")
            axis.axvline(same, color="black", linewidth=0.5)
            axis.set(xlabel=label, yticks=range(len(shown)), yticklabels=[])
            axis.grid(axis="y", alpha=0.3)
        axes[0].set_yticklabels([row["arm"] for row in shown])


def _render(folder: Path, parameters: Mapping[str, str]) -> None:
    words = [f"--{name}={value}" for name, value in parameters.items()]
    subprocess.run(installed(["rmoe", "data", "scenes", str(folder), *words]), check=True)


if __name__ == "__main__":
    main()
