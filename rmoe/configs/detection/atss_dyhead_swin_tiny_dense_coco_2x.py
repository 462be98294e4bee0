"""Lower bound: dense finetune of ATSS with a dynamic head on Swin-T, COCO in several sizes, 90 000 steps.

    deepspeed launch/train.py rmoe/configs/detection/atss_dyhead_swin_tiny_dense_coco_2x.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/swin_tiny_core_imagenet1k.py. With timm's published core instead:
--cfg-options model.backbone.core=None model.backbone.kwargs.pretrained=True. The recipe is the published one.
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/coco_boxes.py",
    "../_base_/atss_dyhead_swin_tiny.py",
    "../_base_/schedule_2x.py",
]

card = dict(
    pipeline="Lower bound",
    published="box AP 49.8 (arXiv 2106.08322 and its code)",
    hardware="8 GPUs with 4 images each (32 in all; keep that product)",
    batch=32,
)
stage = "dense"
default_scope = "mmdet"
