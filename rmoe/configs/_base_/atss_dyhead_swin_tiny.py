"""Builds ATSS with a dynamic head of 6 blocks (arXiv 2106.08322) on Swin-T, as published with it."""

model = dict(
    type="ATSS",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=128,  # so that each level is exactly half as large as the one before
    ),
    backbone=dict(
        type="rmoe.TimmPyramid",
        model="swin_tiny_patch4_window7_224",
        kwargs=dict(drop_path_rate=0.2),
        out_indices=(1, 2, 3),
        core="work_dirs/swin_tiny_core_imagenet1k",
    ),
    neck=[
        dict(
            type="FPN",
            in_channels=[192, 384, 768],
            out_channels=256,
            start_level=0,
            add_extra_convs="on_output",
            num_outs=5,
        ),
        dict(type="DyHead", in_channels=256, out_channels=256, num_blocks=6, zero_init_offset=False),
    ],
    bbox_head=dict(
        type="ATSSHead",
        num_classes=80,
        in_channels=256,
        pred_kernel_size=1,
        stacked_convs=0,
        feat_channels=256,
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=8,
            scales_per_octave=1,
            strides=[8, 16, 32, 64, 128],
            center_offset=0.5,
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
    ),
    train_cfg=dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.6), max_per_img=100
    ),
)
