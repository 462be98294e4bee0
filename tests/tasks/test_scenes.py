"""Pictures of answers, pixel by pixel, on images made here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from PIL import Image

from rmoe.tasks.scenes import Scene, colours_of, drawable, evenly_spread, picture, strip

PALETTE = [[250, 0, 0], [0, 250, 0]]


class Pixels:
    """Two grey images with labels: the left half is of class 0, the right one of class 1, the last row void."""

    metainfo: ClassVar = {"classes": ("sky", "grass"), "palette": PALETTE}

    def __init__(self, folder: Any, height: int = 20, width: int = 40) -> None:
        self.paths = [str(folder / f"{number}.png") for number in range(2)]
        self.labels = np.zeros((height, width), dtype=np.int64)
        self.labels[:, width // 2 :] = 1
        self.labels[-1] = 255
        for path in self.paths:
            Image.new("RGB", (width, height), (100, 100, 100)).save(path)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = BaseDataElement(metainfo={"img_path": self.paths[index]})
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(self.labels)[None])
        return {"inputs": torch.zeros(3, 4, 4), "data_samples": sample}

    def get_data_info(self, index: int) -> dict[str, Any]:
        return {"instances": [{"bbox": [4.0, 4.0, 16.0, 16.0], "bbox_label": 1}]}


def segmented(labels: np.ndarray) -> BaseDataElement:
    return BaseDataElement(pred_sem_seg=PixelData(data=torch.from_numpy(labels)[None]))


def test_labels_lie_over_the_image_in_the_colours_of_the_classes(tmp_path):
    data = Pixels(tmp_path)
    answer = data.labels.copy()
    answer[:, :10] = 1  # a quarter is wrong
    shown = picture(Scene(data, 0), segmented(answer))
    assert shown.image.shape == (20, 40, 3)
    # 0.4 of the grey, 0.6 of the colour
    assert shown.truth[0, 0].tolist() == [190, 40, 40]
    assert shown.answer[0, 0].tolist() == [40, 190, 40]
    assert shown.truth[-1, 0].tolist() == [40, 40, 40]
    assert shown.caption == "75% of the pixels right"


def test_large_images_become_small_and_keep_their_shape(tmp_path):
    data = Pixels(tmp_path, 500, 1000)
    shown = picture(Scene(data, 1), segmented(data.labels))
    assert shown.image.shape == shown.truth.shape == shown.answer.shape == (128, 256, 3)
    assert picture(Scene(Pixels(tmp_path, 1, 3000), 1), segmented(np.zeros((1, 3000), int))).image.shape == (1, 256, 3)


def test_objects_have_boxes_in_the_colours_of_their_classes(tmp_path):
    found = InstanceData(
        bboxes=torch.tensor([[20.0, 2.0, 36.0, 18.0], [0.0, 0.0, 40.0, 20.0]]),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.2]),
    )
    shown = picture(Scene(Pixels(tmp_path), 0), BaseDataElement(pred_instances=found))
    assert shown.caption == "1 objects with a score above 0.3"
    assert shown.true_caption == "1 objects"
    assert shown.answer[18, 30].tolist() == PALETTE[0]
    assert shown.truth[16, 10].tolist() == PALETTE[1]
    assert shown.answer[10, 1].tolist() == [100, 100, 100]  # the doubtful one is left out


class Classified:
    metainfo: ClassVar = {"classes": ("cat", "dög", "cow")}

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8), "labels": 2}


def test_a_box_that_reaches_over_the_edge_covers_what_is_inside(tmp_path):
    data = Pixels(tmp_path)
    data.__dict__["get_data_info"] = lambda index: {"instances": [{"bbox": [-0.8, -0.6, 4.0, 3.0], "bbox_label": 1}]}
    scene = Scene(data, 0)
    del scene.batch["data_samples"][0].gt_sem_seg
    assert scene.labels.tolist() == [[1] * 4 + [-1] * 36] * 3 + [[-1] * 40] * 17


def test_an_image_is_shown_as_its_labels_refer_to_it(tmp_path):
    data = Pixels(tmp_path)
    data.paths = [str(tmp_path / "turned.tif")]
    Image.new("RGB", (40, 20), (9, 9, 9)).save(data.paths[0], tiffinfo={0x0112: 6})  # Pillow turns a TIFF alone
    assert Scene(data, 0).image.shape == (20, 40, 3)


def test_the_likeliest_classes_of_an_image_are_text():
    shown = picture(Scene(Classified(), 3), {"logits": torch.tensor([0.0, 3.0, 1.0])})
    assert shown.caption == "dög 84%, cow 11%, cat 4%"
    assert shown.true_caption == "cow"
    assert (shown.truth, shown.answer) == (None, None)
    assert (shown.image.min(), shown.image.max()) == (0, 255)
    assert strip(shown).shape[0] > 8 + 2 * 12  # with lines of text


def test_a_strip_has_all_side_by_side(tmp_path):
    data = Pixels(tmp_path)
    shown = picture(Scene(data, 0), segmented(data.labels))
    whole = strip(shown)
    assert whole.shape[1] == 3 * 40
    assert np.array_equal(whole[:20, 40:80], shown.truth)
    assert whole.dtype == np.uint8


@pytest.mark.parametrize("answer", [torch.zeros(3), None, {"x": 1}, BaseDataElement(), 3, SimpleNamespace()])
def test_other_answers_are_not_drawn(answer):
    assert not drawable(answer)


def test_images_are_evenly_spread():
    assert [scene.index for scene in evenly_spread(Classified(), 4)] == [0, 9, 19, 29]
    assert len(evenly_spread(Classified(), 100)) == 30
    assert evenly_spread(Classified(), 3)[1].name == "image 14"


def test_colours_without_a_palette_are_apart():
    colours = colours_of({"classes": [str(n) for n in range(11)]})
    assert colours.shape == (256, 3)
    assert len({tuple(one) for one in colours[:11].tolist()}) == 11
    assert not colours[11:].any()
    wrong = colours_of({"classes": ["a"], "palette": PALETTE})
    assert wrong.shape == (256, 3)
    assert colours_of({"classes": [str(n) for n in range(1203)]}).shape == (1203, 3)
