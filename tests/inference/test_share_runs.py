"""Runs that were trained are shared and come back with the same answers, of each task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard

import rmoe
from rmoe.inference.adapters import attach, export_adapter
from rmoe.inference.pretrained import save_timm

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.mark.slow
def test_a_segmentor_is_its_core_and_its_adapter(runs: Any, tmp_path: Path) -> None:
    """Whose weights are an average, the best one: frozen cores are the core's bits all the same."""
    found = export_adapter(runs.segmentor, tmp_path / "adapter")
    assert 0 < found.bytes < found.of_bytes
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.pipeline_tag == "image-segmentation"
    expected = rmoe.load(runs.segmentor).predict(IMAGE)[0].labels
    whole = rmoe.load(attach(runs.classifier, found.path, tmp_path / "whole"))
    attached = rmoe.Core(runs.classifier, device="cpu").attach(found.path)
    for one in (whole, attached):
        assert np.array_equal(one.predict(IMAGE)[0].labels, expected)


@pytest.mark.slow
def test_segmentors_and_detectors_come_back(runs: Any, tmp_path: Path) -> None:
    for name in ("segmentor", "detector"):
        run = rmoe.load(getattr(runs, name))
        run.save_pretrained(tmp_path / name, shard_size="200KB")
        again = rmoe.from_pretrained(tmp_path / name)
        assert (again.classes, again.palette, again.task) == (run.classes, run.palette, run.task)
        (ours,), (theirs,) = run.predict(IMAGE), again.predict(IMAGE)
        for key, value in vars(ours).items():
            assert np.array_equal(value, getattr(theirs, key)), (name, key)
        processor = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        given = run.metadata["model"]["data_preprocessor"]
        np.testing.assert_allclose(np.array(processor["image_mean"]) * 255, given["mean"], rtol=1e-6)
        np.testing.assert_allclose(np.array(processor["image_std"]) * 255, given["std"], rtol=1e-6)


@pytest.mark.slow
def test_the_card_of_a_trained_run(runs: Any, tmp_path: Path) -> None:
    rmoe.load(runs.segmentor).save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    logged = [line["mIoU"] for line in runs.logged(runs.segmentor)]
    (result,) = card.data.eval_results
    assert result.metric_value == round(max(logged), 2)  # the best weights', which are written
    for line in ("| steps | 16 |", "| train", "## Cost", "| residual | ", "| data set | SegDataset |"):
        assert line in card.text, line
    assert str(runs.folder) not in card.content


@pytest.mark.slow
def test_timm_loads_a_trained_core(runs: Any, tmp_path: Path) -> None:
    run = rmoe.load(runs.classifier)
    save_timm(run, tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    item = run.item(IMAGE)["inputs"][None]
    with torch.no_grad():
        assert torch.equal(theirs(item), run.model.model(item))
    assert ModelCard.load(tmp_path / "timm" / "README.md").data.library_name == "timm"
