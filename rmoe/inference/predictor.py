"""A loaded model with what belongs to it, and its answers as plain arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import DefaultScope
from PIL import Image
from torch import nn

from rmoe.data.images import of_8_bits, read_image, upright
from rmoe.engine.building import described
from rmoe.errors import UserError
from rmoe.inference.inputs import Inputs, Item
from rmoe.inference.precision import Precision
from rmoe.tasks.classification import TimmClassifier

Picture = str | Path | Image.Image | np.ndarray
"""Is an image: a path, Pillow's, or uint8 [H, W, 3] in red, green, blue, or [H, W] in grey."""
_TASKS = {"mmseg": "segmentation", "mmdet": "detection"}
_WAITING = 4  # batches' worth of images of other shapes that wait for company


@dataclass(frozen=True)
class Segmentation:
    """Holds a class index for each pixel: `labels`, uint8 [H, W], or uint16 for more than 256 classes."""

    labels: np.ndarray


@dataclass(frozen=True)
class Detection:
    """Holds the N objects of an image, the surest first.

    Attributes:
        boxes: float32 [N, 4], left, top, right, bottom in pixels of the image.
        labels: class indices, int64 [N].
        scores: float32 [N], in 0 … 1.
        masks: bool [N, H, W]; None where the model gives boxes alone.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None


@dataclass(frozen=True)
class Classification:
    """Holds the probability of each class: `probabilities`, float32 [classes]."""

    probabilities: np.ndarray

    def top(self, count: int = 5) -> list[tuple[int, float]]:
        """Returns the likeliest classes with their probabilities, the likeliest first."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(int(label), float(self.probabilities[label])) for label in order]


Prediction = Segmentation | Detection | Classification


@dataclass(frozen=True)
class Predictor:
    """Answers images with a loaded model.

    Attributes:
        model: in evaluation mode; what the run's config described, mmseg's, mmdet's or `rmoe.TimmClassifier`.
        inputs: turns an image into the model's input; None where the run had no validation set.
        classes: a name of each class of the model, in the order of their indices; "class 0" and so on where the run did
            not know them.
        palette: a colour of each class, the data set's own if it had one.
        source: the file whose weights these are.
        metadata: of the run's `model.safetensors`.
        dtype: what is computed in.
        precision: what weights were brought to, if they were; see `rmoe.inference.precision`.
    """

    model: nn.Module
    inputs: Inputs | None
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    source: Path
    metadata: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    precision: Precision | None = None

    @property
    def task(self) -> str | None:
        """Returns "segmentation", "detection" or "classification"; None for a model of another kind."""
        if isinstance(self.model, TimmClassifier):
            return "classification"
        packages = [kind.__module__.partition(".")[0] for kind in type(self.model).__mro__]
        return next((_TASKS[name] for name in packages if name in _TASKS), None)

    def predict(
        self, images: Picture | Iterable[Picture], *, batch_size: int = 8, threshold: float = 0.0
    ) -> list[Prediction]:
        """Returns what the model says of each image, in their order.

        Args:
            images: an image or several, of any sizes.
            batch_size: how many images of one shape go through the model together; answers do not depend on it.
            threshold: score from which on an object is among the answers of a detector.

        Raises:
            UserError: an image cannot be read or is of no size that the model takes; the run had no validation set.
        """
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        found: dict[int, Prediction] = {}
        for index, answer in self.answers(images, batch_size, threshold):
            if isinstance(answer, UserError):
                raise answer
            found[index] = answer
        return [found[index] for index in range(len(found))]

    def save_pretrained(self, out: str | Path, *, shard_size: int | str = "5GB", license: str | None = None) -> None:
        """Writes the model into a new folder in Hugging Face's layout, which `rmoe.from_pretrained` loads.

        Args:
            out: the folder, which must be empty or not there.
            shard_size: of the largest file of weights, in bytes or as "500MB"; one larger tensor has a file of its own.
            license: for the model card, by its identifier on the hub, such as "apache-2.0".

        Raises:
            UserError: the folder cannot be written, or the shard size or the licence is none.
        """
        from rmoe.inference.pretrained import save_pretrained

        save_pretrained(self, out, shard_size=shard_size, license=license)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = True,
        message: str | None = None,
        shard_size: int | str = "5GB",
        license: str | None = None,
    ) -> str:
        """Writes what `save_pretrained` writes into a repository of the Hugging Face hub, which it makes.

        Args:
            repo: ORG/NAME.
            private: whether nobody else sees a repository that is made.
            message: of the commit.
            shard_size, license: see `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            UserError: the repository cannot be written; also what `save_pretrained` raises.
        """
        from rmoe.inference.pretrained import push_to_hub

        return push_to_hub(self, repo, private=private, message=message, shard_size=shard_size, license=license)

    def answers(
        self, images: Iterable[Picture], batch_size: int = 8, threshold: float = 0.0
    ) -> Iterator[tuple[int, Prediction | UserError]]:
        """Yields the number of each image and its prediction, or the reason why there is none.

        Images that have one shape as the model gets them are batched, so that none is padded for another's sake; the
        order is theirs by batches.

        Raises:
            UserError: the model has no inputs or is of no known task, or `batch_size` or `threshold` is out of range.
        """
        self._check(batch_size, threshold)
        waiting: dict[tuple[int, ...], list[tuple[int, Item]]] = {}
        for index, image in enumerate(images):
            try:
                item = self.item(image)
            except UserError as error:
                yield index, error
                continue
            group = waiting.setdefault(tuple(item["inputs"].shape), [])
            group.append((index, item))
            if len(group) == batch_size or sum(map(len, waiting.values())) > _WAITING * batch_size:
                largest = max(waiting, key=lambda shape: len(waiting[shape]))
                yield from self._batch(waiting.pop(largest), threshold)
        for rest in waiting.values():
            yield from self._batch(rest, threshold)

    def item(self, image: Picture) -> Item:
        """Returns the model's input for an image.

        Raises:
            UserError: it cannot be read, or the run's transforms do not take it.
        """
        assert self.inputs is not None
        name = str(image) if isinstance(image, str | Path) else "the image"
        picture = opened(image)
        try:
            return self.inputs(picture, name)
        except Exception as error:  # other packages' transforms raise errors of many types at extreme sizes
            raise UserError(
                f"{name}, {picture.width} x {picture.height} pixels, is not taken by the run's transforms "
                f"({described(error)}); if others are, cut or resize it, and if none is, mend the transforms"
            ) from error

    def run(self, batch: Mapping[str, Any]) -> Any:
        """Returns the model's own answer to a batch, in evaluation and without gradients."""
        kind = next(self.model.parameters()).device.type
        autocast: Any = nullcontext() if self.dtype == torch.float32 else torch.autocast(kind, self.dtype)
        scope = DefaultScope.overwrite_default_scope(self.inputs.scope if self.inputs else None)
        with torch.inference_mode(), autocast, scope:
            return self.model.test_step(batch)  # type: ignore[operator]

    def _batch(self, group: list[tuple[int, Item]], threshold: float) -> Iterator[tuple[int, Prediction | UserError]]:
        assert self.inputs is not None
        try:
            found = self.run(self.inputs.collate([item for _, item in group]))
        except UserError as error:  # a size that the model does not take
            yield from ((index, error) for index, _ in group)
            return
        for (index, _), answer in zip(group, found, strict=True):
            yield index, self._plain(answer, threshold)

    def _plain(self, answer: Any, threshold: float) -> Prediction:
        if self.task == "classification":
            return Classification(answer["logits"].float().softmax(0).cpu().numpy())
        if self.task == "segmentation":
            small = len(self.classes) <= 256
            return Segmentation(answer.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8 if small else np.uint16))
        found = answer.pred_instances
        found = found[found.scores >= threshold]
        found = found[found.scores.argsort(descending=True, stable=True)]
        masks = found.get("masks")
        return Detection(
            boxes=found.bboxes.float().cpu().numpy(),
            labels=found.labels.cpu().numpy(),
            scores=found.scores.float().cpu().numpy(),
            masks=None if masks is None else masks.bool().cpu().numpy(),
        )

    def _check(self, batch_size: int, threshold: float) -> None:
        if self.task is None:
            raise UserError(f"{self.source} is a {type(self.model).__name__}; known are mmseg's, mmdet's and ours")
        if self.inputs is None:
            raise UserError(f"{self.source} does not say how images become its inputs: the run had no validation set")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise UserError(f"the batch size is {batch_size!r}; it is a whole number of at least 1")
        if not 0 <= threshold <= 1:
            raise UserError(f"the threshold is {threshold!r}; it is a number from 0 to 1")


def opened(image: Picture) -> Image.Image:
    """Returns an image as viewers show it, turned as its EXIF orientation says.

    Raises:
        UserError: it cannot be read, has more than 8 bits a channel, or is an array of another form.
    """
    if isinstance(image, str | Path):
        return upright(read_image(str(image)))
    if isinstance(image, Image.Image):
        return upright(of_8_bits(image, "given"))
    array = np.asarray(image)
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] != 3)
        or not array.size
    ):
        raise UserError(
            f"an image is {array.dtype} {list(array.shape)}; give uint8 [H, W, 3] in red, green, blue, or [H, W]"
        )
    return Image.fromarray(array)
