"""Images of a data set with what is known of them, and pictures of what a model answers, for logs and reports."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.structures import BaseDataElement
from PIL import Image, ImageDraw

from rmoe.data.images import read_image
from rmoe.data.palette import palette

SURE = 0.3  # score from which on a detection is drawn
_SIDE = 256  # pixels of the longer side of a picture
_OVER = 0.6  # share of a class's colour over the image
_LINE = 12  # pixels of height of a line of text
_LARGE = 5  # likeliest classes of an image


class Picture(NamedTuple):
    """Shows what a model answered for an image.

    Attributes:
        image: uint8 [h, w, 3], the longer side at most 256 pixels.
        truth: likewise, with the true labels; None where the picture cannot show them.
        answer: likewise, with the model's.
        caption: what of the answer is text.
        true_caption: what of the truth is text.
    """

    image: np.ndarray
    truth: np.ndarray | None
    answer: np.ndarray | None
    caption: str
    true_caption: str


class Scene:
    """Holds one image of a data set, and what is known of it.

    Args:
        dataset: of a task: `rmoe.ImageFolder`, or one of mmseg's or mmdet's.
        index: of the image.
    """

    def __init__(self, dataset: Any, index: int) -> None:
        item = dataset[index]
        self.dataset, self.index = dataset, index
        self.batch = default_collate([item]) if "labels" in item else pseudo_collate([item])

    def answer(self, model: Any) -> Any:
        """Returns what `model` says, in evaluation mode and without gradient."""
        with torch.no_grad():
            return model.test_step(self.batch)[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (height, width) in pixels of the image as the backbone gets it, without what a batch pads it by."""
        rows, columns = self.batch["inputs"][0].shape[-2:]
        return rows, columns

    @property
    def name(self) -> str:
        """Returns the name of its file; of a classifier's, its number in the data set."""
        sample: Any = {} if "labels" in self.batch else self.batch["data_samples"][0]
        return os.path.basename(sample.img_path) if "img_path" in sample else f"image {self.index}"

    @property
    def image(self) -> np.ndarray:
        """Returns the image [H, W, 3] as it lies on disk; a classifier's as its transform made it, in 0 … 1."""
        if "labels" in self.batch:
            pixels = self.batch["inputs"][0].movedim(0, -1).numpy()
            return (pixels - pixels.min()) / max(np.ptp(pixels), 1e-6)
        return np.asarray(read_image(self.batch["data_samples"][0].img_path).convert("RGB"))

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Returns a detector's truth from the data set's own list: that in a batch has been resized with the image."""
        return self.dataset.get_data_info(self.index)["instances"]

    @property
    def labels(self) -> np.ndarray:
        """Returns class indices, int [H, W]: the image's class, the label map, or, of boxes, the class of the smallest
        around a pixel and -1 outside of all.
        """
        if "labels" in self.batch:
            return np.full(self.batch["inputs"].shape[-2:], int(self.batch["labels"][0]))
        sample = self.batch["data_samples"][0]
        if "gt_sem_seg" in sample:
            return sample.gt_sem_seg.data[0].numpy()
        labels = np.full(self.image.shape[:2], -1)
        for one in sorted(self.objects, key=lambda one: -_area(one["bbox"])):
            left, top, right, bottom = (max(0, round(side)) for side in one["bbox"])  # it may reach over the edge
            labels[top:bottom, left:right] = one["bbox_label"]
        return labels


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def evenly_spread(dataset: Any, count: int) -> list[Scene]:
    """Returns at most `count` images of a data set, the first and the last among them."""
    return [Scene(dataset, int(i)) for i in np.linspace(0, len(dataset) - 1, min(count, len(dataset)))]


def strip(shown: Picture) -> np.ndarray:
    """Returns image, truth and answer side by side over their captions, uint8 [h, w, 3]."""
    panels = np.concatenate([x for x in (shown.image, shown.truth, shown.answer) if x is not None], 1)
    height, width = panels.shape[:2]
    lines = textwrap.wrap(f"truth: {shown.true_caption}", max(8, width // 6)) if shown.true_caption else []
    lines += textwrap.wrap(f"answer: {shown.caption}", max(8, width // 6))
    canvas = Image.new("RGB", (width, height + _LINE * len(lines) + 4), "white")
    canvas.paste(Image.fromarray(panels))
    for number, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((2, height + 2 + _LINE * number), _ascii(line), fill="black")
    return np.asarray(canvas)


def _ascii(text: str) -> str:
    """Returns the text in the only letters of Pillow's own font."""
    return text.encode("ascii", "replace").decode()


def drawable(answer: Any) -> bool:
    """Says whether `picture` knows what a model has answered: a classifier's, a segmentor's or a detector's."""
    if isinstance(answer, BaseDataElement):
        return "pred_sem_seg" in answer or "pred_instances" in answer
    return isinstance(answer, Mapping) and "logits" in answer


def picture(scene: Scene, answer: Any) -> Picture:
    """Returns the picture of a `drawable` answer for an image."""
    if isinstance(answer, Mapping):
        return _of_class(scene, answer)
    return _of_pixels(scene, answer) if "pred_sem_seg" in answer else _of_objects(scene, answer)


def _of_pixels(scene: Scene, answer: Any) -> Picture:
    image, labels = scene.image, answer.pred_sem_seg.data[0].cpu().numpy()
    colours = colours_of(scene.dataset.metainfo)
    if "gt_sem_seg" not in scene.batch["data_samples"][0]:
        return Picture(_small(image), None, _over(image, colours[labels]), "", "")
    truth = scene.labels
    known = truth < len(scene.dataset.metainfo["classes"])
    said = f"{np.mean((labels == truth)[known]):.0%} of the pixels right" if known.any() else ""
    return Picture(_small(image), _over(image, colours[truth]), _over(image, colours[labels]), said, "")


def _of_objects(scene: Scene, answer: Any) -> Picture:
    found = answer.pred_instances[answer.pred_instances.scores > SURE].cpu().numpy()
    image = scene.image
    truth = [(one["bbox"], one["bbox_label"], None) for one in scene.objects]
    shown = [*zip(found.bboxes, found.labels.tolist(), found.scores.tolist(), strict=True)]
    said = f"{len(shown)} objects with a score above {SURE:g}"
    return Picture(
        _small(image), _boxed(image, truth, scene), _boxed(image, shown, scene), said, f"{len(truth)} objects"
    )


def _of_class(scene: Scene, answer: Any) -> Picture:
    names = (getattr(scene.dataset, "metainfo", None) or {}).get("classes") or ()
    shares = answer["logits"].float().softmax(0)
    best = shares.topk(min(_LARGE, len(shares)))
    said = ", ".join(
        f"{_name(names, i)} {share:.0%}" for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    image = (255 * scene.image).round().astype(np.uint8)
    return Picture(_small(image), None, None, said, _name(names, int(scene.batch["labels"][0])))


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"


def colours_of(metainfo: Mapping[str, Any]) -> np.ndarray:
    """Returns the colour of every label value, uint8 [256 or more, 3]: the data set's palette or colours that tell the
    classes apart, and black for what is no class.
    """
    count, given = len(metainfo["classes"]), metainfo.get("palette")
    colours = given if isinstance(given, Sequence) and len(given) == count else palette(count)
    return np.array([*colours, *[(0, 0, 0)] * (256 - count)], dtype=np.uint8)


def _small(image: np.ndarray) -> np.ndarray:
    scale = _SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _over(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Returns the image under a layer of colours, [H, W, 3] of its own size or of another one."""
    height, width = image.shape[:2]
    layer = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
    return _small(((1 - _OVER) * image + _OVER * np.asarray(layer)).round().astype(np.uint8))


def _boxed(image: np.ndarray, boxes: Sequence[tuple[Any, int, float | None]], scene: Scene) -> np.ndarray:
    """Returns the image with boxes (left, top, right, bottom, in its pixels), their class and, if any, their score."""
    small = _small(image)
    drawn = Image.fromarray(small.copy())
    pen, scale = ImageDraw.Draw(drawn), len(small) / len(image)
    names, colours = scene.dataset.metainfo["classes"], colours_of(scene.dataset.metainfo)
    for box, label, score in boxes:
        left, top, right, bottom = (scale * float(side) for side in box)
        colour = tuple(colours[label].tolist())
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        text = _name(names, label) + (f" {score:.2f}" if score is not None else "")
        text = _ascii(text)
        pen.rectangle(pen.textbbox((left + 1, top), text), fill=colour)
        pen.text((left + 1, top), text, fill="black")
    return np.asarray(drawn)
