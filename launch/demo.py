"""The whole pipeline in small, on two CPU cores: `python launch/demo.py` (or `make demo`).

Renders the embedded data set, pretrains a dense core, finetunes it for segmentation and for detection, each once dense
and once with residual experts, and leaves the table, the pictures and all logs in its work dir. A step that is complete
is not run again unless its configuration has changed; one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from mmengine.config import Config

from rmoe.engine.terminal import progress_bar
from rmoe.errors import run_guarded
from rmoe.pipelines import Failed, Training, installed, moved

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = Path("work_dirs/demo")  # as the configs have it
PROCESSES = 2
STEPS = 7  # data, core, four finetunes, report
TITLES = {
    "core": "Core pretraining: a small dense Swin on single objects",
    "dense": "Dense finetune: the core with UPerNet on scenes",
    "residual": "Upcycling and residual finetune: the same with 8 experts",
    "detection_dense": "Dense finetune: the core with Mask R-CNN on scenes",
    "detection_residual": "Upcycling and residual finetune: the same with 8 experts",
}
_TELL = 20.0  # seconds from one line to the next where there is no terminal
_MOE = "model.backbone.moe."


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
        for number, (name, training) in enumerate(runs.items(), start=2):
            _heading(number, TITLES[name])
            _train(training)
    except Failed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    _heading(STEPS, "Report")
    from rmoe.reporting.report import report

    report([training.folder for training in runs.values()], out, out / "report.html")
    minutes = (time.monotonic() - started) / 60
    print(f"{minutes:.1f} minutes. In {out}: report.html, summary.json, pictures (*.png), and in each run's folder")
    print(f"its logs; curves: tensorboard --logdir {out}")
    return 0


def trainings(out: Path, residual: str) -> dict[str, Training]:
    """Returns the core and the finetunes from it, by the names of their configs; `residual` is the residuals' kind."""

    def training(name: str, folder: str, json: str, options: list[str], after: tuple[Training, ...] = ()) -> Training:
        path = f"rmoe/configs/demo/{name}.py"
        if out != DEFAULT:
            config = Config.fromfile(ROOT / path, import_custom_modules=False)
            options = [f"{key}={value}" for key, value in moved(config, DEFAULT, out).items()] + options
        return Training(out / folder, path, f"ds_configs/{json}.json", options, after, PROCESSES)

    runs = {"core": training("core", "core", "zero0", [])}
    suffix, kind = ("", []) if residual == "low_rank" else (f"_{residual}", [f"{_MOE}residual={residual}"])
    kind = [f"{_MOE}ep_size={PROCESSES}", *kind]
    for prefix in ("", "detection_"):
        for arm, ending, options in (("dense", "", []), ("residual", suffix, kind)):
            name = f"{prefix}{arm}"
            runs[name] = training(name, f"{name}{ending}", "zero2", options, (runs["core"],))
    return runs


def _render(folder: Path) -> None:
    command = ["rmoe", "data", "scenes", str(folder)]
    print(f"$ {shlex.join(command)}")
    code = subprocess.run(installed(command)).returncode
    if code:
        raise Failed(f"{shlex.join(command)} left with exit code {code}")


def _train(training: Training) -> None:
    """Runs a training unless it is complete, with its progress on the terminal."""
    if training.folder.exists() and not training.current():
        print(f"{training.folder} is of another configuration")
    print(f"$ {shlex.join(training.command())}\n  output: {training.folder / 'output.log'}")
    terminal, told = sys.stderr.isatty(), time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("train", total=None, visible=terminal, note="")

        def show(step: int, steps: int, loss: str) -> None:
            nonlocal told
            bar.update(task, completed=step, total=steps, note=f"loss {loss}", refresh=terminal)
            if not terminal and time.monotonic() - told > _TELL:
                told = time.monotonic()
                print(f"step {step}/{steps}, loss {loss}", flush=True)

        if not training.run(show):
            bar.console.print(f"complete in {training.folder}")


def _heading(number: int, text: str) -> None:
    print(f"\n{number}/{STEPS} {text}\n{'─' * (len(text) + 4)}", flush=True)


if __name__ == "__main__":
    run_guarded(main, "demo")
