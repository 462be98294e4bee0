"""Lower bound: dense finetune of Mask2Former on DINOv2-B/14, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/mask2former_dinov2_base_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one (Meta's, Apache License 2.0). Head and schedule are mmsegmentation's of Mask2Former on
Swin, the augmentation is UPerNet's; the four maps are those of blocks 3, 6, 9 and 12, resized to strides 4, 8, 16 and
32, without an adapter. As a mixture: --cfg-options stage=residual model.backbone.moe.num_experts=8.

Other sizes, with the words to write after --cfg-options:
    S  model.backbone.model=vit_small_patch14_dinov2 model.decode_head.in_channels=[384,384,384,384]
    L  model.backbone.model=vit_large_patch14_dinov2 model.backbone.out_indices=[5,11,17,23]
        model.decode_head.in_channels=[1024,1024,1024,1024]
    registers  model.backbone.model=vit_base_patch14_reg4_dinov2
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py", "../_base_/mask2former.py"]

card = dict(published="no figure of this size (DINOv2-g, frozen, with an adapter: 60.2, arXiv 2304.07193)")
model = dict(
    backbone=dict(
        model="vit_base_patch14_dinov2",
        kwargs=dict(pretrained=True),
        out_indices=(2, 5, 8, 11),
        core=None,
    ),
    decode_head=dict(
        _delete_=True,
        in_channels=[768, 768, 768, 768],
        num_classes=150,
        align_corners=False,
        loss_cls=dict(class_weight=[1.0] * 150 + [0.1], **_base_.pop("class_loss")),
        train_cfg=_base_.pop("matching"),
        **_base_.pop("mask2former"),
    ),
    auxiliary_head=None,
)
optim_wrapper = dict(_delete_=True, **_base_.pop("optimization"))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, by_epoch=False, begin=0, end=160000)]
