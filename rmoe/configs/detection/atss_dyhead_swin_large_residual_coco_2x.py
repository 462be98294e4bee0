"""RMoE-D: residual finetune of ATSS with a dynamic head on Swin-L, COCO in many sizes, 24 epochs; 8 low-rank experts
in every other block of the last two stages, the core of these blocks frozen.

    deepspeed launch/train.py rmoe/configs/detection/atss_dyhead_swin_large_residual_coco_2x.py \
        --deepspeed_config ds_configs/zero2.json

For 16 GPUs of 80 GB with 1 image each (16 in all; keep that product). Schedule, data and core are those of the dense
finetune, whose result is box AP 56.2; published for RMoE, the detector unnamed: + 0.6 AP (arXiv 2204.09636). The
experts' number, kind and place are this project's choices. Nobody has run this file at full scale.
"""

_base_ = ["atss_dyhead_swin_large_dense_coco_2x.py"]

stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8, top_k=1, ep_size=8)))
