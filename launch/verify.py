"""Checks this machine, or this cluster: `deepspeed launch/verify.py`."""

from rmoe.engine.verify import main
from rmoe.errors import run_guarded

if __name__ == "__main__":
    run_guarded(main, "verify.py")
