"""Lower bound: dense finetune of UPerNet on Swin-S, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_small_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/swin_small_core_imagenet1k.py. With timm's published core instead:
--cfg-options model.backbone.core=None model.backbone.kwargs.pretrained=True. The recipe is Swin-T's, as published.
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(published="mIoU 47.72, multi-scale 49.24 (mmsegmentation)")
model = dict(backbone=dict(model="swin_small_patch4_window7_224", core="work_dirs/swin_small_core_imagenet1k"))
