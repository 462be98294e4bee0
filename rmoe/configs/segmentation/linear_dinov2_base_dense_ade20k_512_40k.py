"""Lower bound: linear evaluation of DINOv2-B/14, ADE20K in crops of 512 pixels, 40 000 steps: a batch norm and a linear
layer read the last map of a frozen backbone.

    deepspeed launch/train.py rmoe/configs/segmentation/linear_dinov2_base_dense_ade20k_512_40k.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one (Meta's, Apache License 2.0). The recipe is DINOv2's; images are evaluated whole, where
DINOv2 moved a window over them. train_only freezes all but the head. It names residuals and gates as well, which this
model does not have, so that the residual config adds its experts and changes nothing else.

Other sizes and heads, with the words to write after --cfg-options:
    S  model.backbone.model=vit_small_patch14_dinov2 model.decode_head.in_channels=[384]
    L  model.backbone.model=vit_large_patch14_dinov2 model.backbone.out_indices=[23]
        model.decode_head.in_channels=[1024]
    registers  model.backbone.model=vit_base_patch14_reg4_dinov2
    four maps  model.backbone.out_indices=[8,9,10,11] model.backbone.strides=[14,14,14,14]
        model.decode_head.in_channels=[768,768,768,768]

Published for S and L: mIoU 44.3 and 47.7, with four maps and several scales 47.2 and 53.1.
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(published="mIoU 47.3, with four maps and several scales 51.3 (arXiv 2304.07193)")
custom_imports = dict(imports=["rmoe.tasks.segmentation", "rmoe.tasks.heads"])
model = dict(
    backbone=dict(
        model="vit_base_patch14_dinov2",
        kwargs=dict(_delete_=True, pretrained=True),
        out_indices=(11,),
        strides=(14,),
        core=None,
    ),
    decode_head=dict(
        _delete_=True,
        type="rmoe.LinearHead",
        in_channels=[768],
        num_classes=150,
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_decode=_base_.loss,
    ),
    auxiliary_head=None,
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=1e-4),
    paramwise_cfg=dict(train_only=["head", "residual", "gate"]),
)
_base_.param_scheduler[1].end = 40000
train_cfg = dict(max_iters=40000, val_interval=4000)
