"""Core pretraining: dense Swin-L on ImageNet-22k, 90 epochs.

    deepspeed --hostfile hostfile launch/train.py rmoe/configs/upstream/swin_large_core_imagenet22k.py \
        --deepspeed_config ds_configs/zero2.json

    sbatch --nodes=8 launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/swin_large_core_imagenet22k.py \
        ds_configs/zero2.json work_dirs/swin_large_core_imagenet22k

Schedule, weight decay and drop path are those of the published configuration (the paper says weight decay 0.01).
Gradients are clipped and images augmented as for ImageNet-1k.
"""

_base_ = ["../_base_/runtime.py", "../_base_/imagenet22k_224.py", "../_base_/pretraining.py"]

card = dict(
    pipeline="Core pretraining",
    published=(
        "after finetuning on ImageNet-1k, which is not part of this, top-1 86.3 at 224 and 87.3 at 384 pixels (arXiv "
        "2103.14030)"
    ),
    hardware="8 nodes of 8 GPUs with 80 GB and 64 images each (4096 in all; keep that product)",
    batch=4096,
)
epoch = 3466  # steps of 4096 images

model = dict(
    model="swin_large_patch4_window7_224",
    kwargs=dict(drop_path_rate=0.2),
    num_classes={{_base_.num_classes}},
)
train_dataloader = dict(batch_size=64)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=5 * epoch),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=5 * epoch, end=90 * epoch),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=90 * epoch, val_interval=5 * epoch)
default_hooks = dict(checkpoint=dict(interval=epoch))
