"""Upper bound: Swin-T pretrained on ImageNet-1k as a mixture of 8 experts in every other block of the last two stages,
300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/swin_tiny_moe_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/swin_tiny_moe_imagenet1k.py \
        ds_configs/zero1.json work_dirs/swin_tiny_moe_imagenet1k \
        --cfg-options train_dataloader.batch_size=32

Hardware: 8 GPUs with 128 images each, or 4 nodes of 8 with 32 (1024 in all; keep that product). The experts of a layer
are spread over 8 GPUs.
Published: no figure of this model. Swin-MoE-S at 192 pixels, with 8 experts, trained on ImageNet-22k: top-1 36.8 there
against 35.5 dense (microsoft/Swin-Transformer, MODELHUB.md).
Run at full scale: no.

Each expert is a network of its own from the start. Top-1, the capacity, the noise and the place of the experts are
Swin-MoE's; softmax before the choice and the weights of importance and load loss V-MoE's (arXiv 2106.05974). All else
is as for the dense core, for comparison.
"""

_base_ = ["swin_tiny_core_imagenet1k.py"]

stage = "moe"
model = dict(
    moe=dict(
        num_experts=8,
        top_k=1,
        residual="experts",
        expert_init="random",
        combine="softmax",
        capacity_factor=1.25,
        noise=1.0,
        losses=dict(importance=0.005, load=0.005),
        ep_size=8,
    )
)
