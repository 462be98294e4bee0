"""Demo, step 3a: dense finetune of Mask R-CNN on the embedded scenes, from the core of step 1.

    deepspeed --num_accelerators 2 launch/train.py rmoe/configs/demo/detection_dense.py \
        --deepspeed_config ds_configs/zero2.json --work-dir work_dirs/demo/detection_dense
"""

_base_ = ["../_base_/runtime.py"]

card = dict(
    pipeline="Demo, step 3a",
    published="nothing; the full-size recipe is detection/mask_rcnn_swin_tiny_dense_coco_1x.py",
    hardware="2 CPU cores, about 2 minutes",
    full_scale="yes, it is the demo",
)
custom_imports = dict(imports=["rmoe.tasks.detection"], allow_failed_imports=False)
stage = "dense"
default_scope = "mmdet"
num_classes = 24
steps = 500
channels = 64
norm = dict(type="GN", num_groups=8)
data_root = "work_dirs/demo/data/coco"
dataset = dict(
    type="rmoe.DetDataset",
    data_root=data_root,
    classes=f"{data_root}/annotations/instances_val2017.json",
    num_classes=num_classes,
)
nms = dict(type="nms", iou_threshold=0.7)
pooling = dict(type="SingleRoIExtractor", out_channels=channels, featmap_strides=[8, 16])

model = dict(
    type="MaskRCNN",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="rmoe.TimmPyramid",
        model="swin_tiny_patch4_window7_224",
        kwargs=dict(embed_dim=32, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16), window_size=4, drop_path_rate=0.0),
        out_indices=(1, 2, 3),
        core="work_dirs/demo/core",
    ),
    neck=dict(type="FPN", in_channels=[64, 128, 256], out_channels=channels, num_outs=3, norm_cfg=norm),
    rpn_head=dict(
        type="RPNHead",
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(type="AnchorGenerator", scales=[3], ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32]),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
        loss_bbox=dict(type="L1Loss"),
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(**pooling, roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2)),
        bbox_head=dict(
            type="ConvFCBBoxHead",
            num_shared_convs=1,
            num_shared_fcs=1,
            in_channels=channels,
            conv_out_channels=channels,
            fc_out_channels=256,
            norm_cfg=norm,
            num_classes=num_classes,
            reg_class_agnostic=True,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_bbox=dict(type="L1Loss"),
        ),
        mask_roi_extractor=dict(**pooling, roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=2)),
        mask_head=dict(
            type="FCNMaskHead",
            num_convs=2,
            in_channels=channels,
            conv_out_channels=channels,
            norm_cfg=norm,
            num_classes=num_classes,
            class_agnostic=True,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(type="RandomSampler", num=64, pos_fraction=0.5, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
        ),
        rpn_proposal=dict(nms_pre=200, max_per_img=100, nms=nms, min_bbox_size=0),
        rcnn=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
            sampler=dict(type="RandomSampler", num=32, pos_fraction=0.4),
            mask_size=28,
            pos_weight=-1,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=100, nms=nms, min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=30, mask_thr_binary=0.5),
    ),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type="rmoe.LoadImage"),
            dict(type="rmoe.LoadObjects", with_mask=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017"),
        test_mode=True,
        pipeline=[
            dict(type="rmoe.LoadImage"),
            dict(type="Resize", scale=(128, 128), keep_ratio=True),
            dict(type="rmoe.LoadObjects"),
            dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
        ],
    ),
)
val_evaluator = dict(
    type="rmoe.CocoMetric",
    ann_file=f"{data_root}/annotations/instances_val2017.json",
    metric=["bbox", "segm"],
    classwise=True,
)
val_cfg = dict(type="ValLoop")
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    constructor="rmoe.ParamGroups",
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=50, end=steps),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)
default_hooks = dict(checkpoint=dict(interval=steps), logger=dict(interval=10))
