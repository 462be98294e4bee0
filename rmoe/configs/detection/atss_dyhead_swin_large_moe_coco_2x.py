"""Upper bound: finetune of ATSS with a dynamic head on Swin-L, COCO in many sizes, 24 epochs, on a backbone pretrained
as a mixture of 8 experts in every other block of the last two stages.

    deepspeed launch/train.py rmoe/configs/detection/atss_dyhead_swin_large_moe_coco_2x.py \
        --deepspeed_config ds_configs/zero2.json

The weights come from the work dir of upstream/swin_large_moe_imagenet22k.py. The mixture is that of
_base_/upper_bound.py. Schedule and data are those of the other finetunes, so that they can be compared.
"""

_base_ = ["atss_dyhead_swin_large_dense_coco_2x.py", "../_base_/upper_bound.py"]

card = dict(pipeline="Upper bound", published="no figure of the upper bound; dense: box AP 56.2")
stage = "moe"
model = dict(backbone=dict(core="work_dirs/swin_large_moe_imagenet22k", moe=_base_.pop("upper_bound")))
