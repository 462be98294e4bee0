"""Upper bound: CvT-13 pretrained on ImageNet-1k as a mixture of 8 experts in every other block of the last two stages,
300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/cvt_13_moe_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/cvt_13_moe_imagenet1k.py \
        ds_configs/zero1.json work_dirs/cvt_13_moe_imagenet1k \
        --cfg-options train_dataloader.batch_size=64

The mixture is that of _base_/upper_bound.py. All else is as for the dense core, so that they can be compared.
"""

_base_ = ["cvt_13_core_imagenet1k.py", "../_base_/upper_bound.py"]

card = dict(
    pipeline="Upper bound",
    published=(
        "no figure of this model. Swin-MoE-S at 192 pixels, with 8 experts, trained on ImageNet-22k: top-1 36.8 "
        "there against 35.5 dense (microsoft/Swin-Transformer, MODELHUB.md)"
    ),
    hardware=(
        "8 GPUs with 256 images each, or 4 nodes of 8 with 64 (2048 in all; keep that product). The experts of a "
        "layer are spread over 8 GPUs"
    ),
)
stage = "moe"
model = dict(moe=_base_.pop("upper_bound"))
