"""Lower bound: dense finetune of DPT on DINOv3-B/16, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/dpt_dinov3_base_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one, under Meta's DINOv3 License, which is no open-source licence: read it before you use
the weights or pass on what was trained from them. Recipe and head are mmsegmentation's of DPT on ViT-B, but for the
class token, which is left out here. Its maps are those of blocks 3, 6, 9 and 12 at the stride of the patches.

Other sizes, with the words to write after --cfg-options:
    S  model.backbone.model=vit_small_patch16_dinov3 model.decode_head.in_channels=[384,384,384,384]
    L  model.backbone.model=vit_large_patch16_dinov3 model.backbone.out_indices=[5,11,17,23]
        model.decode_head.in_channels=[1024,1024,1024,1024]
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(published="no figure of DPT; a linear layer on the frozen backbone: mIoU 51.8 (DINOv3's model card)")
custom_imports = dict(imports=["rmoe.tasks.segmentation", "rmoe.tasks.heads"])
model = dict(
    backbone=dict(
        model="vit_base_patch16_dinov3",
        kwargs=dict(pretrained=True, drop_path_rate=0.1),
        out_indices=(2, 5, 8, 11),
        strides=(16, 16, 16, 16),
        core=None,
    ),
    decode_head=dict(
        _delete_=True,
        type="rmoe.DPTHead",
        in_channels=[768, 768, 768, 768],
        channels=256,
        post_process_channels=[96, 192, 384, 768],
        num_classes=150,
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_decode=_base_.loss,
    ),
    auxiliary_head=None,
)
