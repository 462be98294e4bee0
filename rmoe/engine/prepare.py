"""From a config and a DeepSpeed JSON to what the runner needs: everything is checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from rmoe.config import ResidualMoEConfig
from rmoe.engine import changes, ds_json
from rmoe.engine.calibration import check_calibration
from rmoe.engine.check_values import check_values, short_name
from rmoe.engine.checkpoint import files
from rmoe.engine.checkpoint.export import MODEL
from rmoe.engine.checkpoint.files import Layout
from rmoe.engine.lock import check_folder
from rmoe.engine.model_config import allow_random_cores, complete_moe, moe_dicts
from rmoe.engine.optim import complete_paramwise
from rmoe.engine.precision import autocasts
from rmoe.engine.processes import backend
from rmoe.engine.task_config import check_json, check_tasks
from rmoe.errors import UserError, nearest

_CONSTRUCTORS = (None, "DefaultOptimWrapperConstructor", "rmoe.ParamGroups")
_WRAPPER_KEYS = {
    *("type", "optimizer", "constructor", "paramwise_cfg", "clip_grad", "accumulative_counts"),
    *("dtype", "loss_scale", "use_fp64"),  # of a wrapper without DeepSpeed: the precision is in the JSON
}
_SAMPLERS = {
    "InfiniteSampler": "rmoe.InfiniteSampler",
    "DefaultSampler": "rmoe.EpochSampler",
    "EpochSampler": "rmoe.EpochSampler",
    "TaskSampler": "rmoe.TaskSampler",
}
_STRATEGY = "rmoe.engine.strategy.Strategy"
_HOOKS = "rmoe.engine.hooks"
_BALANCE = "rmoe.GateBalanceHook"
_PREDICTIONS = "rmoe.PredictionsHook"


def prepare(cfg: Config, content: Mapping[str, Any], processes: int, work_dir: Path | None, resume: bool) -> list[str]:
    """Fills in, in place, what the runner needs: any mmengine config with a train loop will do.

    Args:
        cfg: the config.
        content: of the DeepSpeed JSON.
        processes: number of processes.
        work_dir: of the command line.
        resume: of the command line.

    Returns:
        What to tell the user, once there is a log.

    Raises:
        UserError: before anything is built or written.
    """
    notes: list[str] = []
    check_values(cfg)
    if cfg.get("resume") and (cfg.get("strategy") or {}).get("type") != _STRATEGY:  # which a run's dumped config has
        raise UserError(f"the config has resume={cfg.resume!r}; leave it out, and give --resume to go on with a run")
    check_tasks(cfg)
    moe = [complete_moe(values) for values in moe_dicts(cfg.model)]
    check_calibration(cfg.get("calibrate"), moe)
    _check_experts(moe, ds_json.zero_stage(content), processes)
    config, overruled = _deepspeed_config(cfg, content, processes)
    notes += overruled
    complete_paramwise(cfg.optim_wrapper, moe)
    notes += _other_batch(cfg, config["train_batch_size"])
    check_json(cfg, config["train_micro_batch_size_per_gpu"], ds_json.zero_stage(config))
    cfg.train_dataloader.batch_size = config["train_micro_batch_size_per_gpu"]
    cfg.randomness = dict(cfg.get("randomness") or {}, seed=(cfg.get("randomness") or {}).get("seed") or 0)
    layout = Layout(
        processes=processes,
        ep_size=max((one.ep_size for one in moe), default=1),
        num_experts=max((one.num_experts for one in moe), default=0),
        micro_batch=config["train_micro_batch_size_per_gpu"],
        accumulation=config["gradient_accumulation_steps"],
        seed=cfg.randomness["seed"],
    )
    cfg.work_dir = str(work_dir or cfg.get("work_dir") or Path("work_dirs") / Path(cfg.filename or "run").stem)
    check_folder(Path(cfg.work_dir))
    cfg.resume, load_from = _start(cfg, resume, layout, notes), cfg.get("load_from")
    cfg.load_from = None if cfg.resume else load_from
    if cfg.resume or cfg.load_from:
        allow_random_cores(cfg.model)
    cfg.strategy = {
        "type": _STRATEGY,
        "config": config,
        "layout": vars(layout),
        "load_from": cfg.load_from,
    }
    cfg.launcher = "pytorch"
    cfg.env_cfg = dict(cfg.get("env_cfg") or {}, dist_cfg={"backend": backend()})
    _seed_data(cfg.train_dataloader, cfg.randomness["seed"], notes)
    if "EpochBased" not in str(cfg.train_cfg.get("type")) and not cfg.train_cfg.get("by_epoch"):
        cfg.log_processor = {"by_epoch": False, **(cfg.get("log_processor") or {})}
    for loader in ("train_dataloader", "val_dataloader"):
        if cfg.get(loader):
            cfg[loader].setdefault("worker_init_fn", {"type": "rmoe.engine.faults.spare_worker"})
            if backend() == "nccl":
                cfg[loader].setdefault("pin_memory", True)  # the copy to the GPU need not be waited for
    _add_tensorboard(cfg)
    _add_hooks(cfg, notes)
    if cfg.resume:
        notes += changes.compare(Path(cfg.resume), cfg)
    return notes


def _check_experts(moe: list[ResidualMoEConfig], stage: int, processes: int) -> None:
    for one in moe:
        if stage == 3 and one.ep_size > 1:
            raise UserError(
                "zero_optimization.stage is 3, which splits every parameter over all processes, and moe.ep_size is "
                f"{one.ep_size}, which spreads the experts already; use stage 2 (ds_configs/zero2.json), or ep_size 1"
            )
        if processes % one.ep_size:
            fitting = [n for n in range(1, processes + 1) if processes % n == 0 and one.num_experts % n == 0]
            raise UserError(
                f"moe.ep_size {one.ep_size} does not divide the {processes} processes; use one of {fitting}"
            )


def _deepspeed_config(cfg: Config, content: Mapping[str, Any], processes: int) -> tuple[dict[str, Any], list[str]]:
    """Returns DeepSpeed's config, which takes over what of `cfg.optim_wrapper` is DeepSpeed's business, and what to
    tell where it says otherwise.
    """
    wrapper = cfg.optim_wrapper
    for key in wrapper:
        if key not in _WRAPPER_KEYS:
            raise UserError(f"optim_wrapper has no key '{key}'{nearest(key, _WRAPPER_KEYS)}")
    if wrapper.get("constructor") not in _CONSTRUCTORS:
        raise UserError(f"optim_wrapper.constructor is {wrapper.constructor!r}; use 'rmoe.ParamGroups', or none")
    if wrapper.get("constructor") != "rmoe.ParamGroups":
        # mmengine decays everything that a config does not except.
        wrapper.paramwise_cfg = {**(wrapper.get("paramwise_cfg") or {}), "exempt": False}
        wrapper.constructor = "rmoe.ParamGroups"
    clip = {"max_norm": None} if wrapper.get("clip_grad") is None else wrapper.clip_grad
    if "max_norm" not in clip:
        raise UserError(
            f"optim_wrapper.clip_grad is {clip}, without max_norm; give one, such as dict(max_norm=1.0), or "
            "clip_grad=None to clip nothing"
        )
    if clip.get("norm_type", 2) != 2 or set(clip) - {"max_norm", "norm_type", "error_if_nonfinite", "foreach"}:
        raise UserError(f"optim_wrapper.clip_grad is {clip}; DeepSpeed clips by max_norm with norm_type 2 only")
    batch_size, accumulation = cfg.train_dataloader.get("batch_size"), wrapper.get("accumulative_counts")
    config = ds_json.resolve(
        content,
        batch_size=batch_size or 1,
        accumulation=accumulation or 1,
        max_norm=clip["max_norm"] or 0.0,
        processes=processes,
        autocasts=autocasts(),
    )
    stated = {
        ds_json.MICRO: ("train_dataloader.batch_size", batch_size),
        ds_json.ACCUMULATION: ("optim_wrapper.accumulative_counts", accumulation),
        ds_json.CLIPPING: ("optim_wrapper.clip_grad.max_norm", clip["max_norm"]),
    }
    return config, ds_json.overruled(config, stated)


def _other_batch(cfg: Config, images: int) -> list[str]:
    """Says so where a step takes another number of images than the recipe that the config's figures are from."""
    recipe = (cfg.get("card") or {}).get("batch")
    if recipe in (None, images):
        return []
    return [
        f"a step takes {images} images, and {recipe} in the recipe of this config: set train_dataloader.batch_size so "
        "that all processes together take as many, or adapt the learning rate"
    ]


def _start(cfg: Config, resume: bool, layout: Layout, notes: list[str]) -> str | bool:
    """Returns the newest checkpoint of the work dir, or False; the processes find out together which one is intact."""
    folder = Path(cfg.work_dir)
    found, wrong = files.complete_checkpoints(folder)
    there = [*found, *(path for path in wrong if (path / files.MARKER).exists())]
    if there and not resume:
        raise UserError(f"{there[0]} is there already; give --resume to go on from it, or another --work-dir")
    if not resume and (left := _results(folder)):
        raise UserError(f"{left[0]} is of a finished run; give another --work-dir, or move it away")
    if there and not found:
        harms = "; ".join(f"{path.name} is {harm}" for path, harm in wrong.items())
        raise UserError(f"no checkpoint in {folder} can be resumed: {harms}; move them away to start anew")
    if resume:
        notes += [f"{path} is {harm}; it is ignored" for path, harm in wrong.items()]
        notes.append(f"resuming from {found[0]}" if found else f"no complete checkpoint in {folder}: starting anew")
    if not found:
        return False
    files.check_layout(found[0], layout)
    return str(found[0])


def _results(folder: Path) -> list[Path]:
    """Returns what a run has left at its end in a work dir, checkpoints aside."""
    return [path for path in (folder / MODEL, folder / "cost.json") if path.exists()]


def check_unused(cfg: Config, resume: bool) -> None:
    """Looks again, once the work dir is this run's alone, whether another one has left a checkpoint there meanwhile.

    Args:
        cfg: what `prepare` made of it.
        resume: of the command line.

    Raises:
        UserError: one is there, and this run is to start anew.
    """
    folder = Path(cfg.work_dir)
    if not cfg.resume and (found := files.complete_checkpoints(folder)[0] or ([] if resume else _results(folder))):
        again = "start again" if resume else "start again with --resume"
        raise UserError(f"another run has left {found[0]} meanwhile; {again}, or give another --work-dir")


def _seed_data(loader: ConfigDict, seed: int, notes: list[str]) -> None:
    """Makes what the loader yields a function of the position in the run (see `rmoe.engine.randomness`)."""
    sampler = loader.get("sampler") or {"type": "InfiniteSampler", "shuffle": True}
    name = short_name(sampler["type"])
    if name in _SAMPLERS:
        loader.sampler = dict(sampler, type=_SAMPLERS[name], seed=seed)
    else:
        notes.append(f"sampler {name}: a resumed run will not see the same augmentations")
    inner = loader.dataset.dataset if short_name(loader.dataset.type) == "SeededDataset" else loader.dataset
    loader.dataset = {"type": "rmoe.SeededDataset", "dataset": inner, "seed": seed}


def _add_tensorboard(cfg: Config) -> None:
    visualizer = cfg.get("visualizer") or {"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]}
    backends = list(visualizer.get("vis_backends") or [])
    if not any(short_name(backend["type"]) == "TensorboardVisBackend" for backend in backends):
        backends.append({"type": "TensorboardVisBackend"})
    cfg.visualizer = dict(visualizer, vis_backends=backends)


def _add_hooks(cfg: Config, notes: list[str]) -> None:
    stage, given = cfg.get("stage"), cfg.get("custom_hooks") or []
    ours = [
        {"type": f"{_HOOKS}.RunningStatsHook"},
        {"type": "rmoe.engine.randomness.StepSeedHook", "seed": cfg.randomness["seed"]},
        {"type": f"{_HOOKS}.LocalExpertsHook"},
        {"type": f"{_HOOKS}.CostHook", "stage": stage},
        {"type": f"{_HOOKS}.ExportHook", "stage": stage},
        {"type": "rmoe.engine.progress.ProgressHook"},
    ]
    names = {short_name(hook["type"]) for hook in ours}
    # A run dumps them into its config; an earlier version's stood in other modules.
    dumped = [f"{hook['type']}".startswith("rmoe.engine.") and short_name(hook["type"]) in names for hook in given]
    custom = [hook for hook, ours_already in zip(given, dumped, strict=True) if not ours_already]
    if not any(hook["type"] == _BALANCE for hook in custom):
        every = ((cfg.get("default_hooks") or {}).get("logger") or {}).get("interval", 10)
        custom.append({"type": _BALANCE, "interval": every})
    if not any(hook["type"] == _PREDICTIONS for hook in custom):
        custom.append({"type": _PREDICTIONS})
    for hook in custom:
        if short_name(hook["type"]) == "EMAHook" and hook["type"] != "rmoe.EMAHook":
            ours_is = f"dict(type='rmoe.EMAHook', momentum={hook.get('momentum', 0.0002)})"
            raise UserError(f"custom_hooks has mmengine's EMAHook, whose average checkpoints lack; write {ours_is}")
        if hook["type"] == "rmoe.EMAHook" and ds_json.zero_stage(cfg.strategy.config) == 3:
            raise UserError("rmoe.EMAHook averages whole weights, which zero_optimization.stage 3 splits; use stage 2")
    # mmengine's default, unless the config has another or, by None, no checkpoints.
    cfg.default_hooks = {"checkpoint": {"type": "CheckpointHook", "interval": 1}, **(cfg.get("default_hooks") or {})}
    savers = (cfg.default_hooks.checkpoint or {}, *custom)
    for hook in savers:
        if short_name(hook.get("type", "")) == "CheckpointHook":
            hook["type"] = "rmoe.CheckpointHook"
    if not any(hook.get("type") == "rmoe.CheckpointHook" and hook.get("save_optimizer", True) for hook in savers):
        notes.append(
            "no CheckpointHook saves the optimizer: a run that is stopped cannot be resumed and starts anew; leave "
            "save_optimizer True to change that"
        )
    cfg.custom_hooks = ours[:1] + custom + ours[1:]  # what an average of weights takes along is in order by then
