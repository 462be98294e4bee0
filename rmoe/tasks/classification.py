"""Adds upstream classification with timm's models and transforms to mmengine's runner."""

from __future__ import annotations

import inspect
import math
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
from rmoe.backbones.networks import one_line
from rmoe.data.archives import LAYOUTS, Packed, archives_of, class_names, find_split, index_all
from rmoe.data.arguments import check_arguments
from rmoe.data.files import class_images
from rmoe.data.images import read_image
from rmoe.errors import UserError, nearest
from rmoe.registry import DATASETS, METRICS, MODELS


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """Holds a timm model with its own classifier, and computes its loss.

    Args:
        model: the timm model's name.
        num_classes: number of the data set's classes.
        kwargs: further arguments of `timm.create_model`.
        core: checkpoint of the dense core, or of a mixture that `moe` describes; see `rmoe.backbones.build`.
        moe: keys of `rmoe.config.ResidualMoEConfig`; None leaves the model dense.
        label_smoothing: share of the target spread evenly over the classes.
        mixup: arguments of `timm.data.Mixup` (mixup_alpha, cutmix_alpha, …) for training; batches must be even.
        allow_random_core: accept residuals around random weights: in trials, where weights are loaded later, and to
            train from scratch.
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
        """Does nothing: timm has initialised the model, and mmengine would do it again and overwrite the core."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        """Runs the model in one of mmengine's modes.

        Args:
            inputs: images [B, 3, H, W], normalised.
            labels: class indices [B], int64.
            mode: "tensor" returns logits [B, classes]; "loss" returns {"loss_cls": scalar}; "predict" returns for each
                image a dict with "logits" [classes] and, if labels are given, its "label".
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
    """Reads images of classes from folders or archives, which stay packed; its classes are those of the split "train".

    A split is ROOT/SPLIT/CLASS/*.jpg, as in ImageNet; or ROOT/SPLIT.zip (or .tar, not compressed) with CLASS/*.jpg or
    SPLIT/CLASS/*.jpg inside; or ROOT/SPLIT/CLASS.zip or CLASS.tar, as in ImageNet-22k. Splits may have different forms.

    Items are {"inputs": float32 [3, H, W], "labels": int}, for a loader with `collate_fn=dict(type="default_collate")`.
    `metainfo["classes"]` holds the names of the classes in the order of their indices, `labels` the label of each item.

    Processes that train together share the work of indexing archives, and all of them must build the data set.

    Args:
        root: folder with the splits.
        split: "train", "val", …
        num_classes: number of the model's classes.
        transform: arguments of `timm.data.create_transform`; `is_training` is true for the split "train".

    Raises:
        UserError: a split is missing, has no image, another number of classes, or a class that "train" does not have;
            an archive was cut short or has another one inside. When an item is read: its file is no whole image.
    """

    def __init__(self, root: str, split: str, num_classes: int, transform: Mapping[str, Any]) -> None:
        check_arguments({"root": root, "split": split, "num_classes": num_classes})
        self.transform = _transform(transform, split == "train")
        train, place = find_split(root, "train"), find_split(root, split)
        classes = _classes(train)
        if len(classes) != num_classes:
            raise UserError(
                f"{train} has {len(classes)} classes; the config says num_classes={num_classes}: make them equal"
            )
        if unknown := sorted(set(_classes(place)) - set(classes)):
            raise UserError(
                f"{place} has the class '{unknown[0]}', which {train} has not; both must have the same classes"
            )
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
    """Reads the images of class folders, with the interface of `rmoe.data.archives.Packed`."""

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
    """Returns timm's transform, or raises UserError for arguments that timm does not take."""
    known = inspect.signature(timm.data.create_transform).parameters.keys() - {"is_training"}
    if not isinstance(given, Mapping):
        raise UserError(f"transform is {given!r:.80}; it is a dict of arguments of timm.data.create_transform")
    if unknown := sorted(map(str, given.keys() - known)):
        raise UserError(f"transform has the unknown argument '{unknown[0]}'{nearest(unknown[0], known)}")
    try:
        return timm.data.create_transform(**given, is_training=is_training)
    except Exception as error:  # timm raises errors of many types at wrong values
        found = f"timm.data.create_transform refuses transform={dict(given)} ({one_line(error)})"
        raise UserError(f"{found}; see its documentation") from error


def _classes(place: Path) -> list[str]:
    if not os.path.exists(place):
        raise UserError(f"there is no {place}; the layout is {LAYOUTS}, with a split 'train'")
    return class_names(place)


def _packed(place: Path, archives: Sequence[Path], classes: Sequence[str]) -> Packed:
    """Indexes some of the archives in each process; all processes get the whole index, or the same error."""
    rank, processes = get_dist_info()
    shares = all_gather_object(index_all(place, archives[rank::processes]))
    members = [shares[i % processes][i // processes] for i in range(len(archives))]
    for one in members:
        if isinstance(one, UserError):
            raise one
    return Packed(archives, members, classes)


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Computes top-1 and top-5 accuracy in percent, under the names "top1" and "top5".

    An image counts for top-k if fewer than k other classes have a logit at least as high as its own class. So ties
    never count in the model's favour.
    """

    default_prefix = "accuracy"
    ranks = (1, 5)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Collects the predictions of `TimmClassifier`."""
        for sample in data_samples:
            logits, label = sample["logits"], sample["label"]
            self.results.append((int((~(logits < logits[label])).sum()) - 1, int(label)))  # NaN counts as above

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """Returns the accuracies, from each image's number of wrong classes at least as likely as its right one, and
        that one.
        """
        above = torch.tensor([number for number, _ in results])
        return {f"top{k}": 100 * (above < k).double().mean().item() for k in self.ranks}

    def class_values(self, results: Sequence[tuple[int, int]]) -> dict[str, dict[str, float]]:
        """Returns the accuracies over the images of each class, in percent; NaN for a class without any."""
        names = (self.dataset_meta or {})["classes"]
        of_class: list[list[int]] = [[] for _ in names]
        for above, label in results:
            of_class[label].append(above)
        return {
            name: {f"top{k}": 100 * sum(x < k for x in found) / len(found) if found else math.nan for k in self.ranks}
            for name, found in zip(names, of_class, strict=True)
        }


def majority_top1(train: ImageFolder, val: ImageFolder) -> float:
    """Returns top-1 accuracy in percent of answering the commonest class of `train` for every image of `val`."""
    commonest = Counter(train.labels).most_common(1)[0][0]
    return 100 * sum(label == commonest for label in val.labels) / len(val)
