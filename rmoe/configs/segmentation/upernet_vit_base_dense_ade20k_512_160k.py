"""Lower bound: dense finetune of UPerNet on ViT-B/16, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_vit_base_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/vit_base_core_imagenet1k.py. With timm's published core instead:
--cfg-options model.backbone.core=None model.backbone.kwargs.pretrained=True. The outputs of blocks 3, 6, 9 and 12 are
resized to strides 4, 8, 16 and 32. Drop path and heads are mmsegmentation's.
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(published="mIoU 47.73, multi-scale 49.95 (mmsegmentation, with its own neck and core)")
model = dict(
    backbone=dict(
        model="vit_base_patch16_224",
        kwargs=dict(drop_path_rate=0.1),
        out_indices=(2, 5, 8, 11),
        core="work_dirs/vit_base_core_imagenet1k",
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768, in_index=3),
)
