"""Upper bound, experts fixed: finetune of Mask R-CNN on Swin-T, COCO, 12 epochs, on a backbone pretrained as a mixture
of 8 experts in every other block of the last two stages, whose experts and gates stay as they are.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_swin_tiny_fixed_experts_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

Everything else is trained as in mask_rcnn_swin_tiny_moe_coco_1x.py; fixed experts were best for Swin-MoE on COCO. All
processes hold all experts, which have neither gradients nor optimizer states.

To start from a Swin-MoE checkpoint (NAME.pth.rank0, NAME.pth.rank1, … and NAME.pth.master) instead: --cfg-options
model.backbone.core=NAME.pth model.backbone.model=swin_small_patch4_window7_224 model.backbone.kwargs.window_size=12
model.backbone.moe.num_experts=32
"""

_base_ = ["mask_rcnn_swin_tiny_moe_coco_1x.py"]

card = dict(
    pipeline="Upper bound, experts fixed",
    published="no figure of this detector; SwinV2-MoE, experts fixed: box AP + 0.4 over dense (arXiv 2206.03382)",
)
model = dict(backbone=dict(moe=dict(train_residual=False)))
optim_wrapper = dict(paramwise_cfg=dict(gate_lr_mult=0.0))
