"""Demo, step 2b: the same finetune with residual experts in every other block of the last two stages.

    deepspeed --num_accelerators 2 launch/train.py rmoe/configs/demo/residual.py \
        --deepspeed_config ds_configs/zero2.json --work-dir work_dirs/demo/residual \
        --cfg-options model.backbone.moe.ep_size=2

That spreads the experts over both processes; without it, each has all.

--cfg-options model.backbone.moe.residual=full gives every expert a residual of the core's shape.
"""

_base_ = ["dense.py"]

card = dict(
    pipeline="Demo, step 2b",
    published="nothing; the full-size recipe is segmentation/upernet_swin_tiny_residual_ade20k_512_160k.py",
)
stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8)))
