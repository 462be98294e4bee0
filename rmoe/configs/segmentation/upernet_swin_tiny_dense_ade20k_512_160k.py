"""Lower bound: dense finetune of UPerNet on Swin-T, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/swin_tiny_core_imagenet1k.py. With timm's published core instead:
--cfg-options model.backbone.core=None model.backbone.kwargs.pretrained=True. The recipe is the published one.
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/ade20k_512.py",
    "../_base_/upernet_swin_tiny.py",
    "../_base_/schedule_160k.py",
]

card = dict(
    pipeline="Lower bound",
    published="mIoU 44.51, multi-scale 45.81 (arXiv 2103.14030 and its code)",
    hardware="8 GPUs with 2 images each (16 in all; keep that product)",
    batch=16,
)
stage = "dense"
default_scope = "mmseg"
