"""Reads COCO instances in many sizes, cropped at random as for Swin with Mask R-CNN, 2 images for each of 8 GPUs."""

_base_ = ["loaders.py"]

custom_imports = dict(imports=["rmoe.tasks.detection"], allow_failed_imports=False)
num_classes = 80
data_root = "data/coco"
sizes = [(side, 1333) for side in range(480, 801, 32)]
train_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="rmoe.LoadObjects", with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomChoiceResize", scales=sizes, keep_ratio=True)],
            [
                dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
                dict(type="RandomChoiceResize", scales=sizes, keep_ratio=True),
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
val_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="rmoe.LoadObjects"),  # after Resize, so that the truth keeps its size
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        type="rmoe.Coco",
        data_root=data_root,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type="rmoe.Coco",
        data_root=data_root,
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017"),
        test_mode=True,
        pipeline=val_pipeline,
    ),
)
val_evaluator = dict(
    type="rmoe.CocoMetric",
    ann_file=f"{data_root}/annotations/instances_val2017.json",
    metric=["bbox", "segm"],
    classwise=True,
)
