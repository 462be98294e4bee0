"""Demo, step 2a: dense finetune of UPerNet on the embedded scenes, from the core of step 1.

    deepspeed --num_accelerators 2 launch/train.py rmoe/configs/demo/dense.py --deepspeed_config ds_configs/zero2.json \
        --work-dir work_dirs/demo/dense
"""

_base_ = ["../_base_/runtime.py"]

card = dict(
    pipeline="Demo, step 2a",
    published="nothing; the full-size recipe is segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py",
    hardware="2 CPU cores, about 2 minutes",
    full_scale="yes, it is the demo",
)
custom_imports = dict(imports=["rmoe.tasks.segmentation"], allow_failed_imports=False)
stage = "dense"
default_scope = "mmseg"
num_classes = 32
steps = 500
size = (128, 128)
data_root = "work_dirs/demo/data/ade20k"
dataset = dict(
    type="rmoe.SegDataset",
    data_root=data_root,
    classes=f"{data_root}/classes.json",
    num_classes=num_classes,
    reduce_zero_label=True,
)
load = [dict(type="rmoe.LoadImage"), dict(type="rmoe.LoadLabels", num_classes=num_classes)]

model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=size,
    ),
    backbone=dict(
        type="rmoe.TimmPyramid",
        model="swin_tiny_patch4_window7_224",
        kwargs=dict(embed_dim=32, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16), window_size=4, drop_path_rate=0.0),
        out_indices=(0, 1, 2, 3),
        core="work_dirs/demo/core",
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=48,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=dict(type="GN", num_groups=8),  # not BN: its running means differ from process to process
        align_corners=False,
        # 8 kinds of stuff, then 24 of things; without these weights, so short a training predicts stuff alone
        loss_decode=dict(type="CrossEntropyLoss", class_weight=[0.5] * 8 + [2.0] * 24),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[
            *load,
            dict(type="RandomResize", scale=size, ratio_range=(0.75, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=size, cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=[*load, dict(type="PackSegInputs")],
    ),
)
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
val_cfg = dict(type="ValLoop")
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01),
    constructor="rmoe.ParamGroups",
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=50, end=steps),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)
default_hooks = dict(checkpoint=dict(interval=100), logger=dict(interval=10))
