"""Measures rmoe on one GPU and writes JSON and pictures.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --part parity --part layer --quick

- `parity`: every path of the layer against its definition in float64, and losses of 20 steps against the CPU's.
- `layer`: one feed-forward network with its gate, forward + backward and forward alone, against the dense network,
  LoRA, torch's grouped GEMM under autograd, a loop over experts and, where it is installed, deepspeed.moe. Forward +
  backward of some sizes also as a CUDA graph, which leaves out what the host takes.
- `step`: whole training steps; of the shipped configs where mmseg and mmdet are installed.

Each part ends once its minutes are spent; what was not measured is said. The exit code is 1 if anything failed or was
further off than its bound.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.gpu.measure import Arguments, tf32

PARTS = ("parity", "layer", "step")
MINUTES = {"parity": 1.5, "layer": 3.5, "step": 2.5}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="one of them; default: all")
    parser.add_argument("--quick", action="store_true", help="few cells: a minute")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: shows that it runs")
    parser.add_argument("--minutes", type=float, help="for each part; default: 1.5, 3.5 and 2.5, quick 0.7")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results; quick and dry runs work_dirs/benchmarks")
    given = parser.parse_args(argv)
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run runs the same code on the CPU, at tiny sizes")
    out = given.out or (common.QUICK_RESULTS if given.quick or given.dry_run else common.RESULTS)
    failures: list[str] = []
    for part in given.part or PARTS:
        minutes = given.minutes or (0.7 if given.quick else MINUTES[part])
        arguments = Arguments((part,), given.dry_run, given.quick, minutes, out)
        with tf32(part != "parity"):  # which sets it for each check
            failures += importlib.import_module(f"benchmarks.gpu.{part}").main(arguments).failures
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
