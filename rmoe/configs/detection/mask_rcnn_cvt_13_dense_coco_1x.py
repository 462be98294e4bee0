"""Lower bound: dense finetune of Mask R-CNN on CvT-13, COCO, 12 epochs.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_cvt_13_dense_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/cvt_13_core_imagenet1k.py. CvT has three feature maps, of strides 4, 8 and
16; the feature pyramid adds strides 32 and 64. To use Swin-T's recipe is this project's choice.
"""

_base_ = ["mask_rcnn_swin_tiny_dense_coco_1x.py"]

card = dict(published="no figure of a dense CvT-13 found")
model = dict(
    backbone=dict(model="cvt_13", out_indices=(0, 1, 2), core="work_dirs/cvt_13_core_imagenet1k"),
    neck=dict(in_channels=[64, 192, 384]),
)
