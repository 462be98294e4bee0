"""Core pretraining: dense ViT-S/16 on ImageNet-1k, 300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/vit_small_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/vit_small_core_imagenet1k.py \
        ds_configs/zero1.json work_dirs/vit_small_core_imagenet1k \
        --cfg-options train_dataloader.batch_size=32

Hardware: 8 GPUs with 128 images each, or 4 nodes of 8 with 32 (1024 in all; keep that product).
Published: top-1 79.9, by the recipe of DeiT-S (arXiv 2012.12877), of which this has all but repeated augmentation.
Run at full scale: no.

As in the published code the weights are averaged with a decay of 0.99996; what is evaluated here is the average, there
it was the weights.
"""

_base_ = ["swin_tiny_core_imagenet1k.py"]

epoch = 1251  # steps of 1024 images

model = dict(model="vit_small_patch16_224", kwargs=dict(drop_path_rate=0.1))
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=5 * epoch),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=5 * epoch, end=300 * epoch),
]
custom_hooks = [dict(type="rmoe.EMAHook", momentum=4e-5)]
