"""Lower bound: dense finetune of Mask R-CNN on EVA-02-B/14 with a simple feature pyramid, COCO, 12 epochs.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_eva02_base_dense_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one of masked image modelling on ImageNet-22k (BAAI's, MIT licence). Its last map alone
becomes those of strides 4, 8, 16 and 32, as in ViTDet (arXiv 2203.16527), which attends within windows and trains much
longer; here every block attends to the whole image (model.backbone.with_cp=True saves memory). Recipe and head are
those of Mask R-CNN on Swin-T.

Other sizes, with the words to write after --cfg-options:
    L  model.backbone.model=eva02_large_patch14_224.mim_m38m model.backbone.out_indices=[23]
        model.neck.in_channels=[256,512,1024,1024]
"""

_base_ = ["mask_rcnn_swin_tiny_dense_coco_1x.py"]

card = dict(published="box AP 55.5, mask AP 47.1 (EVA-02's code: cascade, 60 000 steps of 128 images)")
model = dict(
    data_preprocessor=dict(mean=[122.771, 116.746, 104.094], std=[68.501, 66.632, 70.323]),
    backbone=dict(
        model="eva02_base_patch14_224",
        kwargs=dict(pretrained=True),
        out_indices=(11,),
        strides=(4, 8, 16, 32),
        core=None,
    ),
    neck=dict(type="rmoe.LevelConvs", in_channels=[192, 384, 768, 768]),
)
