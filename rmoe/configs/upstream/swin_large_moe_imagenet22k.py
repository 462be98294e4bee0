"""Upper bound: Swin-L pretrained on ImageNet-22k as a mixture of 8 experts in every other block of the last two stages,
90 epochs.

    deepspeed --hostfile hostfile launch/train.py rmoe/configs/upstream/swin_large_moe_imagenet22k.py \
        --deepspeed_config ds_configs/zero2.json

    sbatch --nodes=8 launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/swin_large_moe_imagenet22k.py \
        ds_configs/zero2.json work_dirs/swin_large_moe_imagenet22k

The mixture is that of _base_/upper_bound.py. All else is as for the dense core, so that they can be compared.
"""

_base_ = ["swin_large_core_imagenet22k.py", "../_base_/upper_bound.py"]

card = dict(
    pipeline="Upper bound",
    published=(
        "no figure of this model. Swin-MoE-S at 192 pixels, with 8 experts, trained on ImageNet-22k: top-1 36.8 "
        "there against 35.5 dense (microsoft/Swin-Transformer, MODELHUB.md)"
    ),
    hardware=(
        "8 nodes of 8 GPUs with 80 GB and 64 images each (4096 in all; keep that product). The experts of a layer "
        "are spread over 8 GPUs"
    ),
)
stage = "moe"
model = dict(moe=_base_.pop("upper_bound"))
