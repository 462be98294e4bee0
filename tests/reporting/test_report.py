"""The table, summary.json and the pictures, from work dirs as finished runs leave them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import finished_run
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from safetensors.torch import save_file

from rmoe.cli import main
from rmoe.errors import UserError
from rmoe.inference.runs import Run
from rmoe.moe.state import global_state_dict
from rmoe.reporting.comparison import compare
from rmoe.reporting.page import render
from rmoe.reporting.report import _earlier, report

COST = {
    "train_seconds": 12.5,
    "device_seconds": 25.0,
    "flops_per_step": 3_000_000_000,
    "params_total": 300,
    "params_active": 200,
    "params_trainable": 100,
    "steps": 7,
}
BACKBONE = {
    "type": "rmoe.TimmPyramid",
    "model": "swin_tiny_patch4_window7_224",
    "kwargs": {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4},
    "core": "work_dirs/gone",
}
HEAD = {
    "type": "UPerHead",
    "in_channels": [8, 16, 32, 64],
    "in_index": [0, 1, 2, 3],
    "channels": 8,
    "num_classes": 2,
    "norm_cfg": {"type": "GN", "num_groups": 2},
    "align_corners": False,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three scenes for each split: sky above, grass below; in training grass is the commoner."""
    for split, horizon in {"training": 12, "validation": 16}.items():
        for folder in ("images", "annotations"):
            (tmp_path / folder / split).mkdir(parents=True)
        labels = np.ones((32, 32), dtype=np.uint8)
        labels[horizon:] = 2
        for index in range(3):
            Image.fromarray(np.stack([labels * 60] * 3, -1)).save(tmp_path / f"images/{split}/{index}.jpg")
            Image.fromarray(labels).save(tmp_path / f"annotations/{split}/{index}.png")
    return tmp_path


def split(root: Path, name: str) -> dict[str, Any]:
    return {
        "type": "rmoe.SegDataset",
        "classes": ["sky", "grass"],
        "num_classes": 2,
        "data_root": str(root),
        "data_prefix": {"img_path": f"images/{name}", "seg_map_path": f"annotations/{name}"},
        "reduce_zero_label": True,
        "pipeline": [
            {"type": "rmoe.LoadImage"},
            {"type": "rmoe.LoadLabels", "num_classes": 2},
            {"type": "PackSegInputs"},
        ],
    }


def run_dir(folder: Path, data: Path, stage: str, moe: dict[str, Any] | None) -> Path:
    model = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor"},
        "backbone": {**BACKBONE, "moe": moe},
        "decode_head": HEAD,
        "test_cfg": {"mode": "whole"},
    }
    config = Config(
        {
            "stage": stage,
            "default_scope": "mmseg",
            "custom_imports": {"imports": ["rmoe.tasks.segmentation"]},
            "model": model,
            # as the engine dumps it: the training set wrapped
            "train_dataloader": {"dataset": {"type": "rmoe.SeededDataset", "dataset": split(data, "training")}},
            "val_dataloader": {"dataset": split(data, "validation")},
            "val_evaluator": {"type": "IoUMetric"},
        }
    )
    logs = folder / "20260101_000000" / "vis_data"
    logs.mkdir(parents=True)
    config.dump(folder / "config.py")
    lines = [{"loss": 2.0, "step": 5}, {"mIoU": 11.0, "step": 5}, {"mIoU": 42.25, "aAcc": 80.0, "step": 7}]
    (logs / "scalars.json").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (folder / "cost.json").write_text(json.dumps(COST))
    init_default_scope("mmseg")
    alone = {**BACKBONE, "core": None, "allow_random_core": True, "moe": moe and {**moe, "ep_size": 1}}
    built = MODELS.build(Config({"model": {**model, "backbone": alone}}).model)
    save_file(global_state_dict(built), folder / "model.safetensors")
    return folder


@pytest.fixture
def runs(tmp_path: Path, data: Path) -> list[Path]:
    residual = run_dir(tmp_path / "residual", data, "residual", {"num_experts": 4, "ep_size": 2})
    return [run_dir(tmp_path / "dense", data, "dense", None), residual]


def test_what_a_report_leaves(runs, tmp_path, capsys):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = report(runs, tmp_path / "out")
    assert [one.filename for one in warned if "/mmseg/" in one.filename or "/mmdet/" in one.filename] == []
    (content,) = json.loads((tmp_path / "out" / "summary.json").read_text())["groups"]
    assert [one["arm"] for one in content["runs"]] == ["dense", "residual"]
    # grass everywhere: right on 16 of 32 rows
    expected = {"task": "segmentation", "metrics": {"mIoU": 42.25}, "majority": {"mIoU": 25.0}}
    assert {key: content["runs"][0][key] for key in expected} == expected
    assert found.entries[0].cost["params_trainable"] == 100
    shown = capsys.readouterr().out
    assert shown.startswith("segmentation on ")
    assert "42.25" in shown
    assert "25.00" in shown
    assert "residual" in shown
    for name, columns in {"predictions.png": 4, "experts_residual.png": 3}.items():
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width > 200 * columns
            assert image.height > 3 * 200
            assert len(set(image.convert("RGB").get_flattened_data())) > 20


def test_a_page_or_a_table_needs_neither_data_nor_weights(runs, tmp_path, data):
    for gone in (*data.glob("images"), *data.glob("annotations")):
        gone.rename(tmp_path / f"{gone.name} elsewhere")
    for run in runs:
        (run / "model.safetensors").unlink()
    report(runs, html=tmp_path / "report.html")
    assert "dense" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError):
        report(runs, out=tmp_path / "out")


def test_what_an_analysis_leaves(runs, tmp_path, capsys):
    out = tmp_path / "inside"
    assert main(["analyze", str(runs[1]), "--before", str(runs[1]), "--out", str(out), "--images", "2"]) == 0
    found = json.loads((out / "analysis.json").read_text())
    assert found["images"] == 2
    assert list(found["layers"]) == ["layers.2.blocks.1.mlp", "layers.3.blocks.1.mlp"]
    for layer in found["layers"].values():
        assert layer["weights"]["residual_norm"] == [0.0] * 4
        assert sum(layer["load"]["load"]) == pytest.approx(1)
        assert layer["movement"]["core"] == 0
    of_classes = [layer["load"]["by_class"] for layer in found["layers"].values()]
    assert [set(classes) for classes in of_classes] == [
        {"sky", "grass"},
        {"grass"},
    ]  # one token has grass in its middle
    assert "layers.2.blocks.1" in capsys.readouterr().out
    for name in ("weights.png", "load.png", "experts.png", "movement.png"):
        with Image.open(out / name) as image:
            assert len(set(image.convert("RGB").get_flattened_data())) > 20
    assert main(["analyze", str(runs[0]), "--out", str(out)]) == 2
    assert "the model is dense" in capsys.readouterr().err


def test_of_several_evaluators_the_first_known_one_says_the_task(tmp_path):
    others = [{"type": "DumpResults"}, {"type": "IoUMetric"}]
    Config({"stage": "residual", "val_evaluator": others}).dump(tmp_path / "config.py")
    assert Run(tmp_path).task.name == "segmentation"
    Config({"stage": "residual", "val_evaluator": others[:1]}).dump(tmp_path / "config.py")
    with pytest.raises(UserError, match="was evaluated by DumpResults; a report knows IoUMetric"):
        Run(tmp_path)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*gone; give the work dir of one finished run"):
        Run(tmp_path / "gone")


def test_the_loss_at_the_end_is_the_tasks_own(tmp_path):
    Config({"stage": "residual", "val_evaluator": {"type": "IoUMetric"}}).dump(tmp_path / "config.py")
    gates = {"loss_moe_aux": 0.25}
    logs = {  # the second run resumed from step 10
        "first": [{"loss": 9.0, "step": 10}, {"loss": 7.0, "step": 20, **gates}],
        "second": [{"loss": 3.0, "step": 19, **gates}, {"loss": 2.0, "step": 20, **gates}, {"mIoU": 1.0, "step": 20}],
    }
    for name, lines in logs.items():
        (tmp_path / name / "vis_data").mkdir(parents=True)
        (tmp_path / name / "vis_data" / "scalars.json").write_text("\n".join(map(json.dumps, lines)))
    assert Run(tmp_path).train_loss() == (2.75 + 1.75) / 2
    for name in logs:
        (tmp_path / name / "vis_data" / "scalars.json").write_text(json.dumps({"mIoU": 1.0, "step": 2}))
    assert Run(tmp_path).train_loss() is None


def test_an_earlier_run_of_several_tasks_is_that_of_the_same_task(tmp_path):
    tasks = {"things": {"type": "EncoderDecoder"}, "stuff": {"type": "EncoderDecoder"}}
    Config(
        {
            "stage": "residual",
            "model": {"type": "rmoe.MultiTask", "backbone": {}, "tasks": tasks},
            "val_evaluator": {"metrics": {name: {"type": "IoUMetric"} for name in tasks}},
        }
    ).dump(tmp_path / "config.py")
    assert _earlier(tmp_path, "stuff").part == "stuff"
    with pytest.raises(UserError, match="is a run of the tasks stuff, things; say which"):
        _earlier(tmp_path, None)
    assert _earlier(finished_run(tmp_path / "alone"), "stuff").part is None


def test_norms_and_routing_get_from_an_analysis_into_a_report(runs, tmp_path, capsys):
    (log,) = runs[1].rglob("scalars.json")
    norms = [{"residual/backbone.model.layers.2.blocks.1.mlp": 0.1 * step, "step": step} for step in (1, 2, 3)]
    log.write_text(log.read_text() + "".join(json.dumps(line) + "\n" for line in norms))
    assert main(["analyze", str(runs[1]), "--images", "2"]) == 0
    assert {path.name for path in (runs[1] / "analysis").iterdir()} == {
        "analysis.json",
        *(f"{name}.png" for name in ("weights", "load", "experts", "norms")),
    }
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
    page = render(compare([Run(run) for run in runs]))
    assert page.count('<figure class="whole">') == 2
    assert 'data-chart="experts-0-1-1"' in page


@pytest.mark.parametrize(
    "gone", ["cost.json", "model.safetensors", "20260101_000000/vis_data/scalars.json", "config.py"]
)
def test_pictures_of_an_unfinished_run_are_refused(runs, tmp_path, gone):
    (runs[0] / gone).unlink()
    with pytest.raises(UserError, match="finished run|finish the run|of one run"):
        report(runs[:1], tmp_path / "out")
