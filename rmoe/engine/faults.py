"""What befalls a run from outside: a signal to make room, a process that dies or hangs, a network that is cut.

A signal is remembered until all processes agree, between two steps, to save and leave. Against everything else each
process has a thread that writes a heartbeat into the work dir once a second: what the process has finished, and whether
it waits for others. A process that cannot go on reads the heartbeats, says in one line which process is the cause, and
ends, at the latest `timeout` seconds after its last progress.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop
from torch.distributed import distributed_c10d

from rmoe.errors import UserError

PREEMPTED = 85  # exit code of a run that left on request: Slurm's RequeueExit knows it, and so do our batch scripts
FAULT = 3  # exit code of a process that a fault of another one, or its own standstill, has ended
HEARTBEATS = "heartbeats"  # folder in the work dir
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_RECORD = 1024  # bytes of a heartbeat, padded: it is overwritten in place
_GLOO = re.compile(r"\[\S*/gloo/\S+:\d+\]")  # what a message of gloo's begins with
_MISSED = 4  # heartbeats, after which a process counts as gone


class Preempted(Exception):
    """All processes have left the training loop, because one of them got a signal; the message says what is saved."""


class Fault(RuntimeError):
    """Training cannot go on; the message names the process that is the cause, and its last finished step."""


class Signals:
    """Remembers SIGUSR1 and SIGTERM instead of dying of them, while it is entered.

    Attributes:
        caught: the first of them that came, or 0.
    """

    def __init__(self) -> None:
        self.caught = 0

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            # The first to leave makes Slurm send SIGTERM to the others, which are on their way out with their own code.
            signal.signal(number, signal.SIG_IGN if kind is Preempted else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or number


class PreemptionHook(Hook):
    """Lets the processes ask each other, before each step, whether one was told to leave; then all save and leave.

    It costs one all-reduce of a number in each step. Everything that belongs to the steps before, evaluation included,
    is done by then.

    Args:
        signals: of this process.
    """

    priority = "HIGHEST"

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def before_train(self, runner: Any) -> None:
        """Remembers where this process started: there is nothing to save there."""
        self._start = runner.iter

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Asks all processes; collective.

        Raises:
            Preempted: on all processes.
        """
        if runner.iter % runner.strategy.layout.accumulation:
            return
        caught = torch.tensor(self._signals.caught, device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(caught, op=dist.ReduceOp.MAX)
        if number := int(caught.item()):
            raise Preempted(f"{signal.Signals(number).name} after step {runner.iter}: {self._save(runner)}")

    def _save(self, runner: Any) -> str:
        """Saves through that checkpoint hook of the run which saves the optimizer too, and counts the old ones; returns
        what is saved, and what --resume does.
        """
        savers = (hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_optimizer)
        if (saver := next(savers, None)) is None:
            return "nothing is saved, for the config has no CheckpointHook with save_optimizer: --resume starts anew"
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            return "--resume goes on from the last checkpoint, as a loop over epochs saves none in the middle of one"
        if runner.iter == self._start:
            return "no step has been made since the start; --resume goes on from there"
        name = saver.filename_tmpl.format(runner.iter)
        if Path(saver.last_ckpt or "").name != name:
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            saver._save_checkpoint_with_step(runner, runner.iter, meta=meta)
        return f"{name} is saved; --resume goes on"


class Watch:
    """The heartbeat of this process and its look at those of the others, while it is entered.

    Args:
        folder: the run's work dir, which all processes see.
        timeout: seconds without progress after which the process is ended.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.timeout, self._folder = timeout, folder / HEARTBEATS
        self._interval = min(1.0, timeout / 20)
        self._rank, self._processes = dist.get_rank(), dist.get_world_size()
        self._file = self._folder / f"{self._rank}.json"
        self._state: dict[str, Any] = {"beat": 0, "step": 0, "host": socket.gethostname(), "process": os.getpid()}
        self._progress: float | None = None  # when the last one was; None while nobody counts on it
        self._main, self._lock, self._over = threading.get_ident(), threading.Lock(), threading.Event()
        self._warned: set[str] = set()

    def __enter__(self) -> Watch:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file.unlink(missing_ok=True)  # an earlier run's, of which nothing may be left behind ours
            self._beat()
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot be written ({error.strerror}); give a --work-dir that all processes can write"
            ) from error
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        self._thread.join()
        if error is None or isinstance(error, Preempted):
            with contextlib.suppress(OSError):  # the run is over: nobody reads what may be left
                self._file.unlink(missing_ok=True)
                self._folder.rmdir()  # by the last one
        else:
            self._try_to_beat(ended=f"{type(error).__name__}: {error}".splitlines()[0])

    def step(self, finished: int) -> None:
        """Notes progress: `finished` steps are done. The first call starts the clock."""
        self._state["step"], self._progress = finished, time.monotonic()

    def rest(self) -> None:
        """Stops the clock."""
        self._progress = None

    def explain(self, error: BaseException | None = None) -> str:
        """Finds who is the cause of `error`, or of the standstill. It takes a few heartbeats.

        Returns:
            One line.
        """
        before = self._read()
        for _ in range(_MISSED):
            time.sleep(self._interval)
            self._try_to_beat()
        after = self._read()
        cause = self._cause(before, after)
        reason = f" ({str(error).splitlines()[0][:200]})" if error is not None and str(error) else ""
        return (
            f"rank {self._rank} on {self._state['host']} ends after step {self._state['step']}: {cause}{reason}; "
            "--resume goes on from the last checkpoint"
        )

    def _cause(self, before: Mapping[int, dict[str, Any]], after: Mapping[int, dict[str, Any]]) -> str:
        ranks = range(self._processes)
        if absent := [rank for rank in ranks if rank not in after]:
            return f"rank {absent[0]} has no heartbeat in {self._folder}"
        silent = [rank for rank in ranks if before.get(rank, {}).get("beat") == after[rank]["beat"]]
        if gone := [rank for rank in silent if not after[rank].get("ended")]:
            return "; ".join(f"{_name(rank, after[rank])} is gone or stopped" for rank in gone)
        if silent:  # they left because of another one, or are the cause
            said = next((after[rank]["ended"] for rank in silent if not after[rank]["ended"].startswith("Fault")), None)
            return f"{_name(silent[0], after[silent[0]])} ended ({said or after[silent[0]]['ended']})"
        slowest = min(after[rank]["step"] for rank in ranks)
        behind = [rank for rank in ranks if after[rank]["step"] == slowest]
        busy = [rank for rank in behind if not after[rank]["waits"]]
        if busy and (len(busy) < self._processes or self._processes == 1):
            return "; ".join(f"{_name(rank, after[rank])} hangs at {after[rank]['at']}" for rank in busy)
        hosts = sorted({one["host"] for one in after.values()})
        return f"all ranks wait for each other after step {slowest}; look at the network of {', '.join(hosts)}"

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self._try_to_beat()
            if self._progress is not None and time.monotonic() - self._progress > self.timeout:
                self._end()

    def _end(self) -> None:
        """Ends this process, whether its cause can be found or not."""
        standstill = TimeoutError(f"no progress for {self.timeout:g} s, see --timeout")
        try:
            text = self.explain(standstill)
        except Exception as error:  # the process must end all the same
            text = (
                f"rank {self._rank} ends after step {self._state['step']}: {standstill}, of unknown cause ({error!r})"
            )
        if not self._over.is_set():
            self._try_to_beat(ended=f"Fault: {text}")
            leave(text)

    def _try_to_beat(self, ended: str = "") -> None:
        """Writes a heartbeat if it can. Whatever goes wrong must not stop the clock, and is told once."""
        try:
            self._beat(ended)
        except Exception as error:
            self._warn(f"the heartbeat cannot be written ({error}); a standstill of this process is still seen")

    def _warn(self, text: str) -> None:
        """Says it once, and not through the log, whose lock a thread that hangs in writing it would hold."""
        if text not in self._warned:
            self._warned.add(text)
            with contextlib.suppress(OSError, ValueError):
                print(f"rmoe: warning: {text}", file=sys.stderr, flush=True)

    def _beat(self, ended: str = "") -> None:
        with self._lock:
            waits, at = _stacks(self._main)
            self._state |= {"beat": self._state["beat"] + 1, "waits": waits, "at": at, "ended": ended}
            while len(record := json.dumps(self._state).encode()) > _RECORD:
                self._state["ended"] = self._state["ended"][: len(self._state["ended"]) // 2]
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
                if self._state["beat"] > 1:
                    self._warn(f"{self._folder} was removed while the run goes on; it is made again")
            # In place and closed each time: so other machines see it at once, on a network file system too.
            descriptor = os.open(self._file, os.O_CREAT | os.O_WRONLY, 0o644)
            try:
                os.write(descriptor, record.ljust(_RECORD))
            finally:
                os.close(descriptor)

    def _read(self) -> dict[int, dict[str, Any]]:
        """Returns the heartbeats by rank, without those that cannot be read."""
        found = {}
        for rank in range(self._processes):
            with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
                record = json.loads((self._folder / f"{rank}.json").read_text())
                if all(type(record[key]) is type(value) for key, value in self._state.items()):
                    found[rank] = record
        return found


class WatchHook(Hook):
    """Tells the watch of every step, of training and of evaluation."""

    priority = "LOWEST"

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def before_train(self, runner: Any) -> None:
        """Starts the clock: from here on a standstill ends the process."""
        self._watch.step(runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Notes that the step and its checkpoint are done."""
        self._watch.step(runner.iter + 1)

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Notes that a batch has been evaluated."""
        self._watch.step(runner.iter)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Notes that the metrics are computed."""
        self._watch.step(runner.iter)

    def after_train(self, runner: Any) -> None:
        """Stops the clock: the whole model is written."""
        self._watch.rest()


def limit_groups(timeout: float) -> None:
    """Sets how long new process groups wait to `timeout` seconds: DeepSpeed makes its own with torch's default, half
    an hour.
    """
    distributed_c10d.default_pg_timeout = timedelta(seconds=timeout)
    distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=timeout)


def limit_group(timeout: float) -> None:
    """Sets the same for the group of all processes, once they have met."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))


def of_a_collective(error: BaseException) -> bool:
    """Returns whether `error` says that the other processes cannot be reached, and nothing about this one.

    torch has a class for such errors; those of gloo are plain ones, raised in a collective or, where it is waited for
    elsewhere, with the place in gloo's source that they are from.
    """
    if type(error) is not RuntimeError:
        return isinstance(error, dist.DistError)
    passed = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    return bool(_GLOO.match(str(error))) or distributed_c10d.__file__ in passed


def leave(text: str) -> NoReturn:
    """Says `text`, ends this process and its loaders' workers at once: a group that lost a member cannot be closed."""
    try:
        for child in multiprocessing.active_children():
            child.kill()
        print(f"rmoe: error: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:  # whatever the streams are: a pipe that nobody reads, a file on a full disk
        os._exit(FAULT)


def spare_worker(worker_id: int) -> None:
    """Lets a loader's worker, which is starting, outlive a scheduler's SIGTERM to all processes of a job: it is needed
    until its own process has saved, and ends with that one.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_request, daemon=True).start()


def _end_on_request() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _stacks(main: int) -> tuple[bool, str]:
    """Returns whether a thread of this process waits for others, and where the main one is."""
    frames = sys._current_frames()
    waits = any(_in_collective(frame) for thread, frame in frames.items() if thread != threading.get_ident())
    top = frames.get(main)
    return waits, f"{Path(top.f_code.co_filename).name}:{top.f_lineno}" if top else ""


def _in_collective(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == distributed_c10d.__file__:
            return True
        frame = frame.f_back
    return False


def _name(rank: int, state: Mapping[str, Any]) -> str:
    return f"rank {rank} (process {state['process']} on {state['host']}, last seen after step {state['step']})"
