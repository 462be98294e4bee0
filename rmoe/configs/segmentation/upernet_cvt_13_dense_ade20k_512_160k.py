"""Lower bound: dense finetune of UPerNet on CvT-13, ADE20K in crops of 512 pixels, 160 000 steps.

    deepspeed launch/train.py rmoe/configs/segmentation/upernet_cvt_13_dense_ade20k_512_160k.py \
        --deepspeed_config ds_configs/zero2.json

The core comes from the work dir of upstream/cvt_13_core_imagenet1k.py. CvT has three feature maps, of strides 4, 8 and
16; UPerNet pools the last one where it pools Swin-T's map of stride 32. To use Swin-T's recipe is this project's
choice.
"""

_base_ = ["upernet_swin_tiny_dense_ade20k_512_160k.py"]

card = dict(published="no figure of a dense CvT-13 found")
model = dict(
    backbone=dict(model="cvt_13", out_indices=(0, 1, 2), core="work_dirs/cvt_13_core_imagenet1k"),
    decode_head=dict(in_channels=[64, 192, 384], in_index=[0, 1, 2]),
)
