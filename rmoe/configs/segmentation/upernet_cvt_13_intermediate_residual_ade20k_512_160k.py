"""RMoE-I: residual finetune of UPerNet on CvT-13, ADE20K in crops of 512 pixels, 160 000 steps, with residuals and
gates from intermediate finetuning.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_cvt_13_intermediate_residual_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

Hardware: 8 GPUs with 2 images each (16 in all; keep that product).
Published: mIoU + 0.9 over dense (arXiv 2204.09636, whose abstract does not say by which of RMoE-D and RMoE-I); dense:
no figure found.
Run at full scale: no.

All but where the weights come from is as in segmentation/upernet_cvt_13_residual_ade20k_512_160k.py: core, residuals
and gates are the work dir of upstream/cvt_13_intermediate_imagenet1k.py.
"""

_base_ = ["upernet_cvt_13_residual_ade20k_512_160k.py"]

model = dict(backbone=dict(core="work_dirs/cvt_13_intermediate_imagenet1k"))
