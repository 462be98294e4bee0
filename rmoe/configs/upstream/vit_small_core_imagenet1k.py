"""Core pretraining: dense ViT-S/16 on ImageNet-1k, 300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/vit_small_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/vit_small_core_imagenet1k.py \
        ds_configs/zero1.json work_dirs/vit_small_core_imagenet1k \
        --cfg-options train_dataloader.batch_size=32

As in the published code, the weights are averaged with a decay of 0.99996. Here the average is evaluated; there it was
the weights themselves.
"""

_base_ = ["swin_tiny_core_imagenet1k.py"]

card = dict(
    published="top-1 79.9, by the recipe of DeiT-S (arXiv 2012.12877), of which this has all but repeated augmentation"
)
model = dict(model="vit_small_patch16_224", kwargs=dict(drop_path_rate=0.1))
optim_wrapper = dict(clip_grad=None)
_base_.param_scheduler[0].end = _base_.param_scheduler[1].begin = 5 * _base_.epoch
custom_hooks = [dict(type="rmoe.EMAHook", momentum=4e-5)]
