"""RMoE-D: residual finetune of UPerNet on Swin-T, ADE20K, 160k steps.

Every other block of the last two stages has 8 low-rank experts around its frozen core.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_tiny_residual_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

For 8 GPUs with 2 images each (16 in all; keep that product). Schedule, data and core are those of the dense finetune,
whose mIoU is 44.51; published for RMoE: + 1.1 (arXiv 2204.09636). The experts' number, kind and place are choices of
this project. Nobody has run this file at full scale.
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8, top_k=1, ep_size=8)))
