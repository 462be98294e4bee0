"""Demo, step 3b: the same finetune with residual experts in every other block of the last two stages.

    deepspeed --num_accelerators 2 launch/train.py rmoe/configs/demo/detection_residual.py \
        --deepspeed_config ds_configs/zero2.json --work-dir work_dirs/demo/detection_residual \
        --cfg-options model.backbone.moe.ep_size=2

That spreads the experts over both processes; without it, each has all.
"""

_base_ = ["detection_dense.py"]

card = dict(
    pipeline="Demo, step 3b",
    published="nothing; the full-size recipe is detection/mask_rcnn_swin_tiny_residual_coco_1x.py",
)
stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8)))
