"""RMoE-D: residual finetune of UPerNet on Swin-T, ADE20K in crops of 512 pixels, 160 000 steps; 8 low-rank experts, all
weighed for each token, in every other block of the last two stages, their cores trained as well.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_tiny_residual_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

Schedule, data and core are those of the dense finetune. This project chose the number, kind and place of the experts.

Every process holds all experts. Where memory is short, spread them over 8 processes:
--cfg-options model.backbone.moe.ep_size=8.

Variants of this config, each with the words to write after --cfg-options:
    model.backbone.moe.top_k=1           each token uses one expert
    model.backbone.moe.residual=full     each expert has a residual of the core's shape
    model.backbone.moe.residual=experts  sparse upcycling: each expert is a copy of the core, trained whole
    model.backbone.moe.train_core=False  the cores stay as they are, for several tasks to share
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(
    pipeline="RMoE-D",
    published=(
        "mIoU + 1.1 over dense (arXiv 2204.09636, whose abstract does not say by which of RMoE-D and RMoE-I); dense: "
        "mIoU 44.51, multi-scale 45.81"
    ),
)
stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8)))
