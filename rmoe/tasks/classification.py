"""ImageNet-style classification with timm's models and transforms, for mmengine's runner: upstream of everything."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm.data
import torch
import torch.nn.functional as F
from mmengine.dist import all_gather_object, get_dist_info
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from PIL import Image
from timm.utils.misc import natural_key
from torch import Tensor

from rmoe.backbones.build import add_weights, brings_weights, checked_kwargs, timm_model
from rmoe.data.archives import LAYOUTS, Packed, archives_of, class_names, find_split, index_all
from rmoe.data.arguments import check_arguments
from rmoe.data.files import class_images
from rmoe.data.images import read_image
from rmoe.errors import UserError, nearest
from rmoe.registry import DATASETS, METRICS, MODELS


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """A timm model with its own classifier, and its loss.

    Args:
        model: the timm model's name.
        num_classes: classes of the data set.
        kwargs: further arguments of `timm.create_model`.
        core: checkpoint of the dense core, or of a mixture that `moe` describes: see `rmoe.backbones.build`.
        moe: keys of `rmoe.config.ResidualMoEConfig`; None leaves the model dense.
        label_smoothing: share of the target spread evenly over the classes.
        mixup: arguments of `timm.data.Mixup` (mixup_alpha, cutmix_alpha, …) for training; needs even batches.
        allow_random_core: residuals may stand beside a frozen core that no checkpoint filled: for trials, and where
            weights are loaded later.
    """

    def __init__(
        self,
        model: str,
        num_classes: int,
        kwargs: Mapping[str, Any] | None = None,
        core: str | None = None,
        moe: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        mixup: Mapping[str, Any] | None = None,
        allow_random_core: bool = False,
    ) -> None:
        super().__init__()
        kwargs = checked_kwargs(kwargs)
        self.model = timm_model(model, {**kwargs, "num_classes": num_classes})
        add_weights(self.model, core, moe, allow_random_core=allow_random_core or brings_weights(kwargs))
        self.label_smoothing = label_smoothing
        self.mixup = None
        if mixup is not None:
            self.mixup = timm.data.Mixup(**mixup, label_smoothing=label_smoothing, num_classes=num_classes)

    def init_weights(self) -> None:
        """timm has initialised the model already; mmengine's way would do it again, over the loaded core."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        """One pass in mmengine's protocol.

        Args:
            inputs: images [B, 3, H, W], normalised.
            labels: class indices [B], int64.
            mode: "tensor" → logits [B, classes]; "loss" → {"loss_cls": scalar}; "predict" → for each image a dict with
                "logits" [classes] and, if labels are given, its "label".
        """
        if mode == "loss":
            assert labels is not None
            return {"loss_cls": self._loss(inputs, labels)}
        logits = self.model(inputs)
        if mode == "tensor":
            return logits
        if labels is None:
            return [{"logits": row} for row in logits]
        return [{"logits": row, "label": label} for row, label in zip(logits, labels.tolist(), strict=True)]

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if self.mixup is None:
            return F.cross_entropy(self.model(inputs), labels, label_smoothing=self.label_smoothing)
        inputs, targets = self.mixup(inputs, labels)  # smoothed targets [B, classes]
        return F.cross_entropy(self.model(inputs), targets)


@DATASETS.register_module()
class ImageFolder(torch.utils.data.Dataset):
    """Images of classes, in folders or in archives that stay packed; the class list is that of the split "train".

    A split is ROOT/SPLIT/CLASS/*.jpg, as ImageNet's; ROOT/SPLIT.zip (or .tar, uncompressed) with members CLASS/*.jpg,
    which may lie below a folder SPLIT; or ROOT/SPLIT/CLASS.zip or CLASS.tar, as ImageNet-22k's. Splits may differ.

    Items are {"inputs": float32 [3, H, W], "labels": int}, for a loader with `collate_fn=dict(type="default_collate")`.
    `metainfo["classes"]` are the classes' names, in the order of the class indices; `labels` are those of all items.

    Where processes train together they share the indexing of archives, and all must build the data set.

    Args:
        root: folder with the splits.
        split: "train", "val", …
        num_classes: classes of the model.
        transform: arguments of `timm.data.create_transform`; `is_training` is true for the split "train".

    Raises:
        UserError: a missing split, no image, another number of classes, a class that the split "train" does not have,
            an archive that was cut short or has another one inside, and when an item is read, a file or member that is
            no image or was cut short.
    """

    def __init__(self, root: str, split: str, num_classes: int, transform: Mapping[str, Any]) -> None:
        check_arguments({"root": root, "split": split, "num_classes": num_classes})
        self.transform = _transform(transform, split == "train")
        train, place = find_split(root, "train"), find_split(root, split)
        classes = _classes(train)
        if len(classes) != num_classes:
            raise UserError(f"{train} has {len(classes)} classes; the config says num_classes={num_classes}")
        if unknown := sorted(set(_classes(place)) - set(classes)):
            raise UserError(f"{place} has the class '{unknown[0]}', which {train} has not; the splits share classes")
        archives = archives_of(place)
        self._images = _packed(place, archives, classes) if archives else _Files(place, classes)
        self.labels: Sequence[int] = self._images.labels
        self.metainfo = {"classes": tuple(classes)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._images.image(index).convert("RGB")
        return {"inputs": self.transform(image), "labels": int(self.labels[index])}


class _Files:
    """The images of class folders, as `rmoe.data.archives.Packed` has those of archives."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        numbers = {name: number for number, name in enumerate(classes)}
        found = [(path, numbers[name]) for name in _classes(folder) for path in class_images(folder, name)]
        if not found:
            raise UserError(f"{folder} holds no image; the layout is {LAYOUTS}")
        found.sort(key=lambda one: natural_key(one[0]))
        self._paths, self.labels = [path for path, _ in found], [label for _, label in found]

    def image(self, number: int) -> Image.Image:
        return read_image(self._paths[number])


def _transform(given: Any, is_training: bool) -> Any:
    """timm's transform of these arguments."""
    known = inspect.signature(timm.data.create_transform).parameters.keys() - {"is_training"}
    if not isinstance(given, Mapping):
        raise UserError(f"transform is {given!r:.80}; it is a dict of arguments of timm.data.create_transform")
    if unknown := sorted(map(str, given.keys() - known)):
        raise UserError(f"transform has the unknown argument '{unknown[0]}'{nearest(unknown[0], known)}")
    try:
        return timm.data.create_transform(**given, is_training=is_training)
    except Exception as error:  # timm's own words on whatever a config gives it
        found = f"timm.data.create_transform refuses transform={dict(given)} ({type(error).__name__}: {error})"
        raise UserError(f"{found}; see its documentation") from error


def _classes(place: Path) -> list[str]:
    if not os.path.exists(place):
        raise UserError(f"there is no {place}; the layout is {LAYOUTS}, with a split 'train'")
    return class_names(place)


def _packed(place: Path, archives: Sequence[Path], classes: Sequence[str]) -> Packed:
    """Each process indexes some of the archives; all of them get all indices, or the same error."""
    rank, processes = get_dist_info()
    shares = all_gather_object(index_all(place, archives[rank::processes]))
    members = [shares[i % processes][i // processes] for i in range(len(archives))]
    for one in members:
        if isinstance(one, UserError):
            raise one
    return Packed(archives, members, classes)


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Top-1 and top-5 accuracy in percent, under the names "top1" and "top5".

    An image counts for top-k if fewer than k classes have a logit at least as high as its own class's, that class
    aside: ties are never counted in the model's favour.
    """

    default_prefix = "accuracy"
    ranks = (1, 5)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Takes the predictions of `TimmClassifier`."""
        for sample in data_samples:
            logits, label = sample["logits"], sample["label"]
            self.results.append(int((~(logits < logits[label])).sum()) - 1)  # NaN counts as above

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """results: for each image, the number of wrong classes at least as likely as the right one."""
        above = torch.tensor(results)
        return {f"top{k}": 100 * (above < k).double().mean().item() for k in self.ranks}


def majority_top1(train: ImageFolder, val: ImageFolder) -> float:
    """Top-1 accuracy in percent of answering for every image of `val` the class commonest in `train`."""
    commonest = Counter(train.labels).most_common(1)[0][0]
    return 100 * sum(label == commonest for label in val.labels) / len(val)
