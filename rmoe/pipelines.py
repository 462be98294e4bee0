"""Trainings that build on one another, as a pipeline's stages do: each is run once, gone on with where it was
interrupted, and done again where something that it depends on has changed. They are run as a user would run them, from
the root of the repository.
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

_STEP = re.compile(r"Iter\(train\)\s*\[\s*(\d+)/(\d+)\].*?loss: ([\d.]+)")
_TAIL = 25  # lines of a failed run's log that are shown
_POLL = 0.2  # seconds

Show = Callable[[int, int, str], object]
"""Called with the steps done, those in all, and the loss as it was logged."""


class Failed(Exception):
    """A command did not do its work; the message has the end of its log."""


@dataclass(frozen=True)
class Training:
    """One training run.

    Attributes:
        folder: its work dir.
        config: file, as one types it from the root of the repository.
        json: DeepSpeed's file, likewise.
        options: as for --cfg-options.
        after: the runs whose weights it starts from.
        processes: of DeepSpeed's launcher; 1 runs without it.
    """

    folder: Path
    config: str
    json: str
    options: Sequence[str] = ()
    after: Sequence[Training] = ()
    processes: int = 1

    def command(self) -> list[str]:
        """As a user would type it."""
        words = ["python"]
        if self.processes > 1:
            words = ["deepspeed", "--num_accelerators", str(self.processes), "--master_port", str(free_port())]
        words += ["launch/train.py", self.config, "--deepspeed_config", self.json]
        words += ["--work-dir", str(self.folder), "--resume"]
        return words + (["--cfg-options", *self.options] if self.options else [])

    def fingerprint(self) -> str:
        """Of all that the result depends on."""
        config = Config.fromfile(self.config, import_custom_modules=False)
        config.pop("card", None)
        parts = (config.pretty_text, Path(self.json).read_text(), *self.options, str(self.processes))
        before = (one.fingerprint() for one in self.after)
        return hashlib.sha256("\n".join((*parts, *before)).encode()).hexdigest()

    def complete(self) -> bool:
        """Whether it has left what a finished run leaves."""
        return all((self.folder / name).is_file() for name in ("cost.json", "model.safetensors"))

    def current(self) -> bool:
        """Whether what is in its work dir, finished or not, is of this configuration."""
        note = self.folder / "fingerprint"
        return note.is_file() and note.read_text() == self.fingerprint()

    def run(self, show: Show | None = None) -> bool:
        """Runs it, unless it is complete; those `after` which it comes must be.

        Args:
            show: told of the progress.

        Returns:
            Whether anything had to be done.

        Raises:
            Failed: the command failed, or left an incomplete run.
            UserError: there is something in its work dir that it has not made.
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
        if not self.complete():  # a launcher that was killed may leave with 0
            raise Failed(f"{self.folder} is not complete; see {log}, and run this again")
        return True

    def _remove(self) -> None:
        """Removes the work dir of another configuration; a run has left its fingerprint there."""
        if self.folder.is_symlink() or not (self.folder / "fingerprint").is_file():
            raise UserError(
                f"{self.folder} is there already, and no pipeline has made it (it has no file 'fingerprint'); move it "
                "away, or give another work dir"
            )
        shutil.rmtree(self.folder)


def moved(config: Config, old: Path, new: Path) -> dict[str, str]:
    """Returns the options (dotted keys and values) that move every path of a config from the folder `old` to `new`."""
    return {
        key: str(new / Path(value).relative_to(old))
        for key, value in everywhere(config.to_dict())
        if isinstance(value, str) and Path(value).is_relative_to(old)
    }


def with_classes(config: Config, number: int) -> dict[str, int]:
    """Returns the options that set every number of classes of a config."""
    return {key: number for key, _ in everywhere(config.to_dict()) if key.rpartition(".")[2] == "num_classes"}


def run_logged(command: Sequence[str], log: Path, show: Show | None = None) -> None:
    """Runs `command` with its output in `log`.

    Raises:
        Failed: it left with another exit code than 0.
    """
    with log.open("wb") as out, log.open(errors="replace") as lines:
        child = subprocess.Popen(installed(command), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while child.poll() is None:
                time.sleep(_POLL)
                _tell(show, lines.read())
            _tell(show, lines.read())
        finally:
            _end(child)
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise Failed(f"{tail}\n\n{shlex.join(command)}\nleft with exit code {child.returncode}; all output: {log}")


def installed(command: Sequence[str]) -> list[str]:
    """The command, from the environment that this Python belongs to.

    Raises:
        UserError: it is not there.
    """
    program = Path(sys.executable).with_name(command[0])
    if not program.is_file():
        raise UserError(f"there is no {program}; install the project into this environment: pip install -e .")
    return [str(program), *command[1:]]


def _tell(show: Show | None, text: str) -> None:
    for step, steps, loss in _STEP.findall(text) if show else ():
        show(int(step), int(steps), loss)  # type: ignore[misc]


def _end(child: subprocess.Popen[bytes]) -> None:
    """With all that it has started: DeepSpeed's launcher leaves its children behind when it is told to end."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()
