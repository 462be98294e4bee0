"""Lower bound: dense finetune of UPerNet on EVA-02-B/14, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_eva02_base_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core is timm's published one of masked image modelling on ImageNet-22k (BAAI's, MIT licence), with its mean and
deviation of pixels. The recipe is Swin's and ViT's: EVA-02's has 60 000 steps of 32 images, patches interpolated to 16
pixels, and a layer-wise decay of the learning rate: optim_wrapper.paramwise_cfg.layer_decay.

Another size, with the words to write after --cfg-options:
    L  model.backbone.model=eva02_large_patch14_224.mim_m38m model.backbone.out_indices=[5,11,17,23]
        model.decode_head.in_channels=[1024,1024,1024,1024] model.auxiliary_head.in_channels=1024

Published for L: mIoU 59.8.
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(published="mIoU 55.3 (EVA-02's code, with its own recipe)")
model = dict(
    data_preprocessor=dict(mean=[122.771, 116.746, 104.094], std=[68.501, 66.632, 70.323]),
    backbone=dict(
        model="eva02_base_patch14_224",
        kwargs=dict(pretrained=True, drop_path_rate=0.1),
        out_indices=(2, 5, 8, 11),
        core=None,
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
