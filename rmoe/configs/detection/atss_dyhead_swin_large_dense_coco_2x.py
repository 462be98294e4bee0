"""Lower bound: dense finetune of ATSS with a dynamic head on Swin-L, COCO in many sizes, 24 epochs.

    deepspeed launch/train.py rmoe/configs/detection/atss_dyhead_swin_large_dense_coco_2x.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/swin_large_core_imagenet22k.py. With timm's published core instead:
--cfg-options model.backbone.core=None model.backbone.kwargs.pretrained=True
model.backbone.model=swin_large_patch4_window12_384.ms_in22k. The recipe is mmdetection's.

The largest image, 2000 x 1200 pixels, takes about 22 GB of a GPU in bfloat16, estimated from the segmentor's by the
number of pixels and not measured; model.backbone.with_cp=True lowers that and recomputes the backbone in each backward
pass.
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/coco_boxes.py",
    "../_base_/atss_dyhead_swin_tiny.py",
    "../_base_/schedule_1x.py",
]

card = dict(
    pipeline="Lower bound",
    published="box AP 56.2 (mmdetection); with more of everything 58.4 (arXiv 2106.08322)",
    hardware="16 GPUs of 80 GB with 1 image each (16 in all; keep that product)",
    batch=16,
)
stage = "dense"
default_scope = "mmdet"
epoch, warmup = _base_.epoch, 500
scales = [(2000, 480), (2000, 1200)]
train_pipeline, val_pipeline = _base_.train_pipeline, _base_.val_pipeline
train_pipeline[2] = dict(type="RandomResize", scale=scales, keep_ratio=True)
val_pipeline[1].update(type="Resize", scale=scales[1])

_base_.model.neck[0].update(type="FPN", in_channels=[384, 768, 1536])
model = dict(backbone=dict(model="swin_large_patch4_window12_384", core="work_dirs/swin_large_core_imagenet22k"))
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
_base_.param_scheduler[0].end = warmup
_base_.param_scheduler[1].update(begin=warmup, end=24 * epoch, milestones=[16 * epoch - warmup, 22 * epoch - warmup])
train_cfg = dict(max_iters=24 * epoch)
