"""The command line of training: from a config, a DeepSpeed JSON and options to a run."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object

from rmoe.data.preflight import preflight
from rmoe.engine import ds_json, faults, safe_config
from rmoe.engine.building import user_errors
from rmoe.engine.faults import Fault, Preempted
from rmoe.engine.lock import Lock
from rmoe.engine.prepare import check_unused, prepare
from rmoe.engine.processes import join, set_place
from rmoe.engine.read_config import Options, folder_name, read_config, seconds
from rmoe.engine.strategy import Diverged, Runner
from rmoe.errors import UserError

_PATIENCE = 20.0  # seconds
_TIMEOUT = 300.0  # seconds


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
        if arguments.debug:
            traceback.print_exc()
        if os.environ.get("RANK", "0") != "0":
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
    set_place()
    with faults.Signals() as signals:
        if arguments.safe_config:
            safe_config.lock_down()
        content = ds_json.read_json(arguments.deepspeed_config)
        cfg = read_config(arguments.config, arguments.cfg_options or {}, arguments.safe_config)
        with user_errors("the config"):
            notes = prepare(cfg, content, int(os.environ["WORLD_SIZE"]), arguments.work_dir, arguments.resume)
        join(arguments.timeout)
        folder = Path(cfg.work_dir)
        with Lock(folder), faults.Watch(folder, arguments.timeout) as watch:
            try:
                check_unused(cfg)
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
    words.add_argument("--work-dir", type=folder_name, metavar="DIR", help="default: work_dirs/ and the config's name")
    words.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint, if any")
    words.add_argument(
        "--timeout",
        type=seconds,
        default=_TIMEOUT,
        metavar="SECONDS",
        help="without progress, after which every process ends; longer than a step, an evaluation's metrics and a "
        "checkpoint take (default: %(default)g)",
    )
    words.add_argument(
        "--safe-config", action="store_true", help="refuse a CONFIG that is a Python program: only JSON or YAML"
    )
    words.add_argument("--cfg-options", nargs="+", action=Options, metavar="KEY=VALUE", help="change the config")
    words.add_argument("--debug", action="store_true", help="show where in the program an error comes from")
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return words


def innermost(message: str) -> str:
    """Of an error in a loader's worker, which arrives with its traceback, the last line; else the message."""
    if "Original Traceback" not in message:
        return message
    return re.split(r"\n[\w.]*UserError: ", message)[-1]
