"""One run in a work dir at a time: a file there says who writes, and a run that ended without a word is no obstacle.

Whether the holder lives is asked of the system where it runs on this machine. Of another machine's only the file tells:
its time of change, which the holder renews, is compared with that of a file made just now, so that the clock is that of
the file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process

from rmoe.engine import faults
from rmoe.errors import UserError

NAME = "run.lock"
_RENEWED = 3.0  # seconds between two renewals
_POLL = 1.0  # seconds between two looks at it
_STALE = 20.0  # seconds without one, after which the lock of another machine's process counts for nothing
_ROOM = 2**20  # bytes that a work dir needs at the very least
_WAIT = "wait"
_SHOWN = 200  # characters of a path in a message


class Lock:
    """The right of this run to write into a work dir, while it is entered. All processes enter it; the first holds it.

    Args:
        folder: the work dir; it is made.

    Raises:
        UserError: the folder cannot be written, or another run has the lock; every process raises it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._about = {**_identity(os.getpid()), "token": uuid.uuid4().hex}
        self._seen: tuple[str, int] | None = None
        self._over = threading.Event()

    def __enter__(self) -> Lock:
        while True:
            said = [self._attempt() if is_main_process() else None]
            broadcast_object_list(said)
            if not said[0]:
                break
            if said[0] != _WAIT:
                raise UserError(said[0])
            time.sleep(_POLL)
        if is_main_process():
            self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if is_main_process():
            self._over.set()
            self._thread.join()
            if self._holder().get("token") == self._about["token"]:
                self._file.unlink(missing_ok=True)

    def _attempt(self) -> str:
        """Returns nothing if the lock is this run's now, the refusal, or that it takes a while to tell."""
        try:
            make_folder(self._file.parent)
            return self._take()
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"the work dir {self._file.parent} cannot be written ({error}); give another --work-dir"

    def _take(self) -> str:
        while True:
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                try:
                    os.write(descriptor, json.dumps(self._about).encode())
                except OSError:
                    self._file.unlink()
                    raise
                finally:
                    os.close(descriptor)
                return ""
            holder = self._holder()
            alive = self._alive(holder)
            who = f"process {holder.get('process', '?')} on {holder.get('host', 'an unknown host')}"
            if alive is None:
                return _WAIT
            if alive:
                return f"{who} is training in {self._file.parent}; wait until it has ended, or give another --work-dir"
            self._remove(holder)
            print(f"rmoe: the lock of {who}, which is gone, has been removed", file=sys.stderr, flush=True)

    def _alive(self, holder: dict[str, Any]) -> bool | None:
        """Returns whether the holder of the lock lives; None while nobody can tell."""
        here = self._about
        if holder.get("machine") == here["machine"]:
            return _identity(holder.get("process"))["started"] == holder.get("started")
        try:
            renewed, now = self._file.stat().st_mtime_ns, self._clock()
        except FileNotFoundError:
            return False
        if (now - renewed) / 1e9 > _STALE:
            return False
        seen, self._seen = self._seen, (holder.get("token", ""), renewed)
        if seen is None:
            text = f"{self._file} is of a process on another machine: waiting up to {_STALE:g} s for a sign of life"
            print(f"rmoe: {text}", file=sys.stderr, flush=True)
        return True if seen not in (None, self._seen) else None

    def _clock(self) -> int:
        """Returns the file system's time, in nanoseconds."""
        probe = self._file.with_name(f"{NAME}.{self._about['token']}")
        try:
            probe.touch()
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _remove(self, holder: dict[str, Any]) -> None:
        """Removes the lock of `holder`, and no other that somebody has put there meanwhile."""
        aside = self._file.with_name(f"{NAME}.{self._about['token']}")
        with contextlib.suppress(FileNotFoundError):
            self._file.rename(aside)
            if _read(aside).get("token") != holder.get("token"):
                aside.rename(self._file)
            else:
                aside.unlink()

    def _holder(self) -> dict[str, Any]:
        return _read(self._file)

    def _renew(self) -> None:
        while not self._over.wait(_RENEWED):
            with contextlib.suppress(OSError):
                os.utime(self._file)
            token = self._holder().get("token")
            if token is not None and token != self._about["token"]:
                faults.leave(f"another run has taken over {self._file.parent}, as this one gave no sign of life")


def check_folder(folder: Path, option: str = "--work-dir") -> None:
    """Checks that a folder for results can be made and written; nothing is made yet.

    Raises:
        UserError: it cannot; `option` of the command line names another.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.lstat()
        if not folder.exists() and folder.is_symlink():
            raise NotADirectoryError(f"it is a link to {folder.readlink()}, which is not there")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"{there} is read-only")
    except (OSError, ValueError) as error:
        text = str(folder) if len(str(folder)) < _SHOWN else f"{str(folder)[:_SHOWN]}…"
        raise UserError(f"the folder {text} cannot be written: {error}; give another {option}") from error


def make_folder(folder: Path) -> None:
    """Makes the work dir, and sees that there is room in it.

    Raises:
        OSError: it cannot be made.
        UserError: its disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize < _ROOM:
        raise UserError(f"the disk of the work dir {folder} is full; make room, or give another --work-dir")


def _read(file: Path) -> dict[str, Any]:
    """Returns what the lock says; nothing, where it is half written or gone."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(file.read_text())
        if isinstance(content, dict):
            return content
    return {}


def _identity(process: Any) -> dict[str, Any]:
    """Returns what tells a process of this machine from all others, those that had its number before included."""
    started = None
    with contextlib.suppress(OSError, ValueError):
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        started = int(rest[18]) if state != "Z" else None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return {"host": socket.gethostname(), "machine": machine, "process": process, "started": started}
