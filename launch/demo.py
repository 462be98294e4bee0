"""The whole pipeline in small, on two CPU cores: `python launch/demo.py` (or `make demo`).

Renders the embedded data set, pretrains a dense core, finetunes it for segmentation and for detection, each once dense
and once with residual experts, and leaves the table, the pictures and all logs in its work dir. A step that is complete
is not run again unless its configuration has changed; one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from tqdm import tqdm

from rmoe.cli import run_guarded
from rmoe.config import UserError

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = Path("work_dirs/demo")  # as the configs have it
PROCESSES = 2
STEPS = 7  # data, core, four finetunes, report
_STEP = re.compile(r"Iter\(train\)\s*\[\s*(\d+)/(\d+)\].*?loss: ([\d.]+)")
_KIND = "model.backbone.moe.residual="
_TAIL = 25  # lines of a failed step's log that are shown


@dataclass(frozen=True)
class Training:
    """One training run.

    Attributes:
        folder: its work dir.
        title: for people.
        config: file in rmoe/configs/demo.
        json: file in ds_configs.
        options: as for --cfg-options.
    """

    folder: Path
    title: str
    config: str
    json: str
    options: Sequence[str]

    def command(self) -> list[str]:
        """As a user would type it."""
        command = ["deepspeed", "--num_accelerators", str(PROCESSES), "--master_port", str(_free_port())]
        command += [
            "launch/train.py",
            f"rmoe/configs/demo/{self.config}",
            "--deepspeed_config",
            f"ds_configs/{self.json}",
        ]
        command += ["--work-dir", str(self.folder), "--resume"]
        return command + (["--cfg-options", *self.options] if self.options else [])

    def fingerprint(self, core: str) -> str:
        """Of all that the result depends on; `core` is the fingerprint of the core that it starts from."""
        config = Config.fromfile(ROOT / "rmoe/configs/demo" / self.config, import_custom_modules=False)
        parts = (config.pretty_text, (ROOT / "ds_configs" / self.json).read_text(), *self.options, core)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def complete(self) -> bool:
        """Whether it has left what a finished run leaves."""
        return all((self.folder / name).is_file() for name in ("cost.json", "model.safetensors"))


class Failed(Exception):
    """A step's command did not do its work."""


def main() -> int:
    """Runs all steps; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=DEFAULT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--residual", choices=("low_rank", "full"), default="low_rank", help="kind of the residuals")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    # The demo is the same everywhere: on the CPU, whatever the machine has.
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the step that is running, too
    out, started = arguments.work_dir, time.monotonic()
    runs = trainings(out, arguments.residual)
    try:
        _heading(1, "Data: the embedded data set, in the layouts of ImageNet, ADE20K and COCO")
        _render(out / "data")
        core = ""
        for number, training in enumerate(runs, start=2):
            _heading(number, training.title)
            fingerprint = _train(training, core)
            core = core or fingerprint
    except Failed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    _heading(STEPS, "Report")
    from rmoe.report import report

    report([training.folder for training in runs], out)
    print(
        f"{(time.monotonic() - started) / 60:.1f} minutes. In {out}: summary.json, pictures (*.png), and in each run's"
    )
    print(f"folder its logs; curves: tensorboard --logdir {out}")
    return 0


def trainings(out: Path, residual: str) -> list[Training]:
    """The core and the finetunes from it, with residuals of the kind `residual`."""
    core, scenes, objects, splits = out / "core", out / "data/ade20k", out / "data/coco", ("train", "val")
    classes = {scenes: scenes / "classes.json", objects: objects / "annotations/instances_val2017.json"}
    roots = [f"{split}_dataloader.dataset.root={out / 'data/upstream'}" for split in splits]
    moved = {
        data: [f"model.backbone.core={core}"]
        + [f"{split}_dataloader.dataset.data_root={data}" for split in splits]
        + [f"{split}_dataloader.dataset.classes={classes[data]}" for split in splits]
        for data in classes
    }
    moved[objects].append(f"val_evaluator.ann_file={classes[objects]}")
    if out == DEFAULT:
        roots, moved = [], {scenes: [], objects: []}
    suffix, kind = ("", []) if residual == "low_rank" else (f"_{residual}", [_KIND + residual])
    made = [Training(core, "Core pretraining: a small dense Swin on single objects", "core.py", "zero0.json", roots)]
    for data, prefix, head in ((scenes, "", "UPerNet on scenes"), (objects, "detection_", "Mask R-CNN on scenes")):
        for arm, title, more in (
            ("dense", "Dense finetune: the core with", []),
            ("residual", f"Upcycling and residual finetune, 8 experts with {residual} residuals:", kind),
        ):
            folder = out / f"{prefix}{arm}{suffix if more else ''}"
            options = moved[data] + more
            made.append(Training(folder, f"{title} {head}", f"{prefix}{arm}.py", "zero2.json", options))
    return made


def _render(folder: Path) -> None:
    command = ["rmoe", "data", "scenes", str(folder)]
    print(f"$ {shlex.join(command)}")
    code = subprocess.run(_installed(command)).returncode
    if code:
        raise Failed(f"{shlex.join(command)} left with exit code {code}")


def _train(training: Training, core: str) -> str:
    """Runs a training unless it is complete; returns its fingerprint."""
    fingerprint, note = training.fingerprint(core), training.folder / "fingerprint"
    if training.folder.exists() and (not note.is_file() or note.read_text() != fingerprint):
        print(f"{training.folder} is of another configuration: starting over")
        shutil.rmtree(training.folder)
    if training.complete():
        print(f"complete in {training.folder}")
        return fingerprint
    training.folder.mkdir(parents=True, exist_ok=True)
    note.write_text(fingerprint)
    _run_logged(training.command(), training.folder / "output.log")
    if not training.complete():  # a launcher that was killed may leave with 0
        raise Failed(f"{training.folder} is not complete; see {training.folder / 'output.log'}, and run the demo again")
    return fingerprint


def _run_logged(command: Sequence[str], log: Path) -> None:
    """Runs `command` with its output in `log`, and its progress on the terminal."""
    print(f"$ {shlex.join(command)}\n  output: {log}")
    with log.open("wb") as out, log.open(errors="replace") as lines:
        child = subprocess.Popen(_installed(command), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            with tqdm(unit="step", mininterval=0.2 if sys.stderr.isatty() else 20) as bar:
                while child.poll() is None:
                    time.sleep(0.2)
                    _show(bar, lines.read())
                _show(bar, lines.read())
        finally:
            _end(child)
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise Failed(f"{tail}\n\n{shlex.join(command)}\nleft with exit code {child.returncode}; all output: {log}")


def _show(bar: tqdm, text: str) -> None:
    for step, steps, loss in _STEP.findall(text):
        bar.total = int(steps)
        bar.set_postfix(loss=loss, refresh=False)
        bar.update(int(step) - bar.n)


def _end(child: subprocess.Popen[bytes]) -> None:
    """With all that it has started: DeepSpeed's launcher leaves its children behind when it is told to end."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()


def _installed(command: Sequence[str]) -> list[str]:
    """The command, from the environment that this Python belongs to."""
    program = Path(sys.executable).with_name(command[0])
    if not program.is_file():
        raise UserError(f"there is no {program}; install the project into this environment: pip install -e .")
    return [str(program), *command[1:]]


def _heading(number: int, text: str) -> None:
    print(f"\n{number}/{STEPS} {text}\n{'─' * (len(text) + 4)}", flush=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    run_guarded(main, "demo")
