"""Reads COCO boxes in several sizes, flipped at random as for Swin-T with DyHead, 4 images for each of 8 GPUs."""

_base_ = ["coco.py"]

train_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="rmoe.LoadObjects"),
    dict(type="RandomChoiceResize", scales=[(1333, side) for side in range(640, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric=["bbox"])
