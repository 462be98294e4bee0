"""Core pretraining: dense Swin-T on ImageNet-1k, 300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/swin_tiny_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/swin_tiny_core_imagenet1k.py \
        ds_configs/zero1.json work_dirs/swin_tiny_core_imagenet1k \
        --cfg-options train_dataloader.batch_size=32

Hardware: 8 GPUs with 128 images each, or 4 nodes of 8 with 32 (1024 in all; keep that product).
Published: top-1 81.2, by this recipe (arXiv 2103.14030).
Run at full scale: no.
"""

_base_ = ["../_base_/runtime.py", "../_base_/imagenet1k_224.py"]

stage = "core"
default_scope = "mmengine"
epoch = 1251  # steps of 1024 images

model = dict(
    type="rmoe.TimmClassifier",
    model="swin_tiny_patch4_window7_224",
    kwargs=dict(drop_path_rate=0.2),
    num_classes={{_base_.num_classes}},
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="rmoe.ParamGroups",
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=20 * epoch),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=20 * epoch, end=300 * epoch),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=300 * epoch, val_interval=10 * epoch)
default_hooks = dict(checkpoint=dict(interval=epoch))
