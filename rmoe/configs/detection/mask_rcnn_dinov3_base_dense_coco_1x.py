"""Lower bound: dense finetune of Mask R-CNN on DINOv3-B/16 with a simple feature pyramid, COCO, 12 epochs.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_dinov3_base_dense_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one, under Meta's DINOv3 License, which is no open-source licence: read it before you use
the weights or pass on what was trained from them. Its last map alone becomes those of strides 4, 8, 16 and 32, as in
ViTDet (arXiv 2203.16527), which attends within windows and trains much longer; here every block attends to the whole
image (model.backbone.with_cp=True saves memory). Recipe and head are those of Mask R-CNN on Swin-T.

Other sizes, with the words to write after --cfg-options:
    S  model.backbone.model=vit_small_patch16_dinov3 model.neck.in_channels=[96,192,384,384]
    L  model.backbone.model=vit_large_patch16_dinov3 model.backbone.out_indices=[23]
        model.neck.in_channels=[256,512,1024,1024]
"""

_base_ = ["mask_rcnn_swin_tiny_dense_coco_1x.py"]

card = dict(published="no figure of this core; with MAE's, 100 epochs: box AP 51.6, mask AP 45.9 (arXiv 2203.16527)")
model = dict(
    backbone=dict(
        model="vit_base_patch16_dinov3",
        kwargs=dict(pretrained=True),
        out_indices=(11,),
        strides=(4, 8, 16, 32),
        core=None,
    ),
    neck=dict(type="rmoe.LevelConvs", in_channels=[192, 384, 768, 768]),
)
