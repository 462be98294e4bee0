"""Imports go one way, and optional parts stay where they belong."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "rmoe"
ORDER = [
    "quick_imports",
    "errors",
    "fields",
    "config",
    "registry",
    "moe",
    "backbones",
    "tasks",
    "engine",
    "inference",
    "deploy",
    "reporting",
    "pipelines",
]
ORDER += ["cli", "__init__"]  # of rmoe itself
BESIDE = {"data": ["errors", "config"], "registry": []}  # what they may import; the others may import them
MODULES = sorted(path for path in ROOT.rglob("*.py") if "configs" not in path.parts)


def imported(path: Path) -> list[str]:
    """Full names of what a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_way(path: Path) -> None:
    own = part(path)
    for name in imported(path):
        if name.startswith("rmoe."):
            other = name.split(".")[1]
            if own in BESIDE and other != own:
                assert other in BESIDE[own], f"{path} imports {name}"
            elif other not in BESIDE:
                assert ORDER.index(other) <= ORDER.index(own), f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_mmseg_and_mmdet_have_their_files(path: Path) -> None:
    homes = {"mmseg": ["tasks/segmentation.py", "tasks/heads.py"], "mmdet": ["tasks/detection.py"]}
    for name in imported(path):
        package = name.split(".")[0]
        if package in homes:
            assert str(path.relative_to(ROOT)) in homes[package], f"{path} imports {name}"
        if part(path) == "moe":
            assert package not in ("timm", "mmengine", "mmcv"), f"{path} imports {name}"


def test_the_configuration_needs_no_torch() -> None:
    code = "import sys, rmoe, rmoe.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0


def test_a_run_starts_without_transformers() -> None:
    """Which is installed here, and which mmengine and mmdet import where they can; to all others it is there.

    `import rmoe` alone, in a program of OpenMMLab's, changes nothing for it. Nor does a start print anything.
    """
    code = """
import sys, rmoe
finders = [*sys.meta_path]
import rmoe.backbones.pyramid
assert sys.meta_path == finders
rmoe.load, rmoe.Core
import rmoe.tasks.detection
assert not {"transformers", "peft"} & sys.modules.keys()
from mmdet.models.language_models import bert
assert bert.HFBertModel is None
import transformers
assert transformers.__version__
"""
    alone = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, env=alone, check=True, stdout=subprocess.PIPE)
    assert b"accelerator" not in said.stdout


def test_the_layer_and_cores_work_with_torch_and_timm_alone(tmp_path: Path) -> None:
    """As in an environment without DeepSpeed and OpenMMLab: their imports fail. Reports go to Python's logging."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("deepspeed", "mmengine", "mmcv", "mmseg", "mmdet")))
import copy, logging, pickle, timm, torch, rmoe
from pathlib import Path
from rmoe.backbones.build import add_weights, import_core, timm_model
from rmoe.backbones.load_core import load_core

model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
model, report = rmoe.upcycle(model, rmoe.ResidualMoEConfig(num_experts=4))
images = torch.randn(2, 3, 32, 32)
with rmoe.collect() as records:
    loss = model(images).sum()
(loss + records.loss()).backward()
again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
assert torch.equal(again.eval()(images), model.eval()(images))

folder = Path({str(tmp_path)!r})
logging.basicConfig(filename=folder / "log", level=logging.INFO)
dense, again, mixture = (timm_model("test_vit", dict(num_classes=3)).eval() for _ in range(3))
torch.save(dense.state_dict(), folder / "core.pth")
assert import_core(folder / "core.pth", "test_vit", folder / "core.safetensors").loaded == len(dense.state_dict())
assert load_core(again, folder / "core.safetensors").loaded == len(dense.state_dict())
add_weights(mixture, folder / "core.safetensors", dict(num_experts=2, blocks="all"))
images = torch.randn(1, 3, 160, 160)
assert torch.equal(again(images), dense(images))
torch.testing.assert_close(mixture(images), dense(images))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0
    log = (tmp_path / "log").read_text()
    assert "weights loaded" in log
    assert "feed-forward networks became MoE" in log
