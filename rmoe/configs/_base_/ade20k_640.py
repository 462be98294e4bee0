"""ADE20K in crops of 640 pixels, as for the large Swins with UPerNet, 2 images for each of 8 GPUs."""

_base_ = ["ade20k_512.py"]

num_classes = 150
crop_size = (640, 640)
train_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="rmoe.LoadLabels", num_classes=num_classes),
    dict(type="RandomResize", scale=(2560, 640), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
val_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="Resize", scale=(2560, 640), keep_ratio=True),
    dict(type="rmoe.LoadLabels", num_classes=num_classes),  # after Resize: the truth keeps its size
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
