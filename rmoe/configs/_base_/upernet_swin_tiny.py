"""Builds UPerNet on Swin-T, as published with Swin."""

norm_cfg = dict(type="SyncBN", requires_grad=True)
loss = dict(type="CrossEntropyLoss", use_sigmoid=False)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(
        type="rmoe.TimmPyramid",
        model="swin_tiny_patch4_window7_224",
        kwargs=dict(drop_path_rate=0.3),
        out_indices=(0, 1, 2, 3),
        core="work_dirs/swin_tiny_core_imagenet1k",
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[96, 192, 384, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=loss,
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=384,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=0.4, **loss),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
