"""Demo, step 1: core pretraining of a small dense Swin on the embedded upstream set.

    deepspeed --num_accelerators 2 launch/train.py rmoe/configs/demo/core.py --deepspeed_config ds_configs/zero0.json \
        --work-dir work_dirs/demo/core
"""

_base_ = ["../_base_/runtime.py"]

card = dict(
    pipeline="Demo, step 1",
    published="nothing; the full-size recipe is upstream/swin_tiny_core_imagenet1k.py",
    hardware="2 CPU cores, about 3 minutes",
    full_scale="yes, it is the demo",
)
stage = "core"
default_scope = "mmengine"
num_classes = 120
steps = 800
dataset = dict(type="rmoe.ImageFolder", root="work_dirs/demo/data/upstream", num_classes=num_classes)
loader = dict(batch_size=32, num_workers=0, collate_fn=dict(type="default_collate"))

model = dict(
    type="rmoe.TimmClassifier",
    model="swin_tiny_patch4_window7_224",
    kwargs=dict(
        img_size=64, embed_dim=32, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16), window_size=4, drop_path_rate=0.0
    ),
    num_classes=num_classes,
    label_smoothing=0.1,
)
train_dataloader = dict(
    **loader,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(**dataset, split="train", transform=dict(input_size=64, scale=(0.5, 1.0), color_jitter=0.0)),
)
val_dataloader = dict(
    **loader,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**dataset, split="val", transform=dict(input_size=64, crop_pct=1.0)),
)
val_evaluator = dict(type="rmoe.Accuracy")
val_cfg = dict(type="ValLoop")
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    constructor="rmoe.ParamGroups",
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, by_epoch=False, begin=0, end=80),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=80, end=steps),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)
default_hooks = dict(checkpoint=dict(interval=200))
