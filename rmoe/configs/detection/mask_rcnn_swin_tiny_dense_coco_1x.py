"""Lower bound: dense finetune of Mask R-CNN on Swin-T, COCO, 12 epochs.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_swin_tiny_dense_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/swin_tiny_core_imagenet1k.py. With timm's published core instead:
--cfg-options model.backbone.core=None model.backbone.kwargs.pretrained=True. The recipe is the published one.
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/coco.py",
    "../_base_/mask_rcnn_swin_tiny.py",
    "../_base_/schedule_1x.py",
]

card = dict(
    pipeline="Lower bound",
    published="box AP 43.7, mask AP 39.8 (arXiv 2103.14030 and its code)",
    hardware="8 GPUs with 2 images each (16 in all; keep that product)",
    batch=16,
)
stage = "dense"
default_scope = "mmdet"
