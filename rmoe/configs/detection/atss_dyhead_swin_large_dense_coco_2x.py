"""Lower bound: dense finetune of ATSS with a dynamic head on Swin-L, COCO in many sizes, 24 epochs.

    deepspeed launch/train.py rmoe/configs/detection/atss_dyhead_swin_large_dense_coco_2x.py \
        --deepspeed_config ds_configs/zero2.json

Hardware: 16 GPUs of 80 GB with 1 image each (16 in all; keep that product).
Published: box AP 56.2 (mmdetection); with more of everything 58.4 (arXiv 2106.08322).
Run at full scale: no.

The core is the work dir of upstream/swin_large_core_imagenet22k.py, or timm's published one: --cfg-options
model.backbone.core=None model.backbone.kwargs.pretrained=True
model.backbone.model=swin_large_patch4_window12_384.ms_in22k. The recipe is mmdetection's.
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/coco_boxes.py",
    "../_base_/atss_dyhead_swin_tiny.py",
    "../_base_/schedule_1x.py",
]

stage = "dense"
default_scope = "mmdet"
epoch, warmup = 7330, 500
scales = [(2000, 480), (2000, 1200)]
train_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="rmoe.LoadObjects"),
    dict(type="RandomResize", scale=scales, keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
val_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="Resize", scale=scales[1], keep_ratio=True),
    dict(type="rmoe.LoadObjects"),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

model = dict(
    backbone=dict(
        model="swin_large_patch4_window12_384",
        with_cp=True,
        core="work_dirs/swin_large_core_imagenet22k",
    ),
    neck=[
        dict(
            type="FPN",
            in_channels=[384, 768, 1536],
            out_channels=256,
            start_level=0,
            add_extra_convs="on_output",
            num_outs=5,
        ),
        dict(type="DyHead", in_channels=256, out_channels=256, num_blocks=6, zero_init_offset=False),
    ],
)
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=warmup),
    dict(
        type="MultiStepLR",
        gamma=0.1,
        by_epoch=False,
        begin=warmup,
        end=24 * epoch,
        milestones=[16 * epoch - warmup, 22 * epoch - warmup],  # counted from `begin`
    ),
]
train_cfg = dict(max_iters=24 * epoch)
