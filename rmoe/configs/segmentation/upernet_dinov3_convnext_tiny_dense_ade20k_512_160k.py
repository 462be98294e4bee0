"""Lower bound: dense finetune of UPerNet on DINOv3's ConvNeXt-T, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_dinov3_convnext_tiny_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one, under Meta's DINOv3 License, which is no open-source licence: read it before you use
the weights or pass on what was trained from them. The recipe is Swin-T's; ConvNeXt's own has a layer-wise decay of the
learning rate: optim_wrapper.paramwise_cfg.layer_decay.

Other sizes, with the words to write after --cfg-options:
    S  model.backbone.model=convnext_small.dinov3_lvd1689m
    B  model.backbone.model=convnext_base.dinov3_lvd1689m model.decode_head.in_channels=[128,256,512,1024]
        model.auxiliary_head.in_channels=512
    L  model.backbone.model=convnext_large.dinov3_lvd1689m model.decode_head.in_channels=[192,384,768,1536]
        model.auxiliary_head.in_channels=768

Published for S, B and L, a linear layer on the frozen backbone: mIoU 44.8, 46.3 and 47.8.
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(published="no figure of UPerNet; a linear layer on the frozen backbone: mIoU 42.7 (DINOv3's model card)")
model = dict(
    backbone=dict(model="convnext_tiny.dinov3_lvd1689m", kwargs=dict(pretrained=True, drop_path_rate=0.1), core=None)
)
