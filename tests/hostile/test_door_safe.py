"""Under --safe-config, and with foreign weights anywhere, nothing that a file brings along is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import mmengine.registry.registry as lookup
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.fileio.handlers import file_handlers
from mmengine.model import initialize
from mmengine.registry import DATASETS, MODELS
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn

from rmoe.config import ResidualMoEConfig
from rmoe.engine import safe_config
from rmoe.engine.building import user_errors
from rmoe.engine.calibration import check_calibration
from rmoe.engine.read_config import read_config
from rmoe.errors import UserError
from rmoe.inference.load import build_model


class Touch:
    """A pickle that leaves a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process under --safe-config, until the test ends."""
    for owner, name in ((lookup, "get_object_from_string"), (lookup, "import_module"), (np, "load")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    for name in ("fromfile", "_file2dict"):
        monkeypatch.setattr(Config, name, Config.__dict__[name])
    for name in ("pickle", "pkl", "yaml", "yml"):
        handler = file_handlers[name]
        monkeypatch.setattr(handler, "load_from_fileobj", handler.load_from_fileobj)
    safe_config.lock_down()


SAFE_YAML: list[tuple[str, str]] = [
    ("model: {type: mmengine.call_command, cmd: [touch, x]}", "names 'mmengine.call_command'"),
    ("model: {type: mmengine.load, file: x.json}", "names 'mmengine.load'"),
    ("model: {type: mmengine.model.BaseModel}", "no registry"),
    ("model: {type: torch.nn.Linear}", "no registry"),
    ("model: {type: TimmClassifier, teacher_config: x.py}", "names 'x.py', a config"),
    ("model: {type: os.system}", "no registry"),
    ("model: {type: rmoe.engine.cost.counted_flops}", "no registry"),
    ("model: {type: rmoe.engine.hooks.CostHook.__init__}", "no registry"),
    ("model: {type: builtins.eval}", "no registry"),
    ("model: {type: eval}", "no registry"),
    ("model: {type: __import__('os').system('x')}", "no registry"),
    ("model: {type: 3}", "names '3'"),
    ("model: {type: [a]}", "no registry|names"),
    ("model: {type: true}", "names 'True'"),
    ("custom_hooks: [{type: RFSearchHook}]", "evaluates strings"),
    ("model: {a: {type: mmdet.CameraMotionCompensation}}", "evaluates strings"),
    ("custom_hooks: [{type: EMAHook, ema_type: os.system}]", "names 'os.system'"),
    ("a: !!pairs [{type: subprocess.Popen}]", "tag"),
    ("a: !!omap [{type: subprocess.Popen}]", "tag"),
    ("a: !!set {type}", "tag"),
    ("a: !!binary aGVsbG8=", "tag"),
    ("a: !!python/tuple [1, 2]", "tag.*dump it as JSON"),
    ("a: !!python/name:os.system", "tag"),
    ("a: !local {b: 1}", "tag"),
    ("a: 2024-01-01", "timestamp"),
    ("a: &x [1]\nb: *x", "anchor or alias"),
    ("a: &a [*a]", "anchor or alias"),
    ("a: &a {b: 1}\nc: {<<: *a}", "anchor or alias"),
    ("<<: {a: 1}", "merge"),
    ("a: &a [l]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]", "anchor or alias"),
    ("a: 1\na: 2", "'a' stands there twice"),
    ("1: a", "no string"),
    ("null: a", "no string"),
    ("[a]: b", "no string"),
    ("a: .nan", "not a number"),
    ("a: 1\n---\nb: 2", "several documents"),
    ("- a", "must hold all keys"),
    ("", "must hold all keys"),
    ("{", "cannot be read"),
    ("a: " + "[" * 100 + "]" * 100, "levels"),
    ("a: " + "{b: " * 100 + "1" + "}" * 100, "levels"),
    ("a: " + "x" * 2**22, "bytes"),
    ("_base_: x.py", "without _base_"),
    ("custom_imports: {imports: os}", "names 'os'"),
    ("custom_imports: {imports: [3]}", "names '3'"),
    ("custom_imports: evil", "names 'evil'"),
    ("custom_imports: {imports: rmoe.engine.launch}", "neither ours nor OpenMMLab's"),
    ("default_scope: evil", "no scope"),
    ("a: {_scope_: evil}", "no scope"),
    ("a: {ann_file: x.pkl}", "a pickle"),
    ("a: {file: /tmp/X.PICKLE}", "a pickle"),
    ("a: {file_format: pkl}", "a pickle"),
    ("a: {decode_backend: pickle}", "a pickle"),
    ("env_cfg: {mp_cfg: {mp_start_method: spawn}}", "must be 'fork'"),
    ("train_dataloader: {multiprocessing_context: spawn}", "must be 'fork'"),
    ("a: {backend_args: {backend: memcached, sys_path: /tmp}}", "sys_path"),
]


@pytest.mark.parametrize(("text", "message"), SAFE_YAML, ids=lambda x: x[:50])
def test_a_safe_config_is_plain_and_known(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "x.yaml", {}, safe=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {"type": "mmengine.call_command", "cmd": ["touch", "x"]}}', "mmengine.call_command"),
        ('{"a": [[{"type": "subprocess.Popen"}]]}', "subprocess.Popen"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "levels"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "levels"),
        ("[]", "must hold all keys"),
        ("{", "cannot be read as JSON"),
    ],
    ids=lambda x: x[:40],
)
def test_a_safe_json(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "x.json", {}, safe=True)


def test_numbers_of_a_safe_json_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"lr": 1e-05}')
    assert read_config(tmp_path / "x.json", {}, safe=True).lr == 1e-5


def test_under_safe_no_import_string_is_looked_up(locked: None, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="registry"):
        MODELS.build({"type": "mmengine.utils.call_command", "cmd": ["touch", str(tmp_path / "x")]})
    with pytest.raises(KeyError):
        DATASETS.build({"type": "evil.Thing"})
    with pytest.raises(KeyError):
        MODELS.build({"type": "torch.nn.Linear", "in_features": 1, "out_features": 1})


def test_under_safe_no_pickle_is_read(locked: None, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    for name in ("pkl", "pickle", None):
        with pytest.raises(UserError, match="read as a pickle"):
            load(tmp_path / "x.pkl", file_format=name)
    with (tmp_path / "x.npy").open("wb") as file:
        np.save(file, np.array([Touch(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "x.npy", allow_pickle=True)
    (tmp_path / "x.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]")
    with pytest.raises(Exception, match="could not determine a constructor"):
        load(tmp_path / "x.yaml")
    assert not (tmp_path / "ran").exists()


def test_foreign_weights_are_only_weights(tmp_path: Path) -> None:
    path, ran = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"state_dict": {"weight": Touch(ran)}}, path)
    with pytest.raises(UserError, match=r"evil\.pth.*Python objects.*state dict"):
        load_checkpoint(nn.Linear(1, 1), str(path))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    initialise = {"type": "Pretrained", "checkpoint": str(path)}
    with pytest.raises(UserError, match=r"evil\.pth"), user_errors("model"):
        initialize(nn.Linear(1, 1), initialise)
    assert not ran.exists()


def test_a_safe_config_may_calibrate(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"calibrate": {"batches": 2, "confidence": 0.6}}')
    config = read_config(tmp_path / "x.json", {}, safe=True)
    check_calibration(config.calibrate, [ResidualMoEConfig()])
    (tmp_path / "x.json").write_text('{"calibrate": {"type": "os.system"}}')
    with pytest.raises(UserError, match=r"no registry"):
        read_config(tmp_path / "x.json", {}, safe=True)


@pytest.mark.parametrize("name", ["teacher.py", "teacher.json"])
def test_no_other_config_is_run_while_a_model_is_built(locked: None, tmp_path: Path, name: str) -> None:
    """As mmdet's detectors with a teacher do, which read its config from a file."""
    (tmp_path / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "teacher.json").write_text('{"custom_imports": {"imports": ["x"]}}')
    (tmp_path / "teacher.py").write_text((tmp_path / "x.py").read_text())
    with pytest.raises(UserError, match=f"--safe-config: .*{name} is read as a config"):
        Config.fromfile(str(tmp_path / name))
    with pytest.raises(UserError, match="is read as a config"):
        Config.fromstring((tmp_path / name).read_text(), Path(name).suffix)
    assert not (tmp_path / "ran").exists()


def test_the_description_of_a_model_names_no_config(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    model = {"type": "mmdet.KnowledgeDistillationSingleStageDetector", "teacher_config": str(tmp_path / "x.py")}
    with pytest.raises(UserError, match=r"here names .*x.py', a config \(teacher_config\), which would be run"):
        build_model({"model": model, "inputs": {"scope": "mmdet"}}, Path("here"))
    assert not (tmp_path / "ran").exists()
