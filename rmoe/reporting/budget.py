"""What a config's whole pipeline will cost, from the pretraining of its core on, and what is printed of an estimate.

The stages are found through `core`: work dirs are called as the configs are. Each GPU keeps the images that its config
gives it and all see as many images as the schedule has; so with more GPUs there are fewer and larger steps. Whether so
large a batch learns as well is another question. Loading, evaluation and checkpoints are not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmoe.engine.model_config import mappings
from rmoe.engine.read_config import read_config
from rmoe.engine.shipped import CONFIGS
from rmoe.errors import UserError, printable
from rmoe.reporting.estimate import Estimate, share_out, work_of
from rmoe.reporting.machines import Cluster
from rmoe.reporting.work import Setting, Work

COUNTS, PER_NODE = (8, 64, 512), 8
_WIDTH = 110  # columns where the output is a file


@dataclass(frozen=True)
class Cost:
    """What a stage costs on a number of GPUs.

    Attributes:
        config: name of the stage's config.
        gpus: how many there are.
        images: those of the whole schedule, each counted as often as it is seen.
        seconds_per_step: of a step, in which each GPU has the images that its config gives it.
        communication_share: of a step.
        hours: from beginning to end.
    """

    config: str
    gpus: int
    images: int
    seconds_per_step: float
    communication_share: float
    hours: float

    @property
    def gpu_hours(self) -> float:
        """Returns the hours of all GPUs together."""
        return self.hours * self.gpus


def stages(path: Path, cfg: Config) -> list[tuple[str, Config]]:
    """Returns the configs whose runs this one needs, by name and in the order of training, with itself at the end."""
    found = [(path.stem, cfg)]
    while before := _config_before(found[0][1], path.parent):
        if any(name == before.stem for name, _ in found):
            raise UserError(f"{path}: its core comes from {before}, which needs this very config first; change `core`")
        found.insert(0, (before.stem, read_config(before, {})))
    return found


def costs(path: Path, cfg: Config, own: Work, cluster: Cluster) -> Iterator[Cost]:
    """Yields what each stage costs at each of `COUNTS`, by stages.

    Args:
        path: of the config.
        cfg: the config.
        own: its work; the other stages are run as their own configs say.
        cluster: the GPUs, and how they are joined: as many on a node as here, or eight where this is one node.

    It yields nothing where the config does not say in steps how long it trains, and leaves out the numbers of GPUs
    that whole nodes and the spreading of experts do not make up.

    Raises:
        UserError: an earlier stage does not say it.
    """
    if not steps_of(cfg):
        return
    per_node = _per_node(cluster)
    for name, config in stages(path, cfg):
        setting = Setting(own.setting.processes, zero=own.setting.zero, precision=own.setting.precision)
        if config is not cfg:  # it may need more processes than this run has
            setting = replace(setting, processes=max(COUNTS))
        work = own if config is cfg else work_of(config, setting)
        if not (steps := steps_of(config)):
            raise UserError(f"{name} does not say in steps how long it trains; give it train_cfg.max_iters")
        batch = (config.get("card") or {}).get("batch", own.setting.processes * (work.setting.micro_batch or 1))
        for gpus in COUNTS:
            if gpus % per_node == 0 and gpus % (work.setting.ep_size or 1) == 0:
                yield _cost(name, steps * batch, work, replace(cluster, nodes=gpus // per_node, per_node=per_node))


def _per_node(cluster: Cluster) -> int:
    return cluster.per_node if cluster.nodes > 1 else PER_NODE


def _cost(name: str, images: int, work: Work, cluster: Cluster) -> Cost:
    gpus = cluster.processes
    found = share_out(replace(work, setting=replace(work.setting, processes=gpus)), cluster).seconds
    steps = images / (gpus * (work.setting.micro_batch or 1))
    return Cost(name, gpus, images, found.step, found.communication_share, steps * found.step / 3600)


def steps_of(cfg: Config) -> int | None:
    """Returns how many steps a config trains, None where it does not say that in steps."""
    return (cfg.get("train_cfg") or {}).get("max_iters")


def _config_before(cfg: Config, folder: Path) -> Path | None:
    """Returns the config whose run leaves the core of this one: a file in `folder`, or a shipped one."""
    core = next((node["core"] for node in mappings(cfg.model) if isinstance(node.get("core"), str)), None)
    if core is None:
        return None
    name = f"{Path(core).name}.py"
    return next((path for path in (folder / name, *sorted(CONFIGS.rglob(name))) if path.is_file()), None)


def show(found: Estimate, pipeline: Sequence[Cost], steps: int | None) -> None:
    """Prints an estimate in tables as wide as the terminal.

    Args:
        found: the estimate of a step.
        pipeline: what `costs` yielded.
        steps: how many the config trains, if it says so.
    """
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(show_header=False)
    for name, value in _rows(found):
        table.add_row(name, value)
    console.print(table)
    if pipeline:
        console.print(_pipeline(pipeline, found.cluster))
    elif steps is None:
        console.print("No hours: the config does not say in steps (train_cfg.max_iters) how long it trains.")
    else:
        console.print(
            f"No hours: none of {', '.join(map(str, COUNTS))} is a number of whole nodes of {_per_node(found.cluster)} "
            f"GPUs and a multiple of ep_size {found.setting.ep_size}."
        )


def _rows(found: Estimate) -> Iterator[tuple[str, str]]:
    s, c, seconds = found.setting, found.cluster, found.seconds
    height, width = s.image_size or (0, 0)
    yield "images", f"{s.micro_batch} of {height} × {width} on each of {s.processes} GPUs, {s.precision}"
    yield "experts", f"spread over {s.ep_size} GPUs; ZeRO stage {s.zero}"
    parameters = found.parameters
    yield (
        "parameters",
        f"{parameters.total:,} total, {parameters.active:,} active, {parameters.trainable:,} trainable",
    )
    yield "FLOPs", f"{found.flops:.4g} on each GPU and step"
    for name, value in asdict(found.memory).items():
        yield f"memory: {name}", _megabytes(value)
    fits = "" if found.memory.total <= c.gpu.memory else ": more than there is"
    yield "memory: total", f"{_megabytes(found.memory.total)} of {_megabytes(c.gpu.memory)}{fits}"
    for name, value in asdict(found.traffic).items():
        yield f"sent: {name.replace('_', ' ')}", _megabytes(value)
    yield "sent: total", _megabytes(found.traffic.total)
    for name, value in asdict(seconds).items():
        yield f"time: {name}", f"{1e3 * value:,.2f} ms"
    yield "time: step", f"{1e3 * seconds.step:,.2f} ms, {seconds.communication_share:.1%} of it communication"
    joined = f", {c.link / 1e9:g} GB/s between nodes" if c.nodes > 1 else ""
    yield "assumed", f"{c.share:g} of the peak reached, {c.overlap:g} of the reduction hidden{joined}"


def _pipeline(pipeline: Sequence[Cost], cluster: Cluster) -> Table:
    table = Table(title="The whole pipeline", caption="kWh: of the GPUs' boards, at their full power")
    table.add_column("GPUs", justify="right", no_wrap=True)
    table.add_column("stage", overflow="fold")
    for name in ("ms/step", "sent", "hours", "GPU-hours", "kWh"):
        table.add_column(name, justify="right", no_wrap=True)
    for gpus in dict.fromkeys(one.gpus for one in pipeline):
        mine = [one for one in pipeline if one.gpus == gpus]
        for one in mine:
            table.add_row(*_cells(one, 1e3 * one.seconds_per_step, cluster))
        if len(mine) > 1:
            hours = sum(one.hours for one in mine)
            total = replace(mine[0], config="all", images=sum(one.images for one in mine), hours=hours)
            total = replace(total, communication_share=sum(one.communication_share * one.hours for one in mine) / hours)
            table.add_row(*_cells(total, None, cluster))
        table.add_section()
    return table


def _cells(one: Cost, milliseconds: float | None, cluster: Cluster) -> list[Text]:
    shown: list[Any] = [one.gpus, printable(one.config)]
    shown += ["" if milliseconds is None else f"{milliseconds:,.1f}", f"{one.communication_share:.1%}"]
    kwh = one.gpu_hours * cluster.gpu.watts / 1e3
    return [Text(str(value)) for value in (*shown, *(f"{value:,.1f}" for value in (one.hours, one.gpu_hours, kwh)))]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
