"""Trains what a config describes: `deepspeed launch/train.py CONFIG --deepspeed_config ds_configs/zero2.json`."""

from rmoe.cli import run_guarded
from rmoe.engine.launch import main

if __name__ == "__main__":
    run_guarded(main)
