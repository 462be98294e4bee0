"""Trains what a config describes: `deepspeed launch/train.py CONFIG --deepspeed_config ds_configs/zero2.json`."""

from rmoe.engine.launch import main
from rmoe.errors import run_guarded

if __name__ == "__main__":
    run_guarded(main)
