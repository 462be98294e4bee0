"""Core pretraining: dense CvT-W24 on ImageNet-22k, 90 epochs.

    deepspeed --hostfile hostfile launch/train.py rmoe/configs/upstream/cvt_w24_core_imagenet22k.py \
        --deepspeed_config ds_configs/zero2.json

    sbatch --nodes=8 launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/cvt_w24_core_imagenet22k.py \
        ds_configs/zero2.json work_dirs/cvt_w24_core_imagenet22k

The weight decay is the published one. The length of training on ImageNet-22k and the drop path were not published:
Swin-L's schedule and this drop path are this project's choices.
"""

_base_ = ["swin_large_core_imagenet22k.py"]

card = dict(
    published="after finetuning on ImageNet-1k at 384 pixels, which is not part of this, top-1 87.7 (arXiv 2103.15808)"
)
model = dict(model="cvt_w24", kwargs=dict(drop_path_rate=0.3))
optim_wrapper = dict(optimizer=dict(weight_decay=0.1), clip_grad=None)
