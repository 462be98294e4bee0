"""Reads ImageNet-22k (fall 2011: 14 197 122 images of 21 841 synsets) at 224 pixels, augmented as ImageNet-1k.

data/imagenet22k/train holds one tar for each synset, as they are distributed: they stay packed. There is no official
validation set. data/imagenet22k/val is ImageNet-1k's, in folders or archives, without n04399382, the only one of its
synsets that is not among the 21 841. Accuracy on it shows how training goes; no published figure is comparable.
"""

_base_ = ["imagenet1k_224.py"]

num_classes = 21841
data_root = "data/imagenet22k"
train_dataloader = dict(dataset=dict(root=data_root, num_classes=num_classes))
val_dataloader = dict(dataset=dict(root=data_root, num_classes=num_classes))
