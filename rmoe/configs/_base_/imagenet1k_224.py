"""Reads ImageNet-1k at 224 pixels, augmented as for Swin (arXiv 2103.14030, appendix A2.1), 128 images for each of 8
GPUs.

The images lie in SPLIT/CLASS/*.jpg, in SPLIT.zip, or in SPLIT/CLASS.tar or .zip: see rmoe.ImageFolder.
"""

_base_ = ["loaders.py"]

num_classes = 1000
data_root = "data/imagenet"
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="rmoe.ImageFolder",
        root=data_root,
        split="train",
        num_classes=num_classes,
        transform=dict(
            input_size=224,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="rmoe.ImageFolder",
        root=data_root,
        split="val",
        num_classes=num_classes,
        transform=dict(input_size=224, interpolation="bicubic", crop_pct=0.875),
    ),
)
val_evaluator = dict(type="rmoe.Accuracy")
