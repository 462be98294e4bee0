"""A finished run is loaded from its own file, by nothing but what that names, and what is wrong is told in one line."""

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
from safetensors.torch import load_file, save_file

import rmoe
from rmoe.data.palette import palette
from rmoe.engine.checkpoint.export import MODEL, read_metadata, write_model
from rmoe.errors import UserError
from rmoe.inference.predictor import Classification
from rmoe.moe.state import global_state_dict, moe_layers
from rmoe.tasks.classification import TimmClassifier

MIXTURE = {
    "model": "swin_tiny_patch4_window7_224",
    "kwargs": {
        **{"img_size": 64, "embed_dim": 8, "depths": [1, 1, 2, 1]},
        **{"num_heads": [1, 1, 2, 2], "window_size": 4},
    },
    "num_classes": 3,
    "moe": {"num_experts": 4},
}
CONFIG = {"type": "rmoe.TimmClassifier", **MIXTURE, "core": "gone/core", "moe": {"num_experts": 4, "ep_size": 2}}
CLASSES = ("cat", "dog", "owl")
INPUTS = {"scope": "mmengine", "imports": [], "transform": {"input_size": 64, "crop_pct": 1.0}}


@pytest.fixture(scope="module")
def model() -> TimmClassifier:
    torch.manual_seed(0)
    built = TimmClassifier(**MIXTURE, allow_random_core=True).eval()
    for layer in moe_layers(built).values():
        for x in layer.parameters():
            torch.nn.init.normal_(x, std=0.1)  # no residual is zero, so that experts differ
    return built


@pytest.fixture
def run(model: TimmClassifier, tmp_path: Path) -> Path:
    folder = tmp_path / "residual"
    folder.mkdir()
    write_model(folder, global_state_dict(model), CONFIG, classes=CLASSES, inputs=INPUTS)
    return folder


def relabelled(run: Path, **changed: Any) -> Path:
    """Writes other metadata into the run's file; None removes one."""
    metadata = read_metadata(run) | changed
    texts = {key: x if isinstance(x, str) else json.dumps(x) for key, x in metadata.items() if x is not None}
    save_file(load_file(run / MODEL), run / MODEL, texts)
    return run


def test_a_run_and_its_file_are_loaded_alike(run: Path, model: TimmClassifier) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = model(torch.tensor((image / 255 - mean) / std).float().movedim(-1, 0)[None]).softmax(1)[0]
    for path in (run, run / MODEL, str(run)):
        loaded = rmoe.load(path, device="cpu")
        assert (loaded.task, loaded.classes, loaded.source) == ("classification", CLASSES, run / MODEL)
        assert loaded.palette == palette(3)
        assert not loaded.model.training
        (answer,) = loaded.predict(image)
        assert isinstance(answer, Classification)
        torch.testing.assert_close(torch.from_numpy(answer.probabilities), expected, atol=1e-5, rtol=0)


def test_a_file_of_a_mixture_whose_top_k_was_left_open(run: Path) -> None:
    """It was 1 then; what is written now says itself what it is."""
    config = read_metadata(run)["model"]
    assert (config["moe"]["top_k"], config["moe"]["rank"]) == ("all", 8)
    del config["moe"]["top_k"]
    (layer, *_) = moe_layers(rmoe.load(relabelled(run, model=config)).model).values()
    assert layer.config.experts_per_token == 1


def test_loading_draws_no_random_numbers(run: Path) -> None:
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    rmoe.load(run)
    assert torch.rand(1) == first


def test_the_best_weights_come_first(run: Path, model: TimmClassifier) -> None:
    best = {key: x + 1 if key == "model.norm.bias" else x for key, x in global_state_dict(model).items()}
    torch.save({"state_dict": best}, run / "best_accuracy_top1_iter_2.pth")
    loaded, last = rmoe.load(run), rmoe.load(run / MODEL)
    assert loaded.source.name == "best_accuracy_top1_iter_2.pth"
    assert (loaded.model.model.norm.bias - last.model.model.norm.bias).eq(1).all()
    torch.save({"state_dict": best}, run / "best_accuracy_top5_iter_1.pth")
    with pytest.raises(UserError, match=r"by several metrics: best_accuracy_top1_iter_2.pth, best_.*give the path of"):
        rmoe.load(run)
    assert rmoe.load(run / "best_accuracy_top5_iter_1.pth").source.name == "best_accuracy_top5_iter_1.pth"


def test_a_lower_precision_is_computed_in(run: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole, half = (rmoe.load(run, dtype=x).predict(image)[0].probabilities for x in (None, torch.bfloat16))
    assert not np.array_equal(whole, half)
    np.testing.assert_allclose(whole, half, atol=0.02)


def test_classifiers_need_torch_timm_and_mmengine_alone(run: Path) -> None:
    """As in an environment without the others; nor is a process group made."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("deepspeed", "mmcv", "mmseg", "mmdet")))
import numpy as np, rmoe, torch
answer, = rmoe.load({str(run)!r}).predict(np.zeros((9, 7, 3), np.uint8))
assert abs(answer.probabilities.sum() - 1) < 1e-5
assert not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rmoe": "0.2.0"}, r"written by rmoe 0\.2\.0, this is 0\.1\.0; install"),
        ({"rmoe": "1.0"}, "install that version or a later one"),
        ({"rmoe": "x"}, "written by rmoe x"),
        ({"rmoe": None}, "does not say what model it holds"),
        ({"model": None}, "does not say what model it holds"),
        ({"model": [1]}, "no config"),
        ({"model": "{"}, "cannot be read"),
        ({"initial": []}, "the backbone alone, for timm"),
        ({"model": {**CONFIG, "num_classes": 4}}, "another model's: 0 missing, 0 unexpected, 2 of another shape"),
        ({"model": {**CONFIG, "moe": None}}, "another model's: .* missing .* unexpected"),
        ({"model": {**CONFIG, "moe": {"num_experts": 5}}}, r"another model's: [1-9]\d* missing"),
        ({"model": {**CONFIG, "moe": {"expert": 5}}}, "did you mean"),
        ({"model": {"type": "MyModel"}}, "names 'MyModel', which no registry of ours or OpenMMLab's holds"),
        ({"model": {"type": "subprocess.call", "args": "true"}}, "names 'subprocess.call', which no registry"),
        ({"model": {**CONFIG, "type": 3}}, "names '3', which is no name"),
        ({"model": {}}, "the model that it describes"),
        ({"inputs": {**INPUTS, "imports": ["my_heads"]}}, "needs code of its own, the module 'my_heads'.*--import"),
        ({"inputs": {**INPUTS, "imports": ["os.path2"]}}, "needs code of its own"),
        ({"inputs": {**INPUTS, "imports": [3]}}, "needs code of its own"),
        ({"inputs": {**INPUTS, "scope": "evil"}}, "no scope"),
        ({"inputs": {"scope": "mmengine"}}, "neither a pipeline nor a transform"),
        ({"inputs": {**INPUTS, "transform": {"input_sise": 3}}}, "input_sise"),
        ({"inputs": [1]}, "no config"),
        ({"classes": [["cat"], ["dog"], ["owl"]]}, "is damaged: its classes are texts"),
        ({"palette": [[300, 0, 0]] * 3}, "its palette has a red, green and blue of 0 to 255"),
        ({"palette": [[1, 2]] * 3}, "the model that it describes"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_loaded(run: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        rmoe.load(relabelled(run, **changed))
    assert "\n" not in str(error.value)


def test_a_run_without_a_validation_set_has_a_model_alone(run: Path) -> None:
    loaded = rmoe.load(relabelled(run, inputs=None, classes=None))
    assert loaded.inputs is None
    with pytest.raises(UserError, match="the run had no validation set"):
        loaded.predict(np.zeros((4, 4, 3), np.uint8))


def test_what_is_no_run(run: Path, tmp_path: Path) -> None:
    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    (unfinished / "2026" / "vis_data").mkdir(parents=True)
    other.mkdir()
    (tmp_path / "cut.safetensors").write_bytes((run / MODEL).read_bytes()[:500])
    for path, message in {
        tmp_path / "residua": f"did you mean {run}",
        tmp_path: f"is no run, did you mean {run}",
        unfinished: "the run is not finished; let it go on by --resume",
        other: f"has no {MODEL}",
        tmp_path / "cut.safetensors": "cannot be read",
        "": "is ''",
        3: "is 3",
        "x\0": "cannot be looked for|there is no",
    }.items():
        with pytest.raises(UserError, match=message):
            rmoe.load(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", 3.5])
def test_a_device_that_is_not_there(run: Path, device: Any) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        rmoe.load(run, device=device)


def test_a_dtype_that_nobody_computes_in(run: Path) -> None:
    with pytest.raises(UserError, match="it is one of float32, bfloat16, float16"):
        rmoe.load(run, dtype="int8")
