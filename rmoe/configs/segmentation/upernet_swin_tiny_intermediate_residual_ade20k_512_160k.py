"""RMoE-I: residual finetune of UPerNet on Swin-T, ADE20K in crops of 512 pixels, 160 000 steps, with residuals and
gates from intermediate finetuning.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_tiny_intermediate_residual_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

It differs from segmentation/upernet_swin_tiny_residual_ade20k_512_160k.py only in where it starts: core, residuals and
gates come from the work dir of upstream/swin_tiny_intermediate_imagenet1k.py.
"""

_base_ = ["upernet_swin_tiny_residual_ade20k_512_160k.py"]

card = dict(pipeline="RMoE-I")
model = dict(backbone=dict(core="work_dirs/swin_tiny_intermediate_imagenet1k"))
