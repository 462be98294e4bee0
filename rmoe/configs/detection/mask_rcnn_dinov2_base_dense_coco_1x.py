"""Lower bound: dense finetune of Mask R-CNN on DINOv2-B/14 with a simple feature pyramid, COCO, 12 epochs.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_dinov2_base_dense_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one (Meta's, Apache License 2.0). Its last map alone becomes those of strides 4, 8, 16 and
32, as in ViTDet (arXiv 2203.16527), which attends within windows and trains much longer; here every block attends to
the whole image (model.backbone.with_cp=True saves memory). Recipe and head are those of Mask R-CNN on Swin-T.

Other sizes, with the words to write after --cfg-options:
    S  model.backbone.model=vit_small_patch14_dinov2 model.neck.in_channels=[96,192,384,384]
    L  model.backbone.model=vit_large_patch14_dinov2 model.backbone.out_indices=[23]
        model.neck.in_channels=[256,512,1024,1024]
    registers  model.backbone.model=vit_base_patch14_reg4_dinov2
"""

_base_ = ["mask_rcnn_swin_tiny_dense_coco_1x.py"]

card = dict(published="no figure of this core; with MAE's, 100 epochs: box AP 51.6, mask AP 45.9 (arXiv 2203.16527)")
model = dict(
    backbone=dict(
        model="vit_base_patch14_dinov2",
        kwargs=dict(pretrained=True),
        out_indices=(11,),
        strides=(4, 8, 16, 32),
        core=None,
    ),
    neck=dict(type="rmoe.LevelConvs", in_channels=[192, 384, 768, 768]),
)
