"""Trains what a config describes: `deepspeed launch/train.py CONFIG --deepspeed_config ds_configs/zero2.json`."""

from rmoe.engine.command import parser, start
from rmoe.errors import run_guarded

if __name__ == "__main__":
    run_guarded(lambda: start(parser().parse_args()))
