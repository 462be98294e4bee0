"""Upper bound: finetune of UPerNet on Swin-T, ADE20K in crops of 512 pixels, 160 000 steps, on a backbone pretrained as
a mixture of 8 experts in every other block of the last two stages.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_tiny_moe_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

Hardware: 8 GPUs with 2 images each (16 in all; keep that product).
Published: no figure of the upper bound; dense: mIoU 44.51, multi-scale 45.81.
Run at full scale: no.

The weights are the work dir of upstream/swin_tiny_moe_imagenet1k.py. Each expert is a network of its own from the
start. Top-1, the capacity and the place of the experts are Swin-MoE's, whose published runs have 8 to 32 of them; the
gate's noise and the weights of its losses V-MoE's (arXiv 2106.05974). 8 experts, schedule and data are as for RMoE, for
comparison.

Arm, by what follows --cfg-options:
    model.backbone.moe.train_residual=False  experts fixed: Swin-MoE's best for COCO
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

stage = "moe"
model = dict(
    backbone=dict(
        core="work_dirs/swin_tiny_moe_imagenet1k",
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
