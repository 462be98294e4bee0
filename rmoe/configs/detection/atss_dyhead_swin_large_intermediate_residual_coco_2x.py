"""RMoE-I: residual finetune of ATSS with a dynamic head on Swin-L, COCO in many sizes, 24 epochs, with residuals and
gates from intermediate finetuning.

    deepspeed launch/train.py rmoe/configs/detection/atss_dyhead_swin_large_intermediate_residual_coco_2x.py \
        --deepspeed_config ds_configs/zero2.json

It differs from detection/atss_dyhead_swin_large_residual_coco_2x.py only in where it starts: core, residuals and gates
come from the work dir of upstream/swin_large_intermediate_imagenet22k.py.
"""

_base_ = ["atss_dyhead_swin_large_residual_coco_2x.py"]

card = dict(pipeline="RMoE-I")
model = dict(backbone=dict(core="work_dirs/swin_large_intermediate_imagenet22k"))
