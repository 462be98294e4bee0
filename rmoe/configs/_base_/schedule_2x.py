"""90 000 steps of AdamW with 32 images each, 25 epochs, as published for Swin-T with DyHead."""

warmup = 1000
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="rmoe.ParamGroups",
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=warmup),
    dict(
        type="MultiStepLR",
        gamma=0.1,
        by_epoch=False,
        begin=warmup,
        end=90000,
        milestones=[60000 - warmup, 80000 - warmup],  # counted from `begin`
    ),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=90000, val_interval=7500)
