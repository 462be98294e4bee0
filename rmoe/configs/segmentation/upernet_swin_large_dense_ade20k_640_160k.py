"""Lower bound: dense finetune of UPerNet on Swin-L, ADE20K in crops of 640 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_swin_large_dense_ade20k_640_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/swin_large_core_imagenet22k.py. With timm's published core instead:
--cfg-options model.backbone.core=None model.backbone.kwargs.pretrained=True
model.backbone.model=swin_large_patch4_window12_384.ms_in22k. The recipe is Swin-T's, drop path included, as in
mmsegmentation's configs of Swin-L; the crop size is the paper's.

Two images take about 10 GB of a GPU in bfloat16, computed and not measured; model.backbone.with_cp=True would bring
that to 7 and recompute the backbone in each backward pass.
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/ade20k_640.py",
    "../_base_/upernet_swin_tiny.py",
    "../_base_/schedule_160k.py",
]

card = dict(
    pipeline="Lower bound",
    published="mIoU 52.05, multi-scale 53.53 (arXiv 2103.14030 and its code)",
    hardware="8 GPUs of 80 GB with 2 images each (16 in all; keep that product)",
    batch=16,
)
stage = "dense"
default_scope = "mmseg"
model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}),
    backbone=dict(model="swin_large_patch4_window12_384", core="work_dirs/swin_large_core_imagenet22k"),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
