"""Core pretraining: dense Swin-T on ImageNet-1k, 300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/swin_tiny_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/swin_tiny_core_imagenet1k.py \
        ds_configs/zero1.json work_dirs/swin_tiny_core_imagenet1k \
        --cfg-options train_dataloader.batch_size=32
"""

_base_ = ["../_base_/runtime.py", "../_base_/imagenet1k_224.py", "../_base_/pretraining.py"]

card = dict(
    pipeline="Core pretraining",
    published="top-1 81.2, by this recipe (arXiv 2103.14030)",
    hardware="8 GPUs with 128 images each, or 4 nodes of 8 with 32 (1024 in all; keep that product)",
    batch=1024,
)
epoch = 1251  # steps of 1024 images

model = dict(
    model="swin_tiny_patch4_window7_224",
    kwargs=dict(drop_path_rate=0.2),
    num_classes={{_base_.num_classes}},
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=20 * epoch),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=20 * epoch, end=300 * epoch),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=300 * epoch, val_interval=10 * epoch)
default_hooks = dict(checkpoint=dict(interval=epoch))
