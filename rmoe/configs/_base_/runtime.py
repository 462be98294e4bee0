"""Sets logs, TensorBoard and checkpoints, alike for all configs. The engine adds what DeepSpeed needs."""

env_cfg = dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=16000, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
log_processor = dict(by_epoch=False)
log_level = "INFO"
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
randomness = dict(seed=0)
load_from = None
resume = False
card = dict(full_scale="no")  # what `rmoe configs` shows; nobody has run these configs in full yet
