"""Trains 90 000 steps with 32 images each, nearly 25 epochs, as published for Swin-T with DyHead. Optimizer and warm-up
are those of the schedule of 12 epochs.
"""

_base_ = ["schedule_1x.py"]

epoch = 3665  # steps
_base_.param_scheduler[1].update(end=90000, milestones=[60000 - _base_.warmup, 80000 - _base_.warmup])
train_cfg = dict(max_iters=90000, val_interval=7500)
