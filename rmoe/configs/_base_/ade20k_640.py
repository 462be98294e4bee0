"""Reads ADE20K in crops of 640 pixels, as for the large Swins with UPerNet, 2 images for each of 8 GPUs."""

_base_ = ["ade20k_512.py"]

crop_size = (640, 640)
train_pipeline, val_pipeline = _base_.train_pipeline, _base_.val_pipeline
train_pipeline[2].update(type="RandomResize", scale=(2560, 640))
train_pipeline[3].update(type="RandomCrop", crop_size=crop_size)
val_pipeline[1].update(type="Resize", scale=(2560, 640))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
