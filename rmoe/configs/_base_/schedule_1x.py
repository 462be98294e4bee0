"""Trains 12 epochs with AdamW and 16 images a step, as published for Swin with Mask R-CNN."""

epoch = 7330  # steps: 117 266 images of train2017 have objects
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
        end=12 * epoch,
        milestones=[8 * epoch - warmup, 11 * epoch - warmup],  # counted from `begin`
    ),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=12 * epoch, val_interval=epoch)
