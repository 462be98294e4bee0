"""The kernels against plain operations, by Triton's interpreter, and what its compiler makes: fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NO_TRITON = "the kernels are written in Triton, which this installation of torch lacks"


def run(script: str, interpret: bool, cache: Path) -> str:
    """Runs a script beside this one; returns what it prints."""
    pytest.importorskip("triton", reason=NO_TRITON)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script)],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_they_equal_plain_operations_in_value_and_gradient(tmp_path: Path) -> None:
    assert run("interpreted_kernels.py", True, tmp_path) == "equal"


def test_they_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    assert run("compiled_kernels.py", False, tmp_path) == "compiled 16"
