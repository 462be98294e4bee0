"""RMoE-D: residual finetune of UPerNet on ViT-B/16, ADE20K in crops of 512 pixels, 160 000 steps; 8 low-rank experts,
all weighed for each token, in every other block, their cores trained as well.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_vit_base_residual_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

Schedule, data and core are those of the dense finetune. This project chose the number, kind and place of the experts.

Every process holds all experts. Where memory is short, spread them over 8 processes:
--cfg-options model.backbone.moe.ep_size=8.
"""

_base_ = ["upernet_vit_base_dense_ade20k_512_160k.py"]

card = dict(pipeline="RMoE-D", published="no figure of RMoE; dense: mIoU 47.73, multi-scale 49.95")
stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8)))
