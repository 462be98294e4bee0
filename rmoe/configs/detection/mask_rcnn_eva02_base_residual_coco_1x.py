"""RMoE-D: residual finetune of Mask R-CNN on EVA-02-B/14 with a simple feature pyramid, COCO, 12 epochs; 8 low-rank
experts, all weighed for each token, in every other block, their cores trained as well.

    deepspeed launch/train.py rmoe/configs/detection/mask_rcnn_eva02_base_residual_coco_1x.py \
        --deepspeed_config ds_configs/zero2.json

Schedule, data and core are those of the dense finetune. This project chose the number, kind and place of the experts.

Every process holds all experts. Where memory is short, spread them over 8 processes:
--cfg-options model.backbone.moe.ep_size=8.
"""

_base_ = ["mask_rcnn_eva02_base_dense_coco_1x.py"]

card = dict(
    pipeline="RMoE-D",
    published="no figure of RMoE; dense: box AP 55.5, mask AP 47.1 of a cascade with EVA-02's own recipe",
)
stage = "residual"
model = dict(backbone=dict(moe=dict(num_experts=8)))
