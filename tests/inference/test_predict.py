"""Predictions on images from disk: what is written, equal to the training's own, whatever the images are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from pycocotools.coco import COCO

import rmoe
from rmoe.cli import main
from rmoe.errors import UserError
from rmoe.inference.evaluate import inner, run_config
from rmoe.inference.predictor import Classification, Detection, Predictor, Segmentation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def segmentor(runs: Any) -> Predictor:
    return rmoe.load(runs.segmentor, device="cpu")


@pytest.fixture(scope="module")
def detector(runs: Any) -> Predictor:
    return rmoe.load(runs.detector, device="cpu")


@pytest.fixture(scope="module")
def photos(runs: Any) -> list[Path]:
    return sorted((runs.data / "coco/val2017").glob("*.jpg"))


def answers_of_the_data_set(run: Path, predictor: Predictor) -> tuple[list[str], list[Any]]:
    """Returns the validation images, and what the model says of them through the run's own data set."""
    config = run_config(run)
    init_default_scope(config.default_scope)
    dataset = DATASETS.build(inner(config.val_dataloader.dataset))
    paths = [dataset.get_data_info(index)["img_path"] for index in range(len(dataset))]
    with torch.no_grad():
        answers = [predictor.model.test_step(predictor.inputs.collate([dataset[i]]))[0] for i in range(len(dataset))]
    return paths, answers


def test_label_maps_are_those_of_the_training(runs: Any, segmentor: Predictor) -> None:
    paths, expected = answers_of_the_data_set(runs.segmentor, segmentor)
    found = segmentor.predict(paths, batch_size=4)
    assert segmentor.source.name.startswith("best_mIoU")
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Segmentation)
        assert (one.labels.dtype, one.labels.shape) == (np.uint8, (64, 64))
        assert (one.labels == other.pred_sem_seg.data[0].numpy()).mean() > 0.999


def test_objects_are_those_of_the_training(runs: Any, detector: Predictor) -> None:
    paths, expected = answers_of_the_data_set(runs.detector, detector)
    for one, other in zip(detector.predict(paths), expected, strict=True):
        assert isinstance(one, Detection)
        assert len(one.scores) == len(other.pred_instances) > 0
        assert (np.diff(one.scores) <= 0).all()
        order = other.pred_instances.scores.argsort(descending=True, stable=True)
        np.testing.assert_allclose(one.scores, other.pred_instances.scores[order], atol=1e-5)
        np.testing.assert_allclose(one.boxes, other.pred_instances.bboxes[order], atol=1e-3)
        assert one.masks.shape == (len(one.scores), 64, 64)


def test_batches_change_nothing(segmentor: Predictor, photos: list[Path]) -> None:
    images = [np.asarray(Image.open(path)) for path in photos[:5]]
    images.insert(2, images[0][:40, :50])  # of another shape
    alone, together = (segmentor.predict(images, batch_size=size) for size in (1, 4))
    for one, other, image in zip(alone, together, images, strict=True):
        assert one.labels.shape == image.shape[:2]
        assert (one.labels == other.labels).mean() > 0.999
    assert segmentor.predict(images[0])[0].labels.shape == (64, 64)


def test_images_of_all_kinds(segmentor: Predictor, detector: Predictor, photos: list[Path], tmp_path: Path) -> None:
    with Image.open(photos[0]) as image:
        rgb = image.convert("RGB")
    turned = rgb.crop((0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    kinds: list[Any] = [
        *(rgb.convert(mode) for mode in ("L", "1", "P", "RGBA", "LA", "CMYK")),
        *(Image.new("RGB", size) for size in ((1, 1), (1, 90), (90, 1), (33, 7))),
        np.zeros((5, 6), np.uint8),
        tmp_path / "turned.jpg",
    ]
    sizes = [(one.shape[1], one.shape[0]) if isinstance(one, np.ndarray) else one.size for one in kinds[:-1]]
    for size, one in zip([*sizes, (32, 64)], segmentor.predict(kinds), strict=True):
        assert one.labels.shape == size[::-1]
    assert len(detector.predict(kinds)) == len(kinds)
    (upright,), (as_stored,) = segmentor.predict(tmp_path / "turned.jpg"), segmentor.predict(turned)
    assert upright.labels.shape == as_stored.labels.shape[::-1]


def test_pictures_label_maps_and_one_json(segmentor: Predictor, runs: Any, tmp_path: Path, capsys: Any) -> None:
    out, photos = tmp_path / "out", runs.data / "ade20k/images"
    words = ["predict", str(runs.segmentor), str(photos / "validation"), str(photos / "training/*"), "--out", str(out)]
    assert main(words) == 0
    assert "10 images predicted" in capsys.readouterr().out
    content = json.loads((out / "predictions.json").read_text())
    assert content["complete"]
    assert content["weights"] == str(segmentor.source)
    assert [one["name"] for one in content["categories"]] == list(segmentor.classes)
    assert len(content["files"]) == 30
    assert sorted(content["files"]) == sorted(
        path.relative_to(out).as_posix() for path in out.rglob("*.png") if path.is_file()
    )
    for one in content["images"]:
        with Image.open(out / one["files"]["labels"]) as labels, Image.open(out / one["files"]["colours"]) as colours:
            indices, rgb = np.asarray(labels), np.asarray(colours)
        assert indices.shape == (one["height"], one["width"])
        assert (np.array(segmentor.palette, np.uint8)[indices] == rgb).all()
        assert sum(one["classes"].values()) == pytest.approx(1, abs=1e-4)
        assert (indices == segmentor.predict(one["file_name"])[0].labels).mean() > 0.999
    # names that are in both folders; and a second call replaces the first one's files, but nobody else's
    (out / "notes.txt").write_text("mine")
    assert main([*words[:3], "--out", str(out)]) == 0
    assert len(list(out.rglob("*.png"))) == 18
    assert (out / "notes.txt").read_text() == "mine"


def test_objects_are_cocos_results(detector: Predictor, runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["predict", str(runs.detector), str(runs.data / "coco/val2017"), "--out", str(out), "--threshold", "0.1"]
    assert main([*words, "--batch-size", "3"]) == 0
    content = json.loads((out / "predictions.json").read_text())
    truth = COCO()
    truth.dataset = {"images": content["images"], "categories": content["categories"], "annotations": []}
    truth.createIndex()
    found = truth.loadRes(content["annotations"])
    assert len(found.anns) == len(content["annotations"]) > 0
    assert min(one["score"] for one in content["annotations"]) >= content["threshold"] == 0.1
    first = content["images"][0]
    (expected,) = detector.predict(first["file_name"], threshold=0.1)
    mine = [one for one in content["annotations"] if one["image_id"] == first["id"]]
    assert [one["category_id"] for one in mine] == (expected.labels + 1).tolist()
    x, y, width, height = mine[0]["bbox"]
    np.testing.assert_allclose([x, y, x + width, y + height], expected.boxes[0], atol=1e-4)
    assert (found.annToMask(found.anns[1]) == expected.masks[0]).all()


def test_a_classifier_says_its_five_likeliest(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["predict", str(runs.classifier), str(runs.data / "upstream/val"), "--out", str(out)]) == 0
    content = json.loads((out / "predictions.json").read_text())
    assert len(content["images"]) == 12
    top = content["images"][0]["top"]
    assert len(top) == 4  # of four classes
    assert sum(one["probability"] for one in top) == pytest.approx(1, abs=1e-4)
    (answer,) = rmoe.load(runs.classifier).predict(content["images"][0]["file_name"])
    assert isinstance(answer, Classification)
    assert answer.top(1)[0][1] == pytest.approx(top[0]["probability"], abs=1e-5)


def test_bad_images_among_good_ones(runs: Any, photos: list[Path], tmp_path: Path, capsys: Any) -> None:
    bad = tmp_path / "photos"
    bad.mkdir()
    (bad / "text.jpg").write_text("no image")
    (bad / "cut.jpg").write_bytes(photos[0].read_bytes()[:300])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(bad / "deep.png")
    (bad / "good.jpg").write_bytes(photos[0].read_bytes())
    out = tmp_path / "out"
    assert main(["predict", str(runs.segmentor), str(bad), str(bad / "gone.jpg"), "--out", str(out)]) == 1
    said = capsys.readouterr()
    for name in ("text.jpg", "cut.jpg", "deep.png", "gone.jpg"):
        assert name in said.err
    assert "1 images predicted, 4 not" in said.out
    content = json.loads((out / "predictions.json").read_text())
    assert [Path(one["file_name"]).name for one in content["images"]] == ["good.jpg"]
    assert len(content["failed"]) == 4


def test_what_is_refused_before_anything_is_written(runs: Any, photos: list[Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "predictions.json").write_text("{}")
    run, photo, out = str(runs.segmentor), str(photos[0]), str(tmp_path / "out")
    for words, message in (
        ([run, str(tmp_path / "empty"), "--out", out], "empty has no image"),
        ([run, str(tmp_path / "*.jpg"), "--out", out], "no image matches"),
        ([run, photo, "--out", str(tmp_path / "mine")], "holds files that are no predictions of ours"),
        ([run, photo, "--out", photo], "cannot be written"),
        ([run, photo, "--out", out, "--batch-size", "0"], "at least 1"),
        ([run, photo, "--out", out, "--threshold", "nan"], "from 0 to 1"),
        ([run, photo, "--out", out, "--opacity", "2"], "from 0 to 1"),
        ([run, photo, "--out", out, "--device", "gpu"], "cannot be used"),
        ([run, photo, "--out", out, "--import", "gone_module"], "--import gone_module"),
        ([str(tmp_path), photo, "--out", out], "is no run"),
    ):
        assert main(["predict", *words]) == 2, words
        said = capsys.readouterr().err.strip()
        assert message in said, said
        assert "\n" not in said
    assert not Path(out).exists()


def test_arrays_of_another_form(segmentor: Predictor) -> None:
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.uint8(3)):
        with pytest.raises(UserError, match=r"give uint8 \[H, W, 3\]"):
            segmentor.predict([wrong])  # type: ignore[list-item]
    assert segmentor.predict([]) == []


def test_segmentation_needs_neither_deepspeed_nor_mmdet_nor_the_data(runs: Any, tmp_path: Path) -> None:
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((runs.segmentor / "model.safetensors").read_bytes())
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("deepspeed", "mmdet")))
import numpy as np, rmoe
run = rmoe.load({str(alone)!r})
assert run.predict(np.zeros((9, 7, 3), np.uint8))[0].labels.shape == (9, 7)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
