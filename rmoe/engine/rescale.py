"""`--steps N`: a config's whole schedule, made shorter or longer in proportion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from rmoe.engine import ds_json
from rmoe.errors import UserError

_ENDLESS = int(1e9)  # mmengine's INF: no end
_SHORTEST = 2  # steps in which mmengine's warm-up arrives at the whole rate
_LENGTHS = ("T_max", "step_size", "total_steps")  # of a schedule, counted from its `begin`
_LOGGED = 10  # steps from one log line to the next where a config says nothing


def rescale(
    cfg: Config, steps: int, content: Mapping[str, Any], processes: int, options: Mapping[str, Any]
) -> list[str]:
    """Makes the run `steps` long, in place: every length that the config counts in steps changes in proportion.

    Args:
        cfg: the config, with `options` in it.
        steps: length of the run.
        content: of the DeepSpeed JSON, which may say how many iterations make a step, or how many images.
        processes: number of processes.
        options: of the command line, dotted keys; what they set stays as they say.

    Returns:
        What to tell the user.

    Raises:
        UserError: the config trains by epochs, or an option says another length.
    """
    loop: Any = cfg.get("train_cfg") or {}
    schedules = _schedules(cfg)
    if any(key in ("train_cfg", "train_cfg.max_iters") for key in options):
        raise UserError(f"--steps {steps} and --cfg-options train_cfg.max_iters both say how long to train; give one")
    if "max_iters" not in loop or any(one.get("by_epoch", True) for one in schedules):
        raise UserError(
            "--steps counts steps, and this config trains or schedules by epochs; leave it out and change those: "
            "--cfg-options train_cfg.max_epochs=… and param_scheduler"
        )
    before, accumulation = loop["max_iters"], _accumulation(cfg, content, processes)

    def interval(length: int, unit: int = 1) -> int:
        return max(1, round(length * steps / before / unit)) * unit

    for key in ("val_interval", "val_begin"):
        if key in loop:
            loop[key] = interval(loop[key], accumulation if key == "val_interval" else 1)
    if loop.get("dynamic_intervals"):
        loop.dynamic_intervals = [
            (round(begin * steps / before), interval(every, accumulation)) for begin, every in loop.dynamic_intervals
        ]
    loop["max_iters"] = steps
    hooks: Any = cfg.get("default_hooks") or {}
    if hooks.get("logger"):
        hooks.logger.interval = interval(hooks.logger.get("interval", _LOGGED))
    saver: Any = hooks.get("checkpoint") or {}
    for key in ("interval", "save_begin"):
        if not saver.get("by_epoch", True) and saver.get(key, 0) > 0:
            saver[key] = interval(saver[key], accumulation)
    for hook in cfg.get("custom_hooks") or []:
        if hook.get("type") == "rmoe.GateBalanceHook" and "interval" in hook:
            hook.interval = interval(hook.interval)
    for one in schedules:
        _shrink(one, before, steps)
    cfg.merge_from_dict(dict(options))  # before any schedule is left out: options say by its number which they mean
    notes = [f"--steps {steps}: schedules and intervals of {before} steps are scaled by {steps / before:.3g}"]
    schedules = _schedules(cfg)
    cfg.param_scheduler = [one for one in schedules if _is_left(one)]
    for one in schedules:
        if not _is_left(one):
            notes.append(f"--steps {steps}: {one.type} is left out, it would have less than {_SHORTEST} steps")
    return notes


def _schedules(cfg: Config) -> list[Any]:
    schedules = cfg.get("param_scheduler") or []
    return [schedules] if isinstance(schedules, Mapping) else list(schedules)


def _accumulation(cfg: Config, content: Mapping[str, Any], processes: int) -> int:
    """Returns over how many iterations gradients are added up; what is no such number is refused elsewhere."""

    def given(section: str, key: str) -> int:
        value = (cfg.get(section) or {}).get(key)
        return value if isinstance(value, int) and value > 0 else 1

    batch_size, accumulation = given("train_dataloader", "batch_size"), given("optim_wrapper", "accumulative_counts")
    try:
        sizes = ds_json.batch_sizes(content, batch_size=batch_size, accumulation=accumulation, processes=processes)
    except UserError:
        return 1
    return sizes[ds_json.ACCUMULATION]


def _is_left(schedule: Any) -> bool:
    """Returns whether a schedule has any steps."""
    return bool(schedule.get("end", _ENDLESS) > schedule.get("begin", 0))


def _shrink(schedule: Any, before: int, steps: int) -> None:
    """Scales a schedule in place, as one of a run of `steps` steps instead of `before`.

    The same function moves the end of one schedule and the beginning of the next, so that they stay adjacent.
    """

    def moved(step: int) -> int:
        scaled = round(step * steps / before)
        return scaled if step >= before or scaled >= _SHORTEST else 0

    begin, end = schedule.get("begin", 0), schedule.get("end", _ENDLESS)
    start = moved(begin)
    for key in _LENGTHS:
        if schedule.get(key):
            schedule[key] = max(1, moved(begin + schedule[key]) - start)
    if schedule.get("milestones"):
        schedule.milestones = [
            max(1, round((begin + milestone) * steps / before) - start) for milestone in schedule.milestones
        ]
    if schedule.get("periods"):
        schedule.periods = [max(1, round(period * steps / before)) for period in schedule.periods]
    if "begin" in schedule:
        schedule.begin = start
    if end < _ENDLESS:
        schedule.end = moved(end)
