"""RMoE-I, first half: intermediate finetuning of CvT-13 on ImageNet-1k, 5 epochs; 8 low-rank experts, all weighed for
each token, in every other block of the last two stages, their cores trained as well.

    deepspeed launch/train.py rmoe/configs/upstream/cvt_13_intermediate_imagenet1k.py \
        --deepspeed_config ds_configs/zero1.json

    sbatch launch/slurm/pretrain_core.sbatch rmoe/configs/upstream/cvt_13_intermediate_imagenet1k.py \
        ds_configs/zero1.json work_dirs/cvt_13_intermediate_imagenet1k \
        --cfg-options train_dataloader.batch_size=64

The core comes from the work dir of upstream/cvt_13_core_imagenet1k.py. As in the finetunes, the gates and all that lies
outside the experts' networks are trained at one rate, and the residuals at four times that. This, the rate and the
number of epochs are this project's choices.

Every process holds all experts. Where memory is short, spread them over 8 processes:
--cfg-options model.moe.ep_size=8.
"""

_base_ = ["cvt_13_core_imagenet1k.py"]

card = dict(
    pipeline="RMoE-I, first half",
    published="no figure of this stage (arXiv 2204.09636, whose abstract gives those of the finetunes after it)",
)
stage = "intermediate"
epoch = _base_.epoch

model = dict(core="work_dirs/cvt_13_core_imagenet1k", moe=dict(num_experts=8))
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=epoch // 2),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=False, begin=epoch // 2, end=5 * epoch),
]
train_cfg = dict(max_iters=5 * epoch, val_interval=epoch)
