"""RMoE-D: residual finetune of Mask R-CNN on DINOv2-B/14 with a simple feature pyramid, COCO, 12 epochs; 8 low-rank
experts, all weighed for each token, in every other block, their cores trained as well.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_dinov2_base_residual_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

Schedule, data and core are those of the dense finetune. This project chose the number, kind and place of the experts.

Every process holds all experts. Where memory is short, spread them over 8 processes:
--cfg-options model.backbone.moe.ep_size=8.
"""

_base_ = ["mask_rcnn_dinov2_base_dense_coco_1x.py"]

card = dict(pipeline="RMoE-D", published="no figure of RMoE; dense: none of this core")
stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8)))
