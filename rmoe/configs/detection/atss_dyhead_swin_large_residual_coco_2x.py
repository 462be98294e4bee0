"""RMoE-D: residual finetune of ATSS with a dynamic head on Swin-L, COCO in many sizes, 24 epochs; 8 low-rank experts,
all weighed for each token, in every other block of the last two stages, their cores trained as well.

    deepspeed launch/train.py rmoe/configs/detection/atss_dyhead_swin_large_residual_coco_2x.py \
        --deepspeed_config ds_configs/zero2.json

Schedule, data and core are those of the dense finetune. This project chose the number, kind and place of the experts.

Every process holds all experts. Where memory is short, spread them over 8 processes:
--cfg-options model.backbone.moe.ep_size=8.
"""

_base_ = ["atss_dyhead_swin_large_dense_coco_2x.py"]

card = dict(
    pipeline="RMoE-D",
    published=(
        "AP + 0.6 over dense, the detector unnamed (arXiv 2204.09636, whose abstract does not say by which of RMoE-D "
        "and RMoE-I); dense: box AP 56.2"
    ),
)
stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8)))
