"""Lower bound: dense finetune of UPerNet on SwinV2-B, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swinv2_base_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one, pretrained on ImageNet-22k and finetuned on ImageNet-1k with windows of 16
(Microsoft's, MIT licence). The recipe is Swin's.

Another size, with the words to write after --cfg-options:
    L  model.backbone.model=swinv2_large_window12to16_192to256 model.decode_head.in_channels=[192,384,768,1536]
        model.auxiliary_head.in_channels=768
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(published="no figure of this size")
model = dict(
    backbone=dict(model="swinv2_base_window12to16_192to256", kwargs=dict(pretrained=True), core=None),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
