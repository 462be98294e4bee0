"""From a config, a DeepSpeed JSON and a command line to a run: everything is checked before anything is built."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # CUDA libraries without a driver would mislead DeepSpeed

import deepspeed
import deepspeed.ops
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import all_gather_object
from mmengine.runner import FlexibleRunner
from mmengine.utils import import_modules_from_strings

from rmoe.backbones.build import allow_random_cores
from rmoe.config import ResidualMoEConfig
from rmoe.data.preflight import preflight
from rmoe.engine import checkpoint, ds_json, faults, optim  # noqa: F401 (registers 'rmoe.ParamGroups')
from rmoe.engine.checkpoint import Layout
from rmoe.engine.faults import Fault, Preempted
from rmoe.engine.strategy import Diverged, Runner, user_errors
from rmoe.errors import UserError, nearest
from rmoe.stages import free_port

_CONSTRUCTORS = (None, "DefaultOptimWrapperConstructor", "rmoe.ParamGroups")
_WRAPPER_KEYS = {
    *("type", "optimizer", "constructor", "paramwise_cfg", "clip_grad", "accumulative_counts"),
    *("dtype", "loss_scale", "use_fp64"),  # of a wrapper without DeepSpeed: the precision is in the JSON
}
_SAMPLERS = {
    "InfiniteSampler": "rmoe.InfiniteSampler",
    "DefaultSampler": "rmoe.EpochSampler",
    "EpochSampler": "rmoe.EpochSampler",
}
_HOOKS = "rmoe.engine.hooks"
_PATIENCE = 20.0  # seconds
_TIMEOUT = 300.0  # seconds
_PLACE = ("MASTER_ADDR", "MASTER_PORT")
_APART = 60.0  # seconds that processes may always start one after the other
# What a safe config may name: packages to look in, modules to import, and registered names or classes to build.
_SCOPE = r"(mmengine|mmcv|mmseg|mmdet|rmoe)"
_SAFE = {
    "scope": re.compile(_SCOPE),
    "module": re.compile(r"(mmengine|mmcv|mmseg|mmdet|rmoe\.(tasks|backbones))(\.\w+)*"),
    "type": re.compile(rf"({_SCOPE}\.)?\w+|rmoe\.engine\.\w+\.([A-Z]\w+|spare_worker)"),
}
_NAMING = {"type": "type", "constructor": "type", "default_scope": "scope", "_scope_": "scope"}
_DATA_FORMATS = (".json", ".yaml", ".yml")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `launch/train.py`.

    Returns:
        0; 1 where training diverged; 85 where a signal asked the run to leave, and `--resume` goes on. A process that
        another one's fault has ended leaves with 3 at once.

    Raises:
        UserError: what the user can mend.
    """
    arguments = parser().parse_args(argv)
    try:
        train(arguments)
    except (UserError, Diverged) as error:
        if int(os.environ.get("RANK", 0)):
            # The first process speaks: it must not be ended because this one left before it. A launcher ends this one
            # meanwhile, unless the first has met no error; what goes wrong before they join is the same for all.
            time.sleep(_PATIENCE)
            if not torch.distributed.is_initialized():
                return 2
        message = innermost(str(error))
        if isinstance(error, UserError):
            raise UserError(message) from error
        print(f"rmoe: error: {' '.join(message.split())}", file=sys.stderr)
        return 1
    except Preempted as request:
        if not int(os.environ["RANK"]):
            print(f"rmoe: left on {request}; --resume goes on", file=sys.stderr)
        return faults.PREEMPTED
    except Fault as fault:
        faults.leave(str(fault))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def train(arguments: argparse.Namespace) -> None:
    """Checks, prepares, joins the other processes, trains.

    Raises:
        UserError: see `main`.
        Diverged: the loss or a weight is no longer finite.
        Preempted: a process got a signal, and all have saved.
        Fault: the other processes cannot be reached any more.
    """
    set_alone()
    with faults.Signals() as signals:
        content = ds_json.read_json(arguments.deepspeed_config)
        cfg = read_config(arguments.config, arguments.cfg_options or {}, arguments.safe_config)
        notes = prepare(cfg, content, int(os.environ["WORLD_SIZE"]), arguments.work_dir, arguments.resume)
        join(arguments.timeout)
        with faults.Watch(Path(cfg.work_dir), arguments.timeout) as watch:
            try:
                check_data(cfg)
                with user_errors("the config"):
                    runner = Runner.from_cfg(cfg)
                for note in notes:
                    runner.logger.warning(note)
                runner.register_hook(faults.PreemptionHook(signals))
                runner.register_hook(faults.WatchHook(watch))
                runner.train()
            except Exception as error:
                if faults.of_a_collective(error):
                    raise Fault(watch.explain(error)) from error
                raise


def check_data(cfg: Config) -> None:
    """Looks for the data sets before anything is built: one process of each machine, which may have disks of its own.

    Collective: all of them hear what one has found.

    Raises:
        UserError: see `rmoe.data.preflight.preflight`.
    """
    said = ""
    if int(os.environ["LOCAL_RANK"]) == 0:
        try:
            preflight(cfg)
        except UserError as error:
            said = str(error)
    if found := next(filter(None, all_gather_object(said)), ""):
        raise UserError(found)


def parser() -> argparse.ArgumentParser:
    """The command line of `launch/train.py`."""
    words = argparse.ArgumentParser(prog="train.py", description=__doc__)
    words.add_argument("config", type=Path, metavar="CONFIG", help="OpenMMLab config file")
    words.add_argument("--deepspeed_config", type=Path, required=True, metavar="JSON", help="DeepSpeed's own keys")
    words.add_argument("--work-dir", type=Path, metavar="DIR", help="default: work_dirs/ and the config's name")
    words.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint, if any")
    words.add_argument(
        "--timeout",
        type=_seconds,
        default=_TIMEOUT,
        metavar="SECONDS",
        help="without progress, after which every process ends; longer than a step, an evaluation's metrics and a "
        "checkpoint take (default: %(default)g)",
    )
    words.add_argument(
        "--safe-config", action="store_true", help="refuse a CONFIG that is a Python program: only JSON or YAML"
    )
    words.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change the config")
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return words


def _seconds(text: str) -> float:
    if not (seconds := float(text)) > 0:
        raise ValueError("not positive")  # argparse says the rest
    return seconds


def read_config(path: Path, options: Mapping[str, Any], safe: bool = False) -> Config:
    """The config with `options` (dotted keys) set in it.

    Args:
        path: of the config.
        options: what to change in it.
        safe: run no code on the config's behalf: it must be data, and import nothing.

    Raises:
        UserError: no such file, one that Python or mmengine cannot read, or an option whose key nobody reads.
    """
    try:
        cfg = _read_data(path) if safe else Config.fromfile(path)
        if safe and cfg.get("custom_imports"):
            import_modules_from_strings(**cfg.custom_imports)
    except FileNotFoundError as error:
        raise UserError(f"there is no config {error.filename or path}; give the path of a config file") from error
    except (SyntaxError, ImportError, KeyError, AttributeError, NameError, TypeError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a config: {type(error).__name__}: {error}") from error
    known = {*cfg, *inspect.signature(FlexibleRunner.__init__).parameters, "stage"} - {"self", "cfg"}
    for key in options:
        first = key.partition(".")[0]
        if first not in known:
            raise UserError(f"--cfg-options: the config has no '{first}'{_hint(first, known)}")
    try:
        cfg.merge_from_dict(dict(options))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"--cfg-options do not fit the config: {error}") from error
    return cfg


def _read_data(path: Path) -> Config:
    """mmengine runs a file of any kind that names a Python `_base_`, and loads YAML with tags: not here."""
    if path.suffix not in _DATA_FORMATS:
        raise UserError(
            f"--safe-config: {path} is a program that would run with your rights; dump it as JSON or YAML where you "
            "trust it: python -c \"from mmengine import Config; Config.fromfile('x.py').dump('x.json')\""
        )
    try:
        content = yaml.safe_load(path.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(content, dict) or "_base_" in content:
        raise UserError(f"--safe-config: {path} must hold all keys itself, without _base_; dump the whole config")
    modules = (content.get("custom_imports") or {}).get("imports") or []
    named = [("module", name) for name in ([modules] if isinstance(modules, str) else modules)] + [*_names(content)]
    if foreign := [name for kind, name in named if not _SAFE[kind].fullmatch(str(name))]:
        raise UserError(f"--safe-config: {path} names {foreign[0]!r}, which is neither ours nor OpenMMLab's")
    return Config(content, filename=str(path))


def _names(node: Any) -> Iterator[tuple[str, Any]]:
    """What mmengine would import or call: every `type`, and the scopes to look for them in."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in _NAMING and value is not None:
                yield _NAMING[key], value
            yield from _names(value)
    elif isinstance(node, list):
        for value in node:
            yield from _names(value)


def _hint(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else nearest(key, known)


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
    for key in ("model", "train_dataloader", "train_cfg", "optim_wrapper"):
        if cfg.get(key) is None:
            raise UserError(f"the config has no {key}; training needs one")
    moe = [ResidualMoEConfig.from_dict(values) for values in moe_dicts(cfg.model)]
    _check_experts(moe, ds_json.zero_stage(content), processes)
    config = _deepspeed_config(cfg, content, processes)
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
    cfg.resume, load_from = _start(cfg, resume, layout, notes), cfg.get("load_from")
    cfg.load_from = None if cfg.resume else load_from
    if cfg.resume or cfg.load_from:
        allow_random_cores(cfg.model)
    cfg.strategy = {
        "type": "rmoe.engine.strategy.Strategy",
        "config": config,
        "layout": vars(layout),
        "load_from": cfg.load_from,
    }
    cfg.launcher = "pytorch"
    cfg.env_cfg = dict(cfg.get("env_cfg") or {}, dist_cfg={"backend": _backend()})
    _seed_data(cfg.train_dataloader, cfg.randomness["seed"], notes)
    if "EpochBased" not in str(cfg.train_cfg.get("type")) and not cfg.train_cfg.get("by_epoch"):
        cfg.log_processor = {"by_epoch": False, **(cfg.get("log_processor") or {})}
    for loader in ("train_dataloader", "val_dataloader"):
        if cfg.get(loader):
            cfg[loader].setdefault("worker_init_fn", {"type": "rmoe.engine.faults.spare_worker"})
    _add_tensorboard(cfg)
    _add_hooks(cfg, notes)
    return notes


def moe_dicts(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every non-empty dict named `moe`, wherever in a model's config."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "moe" and isinstance(value, Mapping) and value:
                yield value
            else:
                yield from moe_dicts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from moe_dicts(value)


def _check_experts(moe: list[ResidualMoEConfig], stage: int, processes: int) -> None:
    if moe and stage == 3:
        raise UserError(
            "zero_optimization.stage is 3, which splits every parameter over all processes, and DeepSpeed does not do "
            "that with experts; use stage 2 (ds_configs/zero2.json) and spread the experts by moe.ep_size"
        )
    for one in moe:
        if processes % one.ep_size:
            fitting = [n for n in range(1, processes + 1) if processes % n == 0 and one.num_experts % n == 0]
            raise UserError(
                f"moe.ep_size {one.ep_size} does not divide the {processes} processes; use one of {fitting}"
            )


def _deepspeed_config(cfg: Config, content: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """DeepSpeed's config; what of `cfg.optim_wrapper` is DeepSpeed's business goes there."""
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
    clip = wrapper.get("clip_grad") or {}
    if clip.get("norm_type", 2) != 2 or set(clip) - {"max_norm", "norm_type", "error_if_nonfinite", "foreach"}:
        raise UserError(f"optim_wrapper.clip_grad is {clip}; DeepSpeed clips by max_norm with norm_type 2 only")
    return ds_json.resolve(
        content,
        batch_size=cfg.train_dataloader.get("batch_size") or 1,
        accumulation=wrapper.get("accumulative_counts", 1),
        max_norm=clip.get("max_norm", 0.0),
        processes=processes,
    )


def _start(cfg: Config, resume: bool, layout: Layout, notes: list[str]) -> str | bool:
    """The newest checkpoint of the work dir, or False; which one is intact is found out together."""
    folder = Path(cfg.work_dir)
    found, wrong = checkpoint.whole(folder)
    there = [*found, *(path for path in wrong if (path / checkpoint.MARKER).exists())]
    if there and not resume:
        raise UserError(f"{there[0]} is there already; give --resume to go on from it, or another --work-dir")
    if there and not found:
        harms = "; ".join(f"{path.name} is {harm}" for path, harm in wrong.items())
        raise UserError(f"no checkpoint in {folder} can be resumed: {harms}; move them away to start anew")
    if resume:
        notes += [f"{path} is {harm}; it is ignored" for path, harm in wrong.items()]
        notes.append(f"resuming from {found[0]}" if found else f"no complete checkpoint in {folder}: starting anew")
    if not found:
        return False
    checkpoint.check_layout(found[0], layout)
    return str(found[0])


def _seed_data(loader: ConfigDict, seed: int, notes: list[str]) -> None:
    """Makes what the loader yields a function of the position in the run (see `rmoe.engine.randomness`)."""
    sampler = loader.get("sampler") or {"type": "InfiniteSampler", "shuffle": True}
    name = _short(sampler["type"])
    if name in _SAMPLERS:
        loader.sampler = dict(sampler, type=_SAMPLERS[name], seed=seed)
    else:
        notes.append(f"sampler {name}: a resumed run will not see the same augmentations")
    inner = loader.dataset.dataset if _short(loader.dataset.type) == "SeededDataset" else loader.dataset
    loader.dataset = {"type": "rmoe.SeededDataset", "dataset": inner, "seed": seed}


def _short(kind: Any) -> str:
    """The name of a registered class, without its package."""
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _add_tensorboard(cfg: Config) -> None:
    visualizer = cfg.get("visualizer") or {"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]}
    backends = list(visualizer.get("vis_backends") or [])
    if not any(_short(backend["type"]) == "TensorboardVisBackend" for backend in backends):
        backends.append({"type": "TensorboardVisBackend"})
    cfg.visualizer = dict(visualizer, vis_backends=backends)


def _add_hooks(cfg: Config, notes: list[str]) -> None:
    stage = cfg.get("stage")
    ours = [
        {"type": f"{_HOOKS}.RunningStatsHook"},
        {"type": "rmoe.engine.randomness.StepSeedHook", "seed": cfg.randomness["seed"]},
        {"type": f"{_HOOKS}.LocalExpertsHook"},
        {"type": f"{_HOOKS}.CostHook", "stage": stage},
        {"type": f"{_HOOKS}.ExportHook", "stage": stage},
        {"type": f"{_HOOKS}.ProgressHook"},
    ]
    there = {hook["type"] for hook in ours}  # already, in the config that a run has dumped
    custom = [hook for hook in cfg.get("custom_hooks") or [] if hook["type"] not in there]
    for hook in custom:
        if _short(hook["type"]) == "EMAHook" and hook["type"] != "rmoe.EMAHook":
            ours_is = f"dict(type='rmoe.EMAHook', momentum={hook.get('momentum', 0.0002)})"
            raise UserError(f"custom_hooks has mmengine's EMAHook, whose average checkpoints lack; write {ours_is}")
        if hook["type"] == "rmoe.EMAHook" and ds_json.zero_stage(cfg.strategy.config) == 3:
            raise UserError("rmoe.EMAHook averages whole weights, which zero_optimization.stage 3 splits; use stage 2")
    saver = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    if saver.get("max_keep_ckpts") == 1:
        # mmengine removes the old one before it writes the new one.
        notes.append("max_keep_ckpts 1 could leave no checkpoint when a run is killed: keeping 2")
        cfg.default_hooks.checkpoint.max_keep_ckpts = 2
    cfg.custom_hooks = ours[:1] + custom + ours[1:]  # what an average of weights takes along is in order by then


def set_slurm() -> None:
    """Where srun started this process, and no other launcher did, takes its place in the group from Slurm.

    Only a step of srun's has SLURM_STEP_NUM_TASKS: a batch script and an interactive shell have the allocation's
    variables, and Python started from there is alone. MASTER_ADDR and MASTER_PORT win where they are set.
    """
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ:
        return
    step = {name.removeprefix("SLURM_"): value for name, value in os.environ.items() if name.startswith("SLURM_")}
    shares = re.findall(r"(\d+)(?:\(x(\d+)\))?", step["STEP_TASKS_PER_NODE"])  # 4(x2),3 is 4, 4, 3
    here = [share for share, times in shares for _ in range(int(times or 1))][int(step["NODEID"])]
    os.environ.update(
        RANK=step["PROCID"], WORLD_SIZE=step["STEP_NUM_TASKS"], LOCAL_RANK=step["LOCALID"], LOCAL_WORLD_SIZE=here
    )
    alone = step["STEP_NUM_NODES"] == "1"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1" if alone else first_host(step["STEP_NODELIST"]))
    # Below the ports that systems give away, the same in all processes, another one for each job and step.
    os.environ.setdefault("MASTER_PORT", str(20000 + (7 * int(step["JOB_ID"]) + int(step["STEP_ID"])) % 12000))


def first_host(nodes: str) -> str:
    """Of a list as Slurm writes it: `gpu[07-09,12],login` is gpu07 first."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def set_alone() -> None:
    """Where no launcher has given this process a place in a group, takes srun's, else makes it a group of its own."""
    set_slurm()
    if "RANK" not in os.environ:
        port = str(free_port())
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def join(timeout: float) -> None:
    """Joins the other processes; communication that takes longer than `timeout` seconds fails."""
    faults.limit_groups(timeout)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # else all would speak for the first one
    else:
        # It is compiled for a minute, into a folder that all share, for a function that nothing here calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))
    try:
        deepspeed.init_distributed(_backend(), timeout=timedelta(seconds=max(timeout, _APART)))
    except torch.distributed.DistError as error:
        rank, processes, address, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", *_PLACE))
        raise Fault(
            f"rank {rank} has not met the other processes, of {processes}, at {address}:{port} in "
            f"{max(timeout, _APART):g} s; see that all are started and reach that address"
        ) from error
    faults.limit_group(timeout)


def innermost(message: str) -> str:
    """Of an error in a loader's worker, which arrives with its traceback, the last line; else the message."""
    if "Original Traceback" not in message:
        return message
    return re.split(r"\n[\w.]*UserError: ", message)[-1]
