"""Lower bound: dense finetune of Mask R-CNN on SwinV2-B, COCO, 12 epochs.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_swinv2_base_dense_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one, pretrained on ImageNet-22k and finetuned on ImageNet-1k with windows of 16
(Microsoft's, MIT licence). The recipe is Swin-T's.

Another size, with the words to write after --cfg-options:
    L  model.backbone.model=swinv2_large_window12to16_192to256 model.neck.in_channels=[192,384,768,1536]
"""

_base_ = ["mask_rcnn_swin_tiny_dense_coco_1x.py"]

card = dict(published="no figure of this detector")
model = dict(
    backbone=dict(model="swinv2_base_window12to16_192to256", kwargs=dict(pretrained=True), core=None),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
