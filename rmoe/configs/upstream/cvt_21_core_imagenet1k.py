"""Core pretraining: dense CvT-21 on ImageNet-1k, 300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/cvt_21_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/cvt_21_core_imagenet1k.py \
        ds_configs/zero1.json work_dirs/cvt_21_core_imagenet1k \
        --cfg-options train_dataloader.batch_size=64

The recipe is CvT-13's, with the published weight decay of 0.1.
"""

_base_ = ["cvt_13_core_imagenet1k.py"]

card = dict(published="top-1 82.5 (arXiv 2103.15808)")
model = dict(model="cvt_21")
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
