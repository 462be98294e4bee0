"""Upper bound: finetune of Mask R-CNN on Swin-T, COCO, 12 epochs, on a backbone pretrained as a mixture of 8 experts in
every other block of the last two stages.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_swin_tiny_moe_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

The weights come from the work dir of upstream/swin_tiny_moe_imagenet1k.py. The mixture is that of
_base_/upper_bound.py. Schedule and data are those of the other finetunes, so that they can be compared.

A variant of this config, with the words to write after --cfg-options:
    model.backbone.moe.train_residual=False  experts are fixed, which was best for Swin-MoE on COCO
"""

_base_ = ["mask_rcnn_swin_tiny_dense_coco_1x.py", "../_base_/upper_bound.py"]

card = dict(
    pipeline="Upper bound",
    published="no figure of the upper bound; dense: box AP 43.7, mask AP 39.8",
)
stage = "moe"
model = dict(backbone=dict(core="work_dirs/swin_tiny_moe_imagenet1k", moe=_base_.pop("upper_bound")))
