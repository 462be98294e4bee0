"""Starts a training command again when a fault has ended it.

    python launch/restart.py --max-restarts 3 deepspeed --num_gpus 8 launch/train.py CONFIG --deepspeed_config JSON

It stands above the launcher: when a rank has been killed, the launcher ends the others and then itself, and only what
is above it can start all of them anew. A restart has `--resume` added, so the last words must be launch/train.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_FINAL = (0, 1, 2, 85)  # finished; diverged or failed; a mistake in the configuration; left on request
_KILLED = 128 + signal.SIGKILL
_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_GRACE = 10.0  # seconds that processes may outlive their launcher
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux: a descendant whose parent has ended becomes a child of this process


class Supervisor:
    """Runs a command, passes on to its ranks what this process is asked by a signal, and leaves no process behind."""

    def __init__(self) -> None:
        self.asked = False
        self._group = 0
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        for number in _REQUESTS:
            signal.signal(number, self._pass_on)

    def run(self, command: list[str]) -> int:
        """Returns the exit code of `command`, as a shell counts; that of a killed process where it left any behind."""
        child = subprocess.Popen(command, start_new_session=True)
        self._group, ended = child.pid, 0
        while ended != child.pid:  # others first, which DeepSpeed's launcher would take for alive
            ended, status = os.waitpid(-1, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        code = child.returncode if child.returncode >= 0 else 128 - child.returncode
        if not self._ended(_GRACE):
            os.killpg(self._group, signal.SIGKILL)
            code = code or _KILLED  # DeepSpeed's launcher returns 0 when its own process is killed
            self._ended(_GRACE)
        return code

    def _ended(self, seconds: float) -> bool:
        """Waits for all processes of the command; says whether they have ended within the time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if not os.waitpid(-self._group, os.WNOHANG)[0]:
                    time.sleep(0.1)
            except ChildProcessError:
                return True
        return False

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal to the ranks, which save and leave (`deepspeed` would just end), or else to the command.

        Of SIGINT a rank would end at once: it gets SIGTERM.
        """
        self.asked = True
        number = signal.SIGTERM if number == signal.SIGINT else number
        if self._group:
            for process in list(_ranks(self._group)) or [self._group]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)


def main() -> int:
    """Runs the command, again after a fault; returns the exit code of the last attempt."""
    parser = argparse.ArgumentParser(prog="restart.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--max-restarts", type=_count, required=True, metavar="N", help="after faults; others are final"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="ends with words of train.py")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("there is no COMMAND; give that which starts launch/train.py")
    if not shutil.which(arguments.command[0]):
        parser.error(
            f"there is no program {arguments.command[0]!r}; COMMAND begins with one, such as deepspeed or srun"
        )
    supervisor, command = Supervisor(), arguments.command
    for restart in range(arguments.max_restarts + 1):
        code = supervisor.run(command)
        if code in _FINAL or supervisor.asked or restart == arguments.max_restarts:
            break
        count = f"restart {restart + 1} of {arguments.max_restarts}"
        print(f"restart.py: code {code}, {count}: goes on from the last checkpoint", file=sys.stderr, flush=True)
        command = [*arguments.command, "--resume"]
    return code


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of restarts; it is a whole number, at least 0")
    return int(text)


def _ranks(group: int) -> Iterator[int]:
    """Yields the processes of the group that a launcher has given a place."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            process = int(folder.name)
            if os.getpgid(process) == group and b"\0RANK=" in b"\0" + (folder / "environ").read_bytes():
                yield process


if __name__ == "__main__":
    sys.exit(main())
