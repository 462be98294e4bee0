"""Upper bound: finetune of ATSS with a dynamic head on Swin-L, COCO in many sizes, 24 epochs, on a backbone pretrained
as a mixture of 8 experts in every other block of the last two stages.

    deepspeed launch/train.py rmoe/configs/detection/atss_dyhead_swin_large_moe_coco_2x.py \
        --deepspeed_config ds_configs/zero2.json

Hardware: 16 GPUs of 80 GB with 1 image each (16 in all; keep that product).
Published: no figure of the upper bound; dense: box AP 56.2.
Run at full scale: no.

The weights are the work dir of upstream/swin_large_moe_imagenet22k.py. Each expert is a network of its own from the
start. Top-1, the capacity and the place of the experts are Swin-MoE's, whose published runs have 8 to 32 of them; the
gate's noise and the weights of its losses V-MoE's (arXiv 2106.05974). 8 experts, schedule and data are as for RMoE, for
comparison.
"""

_base_ = ["atss_dyhead_swin_large_dense_coco_2x.py"]

stage = "moe"
model = dict(
    backbone=dict(
        core="work_dirs/swin_large_moe_imagenet22k",
        moe=dict(
            num_experts=8,
            top_k=1,
            residual="experts",
            expert_init="random",
            combine="softmax",
            capacity_factor=1.25,
            losses=dict(importance=0.005, load=0.005),
            ep_size=8,
        ),
    )
)
