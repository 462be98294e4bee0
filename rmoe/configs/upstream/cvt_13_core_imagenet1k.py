"""Core pretraining: dense CvT-13 on ImageNet-1k, 300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/cvt_13_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/cvt_13_core_imagenet1k.py \
        ds_configs/zero1.json work_dirs/cvt_13_core_imagenet1k \
        --cfg-options train_dataloader.batch_size=64

Batch size, weight decay, drop path and augmentation are the published ones. The learning rate is that of the published
configuration, 2.5e-4 for each of 8 GPUs; the paper says 0.02. The published network has QuickGELU, this one GELU.
"""

_base_ = ["swin_tiny_core_imagenet1k.py"]

card = dict(
    published="top-1 81.6 (arXiv 2103.15808)",
    hardware="8 GPUs with 256 images each, or 4 nodes of 8 with 64 (2048 in all; keep that product)",
    batch=2048,
)
epoch = 625  # steps of 2048 images

model = dict(model="cvt_13", kwargs=dict(drop_path_rate=0.1))
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-4, by_epoch=False, begin=0, end=5 * epoch),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=5 * epoch, end=300 * epoch),
]
train_cfg = dict(max_iters=300 * epoch, val_interval=10 * epoch)
default_hooks = dict(checkpoint=dict(interval=epoch))
