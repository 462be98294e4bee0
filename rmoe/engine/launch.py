"""A training run: from the words of the command line to the runner, and from what ends it to an exit code."""

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
from rmoe.engine.command import parser
from rmoe.engine.faults import Fault, Preempted
from rmoe.engine.lock import Lock
from rmoe.engine.prepare import check_unused, prepare
from rmoe.engine.processes import join, set_place
from rmoe.engine.progress import StartHook
from rmoe.engine.read_config import read_config
from rmoe.engine.rescale import rescale
from rmoe.engine.shipped import find_json
from rmoe.engine.strategy import Diverged, Runner
from rmoe.engine.terminal import say, without_noise
from rmoe.errors import UserError

_PATIENCE = 20.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line of `launch/train.py`; see `run`."""
    return run(parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Trains as `arguments` say.

    Returns:
        0; 1 where training diverged; 85 where a signal asked the run to leave, and `--resume` goes on. A process that
        another one's fault has ended leaves with 3 at once.

    Raises:
        UserError: what the user can mend.
    """
    try:
        train(arguments)
    except (UserError, Diverged) as error:
        if arguments.trace:
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
            print(f"rmoe: left on {request}", file=sys.stderr)
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
        UserError: see `run`.
        Diverged: the loss or a weight is no longer finite.
        Preempted: a process got a signal, and all have saved.
        Fault: the other processes cannot be reached any more.
    """
    set_place()
    with faults.Signals() as signals:
        if arguments.safe_config:
            safe_config.lock_down()
        json = arguments.deepspeed_config
        say(f"reading {arguments.config} and {json}")
        content = ds_json.read_json(find_json(json))
        options = arguments.cfg_options or {}
        with without_noise():
            cfg = read_config(arguments.config, options, arguments.safe_config)
        with user_errors("the config"):
            own = {key: value for key, value in options.items() if not key.startswith("tasks.")}  # those are joined
            processes = int(os.environ["WORLD_SIZE"])
            notes = rescale(cfg, arguments.steps, content, processes, own) if arguments.steps else []
            notes += prepare(cfg, content, processes, arguments.work_dir, arguments.resume)
        join(arguments.timeout)
        folder = Path(cfg.work_dir)
        with Lock(folder), faults.Watch(folder, arguments.timeout) as watch:
            try:
                check_unused(cfg, arguments.resume)
                check_data(cfg)
                say(f"setting up hooks and logs; output: {folder}")
                with user_errors("the config"):
                    runner = Runner.from_cfg(cfg)
                for note in notes:
                    runner.logger.warning(note)
                runner.register_hook(StartHook(f"{arguments.config}, {json}"))
                runner.register_hook(faults.PreemptionHook(signals))
                runner.register_hook(faults.WatchHook(watch))
                say("building data, model and optimizer")
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


def innermost(message: str) -> str:
    """Returns the message, or the last line of one that arrives with its traceback, from a loader's worker."""
    if "Original Traceback" not in message:
        return message
    return re.split(r"\n[\w.]*UserError: ", message)[-1]
