"""Upper bound: finetune of UPerNet on Swin-T, ADE20K in crops of 512 pixels, 160 000 steps, on a backbone pretrained as
a mixture of 8 experts in every other block of the last two stages.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_tiny_moe_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The weights come from the work dir of upstream/swin_tiny_moe_imagenet1k.py. The mixture is that of
_base_/upper_bound.py. Schedule and data are those of the other finetunes, so that they can be compared.

A variant of this config, with the words to write after --cfg-options:
    model.backbone.moe.train_residual=False  experts are fixed, which was best for Swin-MoE on COCO
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py", "../_base_/upper_bound.py"]

card = dict(
    pipeline="Upper bound",
    published="no figure of the upper bound; dense: mIoU 44.51, multi-scale 45.81",
)
stage = "moe"
model = dict(backbone=dict(core="work_dirs/swin_tiny_moe_imagenet1k", moe=_base_.pop("upper_bound")))
