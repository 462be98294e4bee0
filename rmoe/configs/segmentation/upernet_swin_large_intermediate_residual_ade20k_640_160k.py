"""RMoE-I: residual finetune of UPerNet on Swin-L, ADE20K in crops of 640 pixels, 160 000 steps, with residuals and
gates from intermediate finetuning.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_large_intermediate_residual_ade20k_640_160k.py \
        --deepspeed_config ds_configs/zero2.json

It differs from segmentation/upernet_swin_large_residual_ade20k_640_160k.py only in where it starts: core, residuals and
gates come from the work dir of upstream/swin_large_intermediate_imagenet22k.py.
"""

_base_ = ["upernet_swin_large_residual_ade20k_640_160k.py"]

card = dict(pipeline="RMoE-I")
model = dict(backbone=dict(core="work_dirs/swin_large_intermediate_imagenet22k"))
