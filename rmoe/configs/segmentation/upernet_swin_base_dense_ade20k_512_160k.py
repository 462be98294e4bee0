"""Lower bound: dense finetune of UPerNet on Swin-B, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_base_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/swin_base_core_imagenet1k.py. With timm's published core instead:
--cfg-options model.backbone.core=None model.backbone.kwargs.pretrained=True. The recipe is Swin-T's, as published.
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(published="mIoU 47.99, multi-scale 49.57 (mmsegmentation)")
model = dict(
    backbone=dict(model="swin_base_patch4_window7_224", core="work_dirs/swin_base_core_imagenet1k"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
