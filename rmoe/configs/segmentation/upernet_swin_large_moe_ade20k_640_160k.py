"""Upper bound: finetune of UPerNet on Swin-L, ADE20K in crops of 640 pixels, 160 000 steps, on a backbone pretrained as
a mixture of 8 experts in every other block of the last two stages.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_large_moe_ade20k_640_160k.py \
        --deepspeed_config ds_configs/zero2.json

The weights come from the work dir of upstream/swin_large_moe_imagenet22k.py. The mixture is that of
_base_/upper_bound.py. Schedule and data are those of the other finetunes, so that they can be compared.
"""

_base_ = ["upernet_swin_large_dense_ade20k_640_160k.py", "../_base_/upper_bound.py"]

card = dict(
    pipeline="Upper bound",
    published="no figure of the upper bound; dense: mIoU 52.05, multi-scale 53.53",
)
stage = "moe"
model = dict(backbone=dict(core="work_dirs/swin_large_moe_imagenet22k", moe=_base_.pop("upper_bound")))
