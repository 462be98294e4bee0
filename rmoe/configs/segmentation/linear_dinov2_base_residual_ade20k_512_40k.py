"""RMoE-D: a linear layer on the last map of DINOv2-B/14, ADE20K in crops of 512 pixels, 40 000 steps; 8 low-rank
experts, all weighed for each token, in every other block, which train with their gates and the head, and nothing else.

    deepspeed launch/train.py rmoe/configs/segmentation/linear_dinov2_base_residual_ade20k_512_40k.py \
        --deepspeed_config ds_configs/zero2.json

Schedule, data and core are those of the dense evaluation. This project chose the number, kind and place of the experts.

Every process holds all experts. Where memory is short, spread them over 8 processes:
--cfg-options model.backbone.moe.ep_size=8.
"""

_base_ = ["linear_dinov2_base_dense_ade20k_512_40k.py"]

card = dict(pipeline="RMoE-D", published="no figure of RMoE; dense: mIoU 47.3, with four maps and several scales 51.3")
stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8, train_core=False)))
