"""RMoE-D: residual finetune of UPerNet on Swin-L, ADE20K in crops of 640 pixels, 160 000 steps; 8 low-rank experts, all
weighed for each token, in every other block of the last two stages, their cores trained as well.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_large_residual_ade20k_640_160k.py \
        --deepspeed_config ds_configs/zero2.json

Schedule, data and core are those of the dense finetune. This project chose the number, kind and place of the experts.

Every process holds all experts. Where memory is short, spread them over 8 processes:
--cfg-options model.backbone.moe.ep_size=8.
"""

_base_ = ["upernet_swin_large_dense_ade20k_640_160k.py"]

card = dict(
    pipeline="RMoE-D",
    published=(
        "mIoU + 1.0 over dense (arXiv 2204.09636, whose abstract does not say by which of RMoE-D and RMoE-I); dense: "
        "mIoU 52.05, multi-scale 53.53"
    ),
)
stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8)))
