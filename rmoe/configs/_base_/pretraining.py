"""Trains classifiers with label smoothing, mixup and AdamW, as published for Swin (arXiv 2103.14030)."""

stage = "core"
default_scope = "mmengine"
model = dict(
    type="rmoe.TimmClassifier",
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="rmoe.ParamGroups",
    clip_grad=dict(max_norm=5.0),
)
