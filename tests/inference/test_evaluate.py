"""A finished run is evaluated again: with the figures that its training has logged, and on other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rmoe.cli import main
from rmoe.deploy.merge import MERGED, merge
from rmoe.errors import UserError
from rmoe.inference.evaluate import evaluate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_figures_are_those_that_training_logged(runs: Any) -> None:
    for run in (runs.classifier, runs.detector):
        logged, found = runs.logged(run)[-1], evaluate(run, device="cpu")
        assert len(found.metrics) > 1
        for name, value in found.metrics.items():
            if not name.endswith("_precision") or name in logged:
                assert value == pytest.approx(logged[name], nan_ok=True), name


def test_best_and_last_weights_have_their_own_figures(runs: Any) -> None:
    logged = runs.logged(runs.segmentor)
    best, last = max(logged, key=lambda line: line["mIoU"]), logged[-1]
    assert best["mIoU"] > last["mIoU"] > 0
    found, at_the_end = evaluate(runs.segmentor), evaluate(runs.segmentor / "model.safetensors")
    for name in ("mIoU", "aAcc", "mAcc"):
        assert found.metrics[name] == pytest.approx(best[name], abs=1e-5)  # logs have float32
        assert at_the_end.metrics[name] == pytest.approx(last[name], abs=1e-5)
    known = [values["IoU"] for values in found.classes.values() if values["IoU"] == values["IoU"]]
    assert sum(known) / len(known) == pytest.approx(best["mIoU"], abs=0.01)


def test_a_merged_run_has_the_figures_of_both(runs: Any, tmp_path: Path) -> None:
    found = merge(runs.segmentor, tmp_path / "dense", average=True)
    assert (found.exact, found.not_measured) == (False, None)
    assert found.metrics_of_mixture == pytest.approx(evaluate(runs.segmentor).metrics)
    assert found.metrics == pytest.approx(evaluate(tmp_path / "dense").metrics)
    assert json.loads((tmp_path / "dense" / MERGED).read_text())["metrics"] == found.metrics


def test_another_split_and_another_folder(runs: Any, tmp_path: Path, capsys: Any) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(runs.data, moved)
    for run, layout, count in (
        (runs.segmentor, "ade20k", 4),
        (runs.detector, "coco", 4),
        (runs.classifier, "upstream", 16),
    ):
        here = evaluate(run, split="train")
        assert (here.images, here.split) == (count, "train")
        there = evaluate(run, split="train", data_root=moved / layout)
        assert there.data == str(moved / layout)
        assert there.metrics == pytest.approx(here.metrics, nan_ok=True)
    words = ["test", str(runs.segmentor), "--data-root", str(moved / "ade20k"), "--json", str(tmp_path / "x.json")]
    assert main(words) == 0
    content = json.loads((tmp_path / "x.json").read_text())
    shown = capsys.readouterr().out
    assert f"mIoU: {content['metrics']['mIoU']:g}" in shown
    assert all(name in shown for name in content["classes"])
    assert content["images"] == 6
    assert main([*words[:4], "--cfg-options", "val_dataloader.dataset.data_prefix.img_path=gone"]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_flips_and_scales(runs: Any) -> None:
    plain = evaluate(runs.segmentor)
    same, flipped = (evaluate(runs.segmentor, scales=[1.0], flip=flip) for flip in (False, True))
    assert same.metrics == pytest.approx(plain.metrics, abs=0.02)  # one version alone merges into itself
    several = evaluate(runs.segmentor, scales=[0.5, 1.0], flip=True)
    assert flipped.metrics != plain.metrics
    assert several.metrics != flipped.metrics
    boxes = evaluate(runs.detector, scales=[1.0, 2.0], flip=True)
    assert "coco/bbox_mAP" in boxes.metrics
    assert not any("segm" in name for name in boxes.metrics)
    with pytest.raises(UserError, match="flips and scales are for segmentation and detection"):
        evaluate(runs.classifier, flip=True)


def test_other_classes_and_wrong_words(runs: Any, tmp_path: Path) -> None:
    moved = tmp_path / "ade20k"
    shutil.copytree(runs.data / "ade20k", moved)
    content = json.loads((moved / "classes.json").read_text())
    content["classes"][2] = "lava"
    (moved / "classes.json").write_text(json.dumps(content))
    for words, message in (
        ({"data_root": moved}, "class 2 is 'lava' in the data set and '.*' in the run"),
        ({"data_root": tmp_path / "gone"}, "gone"),
        ({"split": "test"}, "has no test_dataloader; take another"),
        ({"scales": [0]}, "out of range"),
        ({"scales": [float("nan")]}, "out of range"),
        ({"batch_size": 0}, "at least 1"),
        ({"options": {"val_dataloadr.batch_size": 1}}, "did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(runs.segmentor, **words)
