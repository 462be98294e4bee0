"""Core pretraining: dense ViT-B/16 on ImageNet-1k, 300 epochs.

    deepspeed --hostfile hostfile launch/train.py rmoe/configs/upstream/vit_base_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/vit_base_core_imagenet1k.py \
        ds_configs/zero1.json work_dirs/vit_base_core_imagenet1k

Unlike there, timm draws the initial weights in its own way.
"""

_base_ = ["vit_small_core_imagenet1k.py"]

card = dict(
    published="top-1 82.3 of the averaged weights, by this recipe (arXiv 2111.06377, appendix A.2)",
    hardware="4 nodes of 8 GPUs with 128 images each (4096 in all; keep that product)",
    batch=4096,
)
epoch = 312  # steps of 4096 images

model = dict(model="vit_base_patch16_224")
train_dataloader = dict(dataset=dict(transform=dict(re_prob=0.0)))
optim_wrapper = dict(optimizer=dict(lr=1.6e-3, betas=(0.9, 0.95), weight_decay=0.3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=20 * epoch),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=20 * epoch, end=300 * epoch),
]
train_cfg = dict(max_iters=300 * epoch, val_interval=10 * epoch)
default_hooks = dict(checkpoint=dict(interval=epoch))
custom_hooks = [dict(type="rmoe.EMAHook", momentum=1e-4)]
