"""Lower bound: dense finetune of Mask R-CNN on Swin-T, COCO, 36 epochs.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_swin_tiny_dense_coco_3x.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/swin_tiny_core_imagenet1k.py. With timm's published core instead:
--cfg-options model.backbone.core=None model.backbone.kwargs.pretrained=True. The recipe is the published one.
"""

_base_ = ["mask_rcnn_swin_tiny_dense_coco_1x.py"]

card = dict(published="box AP 46.0, mask AP 41.6 (arXiv 2103.14030 and its code)")
model = dict(backbone=dict(kwargs=dict(drop_path_rate=0.2)))
epoch, warmup = _base_.epoch, _base_.warmup
_base_.param_scheduler[1].update(end=36 * epoch, milestones=[27 * epoch - warmup, 33 * epoch - warmup])
train_cfg = dict(max_iters=36 * epoch)
