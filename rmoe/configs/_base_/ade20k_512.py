"""Reads ADE20K in crops of 512 pixels, augmented as for Swin with UPerNet, 2 images for each of 8 GPUs."""

_base_ = ["loaders.py"]

custom_imports = dict(imports=["rmoe.tasks.segmentation"], allow_failed_imports=False)
num_classes = 150
data_root = "data/ade/ADEChallengeData2016"
crop_size = (512, 512)
train_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="rmoe.LoadLabels", num_classes=num_classes),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
val_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="rmoe.LoadLabels", num_classes=num_classes),  # after Resize, so that the truth keeps its size
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        type="rmoe.ADE20K",
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type="rmoe.ADE20K",
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=val_pipeline,
    ),
)
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
