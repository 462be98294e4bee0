"""Core pretraining: dense Swin-B on ImageNet-1k, 300 epochs.

    deepspeed launch/train.py rmoe/configs/upstream/swin_base_core_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/swin_base_core_imagenet1k.py \
        ds_configs/zero1.json work_dirs/swin_base_core_imagenet1k \
        --cfg-options train_dataloader.batch_size=32

The recipe is Swin-T's with the drop path of the published configuration, 0.5.
"""

_base_ = ["swin_tiny_core_imagenet1k.py"]

card = dict(published="top-1 83.5 (arXiv 2103.14030, table 1)")
model = dict(model="swin_base_patch4_window7_224", kwargs=dict(drop_path_rate=0.5))
