"""RMoE-I: residual finetune of Mask R-CNN on Swin-T, COCO, 12 epochs, with residuals and gates from intermediate
finetuning.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_swin_tiny_intermediate_residual_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

It differs from detection/mask_rcnn_swin_tiny_residual_coco_1x.py only in where it starts: core, residuals and gates
come from the work dir of upstream/swin_tiny_intermediate_imagenet1k.py.
"""

_base_ = ["mask_rcnn_swin_tiny_residual_coco_1x.py"]

card = dict(pipeline="RMoE-I")
model = dict(backbone=dict(core="work_dirs/swin_tiny_intermediate_imagenet1k"))
