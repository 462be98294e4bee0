"""RMoE-I: residual finetune of ATSS with a dynamic head on Swin-L, COCO in many sizes, 24 epochs, with residuals and
gates from intermediate finetuning.

    deepspeed launch/train.py rmoe/configs/detection/atss_dyhead_swin_large_intermediate_residual_coco_2x.py \
        --deepspeed_config ds_configs/zero2.json

Hardware: 16 GPUs of 80 GB with 1 image each (16 in all; keep that product).
Published: AP + 0.6 over dense, the detector unnamed (arXiv 2204.09636, whose abstract does not say by which of RMoE-D
and RMoE-I); dense: box AP 56.2.
Run at full scale: no.

All but where the weights come from is as in detection/atss_dyhead_swin_large_residual_coco_2x.py: core, residuals and
gates are the work dir of upstream/swin_large_intermediate_imagenet22k.py.
"""

_base_ = ["atss_dyhead_swin_large_residual_coco_2x.py"]

model = dict(backbone=dict(core="work_dirs/swin_large_intermediate_imagenet22k"))
