"""Lower bound: dense finetune of Mask2Former on SwinV2-B, COCO instances in crops of 1024 pixels, 50 epochs.

    deepspeed launch/train.py rmoe/configs/detection/mask2former_swinv2_base_dense_coco_50e.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one, pretrained on ImageNet-22k and finetuned on ImageNet-1k with windows of 16
(Microsoft's, MIT licence). Head, data and recipe are mmdetection's of Mask2Former on Swin. As a mixture: --cfg-options
stage=residual model.backbone.moe.num_experts=8.

Another size, with the words to write after --cfg-options:
    L  model.backbone.model=swinv2_large_window12to16_192to256 model.panoptic_head.in_channels=[192,384,768,1536]
"""

_base_ = ["mask_rcnn_swin_tiny_dense_coco_1x.py", "../_base_/mask2former.py"]

card = dict(published="no figure of this backbone (Swin-T: box AP 47.7, mask AP 44.7; Swin-S: 49.3, 46.1; mmdetection)")
size = (1024, 1024)
steps = 368750
things = dict(num_things_classes=80, num_stuff_classes=0)
model = dict(
    _delete_=True,
    type="Mask2Former",
    data_preprocessor=dict(
        batch_augments=[dict(type="BatchFixedSizePad", size=size, pad_mask=True)],
        **_base_.model.data_preprocessor,
    ),
    backbone=dict(
        type="rmoe.TimmPyramid",
        model="swinv2_base_window12to16_192to256",
        kwargs=dict(pretrained=True, drop_path_rate=0.3),
        out_indices=(0, 1, 2, 3),
    ),
    panoptic_head=dict(
        in_channels=[128, 256, 512, 1024],
        loss_cls=dict(class_weight=[1.0] * 80 + [0.1], **_base_.pop("class_loss")),
        **things,
        **_base_.pop("mask2former"),
    ),
    panoptic_fusion_head=dict(type="MaskFormerFusionHead", loss_panoptic=None, **things),
    train_cfg=_base_.pop("matching"),
    test_cfg=dict(panoptic_on=False, semantic_on=False, instance_on=True, max_per_image=100),
)
train_pipeline = [
    dict(type="rmoe.LoadImage"),
    dict(type="rmoe.LoadObjects", with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=size, crop_type="absolute", recompute_bbox=True, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-5, 1e-5), by_mask=True),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(_delete_=True, **_base_.pop("optimization"))
param_scheduler = [dict(type="MultiStepLR", gamma=0.1, by_epoch=False, begin=0, end=steps, milestones=[327778, 355092])]
train_cfg = dict(max_iters=steps, val_interval=5000)
