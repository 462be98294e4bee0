"""Core pretraining: dense Swin-T on ImageNet-1k, 300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/swin_tiny_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

For 8 GPUs with 128 images each (1024 in all; keep that product). The recipe is the published one (arXiv 2103.14030):
top-1 81.2. Nobody has run this file at full scale.
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
