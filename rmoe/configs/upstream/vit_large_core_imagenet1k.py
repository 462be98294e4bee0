"""Core pretraining: dense ViT-L/16 on ImageNet-1k, 200 epochs.

    deepspeed --hostfile hostfile launch/train.py rmoe/configs/upstream/vit_large_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero2.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/vit_large_core_imagenet1k.py \
        ds_configs/zero2.json work_dirs/vit_large_core_imagenet1k

Unlike there, timm draws the initial weights in its own way.
"""

_base_ = ["vit_base_core_imagenet1k.py"]

card = dict(
    published="top-1 82.6 of the averaged weights, 81.5 without, by this recipe (arXiv 2111.06377, appendix A.2)",
    hardware="4 nodes of 8 GPUs with 80 GB and 128 images each (4096 in all; keep that product)",
    batch=4096,
)
model = dict(model="vit_large_patch16_224", kwargs=dict(drop_path_rate=0.2))
_base_.param_scheduler[1].end = 200 * _base_.epoch
train_cfg = dict(max_iters=200 * _base_.epoch)
