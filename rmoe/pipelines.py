"""Runs trainings that build on one another, as the stages of a pipeline do.

Each is run once. It is resumed if it was interrupted, and run again if something that it depends on has changed. The
commands are those that a user would type in the root of the repository.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from rmoe.engine.check_values import everywhere
from rmoe.engine.ports import free_port
from rmoe.errors import UserError
from rmoe.inference.moved import moved_paths

_STEP = re.compile(r"Iter\(train\)\s*\[\s*(\d+)/(\d+)\].*?loss: (\S+)")
_TAIL = 25  # lines of a failed run's log that are shown
_POLL = 0.2  # seconds

Show = Callable[[int, int, str], object]
"""Is called with the number of steps done, the number of all steps, and the loss as it was logged."""


class Failed(Exception):
    """Says that a command did not do its work; the message has the end of its log."""


@dataclass(frozen=True)
class Training:
    """Describes one training run.

    Attributes:
        folder: the work dir.
        config: the config file, relative to the root of the repository.
        json: DeepSpeed's JSON file, likewise.
        options: the words after --cfg-options.
        after: the runs whose weights this one starts from.
        processes: number of processes; with 1 it runs without DeepSpeed's launcher.
    """

    folder: Path
    config: str
    json: str
    options: Sequence[str] = ()
    after: Sequence[Training] = ()
    processes: int = 1

    def command(self) -> list[str]:
        """Returns the command that a user would type."""
        words = ["python"]
        if self.processes > 1:
            words = ["deepspeed", "--num_accelerators", str(self.processes), "--master_port", str(free_port())]
        words += ["launch/train.py", self.config, "--deepspeed_config", self.json]
        words += ["--work-dir", str(self.folder), "--resume"]
        return words + (["--cfg-options", *self.options] if self.options else [])

    def fingerprint(self) -> str:
        """Returns a hash of everything that the result depends on."""
        config = Config.fromfile(self.config, import_custom_modules=False)
        config.pop("card", None)
        parts = (config.pretty_text, Path(self.json).read_text(), *self.options, str(self.processes))
        before = (one.fingerprint() for one in self.after)
        return hashlib.sha256("\n".join((*parts, *before)).encode()).hexdigest()

    def complete(self) -> bool:
        """Returns whether the work dir has the files that a finished run leaves."""
        return all((self.folder / name).is_file() for name in ("cost.json", "model.safetensors"))

    def current(self) -> bool:
        """Returns whether the work dir holds a run, finished or not, of this very configuration."""
        note = self.folder / "fingerprint"
        return note.is_file() and note.read_text() == self.fingerprint()

    def run(self, show: Show | None = None) -> bool:
        """Runs the training unless it is complete already; the runs in `after` must be complete.

        Args:
            show: is told of the progress.

        Returns:
            True if the training was run, False if it was complete already.

        Raises:
            Failed: the command failed or left an incomplete run.
            UserError: the work dir holds something that no pipeline has made, or cannot be made.
        """
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self.current():
            self._remove()
        if self.complete():
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the work dir {self.folder} cannot be made ({error}); give another") from error
        (self.folder / "fingerprint").write_text(self.fingerprint())
        log = self.folder / "output.log"
        run_logged(self.command(), log, show)
        if not self.complete():  # a launcher that was killed may return 0
            raise Failed(f"{self.folder} is not complete; see {log}, and run this again")
        return True

    def _remove(self) -> None:
        """Removes the work dir if the fingerprint in it shows that a run of another configuration has made it."""
        if self.folder.is_symlink() or not (self.folder / "fingerprint").is_file():
            raise UserError(
                f"{self.folder} is there already, and no pipeline has made it (it has no file 'fingerprint'); move it "
                "away, or give another work dir"
            )
        shutil.rmtree(self.folder)


def moved(config: Config, old: Path, new: Path) -> dict[str, str]:
    """Returns the options (dotted keys and values) that move every path of a config from the folder `old` to `new`."""
    before = config.to_dict()
    pairs = zip(everywhere(before), everywhere(moved_paths(before, old, new)), strict=True)
    return {key: there for (key, here), (_, there) in pairs if isinstance(there, str) and there != here}


def with_classes(config: Config, number: int) -> dict[str, int]:
    """Returns the options that set every number of classes of a config."""
    return {key: number for key, _ in everywhere(config.to_dict()) if key.rpartition(".")[2] == "num_classes"}


def run_logged(command: Sequence[str], log: Path, show: Show | None = None) -> None:
    """Runs `command` with its output in `log`.

    Raises:
        Failed: the command returned another exit code than 0.
    """
    with log.open("wb") as out, log.open(errors="replace") as lines:
        child = subprocess.Popen(installed(command), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            unfinished = ""
            while child.poll() is None:
                time.sleep(_POLL)
                text = unfinished + lines.read()
                whole, end, unfinished = text.rpartition("\n")
                _tell(show, whole + end)
            _tell(show, unfinished + lines.read())
        finally:
            _end(child)
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise Failed(f"{tail}\n\n{shlex.join(command)}\nreturned exit code {child.returncode}; all output: {log}")


def installed(command: Sequence[str]) -> list[str]:
    """Returns the command with its program's path in the environment of this Python.

    Raises:
        UserError: the environment does not have the program.
    """
    program = Path(sys.executable).with_name(command[0])
    if not program.is_file():
        raise UserError(f"there is no {program}; install the project into this environment: pip install -e .")
    return [str(program), *command[1:]]


def _tell(show: Show | None, text: str) -> None:
    for step, steps, loss in _STEP.findall(text) if show else ():
        show(int(step), int(steps), loss)  # type: ignore[misc]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children, which DeepSpeed's launcher leaves behind when it is told to end."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()
