"""Core pretraining: dense ViT-L/16 on ImageNet-1k, 200 epochs.

    deepspeed --hostfile hostfile launch/train.py rmoe/configs/upstream/vit_large_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero2_bf16.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/vit_large_core_imagenet1k.py \
        ds_configs/zero2_bf16.json work_dirs/vit_large_core_imagenet1k

Hardware: 4 nodes of 8 GPUs with 80 GB and 128 images each (4096 in all; keep that product).
Published: top-1 82.6 of the averaged weights, 81.5 without, by this recipe (arXiv 2111.06377, appendix A.2).
Run at full scale: no.

Left to timm, unlike there: how weights are drawn.
"""

_base_ = ["vit_base_core_imagenet1k.py"]

epoch = 312  # steps of 4096 images

model = dict(model="vit_large_patch16_224", kwargs=dict(drop_path_rate=0.2))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=20 * epoch),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=20 * epoch, end=200 * epoch),
]
train_cfg = dict(max_iters=200 * epoch)
