"""Lower bound: dense finetune of UPerNet on Swin-T, ADE20K, 160k steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

For 8 GPUs with 2 images each (16 in all; keep that product). The core is the work dir of
upstream/swin_tiny_core_imagenet1k.py, or timm's published one: --cfg-options model.backbone.core=None
model.backbone.kwargs.pretrained=True. The recipe is the published one (arXiv 2103.14030): mIoU 44.51, single scale.
Nobody has run this file at full scale.
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/ade20k_512.py",
    "../_base_/upernet_swin_tiny.py",
    "../_base_/schedule_160k.py",
]

stage = "dense"
default_scope = "mmseg"
