"""Demo, two tasks at once: one core for segmentation and detection, with residual experts whose gates know the task.

    deepspeed --num_accelerators 2 launch/train.py rmoe/configs/demo/two_tasks.py \
        --deepspeed_config ds_configs/zero2.json --work-dir work_dirs/demo/two_tasks

Each task gets one expert, its own set of residuals, by --cfg-options model.backbone.moe.router=task
model.backbone.moe.num_experts=2 model.backbone.moe.losses.importance=0 model.backbone.moe.losses.task_information=0.
"""

_base_ = ["../_base_/runtime.py"]

card = dict(
    pipeline="Demo, two tasks at once",
    published="nothing",
    hardware="2 CPU cores, about 4 minutes",
    full_scale="yes, it is the demo",
)
stage = "residual"
steps = 500
tasks = dict(
    segmentation=dict(config="residual.py"),
    detection=dict(config="detection_residual.py"),
)
model = dict(
    backbone=dict(moe=dict(top_k=1, train_core=False, tasks=2, losses=dict(importance=0.005, task_information=0.005)))
)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    constructor="rmoe.ParamGroups",
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=50, end=steps),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)
default_hooks = dict(
    checkpoint=dict(interval=100, save_best="segmentation/mIoU"),
    logger=dict(interval=10),
)
