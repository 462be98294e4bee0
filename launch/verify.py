"""Checks this machine, or this cluster: `deepspeed launch/verify.py`."""

from rmoe.cli import run_guarded
from rmoe.verify import main

if __name__ == "__main__":
    run_guarded(main, "verify.py")
