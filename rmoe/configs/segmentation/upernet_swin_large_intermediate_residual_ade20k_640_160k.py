"""RMoE-I: residual finetune of UPerNet on Swin-L, ADE20K in crops of 640 pixels, 160 000 steps, with residuals and
gates from intermediate finetuning.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_large_intermediate_residual_ade20k_640_160k.py \
        --deepspeed_config ds_configs/zero2.json

Hardware: 8 GPUs of 80 GB with 2 images each (16 in all; keep that product).
Published: mIoU + 1.0 over dense (arXiv 2204.09636, whose abstract does not say by which of RMoE-D and RMoE-I); dense:
mIoU 52.05, multi-scale 53.53.
Run at full scale: no.

All but where the weights come from is as in segmentation/upernet_swin_large_residual_ade20k_640_160k.py: core,
residuals and gates are the work dir of upstream/swin_large_intermediate_imagenet22k.py.
"""

_base_ = ["upernet_swin_large_residual_ade20k_640_160k.py"]

model = dict(backbone=dict(core="work_dirs/swin_large_intermediate_imagenet22k"))
